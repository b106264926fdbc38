"""Offloading: state that is larger than the device's memory, or than the machine's.

`gpuadam.OffloadAdam(params, state="./folder", budget=10**9)` is `Adam` whose moments lie in files. By default they lie in the
host's memory, `state="memory"`, which is pinned if a GPU takes part, and the budget is 256 MiB. With `master="float32"` the
master parameters lie with the moments. A step takes the state through memory of a fixed budget, in chunks. The result has the
same bits as that of `gpuadam.Adam`. Parameters and gradients may be `np.memmap`.

## Where the update runs

| state | parameters | the update runs | moved in each step |
|---|---|---|---|
| `"memory"`, pinned | on a GPU | on the GPU, `update="device"` | state to the GPU and back |
| `"memory"`, pinned | on a GPU | on the host, `update="host"` | gradients to the host, parameters to the GPU |
| a folder of files | on a GPU | on either | as above, and state from the disk and back |
| a folder of files | on the host or in files | on the host | state from the disk and back |

With `update="auto"`, the default, and parameters on a GPU, both ways are measured once, and the faster is taken.
`opt.describe()` says which one, and why.

## Memory

Beside the arrays that stay where they are, a step holds at most `budget` bytes of mapped files and copies on the host, and
as many on the GPU. Where parameters and state in files fit in the budget, beside the chunks under way, their pages stay in the
process's memory between steps, as if they were ordinary arrays.

State takes 8 bytes an element (m and v in float32), 4 with `state_dtype="bfloat16"`, 2.25 with `"8bit"`, and 4 more with
`master="float32"`.

## Speed

The slowest of PCIe, the disk and the update decides, because copies and updates of different chunks overlap. An update on
the GPU moves the float32 state of an element, 8 bytes, in each direction. An update on the host moves 4: the gradient down
and the parameter up.

The limit is the time of moving the same bytes of the same files without arithmetic (`benchmarks/offload.py`). The machines have
two cores, and are those of `gpuadam.guide.how_fast`:

| machine | state in files | a step | times the limit |
|---|---|---|---:|
| Zen 3 | 8 GB, with a budget of 1 GB | 2.01 s, and 67 MB of memory | 1.10 |
| Emerald Rapids | the same | 2.38 s, and 67 MB of memory | 1.01 |
| Zen 4 | 2 GB, which the system's cache holds | 0.18 s, and 67 MB of memory | 1.04 |
| Zen 4 | 2 GB, with a budget of 4 GB | 0.12 s, and 2.3 GB of memory | 1.01 |

The limit includes the system's work on pages, which is half of a step's processor time: ext4 notes each block that will be
written. It goes where parameters and state fit in the budget, because their pages then stay. `python -m gpuadam plan` predicts
the time of a step: `gpuadam.planning`.

## An example

Parameters and state in files, trained, closed and continued:

>>> import pathlib, tempfile
>>> import numpy as np, gpuadam
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> w = np.memmap(folder / "w", "float32", "w+", shape=(1000, 100))
>>> def train(steps):
...     with gpuadam.OffloadAdam({"w": w}, lr=0.1, state=folder / "state", budget=10**6, update="host") as opt:
...         for _ in range(steps):
...             grads = {"w": w - 1}  # your backward pass
...             opt.step(grads)
...     return opt.steps
>>> train(2), train(3)  # the second goes on where the first was closed
(2, 5)
>>> sorted(path.name for path in (folder / "state").iterdir())
['lock', 'm', 'state.json', 'steps.json', 'v']

## What happens on a crash

State is changed in place. A step that is cut short leaves parameters and state of two different steps. The optimizer and the
folder notice that, and refuse to go on with an error that says what to do:

* *An error of the disk, or Ctrl-C, during a step*: this optimizer takes no other step until `load_state_dict` has set all of
  the state. Set the parameters to those of the same checkpoint.
* *The process is killed during a step*: the folder cannot be opened again. Delete it, make the optimizer anew and load a
  checkpoint.
* *The process is killed between two steps*: the folder is continued.
* *The machine stops*: the folder is continued if no step was taken since `flush()` or `close()`, which wait for the disk.
  Otherwise it is refused, because some of the last changes may be missing.
* *The disk is full*: the constructor says so, and takes all the room that is needed. A step needs no more.

So take checkpoints, `opt.save(path, with_params=True)`, as often as you can afford to lose the steps between.

## Checkpoints

`opt.save(path)` writes the file that `Adam` or `AdamW` with the same options would write, so `gpuadam.load(path, params)` makes
one of these of it. `gpuadam.load_offload(path, params, state=folder)` makes an OffloadAdam, of such a file or of one of Adam's.
Training goes on bit for bit on either way, on any backend.

With `master="float32"` the file has the masters in the place of the parameters, whose exact values they are: it is the file of an
Adam of float32 parameters with copies. `gpuadam.load(path, float32_arrays, param_copies=narrow_arrays, with_params=True)` makes
that Adam, and `gpuadam.load_offload(path, narrow_arrays, master="float32")` the OffloadAdam.

## The files

For those who change this package: `optimizer.py` is `OffloadAdam`. `state.py` holds state in memory, `folder.py` in files
that say whether they can be relied on. `jobs.py` checks the arrays of a step. `chunks.py` cuts them into *chunks*: pieces of
one or more parameters that fit in a part of the budget. `runner.py` gives each chunk a slot, and takes it through the stages
*fetch*, *update* and *store*, several chunks at once by `pipeline.py`. `mapped.py` is memory that is a file. `loading.py` makes
an OffloadAdam of a checkpoint.
"""

from .optimizer import OffloadAdam

__all__ = ["OffloadAdam"]
