"""The GPU code of elements of several numbers, executed on the host: the CPU backend's bits, by accesses of 16 bytes."""

import numpy as np
import pytest
from cases import DEFAULTS, assert_sentinels, at_offset, few, in_memory

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpuadam import hyperparameters  # noqa: E402
from gpuadam.kernels import adam, cpu_kernels  # noqa: E402
from gpuadam.kernels.operands import Arrays, lanes_of, operands_of_form  # noqa: E402

KEY = 0x1234567890ABCDEF
CASES = {  # formats, and hyperparameters
    "complex64": (Arrays(numbers=2), {}),
    "complex128, l2 and AMSGrad": (Arrays(*["float64"] * 3, amsgrad=True, numbers=2), {"weight_decay": 0.1}),
    "complex64 with bfloat16 state": (Arrays("float32", "float32", "bfloat16", numbers=2), {"grad_scale": -0.3}),
    "AdaMax where a gradient is": (Arrays(where="nonzero", numbers=2), {"algorithm": "adamax"}),
    "the change of three": (
        Arrays(change="float32", where="array", lr_scale="float32", low="float32", numbers=3),
        {"weight_decay": 0.1, "decoupled": True},
    ),
    "three with copies and bounds": (
        Arrays(param_copy="bfloat16", ema="float32", high="float32", numbers=3),
        {"clip_value": 0.5, "bounds": (-0.5, None), "betas": (0.2, 0.3)},
    ),
    "four of bfloat16, rounded randomly": (Arrays(*["bfloat16"] * 3, stochastic=True, numbers=4), {}),
    "bounds of arrays": (Arrays(low="float32", high="float32"), {}),
}


SHORT = "three with copies and bounds", "complex64 with bfloat16 state", "the change of three"


def form_and_scalars(what):
    arrays, options = CASES[what]
    return hyperparameters.form_and_scalars(hyperparameters.checked(**DEFAULTS | {"lr": 0.1} | options), 3, arrays)


def made(form, n):
    """Return an array for each operand, of n elements; the numbers of an element are in a last dimension."""
    rng, arrays = np.random.default_rng(0), []
    for operand in operands_of_form(form):
        shape = (n, operand.numbers) if operand.numbers > 1 else (n,)
        if operand.format == "uint8":
            x = rng.integers(0, 2, shape).astype("u1")
        else:
            x = rng.standard_normal(shape) * (rng.random(shape) < 0.8)
            x = x**2 if operand.name in ("v", "max_v") else x
            x = x.astype("f4") if operand.format == "bfloat16" else x.astype(operand.format)
            x = (x.view("u4") >> 16).astype("u2") if operand.format == "bfloat16" else x
        arrays.append(x)
    return arrays


def on_cpu(form, arrays, scalars):
    """Return what the CPU backend makes of arrays."""
    new = [a.copy() for a in arrays]
    n = len(new[0])
    table = np.array([[n, 0, 0, *(a.ctypes.data for a in new)]])
    cpu_kernels.build(adam, form, "serial")(table, 0, n, KEY, in_memory(scalars))
    return new


def assert_same(form, found, expected):
    for operand, one, other in zip(operands_of_form(form), found, expected, strict=True):
        bits = f"u{one.itemsize}"
        assert (np.ascontiguousarray(one).view(bits) == other.view(bits)).all(), operand.name


@pytest.mark.in_short()
@pytest.mark.parametrize(
    "what", few(CASES, "complex64 with bfloat16 state", "three with copies and bounds", "the change of three")
)
@pytest.mark.parametrize("loop", ["contiguous", "strided", "table"])
def test_vectors_have_the_cpu_backends_bits(compiler, what, loop):
    form, scalars = form_and_scalars(what)
    arrays = made(form, 1003)
    expected = on_cpu(form, arrays, scalars)
    if loop == "strided":
        found = [np.repeat(a, 2, axis=0)[::2] for a in arrays]
        gpu_code.run_strided(compiler, form, "sm_90", found, scalars, key=KEY)
    else:
        guarded = [at_offset(a.reshape(-1), 4) for a in arrays]
        found = [flat.reshape(a.shape) for (flat, _), a in zip(guarded, arrays, strict=True)]
        if loop == "contiguous":
            gpu_code.run(compiler, form, "sm_90", found, scalars, key=KEY)
        else:
            other = [a.copy() for a in arrays]
            memory = gpu_code.memory_of([*found, *other])
            gpu_code.run_table(compiler, form, "sm_90", [found, other], scalars, memory, key=KEY)
            assert_same(form, other, expected)
        for operand, (_, guard) in zip(operands_of_form(form), guarded, strict=True):
            assert_sentinels(*guard, operand.name)
    assert_same(form, found, expected)


@pytest.mark.in_short("what")
@pytest.mark.parametrize(
    "what", few(["complex64", "three with copies and bounds", "four of bfloat16, rounded randomly"], "complex64")
)
def test_a_thread_takes_16_bytes_at_once(compiler, what):
    form, scalars = form_and_scalars(what)
    arrays = [at_offset(a.reshape(-1), 0)[0].reshape(a.shape) for a in made(form, 1024)]
    kernel, lanes = gpu_code.run(compiler, form, "sm_90", arrays, scalars, key=KEY), lanes_of(form)
    moved = sum(o.itemsize * lanes * (o.loads + o.stores) for o in operands_of_form(form))
    narrow = sum(o.itemsize * lanes % 16 for o in operands_of_form(form))  # a copy of three bfloat16
    of_16 = sum(
        n
        for opcode, n in kernel.opcodes.items()
        if opcode.startswith(("ld.global.v", "st.global.v")) and int(opcode[-2:]) * int(opcode.split(".v")[1][0]) == 128
    )
    assert 16 * of_16 == moved - 3 * narrow, kernel.opcodes
