"""Which options go together.

| option | goes with | does not go with |
|---|---|---|
| `amsgrad` | every state but 8 bits | NAdam, RAdam, AdaMax |
| `state_dtype="8bit"` | C-contiguous parameters of 16 or 32 bits | float64, `amsgrad`, AdaMax |
| `master="remainder"` | bfloat16 parameters; other parameters stay as they are | `stochastic_rounding` |
| `stochastic_rounding` | bfloat16 and float16 parameters; others stay as they are | `master` |
| `formula` | every state and option of Adam and AdamW; of NAdam `"optax"`, without `eps_root` | RAdam, AdaMax |
| `param_copies`, `ema_decay`, `zero_grad`, `maximize`, `weight_decay` | everything | |
| `clip_value`, `bounds` | everything | `complex="joint"`, `gpuadam.torch` |
| `bounds` that are arrays | every state; a checkpoint does not hold them | `complex="joint"`, and the classes of `lr_scale` |
| `complex="joint"`, `components` | every state but 8 bits | `gpuadam.torch`, `gpuadam.foreign_state`; 3 of them: `ShardedAdam` |
| `complex="parts"` | everything; it is what `gpuadam.torch` does | `gpuadam.foreign_state` |
| `lr_scale` | everything; numbers of rows: every state but 8 bits | `OffloadAdam`, `ShardedAdam`, `gpuadam.torch` |
| `where` | every state but 8 bits | `OffloadAdam`, `ShardedAdam`, `gpuadam.torch` |
| `norms` | everything; all parameters are on one device | `OffloadAdam`, `ShardedAdam`, `gpuadam.torch`, `adam_step` |
| `replace` | every state; with 8 bits rows of a multiple of 32 elements | `OffloadAdam`, `ShardedAdam`, `gpuadam.torch` |
| `change` | every state | `ema_decay`, `param_copies`, `master`, and the classes of the last row |
| `max_norm` | everything; on a GPU all arrays of a group are on one device | NAdam on a GPU |
| `check_finite`, and `found_inf` as an array | on a GPU only with `capturable` | |
| `capturable` | groups whose parameters have the same kinds of state | NAdam |

Each cell is tested. A combination that does not go together is refused by an error that says so:

>>> import numpy as np, gpuadam
>>> gpuadam.Adam(np.zeros(3, "float32"), state_dtype="8bit", amsgrad=True)
Traceback (most recent call last):
    ...
ValueError: 8-bit state has no max_v...

`gpuadam.guide.narrow_numbers` explains the formats, `gpuadam.guide.whole_step` the options of a step, and
`gpuadam.guide.how_exact` what `formula` and the family of Adam compute.
"""
