"""The update in a kernel of your own: gradient and update in one pass over memory.

Where a program computes its gradient in a kernel, the gradient is stored only to be loaded again by the update. `gpuadam.Rule`
is the update of one element as a function, which that kernel calls instead. In float32 this saves 12 of the bytes of each
element: the gradient is neither stored nor loaded, and param is loaded once. The bits are those of `gpuadam.adam_step`, on the
CPU and on GPUs.

## Numba on the CPU

>>> import numba, numpy as np, gpuadam
>>> rule = gpuadam.Rule("float32", bounds=(0, None))
>>> update = rule.for_njit()
>>> @numba.njit(parallel=True)
... def fit(x, target, m, v, s):
...     for i in numba.prange(x.size):
...         gradient = x[i] - target[i]
...         x[i], m[i], v[i] = update(x[i], gradient, m[i], v[i], s)
>>> target = np.array([3, -2], "float32")
>>> x, m, v = np.zeros((3, 2), "float32")
>>> for step in range(1, 201):
...     fit(x, target, m, v, rule.scalars(step, lr=0.1))
>>> print(x.round(1))
[3. 0.]

With AMSGrad max_v follows v, and with `ema_decay` ema comes last: `rule.arguments` lists them, and all but grad are returned.
The function returns what it is given new, so a kernel may read one array and write another. That is necessary where the gradient
of an element needs its neighbours.

## Numba CUDA

```python
import cupy
from numba import cuda
import gpuadam

rule = gpuadam.Rule("float32")
update = rule.for_cuda_jit()

@cuda.jit
def fit(x, target, m, v, s):
    i = cuda.grid(1)
    if i < x.size:
        x[i], m[i], v[i] = update(x[i], x[i] - target[i], m[i], v[i], s)

target = cupy.array([3, -2], "float32")
x, m, v = cupy.zeros((3, 2), "float32")
launch = fit[1, 32]  # one block of 32 threads
for step in range(1, 201):
    launch(x, target, m, v, rule.scalars(step, lr=0.1))
print(x.get().round(1))  # [ 3. -2.]
```

## CuPy's RawKernel

`for_cuda_c` returns CUDA C for the top of the file: a namespace with the function `update`, which changes its arguments in
place, and the struct `Scalars`, which CuPy passes by value.

```python
import cupy
import numpy as np
import gpuadam

rule = gpuadam.Rule("float32")
fit = cupy.RawKernel(rule.for_cuda_c() + r'''
extern "C" __global__ void fit(float* x, const float* target, float* m, float* v, int n, gpuadam::Scalars s) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) gpuadam::update(x[i], x[i] - target[i], m[i], v[i], s);
}''', "fit")

target = cupy.array([3, -2], "float32")
x, m, v = cupy.zeros((3, 2), "float32")
for step in range(1, 201):
    fit((1,), (32,), (x, target, m, v, np.int32(x.size), rule.struct(step, lr=0.1)))
print(x.get().round(1))  # [ 3. -2.]
```

An ElementwiseKernel takes the same text as its preamble: see `gpuadam.Rule.for_elementwise`. Two rules in one kernel have
namespaces of different names: `rule.for_cuda_c("positions")`.

## The numbers of a step

`rule.scalars(step)` returns them, or `rule.struct(step)`. lr and the other hyperparameters may be changed there, from step to
step: `rule.scalars(step, lr=schedule(step))`. What decides about the code is fixed when the rule is made: whether there are
weight decay, bounds, clipping or a grad_scale, and whether a beta is above 1/2. So `rule.scalars(step, grad_scale=clip)` is for
a `gpuadam.Rule("float32", grad_scale=0.5)`. Another choice is refused:

>>> rule.scalars(1, weight_decay=0.1)
Traceback (most recent call last):
    ...
ValueError: weight_decay=0.1 needs another kernel than a Rule made with weight_decay=0.0...

## What keeps the bits, and what does not

* **Fast-math is yours alone.** With `fastmath=True`, or `--use_fast_math` in CUDA C, your arithmetic changes and the update does
  not: it has no options of its own, and is inline PTX on a GPU.
* **Your gradient has the bits that your compiler gives it.** Compilers for GPUs fuse a product and a sum, and @njit code does
  not. For equal gradients compile a RawKernel with `options=("--fmad=false",)`; in @cuda.jit code write such a product as
  `numba.cuda.libdevice.fmul_rn(x, y)`, or `dmul_rn` in float64. And CuPy always compiles CUDA C so that float32 operations
  flush subnormal numbers.
* **Types are exact.** The rule computes in its dtype, float32 or float64. A float64 gradient of a float32 rule is refused when
  the code is compiled: it comes from a literal such as `2.0`, and would make a GPU many times slower. Write `np.float32(2)` in
  Python and `2.0f` in CUDA C.
* **Narrow numbers are converted by you**, on load and on store. Random rounding, 8-bit state and remainders belong to arrays:
  `gpuadam.adam_step` has them.
* **Parts and rates.** A kernel that leaves an element out does not call `update` for it. A learning rate for each row is a tuple
  of scalars for each.
* **`cache=True` of Numba** does not see that `update` has become another function. Leave it out.

The arrays are those of `gpuadam.adam_step`: moments start at zero, steps are counted from 1, and the two may take turns.

`python -m gpuadam.examples photons` clears a photograph in one kernel, with NumPy's arrays or CuPy's, and takes the same steps in
two.
"""
