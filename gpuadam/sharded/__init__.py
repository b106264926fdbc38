"""Many ranks: each keeps and updates a part of Adam's state, for data-parallel training.   (Rajbhandari et al. 2020, ZeRO)

A rank is a process with its own part of the data and a copy of the parameters. With `Adam` on every rank, all of them would keep
the same m and v, and make the same update. `ShardedAdam` divides both: with N ranks, each has 1/N of the state, and makes 1/N of
the update. A step sums the gradients of all ranks, each element on the rank that owns it (a reduce-scatter), updates the elements
there, and collects the new parameters on all ranks (an all-gather).

**How to start ranks.** A program is started once for each rank, by the command of its transport:

    mpiexec -n 4 python -m mpi4py train.py      transports.MPI() on CPUs, transports.NCCL() on GPUs
    torchrun --nproc-per-node 4 train.py        transports.Torch(), after torch.distributed.init_process_group

Tests and programs of one rank use `transports.Local()`. `gpuadam.transports` says what each transport needs, and how to write
another one.

**A complete example.** The ranks fit a line, each to its own part of the points. With `MPI()` in the place of `Local()`, any
number of ranks can run this program:

>>> import numpy as np, gpuadam
>>> transport = gpuadam.transports.Local()
>>> x = np.linspace(-1, 1, 1000, dtype="float32")[transport.rank :: transport.size]
>>> y = 3 * x + 1
>>> line = {"slope": np.zeros((), "float32"), "offset": np.zeros((), "float32")}
>>> opt = gpuadam.ShardedAdam(line, transport, lr=0.05)
>>> for _ in range(200):
...     error = line["slope"] * x + line["offset"] - y
...     opt.step({"slope": np.array((error * x).mean()), "offset": np.array(error.mean())})
>>> if transport.rank == 0:
...     print(line["slope"].round(2), line["offset"].round(2))
3.0 1.0

**What is exact.** After every step all ranks have the same bits of parameters. They are the bits of `Adam` for the summed
gradients. The only thing that depends on the number of ranks is how these sums are rounded: where they are exact, parameters and
state are the same for any number. The norm for clipping, random rounding and 8-bit state never depend on it.

**Checkpoints.** All ranks call `save(folder)`, and each writes its own part. `gpuadam.load_sharded(folder, params, transport)`
goes on from the checkpoint on any number of ranks, and `gpuadam.load(folder, params)` in a single `Adam`. Both have the bits of
an optimizer that was never stopped. A save that is killed leaves the checkpoint before it.

**Errors.** Arguments are checked on each rank, and compared between ranks, before anything is written. An error on one rank is
raised on all of them, so that none waits for ever.

The files, from the bottom: `layout` says which rank owns which elements; `transports` move arrays between ranks; `agreement`
compares ranks; `buffer` has parameters and gradients in a row, and `adam` updates this rank's part of them; `norm` and `checks`
are those of a step; `optimizer` puts them together.
"""
