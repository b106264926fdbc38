"""How fast is the whole step of mixed-precision training: unscale, check, clip, update, zero the gradients?

    python benchmarks/amp_step.py [--backend numba-cpu] [--sizes 2e7,gpt2] [--seconds 20] [--out FOLDER]

gpuadam: one `Adam.step(grads, grad_scale=1 / scale, max_norm=1.0, check_finite=True)` with zero_grad=True. It reads the
gradients once for their norm, which says whether they are finite, and once more in the update, which unscales, clips and
zeroes them: 36 bytes an element of float32. torch: `GradScaler.unscale_`, `clip_grad_norm_`, `GradScaler.step` with fused
Adam, `update`, and `zero_grad(set_to_none=False)`: 52 bytes. With bfloat16 copies the new parameters are also stored,
rounded, in a second set of arrays, which with torch is a copy: 38 and 58 bytes. On a GPU neither waits to know whether the
gradients are finite.

Before each step, and not timed, the gradients are written anew, as a backward pass does. Those of a contender lie in one
buffer, as data-parallel training has them, so that one copy does it.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import many
import numpy as np
import peers
import report

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import measure
from gpuadam.terminal import arguments

SCALE, MAX_NORM = 65536.0, 1.0
OURS, THEIRS, COPIES = "gpuadam.Adam.step", measure.TORCH_FUSED, ", bfloat16 copies"


class Contender(NamedTuple):
    """prepare: writes the gradients anew. step: does, or enqueues, the whole step. params: what it updates."""

    prepare: Callable
    step: Callable
    params: list


# -- the contenders --


def gpuadam_step(backend, shapes, copies):
    kernels = backends.load(backend.name)
    params, buffer = _host_arrays(shapes)
    params = [kernels.from_host(param) for param in params]
    buffer, source = kernels.from_host(buffer), kernels.from_host(buffer)
    grads = _in_shapes(buffer, shapes)
    options = dict(peers.HYPERPARAMETERS, zero_grad=True)
    if copies:
        options["param_copies"] = [gpuadam.Bits(kernels.from_host(np.zeros(s, "uint16")), "bfloat16") for s in shapes]
    grad_scale = 1 / SCALE
    if backend.memory == "CUDA":
        options["capturable"] = True  # else a step cannot be left out without waiting for the norm
        grad_scale = kernels.from_host(np.array([grad_scale]))  # a loss scale that changes is there, too
    opt = gpuadam.Adam(params, **options, backend=backend.name)
    to, source = kernels.view("buffer", buffer), kernels.view("source", source)

    def step():
        opt.step(grads, grad_scale=grad_scale, max_norm=MAX_NORM, check_finite=True)

    return Contender(lambda: kernels.copy(to, source), step, params)


def torch_step(backend, shapes, copies):
    import torch

    device = "cuda" if backend.memory == "CUDA" else "cpu"
    params, buffer = _host_arrays(shapes)
    params = [torch.nn.Parameter(torch.tensor(param, device=device)) for param in params]
    buffer, source = torch.tensor(buffer, device=device), torch.tensor(buffer, device=device)
    for param, grad in zip(params, _in_shapes(buffer, shapes), strict=True):
        param.grad = grad
    narrow = [param.detach().bfloat16() for param in params] if copies else []
    opt = torch.optim.Adam(params, **peers.HYPERPARAMETERS, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=1 << 30)  # the scale stays
    scaler.scale(torch.zeros((), device=device))  # as the loss is scaled: it puts the scale on the device

    def step():
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=False)
        if copies:
            torch._foreach_copy_(narrow, [param.detach() for param in params])

    return Contender(lambda: buffer.copy_(source), step, params)


def _host_arrays(shapes):
    """Return the parameters, and the scaled gradients in one buffer."""
    params = [next(measure.data(math.prod(shape), "float32")).reshape(shape) for shape in shapes]
    buffer = np.zeros(sum(map(_room, shapes)), "float32")
    for grad in _in_shapes(buffer, shapes):
        _, values, *_ = measure.data(grad.size, "float32")
        np.multiply(values.reshape(grad.shape), np.float32(SCALE), out=grad)
    return params, buffer


def _in_shapes(buffer, shapes):
    """Return views of a buffer, of any library, one after the other."""
    ends = list(itertools.accumulate(map(_room, shapes)))
    starts = [end - _room(shape) for end, shape in zip(ends, shapes, strict=True)]
    return [buffer[start : start + math.prod(s)].reshape(s) for start, s in zip(starts, shapes, strict=True)]


def _room(shape):
    """Return the elements from one gradient to the next: each starts at a boundary of 512 bytes, as allocators have it."""
    return -(-math.prod(shape) // 128) * 128


# Bytes of an element that a step moves, by reading + writing.
UPDATE = 4 * (4 + 3)  # param, grad, m and v; param, m and v
NORM, ZERO, SCALED = 4, 4, 4 + 4  # of the gradients
TO_COPIES = 2  # what is in registers is stored; torch reads param again
BYTES = {
    OURS: NORM + UPDATE + ZERO,
    OURS + COPIES: NORM + UPDATE + ZERO + TO_COPIES,
    THEIRS: SCALED + NORM + SCALED + UPDATE + ZERO,
    THEIRS + COPIES: SCALED + NORM + SCALED + UPDATE + ZERO + 4 + TO_COPIES,
}
BUILD = {
    OURS: functools.partial(gpuadam_step, copies=False),
    THEIRS: functools.partial(torch_step, copies=False),
    OURS + COPIES: functools.partial(gpuadam_step, copies=True),
    THEIRS + COPIES: functools.partial(torch_step, copies=True),
}
HELD = {False: 20, True: 22}  # bytes of an element: param, grad, m, v and the gradient that is written anew; the copy


# -- the measurement --


def shapes_of(case):
    """Return the shapes of a case of --sizes; a type of argparse, too."""
    return many.shapes_of(case) if "x" in case or case == "gpt2" else [(arguments.whole(case),)]


def measure_rows(backend, options, notes):
    present, absent = peers.chosen(backend, {THEIRS} if options.peers is None else {THEIRS} & {*options.peers})
    notes += report.listed(absent)
    kernels = backends.load(backend.name)
    for case in options.sizes:
        shapes = shapes_of(case)
        n = sum(map(math.prod, shapes))
        needs = {name: HELD[name.endswith(COPIES)] * n for name in BUILD if present or not name.startswith(THEIRS)}
        names, left_out = peers.in_memory(needs, backend, n)
        notes += report.listed(left_out)
        if not names:
            continue
        contenders = [BUILD[name](backend, shapes) for name in names]
        steps, prepares = [one.step for one in contenders], [one.prepare for one in contenders]
        times = measure.in_turn(kernels, steps, options.seconds, before=prepares)
        del contenders, steps, prepares
        peers.release(backend)
        yield rows_of(backend, n, len(shapes), dict(zip(names, times, strict=True)))


def rows_of(backend, n, n_arrays, times):
    """Return the rows of one run. times: contender -> seconds."""
    rows = []
    clock = "device" if backend.memory == "CUDA" else "host"
    for name, seconds in times.items():
        facts = {"state": "in turn", "clock": clock, "arrays": n_arrays, "seconds": seconds, "moved": BYTES[name] * n}
        row = measure.row("amp_step", name, backend.name, n, **facts) | dict.fromkeys(report.FURTHER)
        rows.append(row | {"bytes_per_element": BYTES[name]})
    by_name = {row["contender"]: row["p50_us"] for row in rows}
    for row in rows:  # with copies by torch with copies
        base = by_name.get(THEIRS + COPIES * row["contender"].endswith(COPIES))
        row["x_torch_fused"] = base and float(f"{row['p50_us'] / base:.6g}")
    return rows


def draw(rows, path):
    """Draw, for each backend and case, the time of each contender."""

    def title(backend, n, arrays, of_case):
        return f"AMP step, {backend}\n{n:,} elements in {arrays:,} array{'s' * (arrays > 1)}"

    panels = {"width": 6.5, "height": 2.6, "columns": ("elements", "arrays")}
    report.draw_bars(rows, path, title, "median time of a step", **panels, log=False)


if __name__ == "__main__":
    sizes = dict.fromkeys(("CPU", "CUDA"), "2e7,gpt2")
    help_ = "elements of one array, gpt2 or COUNTxSIZE"
    report.main("amp_step", __doc__, measure_rows, draw, seconds=20.0, sizes=sizes, sizes_help=help_, size=shapes_of)
