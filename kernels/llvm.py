"""What emitters of LLVM for Numba share: its types, inline PTX, and functions for Numba that are made of emitters.

An *emitter* takes an llvmlite builder and LLVM values, appends instructions, and returns the LLVM value of its result.
"""

import inspect

from llvmlite import ir

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
U8, U16, U32, U64 = (ir.IntType(width) for width in (8, 16, 32, 64))  # LLVM's integers have no sign: instructions do
FLOATS = {4: F32, 8: F64}  # by their bytes
INTS = {1: U8, 2: U16, 4: U32, 8: U64}


def function(intrinsic, name, emit, signature, n=1):
    """Return a function that code compiled by Numba can call, made of an emitter.

    intrinsic: `numba.extending.intrinsic`, or the one of Numba's CUDA target. signature: Numba's, or a function
    from the types of n arguments to one. emit: takes and returns tuples as lists, also within each other; it returns None for a
    function without a result.
    """
    fixed = hasattr(signature, "args")
    names = [f"x{k}" for k in range(len(signature.args) if fixed else n)]

    def codegen(context, builder, signature, args):
        values = [_as_lists(builder, kind, value) for kind, value in zip(signature.args, args, strict=True)]
        return _as_tuples(context, builder, signature.return_type, emit(builder, *values))

    def define(typingctx, *arguments):
        return signature if fixed else signature(*arguments), codegen

    # Numba takes an intrinsic's parameters from here, and refuses *arguments
    parameters = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in ("typingctx", *names)]
    define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    define.__name__ = define.__qualname__ = name
    return intrinsic(define)


def _as_lists(builder, kind, value):
    parts = getattr(kind, "types", None)  # which only tuples have
    return [_as_lists(builder, x, builder.extract_value(value, k)) for k, x in enumerate(parts)] if parts else value


def _as_tuples(context, builder, kind, value):
    if value is None:
        return context.get_dummy_value()
    if isinstance(value, list):
        parts = [_as_tuples(context, builder, x, part) for x, part in zip(kind.types, value, strict=True)]
        return context.make_tuple(builder, kind, parts)
    return value


def vector(element, lanes):
    return element if lanes == 1 else ir.VectorType(element, lanes)


def pointer(builder, address, element, addrspace):
    """Return an int64 as a pointer. addrspace: 1 is global memory of a GPU; without it accesses would be generic ones."""
    return builder.inttoptr(address, ir.PointerType(element, addrspace=addrspace))


def assembly(builder, text, constraints, result, *operands):
    kind = ir.FunctionType(result, [x.type for x in operands])
    return builder.call(ir.InlineAsm(kind, text, constraints), operands)


def nvvm_rn(builder):
    """Return a function that calls NVVM's rounded operations, "add" or "mul", which no later pass fuses."""

    def call(operation, x, y):
        name = f"llvm.nvvm.{operation}.rn.{'f' if x.type == F32 else 'd'}"
        called = builder.module.globals.get(name)
        if called is None:
            called = ir.Function(builder.module, ir.FunctionType(x.type, [x.type, x.type]), name)
        return builder.call(called, [x, y])

    return call
