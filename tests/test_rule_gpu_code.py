"""The rule in kernels of users for GPUs, compiled as CuPy and Numba compile them and executed on the host."""

import numpy as np
import pytest
from cases import ARCHITECTURES, DTYPES, KEY_FORMS, assert_same_bits, few, form_and_scalars
from rules import KEYS, OPTIONS, arrays_of, assert_steps, in_adam_step, over_elements

import gpuadam

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from numba import types  # noqa: E402
from numba.core.errors import TypingError  # noqa: E402

BLOCK = 128
C_TYPES = {"float32": "float", "float64": "double"}
PLACE = "const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;"
GRID = "    i = cuda.grid(1)\n    if i < param.size:\n        "


def parameters_of(rule, prefix=""):
    return ", ".join(f"{C_TYPES[rule.dtype.name]}* {prefix}{name}" for name in rule.arguments)


def elements_of(rule, prefix=""):
    return ", ".join(f"{prefix}{name}[i]" for name in rule.arguments)


def of_text(compiler, arch, text, *options):
    """Return a kernel in CUDA C, and a function that runs it with arrays, their size, which it adds, and structs."""
    options = ["-std=c++17", *options, "-ftz=true", f"-arch={arch.replace('sm', 'compute')}"]  # as CuPy appends it
    ptx = gpu_code.nvrtc(12 if compiler == "cupy-cuda12" else 13).compile(text, options, "PTX")
    kernel = gpu_code.loaded(ptx.rstrip(b"\0").decode())

    def run(arrays, *structs):
        n = arrays[0].size
        parameters = gpu_code.packed(kernel, *(a.ctypes.data for a in arrays), n, *(s.tobytes() for s in structs))
        kernel.run(-(-n // BLOCK), BLOCK, parameters, gpu_code.memory_of(arrays))

    return kernel, run


def of_cuda_c(compiler, arch, rule, *options):
    """Return a kernel that updates arrays, one element a thread, and a function that runs it with arrays and scalars."""
    text = f"""{rule.for_cuda_c()}
        extern "C" __global__ void step({parameters_of(rule)}, long long n, gpuadam::Scalars s) {{
            {PLACE}
            if (i < n) gpuadam::update({elements_of(rule)}, s);
        }}"""
    kernel, run = of_text(compiler, arch, text, *options)
    return kernel, lambda arrays, s: run(arrays, np.array(s))


def of_numba(arch, rule, grad="grad[i]", **options):
    """Return the same of Numba CUDA. options: of cuda.jit."""
    kernel = over_elements(rule, rule.for_cuda_jit(), GRID, grad, cuda=gpu_code.cuda)
    real = __import__("numba").from_dtype(rule.dtype)
    signature = *[types.Array(real, 1, "C")] * len(rule.arguments), types.UniTuple(real, len(rule.scalars(1)))
    kernel = gpu_code.loaded(gpu_code.compile_numba(kernel, signature, arch, **options))

    def run(arrays, s):
        n = arrays[0].size
        of_arrays = tuple((0, 0, n, a.itemsize, a.ctypes.data, n, a.itemsize) for a in arrays)
        kernel.run(-(-n // BLOCK), BLOCK, gpu_code.packed(kernel, of_arrays, s), gpu_code.memory_of(arrays))

    return kernel, run


def compiled(compiler, arch, rule, fast_math=False):
    """Return the same of either."""
    if compiler == "numba-cuda":
        return of_numba(arch, rule, fastmath=fast_math)
    return of_cuda_c(compiler, arch, rule, *["--use_fast_math"] * fast_math)


# each option in float32, and two that stand for all in float64
NAMES_AND_DTYPES = [(name, "float32") for name in OPTIONS if name not in KEYS] + [
    (KEYS[0], "float64"), (KEYS[1], "float32"),
]  # fmt: skip


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("of_rule", few(NAMES_AND_DTYPES, *NAMES_AND_DTYPES[-2:]), ids=" ".join)
def test_a_kernel_gives_adam_steps_bits(compiler, of_rule):
    name, dtype = of_rule
    rule, arch = gpuadam.Rule(dtype, **OPTIONS[name]), ARCHITECTURES[list(OPTIONS).index(name) % len(ARCHITECTURES)]
    assert_steps(OPTIONS[name], rule, compiled(compiler, arch, rule)[1])


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("arch", ["sm_75", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_math_of_a_kernel_does_not_reach_the_update(compiler, arch, dtype):
    """Without the inline PTX NVVM would flush subnormals, and divide by div.full."""
    rule = gpuadam.Rule(dtype, **OPTIONS["all with adamw"])
    assert_steps(OPTIONS["all with adamw"], rule, compiled(compiler, arch, rule, fast_math=True)[1])


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KEY_FORMS)
def test_a_part_that_is_not_used_costs_nothing(compiler, name, dtype):
    kernel, _ = compiled(compiler, "sm_90", gpuadam.Rule(dtype, **OPTIONS[name]))
    form, _ = form_and_scalars(name, dtype)
    assert gpu_code.rounded_operations(kernel) == gpu_code.contract_operations(form)
    assert gpu_code.foreign_operations(kernel, form) == []


def test_a_number_of_another_type_is_refused_when_a_kernel_is_compiled():
    rule = gpuadam.Rule("float32")
    text = (
        'extern "C" __global__ void step(float* x, gpuadam::Scalars s) { gpuadam::update(x[0], 2.0 * x[1], x[2], x[3], s); }'
    )
    with pytest.raises(RuntimeError, match="grad must be a float, as the rule computes: cast it, and the literals in it"):
        of_text("cupy", "sm_90", rule.for_cuda_c() + text)
    with pytest.raises(TypingError, match=r"grad is float64, and must be float32: float32\(grad\)"):
        of_numba("sm_90", rule, grad="2.0 * grad[i]")


def test_two_rules_in_one_kernel_do_not_meet():
    rules = [gpuadam.Rule("float32", **OPTIONS["all with l2"]), gpuadam.Rule("float64", **OPTIONS["ema"])]
    names = ["first", "second"]
    pairs = list(zip(names, rules, strict=True))
    calls = "".join(f"{name}::update({elements_of(rule, name)}, of_{name});\n" for name, rule in pairs)
    text = (
        "".join(rule.for_cuda_c(name) for name, rule in pairs)
        + f"""
        extern "C" __global__ void step({", ".join(parameters_of(rule, name) for name, rule in pairs)}, long long n,
                                        first::Scalars of_first, second::Scalars of_second) {{
            {PLACE}
            if (i < n) {{ {calls} }}
        }}"""
    )
    arrays = [arrays_of(rule) for rule in rules]
    expected = [
        in_adam_step(OPTIONS[x], a, rule.arguments, 2)
        for x, a, rule in zip(("all with l2", "ema"), arrays, rules, strict=True)
    ]
    _, run = of_text("cupy", "sm_90", text)
    run([*arrays[0], *arrays[1]], *(np.array(rule.scalars(2)) for rule in rules))
    for a, b in zip(arrays, expected, strict=True):
        assert_same_bits(a, b)
