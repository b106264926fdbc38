"""What programs that optimize arrays ask of Adam: complex numbers, vectors, bounds, parts of arrays, the change, norms.

Each is an option of the update itself, in the same pass over memory. An option that is not used costs no instruction and no
byte. All backends give the same bits.

## Complex numbers

A complex parameter needs a choice, because programs mean two things by its Adam:

| | `complex="joint"` | `complex="parts"` |
|---|---|---|
| v is the mean of | the gradient's squared absolute value | the squares of both parts, a number for each |
| the step turns with the phase | yes | no: it depends on where the phase is counted from |
| as in | optax, tike, ModOpt | torch, Dr.Jit |
| bytes of a complex64 step | 48 | 56 |

The gradient is dL/dRe + i dL/dIm. torch computes it so, and JAX its conjugate: give `xp.conj(grad)` there.
Arrays may be complex64 or complex128, of any strides. A norm, and clipping by it, are of the absolute values.

>>> import numpy as np, gpuadam
>>> field = np.zeros(2, "complex64")
>>> opt = gpuadam.Adam({"field": field}, lr=0.1, complex="joint")
>>> opt.step({"field": np.array([3 + 4j, -1], "complex64")})
>>> print(field)
[-0.06-0.08j  0.1 +0.j  ]
>>> opt.state["field"]["m"].shape, opt.state["field"]["v"].shape
((2, 2), (2,))

The state has real arrays: m with both parts in a last dimension, and v with one number for each complex one. With "parts" v has
the shape of m. `adam_step` takes complex m as well, and of "parts" complex v. `clip_value` and `bounds` would need an order of
complex numbers: "parts" has them, for each part.

## Vectors that share a v

`components=3` does the same for real arrays whose last dimension is 3, or 2, or 4: positions, directions, colours, quaternions.
All numbers of a vector share the mean of their squares' sum, so that the step is as long in each direction and turns with the
axes, which Adam's own does not (Ling et al. 2022, VectorAdam). A group may have its own:

>>> points, sizes = np.zeros((5, 3), "float32"), np.ones(5, "float32")
>>> opt = gpuadam.Adam([{"params": {"points": points}, "components": 3}, {"params": {"sizes": sizes}}], lr=0.1)
>>> opt.step({"points": np.full((5, 3), [2, 1, -2], "float32"), "sizes": sizes.copy()})
>>> print(points[0].round(3))  # a tenth of the gradient's direction
[-0.067 -0.033  0.067]

v and max_v have the parameter's shape without the last dimension, and so have `where` and `lr_scale`. The numbers of a vector are
neighbours in memory.

## Bounds, and gradients clipped by value

`bounds=(low, high)` leaves every element of a parameter between two numbers, either of which may be None: the step is made,
then `min(max(param, low), high)`. A running mean and a copy are of the bounded parameter. A parameter of 16 bits stays between
the bounds as its dtype has them. Either may be arrays of the parameters' shapes and dtypes, in the structure of the group's
params: one array if that is one array, else a dict or a list, with None for those without. `clip_value=c` clips each element of a
gradient to -c ... c, after `grad_scale` and before weight decay. Both are hyperparameters: groups may have their own, and they
may be changed between steps.

>>> density, gain = np.full((2, 3), 0.05, "float32"), np.ones(2, "float32")
>>> bounded, clipped = {"density": density}, {"gain": gain}
>>> opt = gpuadam.Adam([{"params": bounded, "bounds": (0, None)}, {"params": clipped, "clip_value": 10.0}], lr=0.1)
>>> opt.step({"density": np.ones_like(density), "gain": np.array([-3, 1000], "float32")})
>>> print(density.min(), gain)
0.0 [1.1 0.9]

## A part of an array

`where=` is an array of bool or uint8. Where it is 0, the parameter and its moments keep their bits, weight decay included. It
has the parameter's shape, or its leading dimensions alone: one flag for each row. `where="nonzero"` leaves what has a gradient
of 0. A running mean goes on everywhere: it is a mean over steps. The step count is one for the whole array, so the correction
of the bias is too.

>>> points = np.zeros((4, 3), "float32")
>>> opt = gpuadam.Adam(points, lr=0.1)
>>> opt.step(np.ones_like(points), where=np.array([True, False, True, False]))
>>> print(points[:, 0])
[-0.1  0.  -0.1  0. ]

`python -m gpuadam.examples line_scan` shows why rows that are not measured have to stay.

## A rate for each row or element

`lr_scale=` is a float32 or float64 array of the parameter's shape or of its leading dimensions. It multiplies the learning
rate, in decoupled weight decay too.

>>> opt.step(np.ones_like(points), lr_scale=np.array([1, 1, 0, 0.5], "float32"))
>>> print(points[:, 0].round(4))
[-0.2    -0.0744 -0.1    -0.0372]

On the CPU flags and rates of rows are spread over their rows, a block of elements at a time. On a Granite Rapids that
was busy with other work a step with them took two to six times as long as one without. With an array of the parameter's shape,
into which the program had spread them before (`flags[...] = of_rows[:, None]`), it took 1.4 to 5 times as long.

## The change, not the parameter

`change=` receives what the step would add to the parameter, which stays as it is. A line search, a preconditioner or a program
that writes `x = x - step` goes on from there. The moments are updated.

>>> change = np.zeros_like(points)
>>> opt.step(np.ones_like(points), change=change)
>>> x = points + 0.5 * change  # half a step

## When to stop

`step(..., norms=True)` returns two norms: `change`, of what the step adds to all parameters, and `param`, of all parameters after
it. Both are float64 arrays of shape () beside the parameters, so on a GPU nothing waits for them until a program reads them.

>>> x, target = np.zeros((20, 30)), np.linspace(-1, 1, 600).reshape(20, 30)
>>> fit = gpuadam.Adam(x, lr=0.05)
>>> for step in range(1000):
...     norms = fit.step(x - target, norms=True)
...     if norms.change < 1e-3 * norms.param:
...         break
>>> print(step < 999, np.abs(x - target).max() < 0.02)
True True

The change of an element is its new value less the old one, both as they are computed: in float64 if one of the arrays is float64,
else in float32, with bounds, and before a narrow parameter is rounded. Their difference is a float64. So `change` is what
`gpuadam.global_norm` gives of `new - old` in float64, bit for bit, where parameters are stored as they are computed. With
`change=` it is the norm of the change that the step would store, before rounding. A parameter without a gradient, an element that
`where` leaves out and a step that is left out change by 0. `param` is `gpuadam.global_norm(params)`: of the arrays as they are
stored, and so of a bfloat16 parameter without its remainder. The bits are the same on every backend, for every layout and with
any number of threads.

The norms cost a pass before the update, which reads what the update reads, and one after it, which reads the parameters: 48
bytes for each float32 element in the place of 28. On Zen 3 of `gpuadam.guide.how_fast` a step with norms takes 2.4 times as
long as one without, of 20 million elements in one array, and a step with a copy of the parameters and norms by NumPy 3.3 times;
on three of Intel's Xeons 2.4 and 4.9 to 5.2 times (`benchmarks/norms.py`). Of 100,000 elements the norms by NumPy are the quicker
ones: on Granite Rapids they add 0.10 ms to a step of 0.04, and `norms=True` adds 0.15. On a GPU it has not been measured.

With `capturable=True` the norms are the same two arrays at each step, and a graph that has captured the step writes them. Take a
step with `norms=True` before the capture.

## Arrays that grow and shrink

`opt.replace(name, param, rows)` puts another array in a parameter's place: row i goes on from the state of old row `rows[i]`,
or begins anew where that is -1. So points are split, pruned and added without the moments of the others being lost. `opt.add`
and `opt.remove` are for whole parameters, by name.

>>> rows = np.array([0, 0, 2, 3, -1])  # the first is split, the second pruned, and one is new
>>> points = np.concatenate([points[[0, 0, 2, 3]], np.ones((1, 3), "float32")])
>>> opt.replace("0", points, rows)
>>> opt.step(np.ones_like(points))

The step count stays, so the bias of new moments is not corrected. A graph that was captured before updates the old arrays.
`python -m gpuadam.examples gaussians` splits and prunes Gaussians so.

## What takes what

All of `where`, `lr_scale` and `change` are arguments of `step`, of the same structure as the parameters, with None for those
that have none; and of `gpuadam.adam_step`. `norms` is one of `step` alone, for parameters that are on one
device. `gpuadam.guide.options` says what goes with what.
"""
