"""How fast are other fused Adams, on the same arrays in the same run?

    python benchmarks/peers.py [--backend numba-cpu] [--sizes 1000,100000,1000000,20000000] [--json FILE]

Each peer that is installed takes its turn with gpuadam and the limit kernel, again and again, on arrays of its own, so that
none finds them in a cache that another has filled; ratios are of medians. All do one float32 Adam step in place:
torch.optim.Adam(fused=True) and (foreach=True), optax.adam under jax.jit with its buffers donated, and, on a GPU, an
ElementwiseKernel of one element a thread.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpuadam
from gpuadam import backends, hyperparameters
from gpuadam.cli import bench, output
from gpuadam.kernels import adam, limit

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8


def ours(kernels, backend, n):
    def arrays():
        return [kernels.from_host(a) for a in bench.data(n, "float32")]

    step = iter(range(1, 1 << 60))
    one, other = arrays(), arrays()
    opt = gpuadam.Adam([other[0]], lr=LR, betas=BETAS, eps=EPS, backend=backend)
    return {
        "gpuadam.adam_step": lambda: gpuadam.adam_step(*one, next(step), lr=LR, backend=backend),
        "gpuadam.Adam.step": lambda: opt.step([other[1]]),
        "kernel and launch": launcher(kernels, arrays(), adam),
        "limit": launcher(kernels, arrays(), limit),
    }


def launcher(kernels, arrays, rule):
    views = [kernels.view("", a) for a in arrays] + [None]
    h = hyperparameters.checked(lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, decoupled=False, maximize=False)
    form, scalars = hyperparameters.form_and_scalars(h, 10, views[0].dtype, False)
    return lambda: kernels.launch(form, views, scalars, rule)


def torch_peers(memory, n):
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    if memory == "CUDA" and not torch.cuda.is_available():
        return {}
    device = "cuda" if memory == "CUDA" else "cpu"
    peers = {}
    for name in ("fused", "foreach"):
        param = torch.nn.Parameter(torch.randn(n, device=device))
        param.grad = torch.randn(n, device=device) * 1e-4
        peers[f"torch {name}"] = torch.optim.Adam([param], lr=LR, betas=BETAS, eps=EPS, **{name: True}).step
    return peers


def optax_peer(memory, n):
    try:
        import jax
        import optax
    except ModuleNotFoundError:
        return {}
    if (jax.default_backend() == "gpu") != (memory == "CUDA"):
        return {}
    transform = optax.adam(LR, *BETAS, eps=EPS)
    param = jax.numpy.ones(n, "float32")
    grad = param * 1e-4
    held = [param, transform.init(param)]

    def step(param, state, grad):
        updates, state = transform.update(grad, state, param)
        return optax.apply_updates(param, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def run():
        held[:] = jitted(*held, grad)
        jax.block_until_ready(held)

    return {"optax under jit": run}


def plain_elementwise(memory, n):
    """One element a thread, the body as published kernels write it."""
    if memory != "CUDA" or "cupy" not in gpuadam.available_backends():
        return {}
    import cupy

    kernel = cupy.ElementwiseKernel(
        "T grad, T lr, T one_minus_beta1, T one_minus_beta2, T eps",
        "T param, T m, T v",
        "m += one_minus_beta1 * (grad - m); v += one_minus_beta2 * (grad * grad - v); param -= lr * m / (sqrt(v) + eps);",
        "plain_adam",
    )
    param, grad, m, v = (cupy.asarray(a) for a in bench.data(n, "float32"))
    return {"plain ElementwiseKernel": lambda: kernel(grad, LR, 1 - BETAS[0], 1 - BETAS[1], EPS, param, m, v)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=list(backends.BACKENDS), default=gpuadam.available_backends()[0])
    parser.add_argument("--sizes", default="1000,100000,1000000,20000000")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    backend = backends.BACKENDS[options.backend]
    kernels = backends.load(backend.name)
    rows = []
    for n in (int(float(size)) for size in options.sizes.split(",")):
        peers = ours(kernels, backend.name, n) | torch_peers(backend.memory, n)
        peers |= optax_peer(backend.memory, n) | plain_elementwise(backend.memory, n)
        times = bench.in_turn(kernels, list(peers.values()), options.seconds)
        medians = {name: float(np.median(t)) for name, t in zip(peers, times, strict=True)}
        base = medians["torch fused"] if "torch fused" in medians else medians["limit"]
        against = "torch fused" if "torch fused" in medians else "limit"
        print(f"\n{n:,} float32 on {backend.name}, {len(times[0])} rounds")
        print(f"{'':28}{'median us':>12}{'GB/s':>9}{'x limit':>9}{'x ' + against:>15}")
        for name, seconds in medians.items():
            rate = 28 * n / seconds / 1e9
            print(f"{name:28}{1e6 * seconds:12,.1f}{rate:9.1f}{seconds / medians['limit']:9.3f}{seconds / base:15.3f}")
            rows.append({"backend": backend.name, "elements": n, "what": name, "median_us": 1e6 * seconds, "gb_per_s": rate})
    if options.json:
        result = {"rows": rows, "machine": output.machine() | bench.gpu([backend.name]), "versions": output.versions()}
        output.write_json(options.json, result)


if __name__ == "__main__":
    main()
