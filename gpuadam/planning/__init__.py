r"""What a step of Adam needs in every memory, and how long it takes, before a machine is rented.

On the command line:

    python -m gpuadam plan --parameters 70B --param-dtype bfloat16 \
        --master remainder --gpu h100 --world 64 --model-parallel auto

This lists the ways to make a step: in memory, sharded, offloaded, in files. For each way it says how many bytes of every
memory the step needs, how long the step should take, whether it fits, and which way is best. `--plot FILE` draws time and
memory, up to 100,000 GPUs and 10^13 parameters. `--measure` puts this machine's measured rates in the place of data sheets.
A plan is made for at most 10^18 parameters on at most 10,000,000 devices.

In Python:

>>> from gpuadam import planning
>>> update = planning.update(2**33, "bfloat16", master="remainder")
>>> settings = planning.Settings(world=8)
>>> predictions = planning.plan(update, planning.MACHINES["h100"], settings)
>>> [(p.way.name, p.device_bytes >> 30) for p in predictions[:1] + predictions[5:6]]
[('in memory', 112), ('sharded, in memory', 78)]
>>> planning.best(predictions).way.name
'sharded, host memory, device updates'

The numbers in the first result are GiB. `update` says how many numbers are updated, and in which formats. A `Machine` is a
node of a cluster of equal nodes: one of `MACHINES`, or one with figures of your own. `Settings` has the number of devices
and what a step may take of each. `plan` returns a `Prediction` for each `Way` of making the step: the state in the device's
memory, in the host's or in files; each rank with all of the state, or sharded; updated on the device or on the host. `best`
picks the fastest that fits.

## How good the predictions are

**Bytes are exact.** They follow from the operands that the kernels are built from. Of a sharded step they are those of the
rank that has most, so that no rank needs more.

**Seconds are predictions.** On GPUs they follow from data sheets: they say what can be hoped for, and none has been measured
yet. On a virtual machine with two cores, Zen 3 of `gpuadam.guide.how_fast`, predictions were compared with measurements
(`benchmarks/plan.py`). Steps over ranks were not among them:

| step | prediction, from the measured time |
|---|---|
| in memory, nine formats and three sizes | within 18 %; of 27 steps 23 within 10 % |
| with state in files, two sizes | within 1 % |

The worst are of bfloat16. There the conversions take as long as the bytes. The model assumes that the slower of the two
hides the other; the processor hides it only in part. `gpuadam.planning.model` has the formulas and what they leave out.

## The ways

**Sharded.** This is ZeRO's stage 1 (Rajbhandari et al. 2020; `gpuadam.sharded`): each rank has all parameters and gradients
of its piece of the model, and the state of its share. Gradients are reduce-scattered, in float32 or wider, and parameters
all-gathered, in buckets. Without sharding gradients are all-reduced before the update.

**Offloaded.** State outside the device goes through the device once in each direction (update on the device), or gradients
and parameters go to the host and back (update on the host), over PCIe. State in files goes to the disk and back too. All
devices of a node share its host's memory and its disk. ZeRO-Offload (Ren et al. 2021) updates on the host; ZeRO-Infinity
(Rajbhandari et al. 2021) has files too. `gpuadam.offload` makes such steps. No class of gpuadam makes steps that are both
sharded and offloaded.

**Model parallelism** cuts every parameter into pieces. The pieces lie in neighbouring devices, so that the ranks that share
a piece are as far apart as there are pieces (as in Megatron-LM; Narayanan et al. 2021). Its cost in the forward and backward
pass is not counted.
"""

from .machines import MACHINES, Link, Machine, Processor
from .model import Update, update
from .prediction import Prediction, Settings, Way, best, plan, ways

__all__ = ["MACHINES", "Link", "Machine", "Processor", "Update", "update"]
__all__ += ["Prediction", "Settings", "Way", "best", "plan", "ways"]
