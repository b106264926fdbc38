"""Adam over many ranks: each data-parallel rank keeps and updates a part of the state. (Rajbhandari et al. 2020, ZeRO stage 1)

A rank is a process with its own part of the data and a copy of the parameters. With `Adam` on every rank, all ranks would
keep the same m and v, and make the same update. `gpuadam.ShardedAdam` and `gpuadam.ShardedAdamW` divide both: with N ranks,
each rank keeps 1/N of the state and makes 1/N of the update.

A step sums the gradients of all ranks, each element on the rank that owns its state (a reduce-scatter). It updates the
element there, and collects the new parameters on all ranks (an all-gather). This is done in buckets: while one bucket is
updated, others are summed or collected.

## How to start ranks

A program is started once for each rank, by the command of its transport.

| transport | command |
|---|---|
| `transports.MPI()` on CPUs, `transports.NCCL()` on GPUs | `mpiexec -n 4 python -m mpi4py train.py` |
| `transports.Torch()`, after `torch.distributed.init_process_group` | `torchrun --nproc-per-node 4 train.py` |
| `transports.Local()`: one rank, for tests | `python train.py` |

`pip install "gpuadam[mpi]"` brings mpi4py and MPICH. NCCL is used through CuPy. `gpuadam.sharded.transports`, which is also
`gpuadam.transports`, says what each transport needs, and how to write another one.

## A complete example

The ranks fit a line, each to its own part of the points. With `MPI()` in the place of `Local()`, any number of ranks can run
this program:

>>> import numpy as np, gpuadam
>>> transport = gpuadam.transports.Local()
>>> x = np.linspace(-1, 1, 1000, dtype="float32")[transport.rank :: transport.size]
>>> y = 3 * x + 1
>>> line = {"slope": np.zeros((), "float32"), "offset": np.zeros((), "float32")}
>>> opt = gpuadam.ShardedAdam(line, transport, lr=0.05)
>>> for _ in range(200):
...     error = line["slope"] * x + line["offset"] - y
...     grads = {"slope": (error * x).mean(), "offset": error.mean()}
...     opt.step({name: np.array(grad) for name, grad in grads.items()})
>>> if transport.rank == 0:
...     print(line["slope"].round(2), line["offset"].round(2))
3.0 1.0

`python -m gpuadam.examples sharded_digits` is a whole program. It continues from a checkpoint with any other number of
ranks.

## The bits

After every step all ranks have the same bits of parameters: those of `Adam` for the same sums of gradients. Only the
rounding of these sums depends on the number of ranks. Where the sums are exact, parameters and state have the same bits for
any number of ranks. The norm for clipping, random rounding and 8-bit state never depend on the number of ranks.

`transports.MPI` adds the gradients in the order of the ranks. So its sums depend neither on the library of MPI, nor on
`bucket_bytes`, nor on which rank owns an element. The order of other transports is that of NCCL and of torch.

## Errors

Arguments are checked on each rank, and compared between ranks, before a byte is written. Whatever differs (parameters,
options, gradients) is named on all ranks. An error on one rank is raised on all of them, so that no rank waits for ever.
Values are compared, and not their types: 1 and 1.0 are equal, a list and a tuple, and NumPy's numbers and Python's.

A step that is cut short, as by Ctrl-C between two collectives, may leave parameters and state of different steps on its rank.
There every later call over the transport raises ValueError: start all ranks again from a checkpoint. The calls of several
threads over a transport wait for one another, and have to come in the same order on all ranks.

## When a rank ends or is missing

Each rank has to take as many steps as the others. With uneven batches one ends before them:

| what happens to a rank | the others, with `MPI` and `NCCL` |
|---|---|
| it ends normally, or calls `transport.close()` | raise `transports.RankEnded` in their next call, before anything is written |
| it raises what nobody handles | are ended, because the rank calls Abort |
| it ends amid a call, or after one that was cut short | are ended likewise |
| it is killed, or calls `os._exit` | are ended by mpiexec |
| it is stopped, busy, or dead without mpiexec's notice | raise `transports.RankMissing`, with its number, after the timeout |

Without `timeout=` they wait for ever in the last case. A program that catches RankMissing can report it, but no longer use the
transport: the job ends as soon as the program does. With `Torch` the errors and timeouts are torch's.

## Checkpoints

All ranks call `opt.save(folder)`, and each writes the state that it owns. Both ways to continue have the bits of an
optimizer that was never stopped:

* `gpuadam.load_sharded(folder, params, transport)` continues on any number of ranks. It also loads what a single `Adam`
  saved.
* `gpuadam.load(folder, params)` continues with a single `Adam`.

If a rank is killed, at any moment, the folder holds the old checkpoint or the new one. `gpuadam.checkpoint` describes the
files.

**Shown:** saved by 4 ranks, loaded by 1, 2, 3, 8 and by a single `Adam`: the next ten steps have the same bits. One of 4
ranks is killed in the middle of a save.

## Speed

A step over MPI, for 20 million float32 elements, in milliseconds (`benchmarks/sharded.py`). The machines have two cores, and
are those of `gpuadam.guide.how_fast`. Each rank has one thread. A single `Adam` with one thread takes 11 ms on Zen 4 and 21 on
Emerald Rapids.

| ranks | 1 | 2 | 4 |
|---|---:|---:|---:|
| Zen 4, arrays, as in the example above | 38 | 66 | 111 |
| Zen 4, views | 21 | 34 | 39 |
| Emerald Rapids, arrays, as in the example above | 67 | 61 | 118 |
| Emerald Rapids, views | 33 | 31 | 60 |

**Views.** With `ShardedAdam(..., views=True)` the parameters in `opt.params` are views of one buffer, and the arrays that were
given are left as they are. Gradients that are written into the arrays of `opt.grads` lie in their places. Then a step copies
nothing. In the example each step copies parameters and gradients into the buffers, and the parameters back.

Ranks on one machine share its memory, so there is little to gain from them there: with views two ranks take 0.94 of the time of
one on Emerald Rapids, and 1.6 times as long on Zen 4. Of the 34 ms on Zen 4 12 are the update, 12 the reduce-scatter and 8 the
all-gather. Each rank sends 1.0002 times the least number of bytes. On Zen 4 the reduce-scatter takes 0.23 times as long as
MPICH's own between two ranks, and 0.62 times between four (`benchmarks/collectives.py`). Where a container forbids that
processes read one another's memory (CMA), collectives between its ranks take 4 to 7 times as long, for 20 million elements.

## The files

From the bottom: `layout` says which rank owns which elements; `transports` move arrays between ranks; `agreement` compares
ranks; `buffer` has parameters and gradients in a row, and `shard_adam` updates this rank's part of them; `norm` and `checks` are
those of a step; `saving` writes a checkpoint; `optimizer` puts them together; `loading` makes an optimizer from a
checkpoint.
"""
