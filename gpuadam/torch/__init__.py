"""Adam and AdamW for PyTorch: the interface and the checkpoints of `torch.optim`, the update of gpuadam.

`import gpuadam` does not import torch; `import gpuadam.torch` does.

To change a program, change the line that makes its optimizer. Schedulers, `torch.amp.GradScaler`, parameter groups, hooks and
checkpoints work as with `torch.optim`, in both directions.

>>> import torch, gpuadam.torch
>>> model = torch.nn.Linear(2, 1)
>>> opt = gpuadam.torch.AdamW(model.parameters(), lr=1e-2)  # was torch.optim.AdamW
>>> scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
>>> model(torch.ones(4, 2)).square().mean().backward()
>>> opt.step()
>>> scheduler.step()
>>> theirs = torch.optim.AdamW(model.parameters())
>>> theirs.load_state_dict(opt.state_dict())
>>> theirs.param_groups[0]["lr"], int(theirs.state[model.weight]["step"])
(0.005, 1)
"""

from .optimizer import Adam, AdamW

__all__ = ["Adam", "AdamW"]
