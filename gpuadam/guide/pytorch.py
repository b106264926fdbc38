"""gpuadam in a program that uses PyTorch, or JAX.

## The drop-in

`gpuadam.torch.Adam` and `gpuadam.torch.AdamW` have the interface of `torch.optim`: one line of the program changes. They
need `pip install "gpuadam[torch]"`.

```python
import torch
import gpuadam.torch

model = torch.nn.Sequential(
    torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
)
opt = gpuadam.torch.AdamW(model.parameters(), lr=1e-2)  # was torch.optim.AdamW
x = torch.randn(64, 8)
for step in range(300):
    opt.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    opt.step()
print(loss.item() < 0.1)  # True
```

* Checkpoints of `torch.optim.Adam` and `AdamW` load into it, and its checkpoints load into them.
* Schedulers, hooks and `torch.amp.GradScaler` work as before.
* `state_dtype="bfloat16"`, `state_dtype="8bit"`, `master="remainder"` and `stochastic_rounding=True` work as in
  `gpuadam.Adam`. They are given to the optimizer, for all of its groups; in a group they are refused.
  `opt.load_state_dict(state_dict, convert=True)` takes a float32 checkpoint into 8-bit state, or back.
* `capturable=True` keeps the step count on the GPU, for CUDA graphs: see below.
* `foreach` and `fused` choose no other implementation: there is one. With `fused=True` the step unscales gradients itself,
  without writing them, and `GradScaler` does not. `differentiable` is refused.
* A compiled training step may contain `opt.step()`. `torch.compile` leaves it as it is.

* It updates the DTensors of `fully_shard` (torch 2.5 or later), each rank its own part. State is DTensors too, which
  `torch.distributed.checkpoint` saves and loads. 8-bit state of a DTensor is refused.

Tensors are on the CPU or on CUDA devices, in float32, float64, bfloat16, float16, complex64 or complex128, and of any strides. A
sparse gradient is refused: give its `to_dense()`.

### CUDA graphs

With `capturable=True` the recipe of torch's documentation for whole training steps works: some steps on a side stream, then
`opt.zero_grad(set_to_none=True)`, then the backward pass and `opt.step()` within `torch.cuda.graph`. The gradients of the graph
are then new tensors, in its own memory. There are three conditions:

* `lr` is a tensor of one float32 or float64 on the GPU, of which each replay reads the value of then. With a number the capture
  is refused, because the graph would repeat it for ever.
* At least one step was taken before, with the same options and on any stream. It loads the kernels.
* All parameters of a group have gradients in the graph, or none has.

## Tensors in gpuadam's own classes

`gpuadam.Adam` and its family take tensors as parameters too. `opt.step()` then reads their `.grad`, and `zero_grad=True`
zeroes it in the same pass. That gives a torch program the options of `gpuadam.guide.whole_step`.

```python
import torch
import gpuadam

w = torch.nn.Parameter(torch.ones(3))
opt = gpuadam.Adam({"w": w}, lr=0.1, zero_grad=True)
w.sum().backward()
opt.step()
print(w.detach().numpy(), w.grad.numpy())  # [0.9 0.9 0.9] [0. 0. 0.]
```

`gpuadam.foreign_state` takes over the state of torch's and optax's Adam, and gives it back: exactly, or with `convert=True` in
another format.

## JAX

An array of JAX never changes, so it cannot be a parameter. It can be a gradient. A complex one is conjugated first:
`gpuadam.guide.array_programs`. On a CPU give `np.asarray(gradient)`, which copies nothing there: a step of 1,000 elements took 6
microseconds so, and 160 with JAX's own array.

```python
import jax
import numpy as np
import gpuadam

w = np.array([1.0, 2.0], "float32")
opt = gpuadam.Adam(w, lr=0.1)
opt.step(jax.grad(lambda w: (w**2).sum())(w))
print(w)  # [0.9 1.9]
```
"""
