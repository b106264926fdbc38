"""The rule in kernels of users, launched by CuPy and by Numba CUDA: gradient and update in one kernel."""

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, state
from rules import OPTIONS, in_adam_step, over_elements

import gpuadam

pytestmark = pytest.mark.gpu

N = 1003
NAMES = ("adam", "all with adamw, and ema")


def raw_kernel(cp, rule):
    """Return a RawKernel as a function of target, the arrays of the results, and the step."""
    kind = {"float32": "float", "float64": "double"}[rule.dtype.name]
    pointers = ", ".join(f"{kind}* {name}" for name in rule.arguments if name != "grad")
    values = ", ".join("param[i] - target[i]" if name == "grad" else f"{name}[i]" for name in rule.arguments)
    text = f"""
        extern "C" __global__ void fit(const {kind}* target, {pointers}, int n, adam::Scalars s) {{
            const int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) adam::update({values}, s);
        }}"""
    kernel = cp.RawKernel(rule.for_cuda_c("adam") + text, "fit")

    def run(target, arrays, step):
        kernel((-(-N // 128),), (128,), (target, *arrays, np.int32(N), rule.struct(step)))

    return run


def elementwise_kernel(cp, rule):
    parameters, s = rule.for_elementwise()
    values = ", ".join("param - target" if name == "grad" else name for name in rule.arguments)
    results = ", ".join(f"T {name}" for name in rule.arguments if name != "grad")
    kernel = cp.ElementwiseKernel(
        f"T target, {parameters}", results, f"gpuadam::update({values}, {s})", "fit", preamble=rule.for_cuda_c()
    )
    return lambda target, arrays, step: kernel(target, *rule.scalars(step), *arrays)


def numba_kernel(cp, rule):
    from numba import cuda

    loop = "    i = cuda.grid(1)\n    if i < param.size:\n        "
    kernel = cuda.jit(over_elements(rule, rule.for_cuda_jit(), loop, grad="param[i] - grad[i]", cuda=cuda))

    def run(target, arrays, step):
        kernel[-(-N // 128), 128](arrays[0], target, *arrays[1:], rule.scalars(step))

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [raw_kernel, elementwise_kernel, numba_kernel], ids=lambda make: make.__name__)
def test_gradient_and_update_in_one_kernel_give_adam_steps_bits(cp, make, name, dtype):
    options, rule = OPTIONS[name], gpuadam.Rule(dtype, **OPTIONS[name])
    run = make(cp, rule)
    param, target, m, v, max_v = state(N, dtype, True)
    results = [{"param": param, "m": m, "v": v, "max_v": max_v, "ema": param}[x] for x in rule.arguments if x != "grad"]
    arrays = [cp.asarray(array) for array in results]
    for step in range(1, 5):
        expected = in_adam_step(options, [results[0], results[0] - target, *results[1:]], rule.arguments, step)
        run(cp.asarray(target), arrays, step)
        results = [cp.asnumpy(array) for array in arrays]
        assert_same_bits(results, [expected[0], *expected[2:]], f"in step {step}")
