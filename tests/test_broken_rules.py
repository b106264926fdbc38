"""The evidence can fail: a rule that is broken in one backend is found, each way of breaking it by itself."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import different_bits, form_and_scalars, wide_state
from ptx import Refused

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpuadam.kernels import adam, cupy_kernels, numba_cuda_kernels, primitives  # noqa: E402
from gpuadam.kernels.cpu_backend import backend as numba_cpu  # noqa: E402
from gpuadam.kernels.view import on_cpu  # noqa: E402

ARCH = "sm_100"


class BrokenRule:
    """The rule with a piece of its CUDA C replaced."""

    def __init__(self, old, new, times=1):
        self.old, self.new = old, new
        self.__name__ = "broken"
        assert adam.IN_CUDA_C.count(old) >= times

    def in_cuda_c(self, form):
        return adam.in_cuda_c(form).replace(self.old, self.new)


def found(compiler, form, scalars, text):
    """Return how the evidence sees that this PTX is wrong, or None."""
    arrays = wide_state(1003, "float32", form.amsgrad, seed=1)
    expected = [None if a is None else a.copy() for a in arrays]
    numba_cpu.launch(form, [on_cpu("", a) for a in expected if a is not None], scalars)
    try:
        kernel = gpu_code.run(compiler, form, ARCH, arrays, scalars, text=text)
    except Refused:
        return "refused"
    except MemoryError:
        return "memory"
    if gpu_code.foreign_operations(kernel, form):
        return "operations"
    different = sum(different_bits(a, b) for a, b in zip(arrays, expected, strict=True) if a is not None)
    return "bits" if different else None


def cupy_text(rule, form, operation=None):
    kernel = cupy_kernels.build(rule, form, "contiguous")
    if operation:
        import cupy

        kernel = cupy.ElementwiseKernel(
            kernel_params(kernel, slice(0, kernel.nin)),
            kernel_params(kernel, slice(kernel.nin, kernel.nargs)),
            kernel.operation.replace(*operation),
            "broken",
            preamble=kernel.preamble,
        )
    return gpu_code.compile_cupy(kernel, ARCH).rstrip(b"\0").decode()


def kernel_params(kernel, part):
    return ", ".join(f"{'raw ' if p.raw else ''}{np.dtype(p.dtype)} {p.name}" for p in kernel.params[part])


BREAKS = {
    "nothing": (("fma_", "fma_"), {None}),
    "a dropped flush of m": (("m = zero_below_(zero_below_(m, AMSGRAD ? max_v : v), abs_(m));", ""), {"bits"}),
    "a dropped flush of v": (("    v = zero_below_(v, v);", ""), {"bits"}),
    "m kept where the v that divides is flushed": (("zero_below_(m, AMSGRAD ? max_v : v)", "m"), {"bits"}),
    "m flushed where a v is that does not divide": (("AMSGRAD ? max_v : v)", "v)"), {"bits"}),
    "a plain minus": (("sub_(g, m)", "(g - m)"), {"refused", "operations"}),
    "a plain plus and times": (
        ("fma_(root, inv_sqrt_bias2, eps)", "root * inv_sqrt_bias2 + eps"),
        {"refused", "operations"},
    ),
    "a float64 literal": (
        ("div_(direction, denom)", "T(1.0000000001 * direction / denom)"),
        {"refused", "operations"},
    ),
    "a flipped sign bit": (("neg_(v)", "__uint_as_float(__float_as_uint(v) ^ 0x80000000u)"), {"refused", "operations"}),
    "a swapped scalar": (("fma_(w1, sub_(g, m)", "fma_(w2, sub_(g, m)"), {"bits"}),
    "the far arm of lerp": (("NEAR1 ? m : g", "NEAR1 ? g : m"), {"bits"}),
    "a maximum that drops NaN": (("larger_(max_v, v_hat)", "fmaxf(max_v, v_hat)"), {"refused", "operations"}),
    "a flush before max_v": (("T v_hat =", "v = zero_below_(v, v); T v_hat ="), {"bits"}),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_rule_broken_in_cuda_c_is_found(what):
    (old, new), ways = BREAKS[what]
    form, scalars = form_and_scalars("amsgrad", "float32", eps=1e-30)
    assert found("cupy", form, scalars, cupy_text(BrokenRule(old, new), form)) in ways


BREAKS_OF_OTHERS = {
    # the row of FORMS, and what is replaced by what
    "nothing of NAdam": ("nadam", ("fma_", "fma_"), {None}),
    "NAdam's shares in each other's place": (
        "nadam",
        ("fma_(of_g, g, mul_(of_m, m))", "fma_(of_m, g, mul_(of_g, m))"),
        {"bits"},
    ),
    "NAdam's direction without g": ("nadam", ("fma_(of_g, g, mul_(of_m, m))", "mul_(of_m, m)"), {"bits"}),
    "nothing of AdaMax": ("adamax", ("fma_", "fma_"), {None}),
    "AdaMax without eps": ("adamax", ("add_(length_(g), eps)", "length_(g)"), {"bits"}),
    "AdaMax of a signed gradient": ("adamax", ("add_(length_(g), eps)", "add_(g, eps)"), {"bits"}),
    "AdaMax with Adam's decay": ("adamax", ("mul_(w2, v)", "mul_(w1, v)"), {"bits"}),
    "nothing of optax": ("optax", ("fma_", "fma_"), {None}),
    "optax's m kept where only the corrected v is not flushed": ("optax", ("AMSGRAD ? max_v : v", "max_v"), {"bits"}),
    "optax without eps_root": ("optax", ("add_(max_v, eps_root)", "max_v"), {"bits"}),
    "optax's eps and eps_root in each other's place": (
        "optax",
        ("add_(sqrt_(add_(max_v, eps_root)), eps)", "add_(sqrt_(add_(max_v, eps)), eps_root)"),
        {"bits"},
    ),
    "optax's AMSGrad of the uncorrected v": ("optax with amsgrad", ("larger_(max_v, v_hat)", "larger_(max_v, v)"), {"bits"}),
    "a magnitude by a ternary": ("adamax", ("length_(g)", "(g < 0 ? -g : g)"), {"refused", "operations", "bits"}),
}


@pytest.mark.parametrize("what", BREAKS_OF_OTHERS)
def test_a_broken_rule_of_another_algorithm_is_found(what):
    name, (old, new), ways = BREAKS_OF_OTHERS[what]
    form, scalars = form_and_scalars(name, "float32")
    assert found("cupy", form, scalars, cupy_text(BrokenRule(old, new), form)) in ways


@pytest.mark.parametrize(
    "what, operation, ways",
    [
        ("an off-by-one tail", ("k < head ? k : k + vectors * LANES", "k < head ? k : k + vectors * LANES - 1"), {"bits"}),
        ("a tail past the end", ("k + vectors * LANES", "k + vectors * LANES + 1"), {"memory"}),
        ("a vector off its boundary", ("head + j * LANES", "head + j * LANES + 1"), {"memory"}),
        ("a vector body one short", ("j < vectors", "j < vectors - 1"), {"bits", "memory"}),
    ],
)
def test_a_broken_cover_of_the_elements_is_found(what, operation, ways):
    form, scalars = form_and_scalars("adam", "float32")
    assert found("cupy", form, scalars, cupy_text(adam, form, operation)) in ways


def _keep(b, rn, x, y):
    return x


def _contracted_sub(b, rn, x, y):
    return b.fsub(x, y)


def _dropping_max(b, rn, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@pytest.mark.parametrize(
    "what, primitive, emit, ways",
    [
        ("nothing", "fma", primitives.PRIMITIVES["fma"].llvm, {None}),
        ("a dropped flush", "zero_below", _keep, {"bits"}),
        ("a minus that ptxas may fuse", "sub", _contracted_sub, {"refused"}),
        ("a maximum that drops NaN", "larger", _dropping_max, {"bits"}),
    ],
)
def test_a_primitive_broken_in_numba_cuda_is_found(monkeypatch, what, primitive, emit, ways):
    form, scalars = form_and_scalars("amsgrad", "float32", eps=1e-30)
    found(  # the CPU's kernel is compiled before anything is broken
        "numba-cuda", form, scalars, gpu_code.ptx("numba-cuda", form, ARCH)
    )
    monkeypatch.setitem(primitives.PRIMITIVES, primitive, primitives.PRIMITIVES[primitive]._replace(llvm=emit))
    text = gpu_code.compile_numba(
        numba_cuda_kernels.build(adam, form, "contiguous"), gpu_code.signature(form, "contiguous", False), ARCH
    )
    assert found("numba-cuda", form, scalars, text) in ways


def test_a_swapped_scalar_in_numbas_rule_is_found():
    form, scalars = form_and_scalars("adam", "float32")

    class Swapped:
        __name__ = "swapped"

        def in_python(self, form, op):
            update = adam.in_python(form, op)
            assert adam.scalar_names(form)[2:4] == ("w1", "w2")

            def swapped(param, grad, m, v, max_v, ema, lr_scale, where, low, high, s):
                of_arrays = param, grad, m, v, max_v, ema, lr_scale, where, low, high
                return update(*of_arrays, (s[0], s[1], s[3], s[2], s[4], s[5], s[6]))

            return swapped

    text = gpu_code.compile_numba(
        numba_cuda_kernels.build(Swapped(), form, "contiguous"), gpu_code.signature(form, "contiguous", False), ARCH
    )
    assert found("numba-cuda", form, scalars, text) == "bits"


def test_the_page_says_how_many_ways_there_are():
    ways = [ways for _, ways in BREAKS.values()] + [ways for *_, ways in BREAKS_OF_OTHERS.values()]
    for test in (test_a_broken_cover_of_the_elements_is_found, test_a_primitive_broken_in_numba_cuda_is_found):
        ways += [case[-1] for case in test.pytestmark[0].args[1]]
    page = (Path(__file__).parent.parent / "gpuadam/guide/how_exact.py").read_text(encoding="utf-8")
    (said,) = re.findall(r"broken in (\d+) ways", page)
    assert int(said) == sum(None not in of_one for of_one in ways) + 1  # and the swapped scalar
