"""Narrow numbers: state, parameters and gradients in fewer bytes.

The memory bounds the speed of a step, so a faster step moves fewer bytes. Parameters and gradients are float16, bfloat16,
float32 or float64, each independently of the others. The arithmetic is float64 if one of the arrays is float64, and float32
otherwise. NumPy has no bfloat16 of its own: use the dtype of the package `ml_dtypes`, or `gpuadam.Bits(array_of_uint16,
"bfloat16")`.

| option | bytes an element | meaning |
|---|---:|---|
| `state_dtype="float32"` | 8 | m and v in float32: the default |
| `state_dtype="float64"` | 16 | m and v in float64: the default for float64 parameters |
| `state_dtype="bfloat16"` | 4 | m and v in bfloat16, rounded randomly |
| `state_dtype="8bit"` | 2.25 | codes of 8 bits, and two scales for each 32 neighbours |
| `master="remainder"` | + 2 | 16 more bits make a bfloat16 parameter an exact float32 |
| `param_copies=...` | + 2 | a bfloat16 or float16 copy of float32 parameters, written in the same pass |
| `stochastic_rounding=True` | 0 | a 16-bit parameter without a master, rounded up or down at random |

`gpuadam.guide.options` says which of them go together, `gpuadam.guide.how_fast` how much time they take.

## State

bfloat16 state is rounded randomly. If it were rounded to nearest, v would not move: the change of a step, about a thousandth
of v, is less than half a unit in the last place of a bfloat16. 8-bit state is rounded randomly too. It is for C-contiguous
parameters of 16 or 32 bits.

>>> import numpy as np, gpuadam
>>> w = np.zeros(1024, "float32")
>>> opt = gpuadam.AdamW({"w": w}, state_dtype="8bit")
>>> for name in ("m", "v", "m_scale", "v_scale"):
...     print(name, opt.state["w"][name].dtype, opt.state["w"][name].size)
m uint8 1024
v uint8 1024
m_scale float32 32
v_scale float32 32

## Parameters of 16 bits

An update that is smaller than half a unit in the last place of its parameter is lost when the result is rounded to nearest.
The sum of a hundred such updates is lost too. There are three ways out.

**A remainder.** `master="remainder"` keeps 16 bits beside each bfloat16 parameter. Together they are an exact float32; the
model reads the bfloat16 part. There is no third copy of the parameter.

>>> one = np.full(3, 0x3F80, "uint16")  # 1.0 in bfloat16
>>> nearest, exact = one.copy(), one.copy()
>>> params = [{"w": gpuadam.Bits(w, "bfloat16")} for w in (nearest, exact)]
>>> plain = gpuadam.Adam(params[0], lr=1e-4)
>>> with_master = gpuadam.Adam(params[1], lr=1e-4, master="remainder")
>>> for step in range(100):
...     for each in (plain, with_master):
...         each.step({"w": np.ones(3, "float32")})
>>> def value(bfloat16, remainder=0):
...     return ((bfloat16.astype("int32") << 16) + remainder).view("float32")
>>> print(value(nearest), value(exact, with_master.state["w"]["remainder"]).round(4))
[1. 1. 1.] [0.99 0.99 0.99]

**Copies.** `param_copies=` is for float32 parameters: the model reads a bfloat16 or float16 copy, which each step writes
anew.

**Random rounding.** `stochastic_rounding=True` needs no memory. The parameter is rounded up or down at random, so that it is
right on average.

Random bits are a function of the seed, the step, the parameter, and the element's place in the parameter. So they are the
same on every backend, in any number of threads, and however the arrays are cut up.

## From one format to another

State changes its format where that is asked for, and nowhere else. Parameters, step counts and hyperparameters stay.

| from | call |
|---|---|
| a checkpoint, of one process or of ranks | `gpuadam.load(path, params, state_dtype="8bit")`, and `load_sharded` likewise |
| a `state_dict()` | `opt.load_state_dict(state_dict, convert=True)` |
| torch's or optax's Adam | `foreign_state.from_torch(opt, state_dict, names, convert=True)`, and `from_optax` |
| this optimizer, to torch's Adam | `foreign_state.to_torch(opt, convert=True)` |
| `torch.optim.Adam`'s checkpoint, in `gpuadam.torch` | `opt.load_state_dict(state_dict, convert=True)`, for 8 bits |

`gpuadam.torch` needs no word for bfloat16: it casts a checkpoint to the optimizer's floats, as torch's own classes do.

>>> w = np.ones(64, "float32")
>>> before = gpuadam.Adam({"w": w})
>>> before.step({"w": np.linspace(-1, 1, 64, dtype="float32")})
>>> after = gpuadam.Adam({"w": w}, state_dtype="8bit")
>>> after.load_state_dict(before.state_dict(), convert=True)
>>> after.steps, after.state["w"]["m"].dtype
(1, dtype('uint8'))

Numbers are rounded to nearest, and not randomly as in a step: a conversion is made once, so nothing adds up that would have to
be right on average, and the result depends on no seed. It is computed on the host, and so the same on every backend. The way
back loses nothing: float32 state has exactly the numbers that the narrow state had. What overflows float32 becomes infinite.

After 1,000 of 2,000 steps of the task digits below, in percent: the norm of the errors over the norm of m, of v, and of the
step m / sqrt(v); then the mean final loss over that of float32 throughout, and the range of five seeds
(`benchmarks/conversion.py`, on an AMD EPYC, 2026-11-29). The mean losses differ by at most 0.2 %, as with lr x 1.001 below.

| | m | v | step | final loss | range |
|---|---:|---:|---:|---:|---|
| float32 to bfloat16 | 0.16 | 0.17 | 0.19 | 99.96 | 99.91 to 100.01 |
| float32 to 8 bits | 1.18 | 1.09 | 2.66 | 99.89 | 99.76 to 100.14 |
| bfloat16 to float32 | 0 | 0 | 0 | 99.89 | 99.18 to 100.36 |
| 8 bits to float32 | 0 | 0 | 0 | 100.17 | 99.44 to 100.71 |

In 8 bits an |m| that is less than 1/7,900 of the largest among its 32 neighbours becomes 0. A sqrt(v) that is less than 1/8,000
of the largest is raised to 1/8,000 of the largest; a v above 0 never becomes 0. A group with a NaN or an infinity becomes NaN.

## What they cost in quality

The mean final training loss of two tasks, in percent of float32's, and the range of five seeds: `benchmarks/quality.py`, one
thread of an AMD EPYC, 2026-11-23. digits is a small network that reads handwritten digits; text is a character language model.
`benchmarks/results` has each loss.

| | digits | range | text | range |
|---|---:|---|---:|---|
| float32, lr x 1.001: chance | 99.85 | 99.74 to 99.92 | 100.05 | 99.77 to 100.26 |
| bfloat16 state | 99.89 | 99.09 to 100.52 | 100.11 | 99.70 to 100.48 |
| 8-bit state | 100.02 | 99.44 to 100.55 | 100.16 | 99.77 to 100.50 |
| bfloat16 params and grads + 16 bits | 99.93 | 98.77 to 100.85 | 99.95 | 99.56 to 100.24 |
| all bfloat16, params rounded randomly | 101.53 | 99.26 to 105.61 | 100.00 | 99.77 to 100.32 |
| bfloat16 params and grads, to nearest | 390.65 | 359.66 to 412.61 | 100.64 | 100.18 to 101.55 |

The final losses with narrow state are within 0.2 % of float32's. float32's own losses differ by 7.6 % (digits) and 0.8 %
(text) from seed to seed, one standard deviation. "lr x 1.001" shows what is chance: how far apart runs of equal quality end.

The last row shows what random rounding and the 16 bits are for: parameters that are rounded to nearest lose every change
below half a unit in their last place.
"""
