"""How ranks exchange data: over MPI, NCCL or torch's process groups, or, with one rank, not at all.

A rank is a process. Start one for each GPU, or for each part of a CPU, by `mpiexec -n 4 python -m mpi4py script.py`. There
`-m mpi4py` ends all ranks when one raises before it has made its transport, or exits with a status that is not 0. mpiexec ends
them when one is killed. Each rank makes its transport, and its optimizer with it, in the same order. A transport imports its
library when it is made. What becomes of the others when a rank ends or is missing: `gpuadam.sharded`.

| transport | memory | ranks are started by | needs |
|---|---|---|---|
| `MPI(comm=None, timeout=None)` | CPU | mpiexec | mpi4py, in the extra `mpi` |
| `NCCL(comm=None, timeout=None)` | CUDA | mpiexec | CuPy, NCCL, and mpi4py |
| `Torch(group=None)` | CPU or CUDA, as its backend | torchrun | torch, and CuPy on GPUs |
| `Local()` | any | one process | nothing |

A transport of your own is any object with the attributes and methods of `Transport`: `rank`, `size`, `memory`, and

| method | effect |
|---|---|
| `reduce_scatter(buffer, part) -> Work` | store in part the sum over all ranks of the rank-th part of their buffers |
| `all_gather(buffer) -> Work` | fill the buffer, whose rank-th part is there, with the parts of the other ranks |
| `broadcast(buffer)` | make the buffer that of rank 0 |
| `exchange(item) -> list` | return the items of all ranks, in the order of the ranks |

The first two start a collective, and `wait()` of their Work returns when it is done. `Work()` is that of a collective which
was done when its call returned, as with `Local`; `Work(wait)` calls a function of yours. A rank that waits in vain raises an
error in one of these methods.
"""

from .local import Local
from .mpi import MPI
from .nccl import NCCL
from .protocol import Calls, RankEnded, RankMissing, Transport, Work, check
from .torch import Torch

__all__ = ["MPI", "NCCL", "Calls", "Local", "RankEnded", "RankMissing", "Torch", "Transport", "Work", "check"]
