"""Adam and AdamW for PyTorch: the interface and the checkpoints of `torch.optim`, the update of gpuadam.

One line of a program changes: `gpuadam.torch.AdamW` in the place of `torch.optim.AdamW`.

>>> import torch, gpuadam.torch
>>> model = torch.nn.Linear(2, 1)
>>> opt = gpuadam.torch.AdamW(model.parameters(), lr=1e-2)  # was torch.optim.AdamW
>>> scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
>>> model(torch.ones(4, 2)).square().mean().backward()
>>> opt.step()
>>> scheduler.step()

Checkpoints of `torch.optim.Adam` and `AdamW` load into these classes, and the other way round. Parameter groups, schedulers,
hooks and `torch.amp.GradScaler` work as before.

>>> theirs = torch.optim.AdamW(model.parameters())
>>> theirs.load_state_dict(opt.state_dict())
>>> theirs.param_groups[0]["lr"], int(theirs.state[model.weight]["step"])
(0.005, 1)

`state_dtype`, `master="remainder"`, `stochastic_rounding`, `seed` and `backend` are those of `gpuadam.Adam`
(`gpuadam.guide.narrow_numbers`). Its other options are not there (`gpuadam.guide.options`).
`import gpuadam` does not import torch; `import gpuadam.torch` does.
"""

try:
    from .optimizer import Adam, AdamW
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError('gpuadam.torch needs torch: pip install "gpuadam[torch]"', name=error.name) from error

__all__ = ["Adam", "AdamW"]
