"""What a step of Adam needs in every memory, and how long it takes, on up to 10,000,000 devices that need not be there.

    python -m gpuadam plan --parameters 70B --param-dtype bfloat16 --master remainder --gpu h100 --world 64 --model-parallel auto

does on the command line what this package does in Python:

>>> from gpuadam import planning
>>> update = planning.update(2**33, "bfloat16", master="remainder")
>>> predictions = planning.plan(update, planning.MACHINES["h100"], planning.Settings(world=8))
>>> [(p.way.name, p.device_bytes >> 30) for p in predictions[:1] + predictions[5:6]]  # GiB
[('in memory', 112), ('sharded, in memory', 78)]
>>> planning.best(predictions).way.name
'sharded, host memory, device updates'

`update` says how many numbers are updated, and in which formats. A `Machine` is a node of a cluster of equal nodes, either one of
`MACHINES` or one with figures of your own. `Settings` has the number of devices and what a step may take of each. `plan` returns
a `Prediction` for each `Way` of making the step: the state in the device's memory, in the host's or in files; each rank with all
of it, or sharded; updated on the device or on the host. `best` picks the fastest that fits.

**Bytes are exact.** They follow from the operands that the kernels are built from. Of a sharded step they are those of the rank
that has most.

**Seconds are predictions.** On GPUs they follow from data sheets: they say what can be hoped for, and have not been compared with
measurements. Rates that were measured (`plan --measure`) can take the place of the data sheets'. `benchmarks/plan.py` compares
predictions with measurements on a CPU, and `gpuadam.planning.model` has the formulas and what they leave out.

**Ways.** Sharding is ZeRO's stage 1 (Rajbhandari et al. 2020): each rank has all parameters and gradients of its piece of the
model, and the state of its share. Gradients are reduce-scattered, in float32 or wider, and parameters all-gathered, in buckets.
Without sharding gradients are all-reduced before the update.

State outside the device goes through it once in each direction (update on the device), or gradients and parameters go to the host
and back (update on the host), over PCIe. State in files goes to the disk and back too. All devices of a node share its host's
memory and its disk. (ZeRO-Offload, Ren et al. 2021, updates on the host; ZeRO-Infinity, Rajbhandari et al. 2021, has files too.)

Model parallelism cuts every parameter into pieces. The pieces lie in neighbouring devices, so that the ranks that share a piece
are as far apart (as in Megatron-LM; Narayanan et al. 2021). Its cost in the forward and backward pass is not counted.
"""

from .machines import MACHINES, Link, Machine, Processor
from .model import Update, update
from .prediction import Prediction, Settings, Way, best, plan, ways

__all__ = ["MACHINES", "Link", "Machine", "Processor", "Update", "update"]
__all__ += ["Prediction", "Settings", "Way", "best", "plan", "ways"]
