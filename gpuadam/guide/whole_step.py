"""The whole step of mixed-precision training, in two passes over the gradients and one over everything else.

The first pass reads the gradients and computes the norm of all of them. The second pass unscales and clips the gradients,
updates the parameters and their state, writes a low-precision copy, updates a running mean of the parameters, and zeroes the
gradients. Every part is optional: an option that is not used costs no instruction and no byte, because options are constants
when the kernel is compiled.

>>> import numpy as np, gpuadam
>>> rng = np.random.default_rng(0)
>>> w, b = rng.standard_normal((64, 32)).astype("float32"), np.zeros(32, "float32")
>>> params = {"w": w, "b": b}
>>> opt = gpuadam.AdamW(params, lr=1e-2, state_dtype="8bit", ema_decay=0.99, zero_grad=True)
>>> grads = {name: np.zeros_like(p) for name, p in params.items()}
>>> loss_scale = 1024.0
>>> for step in range(100):
...     for name, p in params.items():
...         grads[name] += loss_scale * p  # as a backward pass would
...     opt.step(grads, grad_scale=1 / loss_scale, max_norm=1.0, check_finite=True)
>>> print(opt.steps, np.abs(grads["w"]).max(), opt.state["w"]["ema"].dtype)
100 0.0 float32

## Unscaling and clipping

Every gradient is multiplied by `grad_scale` first. `max_norm` then clips the norm over all gradients, as
`torch.nn.utils.clip_grad_norm_` does: the gradients are multiplied by `max_norm / (norm + 1e-6)` if that is below 1. On a
GPU the norm stays on the GPU. To log it, compute it with `gpuadam.global_norm` and hand it to the step, which then does not
compute it again. `norm=` is the norm before `grad_scale`, and the step multiplies it:

>>> for name, p in params.items():
...     grads[name] += p
>>> norm = gpuadam.global_norm(grads)
>>> opt.step(grads, norm=norm, max_norm=1.0)

## Steps that are left out

`check_finite=True` leaves the step out if the norm of all gradients is infinite or NaN, or so large that a square may overflow
(1.845e19 for float32). `found_inf=` leaves it out if a number is not zero. Parameters, state and step count then keep their bits.
Gradients are still zeroed if `zero_grad` is on.

>>> grads["b"][0] = np.inf
>>> before = params["b"].copy()
>>> opt.step(grads, check_finite=True)
>>> print((params["b"] == before).all(), opt.state["w"]["step"])
True 101

On a GPU, `check_finite` and a `found_inf` that is an array need `capturable=True`. The decision is then made on the GPU, and
the host never waits for it.

## Running means, copies, zeros

`ema_decay=0.99` keeps a running mean of each parameter in `opt.state[name]["ema"]`: the parameter's value after its first
step, then `ema += (1 - ema_decay) * (param - ema)`. `param_copies=` has an array for each parameter, in which each step
stores the parameter, rounded. `zero_grad=True` stores zeros in the gradients in the pass that reads them.

## CUDA graphs

With `capturable=True` the step count is on the GPU. `lr` and `grad_scale` may be arrays of one number on the GPU. A captured
graph reads them at each replay. Capturing a step whose numbers the graph would freeze is refused. Take one step with the same
options before the capture, on any stream: a capture may not load kernels, and a step whose kernels are missing is refused.

```python
import cupy
import gpuadam

params, grads = ({"w": cupy.ones((3, 5), "float32")} for _ in range(2))
lr = cupy.full(1, 1e-3)
opt = gpuadam.AdamW(params, lr=lr, capturable=True)
with cupy.cuda.Stream(non_blocking=True) as stream:
    opt.step(grads)  # compiles
    stream.begin_capture()
    opt.step(grads)
    graph = stream.end_capture()
    for step in range(100):
        lr.fill(1e-3 / (1 + step))
        graph.launch(stream)
```

Other numbers of a step (betas, eps, weight_decay, max_norm) keep in the graph the values that they had at the capture. So do the
addresses of all arrays. Gradients in the graph may be other arrays than those of the step before it, and have to live as long as
the graph. Of several arrays the addresses are in a table on the GPU, which stays there until the process ends.
"""
