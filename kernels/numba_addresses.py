"""Loads and stores of one number at an address, as functions for code that Numba compiles. Addresses are int64."""

import functools

from llvmlite import ir
from numba import types


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
