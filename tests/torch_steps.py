"""Parameters of torch, gradients, and steps over them, for the tests of `gpuadam.torch`."""

import torch

import gpuadam.torch

PAIRS = {"Adam": (gpuadam.torch.Adam, torch.optim.Adam), "AdamW": (gpuadam.torch.AdamW, torch.optim.AdamW)}


def replay(opt, params, grads):
    for given in grads:
        for p, g in zip(params, given, strict=True):
            p.grad = g.clone()  # maximize of torch 2.4 to 2.6 changes it
        opt.step()


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 5), (7,), ())]


def gradients(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (7,), ())]


def stepped(make, seeds=range(3), dtype=torch.float32, **options):
    params = small(dtype)
    opt = make(params, **options)
    replay(opt, params, [gradients(seed, dtype) for seed in seeds])
    return params, opt
