"""An element of each format that a norm takes, for code that Numba compiles. In CUDA C the same is in `norm_cuda_c.py`."""

from typing import Any

from llvmlite import ir
from numba import types

from gpuadam.kernels import primitives

RAW = {"float64": types.float64, "float32": types.float32, "bfloat16": types.uint16, "float16": types.uint16}  # in memory


def to_float64(b, format, x, on_gpu):
    """Return an element as a double, which is exact. b: an llvmlite builder."""

    def convert(name, x):
        emit: Any = primitives.CONVERSIONS[name][2]
        return emit(b, on_gpu, x)

    if format in ("bfloat16", "float16"):
        x = convert(f"from_{format}", b.zext(x, ir.IntType(32)))
    return x if format == "float64" else convert("widened", x)


def widened(intrinsic, format, on_gpu):
    """Return a function from an element as it is in memory to a float64."""

    @intrinsic
    def function(typingctx, x):
        def codegen(context, builder, signature, args):
            return to_float64(builder, format, args[0], on_gpu)

        return types.float64(RAW[format]), codegen

    return function
