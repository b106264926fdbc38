"""Numbers in memory, for code that Numba compiles on the CPU and on a GPU: loads, stores, and formats as float64.

Addresses are int64. In CUDA C the formats are in `norm_cuda_c.py`.
"""

import functools
from typing import Any

from llvmlite import ir
from numba import types

from gpuadam.kernels import conversions

# how an element of a format is loaded
RAW = {"float64": types.float64, "float32": types.float32, "bfloat16": types.uint16, "float16": types.uint16}


@functools.cache
def load_at(intrinsic, element, addrspace=0, align=None):
    """Return a function from an address to the number there.

    intrinsic: Numba's, or that of its CUDA target. element: the number's type. addrspace: 1 on the CUDA target, for global
    memory, because a pointer of no address space makes generic accesses. align: of the address, by default the number's bytes.
    """

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.PointerType(context.get_value_type(element), addrspace=addrspace))
            return builder.load(pointer, align=align or element.bitwidth // 8)

        return element(types.int64), codegen

    return load


@functools.cache
def store_at(intrinsic, element, addrspace=0):
    """Return a function that stores a number at an address. The arguments are those of `load_at`."""

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], ir.PointerType(context.get_value_type(element), addrspace=addrspace))
            builder.store(args[1], pointer, align=element.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(types.int64, element), codegen

    return store


def written_out(head, item, n, **names):
    """Return a function whose value is the tuple of item for k = 0 ... n - 1: Numba has no loop that makes a tuple.

    head: its arguments. item: the text of an expression, with {k}. names: of the functions that the text calls.

    >>> written_out("x, y", "x + {k} * y", 3)(1, 10)
    (1, 11, 21)
    """
    text = f"def written_out({head}):\n    return ({''.join(item.format(k=k) + ', ' for k in range(n))})"
    exec(compile(text, __file__, "exec"), names)
    return names["written_out"]


def to_float64(b, format, x, on_gpu):
    """Return an element as a double, which is exact. b: an llvmlite builder."""

    def convert(name, x):
        emit: Any = conversions.CONVERSIONS[name].llvm
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
