"""Which options go together.

`Adam` and `AdamW` have all options of this table but `master="float32"`, which `OffloadAdam` alone has. "no" is an option that a
class does not have. `array` has the parameter's shape, and `rows` a number for each row.

| option | `NAdam` | `RAdam` | `AdaMax` | `OffloadAdam` | `ShardedAdam` | `gpuadam.torch` | `adam_step` |
|---|---|---|---|---|---|---|---|
| `amsgrad=True` | no | no | no | | | | |
| `state_dtype="8bit"` | | | no | | | | |
| `master="remainder"` | | | | | | | |
| `master="float32"` | no | no | no | | no | no | no |
| `stochastic_rounding=True` | | | | | | | |
| `formula="optax"` | | no | no | | | no | |
| `formula="eps-hat"` | no | no | no | | | no | |
| `eps_root=1e-8` | no | no | no | | | no | |
| `param_copies=array` | | | | | no | no | |
| `ema_decay=0.99` | | | | | | no | |
| `zero_grad=True` | | | | | | no | |
| `maximize=True` | | | | | | | |
| `weight_decay=0.01` | | | | | | | |
| `clip_value=1.0` | | | | | | no | |
| `bounds=(0, 1)` | | | | | | no | |
| `bounds=(array, None)` | | | | no | no | no | |
| `complex="joint"` | | | | | | no | |
| `complex="parts"` | | | | | | no | |
| `components=2` | | | | | | no | |
| `components=3` | | | | | no | no | |
| `lr_scale=array` | | | | no | no | no | |
| `lr_scale=rows` | | | | no | no | no | |
| `where=array` | | | | no | no | no | |
| `change=array` | | | | no | no | no | |
| `norms=True` | | | | no | no | no | no |
| `grad_scale=0.5` | | | | | | no | |
| `max_norm=1.0` | | | | | | no | no |
| `check_finite=True` | | | | | | no | no |
| `found_inf=0.0` | | | | | | no | no |
| `capturable=True` | no | | | no | no | | no |

`gpuadam.torch` takes complex parameters without an option, as "parts"; `GradScaler` gives it the scale of gradients. `adam_step`
has arrays in the place of some options: `max_v`, `m_scale` and `v_scale`, `remainder`, `param_copy`, `ema`. `replace`, `add` and
`remove` are methods of `Adam` and its family.

| option | does not go with |
|---|---|
| `state_dtype="8bit"` | `amsgrad=True`, `complex="joint"`, `components=2`, `where=array`, `lr_scale=rows` |
| `stochastic_rounding=True` | `master="remainder"`, `master="float32"` |
| `param_copies=array` | `master="float32"` |
| `change=array` | `master="remainder"`, `param_copies=array`, `ema_decay=0.99` |
| `complex="joint"` | `clip_value=1.0`, `bounds=(0, 1)`, `bounds=(array, None)` |

| option | needs |
|---|---|
| `state_dtype="8bit"` | C-contiguous parameters of 16 or 32 bits; `replace` then takes rows of a multiple of 32 elements |
| `master="remainder"` | bfloat16 parameters; other parameters stay as they are |
| `master="float32"`, `stochastic_rounding` | bfloat16 or float16 parameters; other parameters stay as they are |
| `eps_root` | `formula="optax"` |
| `complex`; `components` | complex parameters; real ones. `gpuadam.foreign_state` takes neither `"joint"` nor `components` |
| `norms` | parameters that are all on one device |
| `max_norm` on a GPU | all arrays of a group on one device; not `NAdam` |
| `check_finite`, and `found_inf` as an array, on a GPU | `capturable=True` |
| `capturable` | groups whose parameters have the same kinds of state |
| `bounds` that are arrays | to be given again with each checkpoint, which does not hold them |

What does not go together raises ValueError, or TypeError, as Python does of an argument that a class does not have. The first two
tables are tested cell by cell.

>>> import numpy as np, gpuadam
>>> gpuadam.Adam(np.zeros(3, "float32"), state_dtype="8bit", amsgrad=True)
Traceback (most recent call last):
    ...
ValueError: 8-bit state has no max_v...

`gpuadam.guide.narrow_numbers` explains the formats, `gpuadam.guide.whole_step` the options of a step, and
`gpuadam.guide.how_exact` what `formula` and the family of Adam compute.
"""
