"""Which arrays gpuadam updates, where it updates them, and how parameters are put into groups.

`gpuadam.adam_step` updates one parameter; you keep its moments. `gpuadam.Adam`, `gpuadam.AdamW` and their family keep the
moments of one array, of a list, of a dict, or of groups.

## Backends

The arrays decide which backend updates them.

| backend | arrays | implementation |
|---|---|---|
| `cupy` | CuPy arrays; arrays on a GPU with `__cuda_array_interface__` or DLPack, such as PyTorch's | an `ElementwiseKernel` |
| `numba-cuda` | Numba device arrays; with `backend="numba-cuda"` the arrays of `cupy` too | a Numba CUDA kernel |
| `numba-cpu` | NumPy arrays; arrays in CPU memory with DLPack, such as PyTorch's | a vectorised Numba loop on all cores |

Both GPU kernels access memory in pieces of 16 bytes. Where several backends can take the arrays, `backend=`, `with
gpuadam.use_backend(...)` or the environment variable `GPUADAM_BACKEND` chooses one. Arrays are never copied between devices,
and no backend silently replaces another.

`python -m gpuadam doctor` says what works on a machine, why something does not, and how to mend it. It runs steps in
float32, in all bfloat16 with random rounding, with 8-bit state, with bounds and with components on each backend, and compares the
bits with known ones. It also tries checkpoints, PyTorch, the pytest plugin and the extras.

On the CPU an update of 65,536 elements and more takes all of Numba's threads, whose number is set by the environment variable
`NUMBA_NUM_THREADS` or by `numba.set_num_threads`. Each of them needs a free core: where other programs hold the cores, a step
waits for the slowest thread, and one thread can be many times faster.

## Layouts, and what is refused

Every size, every alignment and all strides are computed correctly. Arrays that fill their memory without gaps, all in the same
order of dimensions, are the fast case: C order, Fortran's, channels last. On the CPU a part of a matrix is updated row by row,
and one array with gaps beside others without goes by a buffer, a block at a time. A call on them takes some 0.1 ms more in
Python, so small parts are quicker if you copy them, step, and copy them back. A gradient may be read-only, and a broadcast or
sliding view, unless `zero_grad` is on. With 8-bit state all arrays are C-contiguous.

These arguments raise an error before a byte is written: other read-only, overlapping or broadcast arrays; shapes or devices
that differ; arrays of integers, m and v of two dtypes, the other byte order; hyperparameters out of range. A gradient may have
another float dtype than its parameter. One bad gradient in a list stops the step of all arrays.

## In place

A step writes into the arrays that the optimizer was given, and so must a program that changes them between steps:

>>> import numpy as np, gpuadam
>>> params = {"w": np.array([0.5, 3.0], "float32")}
>>> opt = gpuadam.Adam(params, lr=0.1)
>>> params["w"][...] = params["w"].clip(0, 1)  # or np.clip(w, 0, 1, out=w)
>>> opt.step({"w": np.array([1, 1], "float32")})
>>> print(params["w"])
[0.4 0.9]

`params["w"] = params["w"].clip(0, 1)` would put another array into the dict, and steps would go on updating the one before. A
step notices that in a dict or a list that parameters were given in, and raises ValueError before anything is written. It cannot
notice it where an array was given alone: after `w = w.clip(0, 1)` the program and the optimizer have two arrays. `bounds=` clips
within the step. `opt.replace(name, array, rows)` puts another array in a parameter's place, and its state goes along.

## Many arrays

`step` updates all arrays of a group together. On a GPU that is one launch, which finds the arrays through a table of their
addresses. The table is sent to the GPU again only when an array has moved. On the CPU it is one call.

`gpuadam.flatten` copies arrays into one buffer. It returns views of the buffer in the shapes of the arrays, and a second
buffer with views for the gradients:

>>> flat = gpuadam.flatten({"w": np.ones((2, 3), "float32"), "b": np.zeros(2, "float32")})
>>> opt = gpuadam.Adam(flat.param, lr=0.1)
>>> flat.grads["w"][:] = 5.0
>>> opt.step(flat.grad)
>>> print(flat.params["w"][0], flat.params["b"])
[0.9 0.9 0.9] [0. 0.]

On a CPU the buffers lie on pages of 2 MB, which small arrays cannot have: `gpuadam.guide.memory_pages`.

## Groups and schedules

A group is a dict with parameters and hyperparameters of its own. `opt.groups` is the list of them; numbers in it may be
changed between steps. A gradient of `None` skips its array. To type checkers a list of groups that is made before the call is
`list[gpuadam.typing.Group]`.

>>> w, b = np.ones(2, "float32"), np.ones(2, "float32")
>>> opt = gpuadam.Adam([{"params": {"w": w}, "lr": 0.1}, {"params": {"b": b}, "lr": 0.2}])
>>> opt.groups[0]["lr"] = 0.4
>>> opt.step({"w": np.ones(2, "float32"), "b": None})
>>> print(w, b)
[0.6 0.6] [1. 1.]

`lr` may be a function of the number of the step, counted from 1. It returns a number or an array of no dimensions. optax's
schedules are such functions: `gpuadam.AdamW(params, lr=optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000))`. optax
counts from 0; `lr=lambda step: schedule(step - 1)` is the same as in optax.

>>> opt = gpuadam.Adam(w, lr=lambda step: 1e-3 * min(1, step / 100))

## Which parameters decay

`gpuadam.decay_groups` makes two groups by patterns of names. It refuses a pattern that matches no name.

>>> params = {name: np.ones(2) for name in ("dense.weight", "dense.bias", "norm.scale")}
>>> groups = gpuadam.decay_groups(params, ("*.bias", "norm*"), weight_decay=0.01)
>>> [group["names"] for group in gpuadam.AdamW(groups).groups]
[['dense.weight'], ['dense.bias', 'norm.scale']]

`step` takes the gradients of such groups as one dict of all names.

## Streams

A step on a GPU runs on CuPy's current stream, or on `stream=`: a CuPy, Numba or torch stream. If arrays were last used on
other streams, the step waits for that work on the GPU. The host never waits for the device. (`gpuadam.OffloadAdam` is the
exception: its step returns when all is done.)
"""
