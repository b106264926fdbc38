"""The variants of an update and the data that the tests share."""

import numpy as np
import pytest

from gpuadam import hyperparameters, testing
from gpuadam.kernels import cpu_strided
from gpuadam.kernels.operands import Arrays, operands_of_form
from gpuadam.kernels.view import on_cpu
from gpuadam.testing import bits

DTYPES = ("float32", "float64")

exhaustive = False  # whether pytest was given --exhaustive; set by conftest.py


def examples(few, many):
    """Return how many examples of something a test looks at. A test that asks uses the fixture of this name."""
    return many if exhaustive else few


def few(values, *kept):
    """Return the values of a parameter of which only those `kept` are in the short run, the others behind --exhaustive."""
    assert all(value in values for value in kept)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


# What the GPU code is compiled for, and by what: NVRTC of CUDA 13 and of CUDA 12 for CuPy, NVVM for Numba.
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
COMPILERS = ("cupy", "cupy-cuda12", "numba-cuda")

# Every form: what is asked of `adam_step`, amsgrad standing for max_v. The betas choose the arms of lerp. RAdam rectifies from
# the sixth step on at the earliest, and never if beta2 is 0.5.
FORMS = {
    "adam": {},
    "l2": {"weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1, "decoupled": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "grad_scale": {"grad_scale": 0.3},
    "clip_value": {"clip_value": 0.5},
    "bounds": {"bounds": (-0.5, 1.0)},
    "from g": {"betas": (0.2, 0.999)},
    "from g*g": {"betas": (0.9, 0.3)},
    "from both": {"betas": (0.0, 0.0)},
    "nadam": {"algorithm": "nadam"},
    "radam": {"algorithm": "radam", "step": 8},
    "radam, before it rectifies": {"algorithm": "radam", "betas": (0.9, 0.5)},
    "adamax": {"algorithm": "adamax"},
    "optax": {"formula": "optax", "eps_root": 1e-12},
    "optax with amsgrad": {"formula": "optax", "amsgrad": True},
    "all with l2": {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "grad_scale": 3.0, "betas": (0.5, 0.5)},
    "all with adamw": {
        "weight_decay": 0.1, "decoupled": True, "amsgrad": True, "grad_scale": 1e-3, "betas": (0.3, 0.4),
        "clip_value": 5e-4, "bounds": (-0.75, 0.75),
    },
}  # fmt: skip

# Between them, every option and every arm. Where a kernel is only compiled once more, these stand for all.
KEY_FORMS = ("adam", "all with l2", "all with adamw")
OTHER_ALGORITHMS = ("nadam", "adamax", "optax")  # whose rule differs from Adam's; RAdam's does not

DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False, "maximize": False}


def form_and_scalars(name, dtype, step=3, **changes):
    """Return (Form, Scalars) of a row of FORMS. dtype: of all arrays, or their formats as `operands.Arrays`."""
    options = DEFAULTS | FORMS[name] | changes
    amsgrad = options.pop("amsgrad", False)
    arrays = dtype if isinstance(dtype, Arrays) else Arrays(*[np.dtype(dtype).name] * 3, amsgrad=amsgrad)
    step = options.pop("step", step)
    return hyperparameters.form_and_scalars(hyperparameters.checked(**options), step, arrays)


def table_of(arrays):
    """Return the table of one update for the kernels of the CPU backend; arrays that are None are left out."""
    used = [a for a in arrays if a is not None]
    return np.array([[used[0].size, 0, 0, *(a.ctypes.data for a in used)]])


def strided_table_of(form, arrays):
    """Likewise the table for its kernel of arrays of any strides."""
    views, written = [on_cpu("", a) for a in arrays if a is not None], [operand.stores for operand in operands_of_form(form)]
    return cpu_strided.table_of(views, written, 0, in_c_order=form.arrays.random)


_IN_MEMORY = []


def in_memory(scalars):
    """Return the address of the scalars of a step, as a kernel of the CPU backend takes them. They stay there."""
    _IN_MEMORY.append(np.array(scalars, np.float64))
    return _IN_MEMORY[-1].ctypes.data


def state(n, dtype="float32", amsgrad=False, seed=0):
    """Return (param, grad, m, v, max_v or None) of ordinary size, after some training."""
    rng = np.random.default_rng(seed)
    param, grad, m = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    v = (rng.standard_normal(n) ** 2).astype(dtype)
    max_v = (v * rng.uniform(0.5, 2, n)).astype(dtype) if amsgrad else None
    return param, grad, m, v, max_v


def wide_state(n, dtype="float32", amsgrad=False, seed=0):
    """Likewise over the whole range of the dtype: subnormals, both zeros, infinities and NaN in every array."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    low, high = np.log(float(info.smallest_subnormal)), np.log(float(info.max))

    def values(signed):
        x = np.exp(rng.uniform(low, high, n)).astype(dtype)
        x = np.where(rng.random(n) < 0.2, (x / info.max * info.smallest_normal).astype(dtype), x)
        if signed:
            x = np.where(rng.random(n) < 0.5, -x, x)
        specials = np.array([0.0, -0.0, np.inf, np.nan, info.smallest_subnormal, info.smallest_normal, info.max], dtype)
        return np.where(rng.random(n) < 0.1, rng.choice(specials, n), x).astype(dtype)

    with np.errstate(under="ignore", over="ignore"):
        param, grad, m, v, max_v = (values(signed) for signed in (True, True, True, False, False))
    return param, grad, m, v, max_v if amsgrad else None


def at_offset(a, offset, gap=32):
    """Return a copy that starts `offset` elements after a 64-byte boundary, amid sentinel bytes, and those bytes."""
    if a is None:
        return None, None
    buffer = np.full(a.nbytes + 64 + 2 * gap + 64 + a.itemsize * 16, 0xA5, "u1")
    start = -buffer.ctypes.data % 64 + 64 + offset * a.itemsize
    placed = buffer[start : start + a.nbytes].view(a.dtype)
    placed[:] = a
    return placed, (buffer, start, start + a.nbytes)


def assert_sentinels(buffer, start, end, name):
    assert (buffer[:start] == 0xA5).all(), f"bytes before {name} were written"
    assert (buffer[end:] == 0xA5).all(), f"bytes after {name} were written"


NAMES = ("param", "grad", "m", "v", "max_v")


def different_bits(a, b):
    """Return in how many elements two arrays differ in their bits; a NaN equals every NaN."""
    return int(bits.different(bits.on_host("the first", a), bits.on_host("the second", b)).sum())


def assert_same_bits(actual, expected, context=""):
    """Compare the arrays of an update, in the order of NAMES; where none is expected, one is not looked at."""
    assert len(actual) == len(expected)
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        if b is not None:
            testing.assert_same_bits(a, b, f"{name} {context}".rstrip())
