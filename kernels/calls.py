"""Calls that compiled code makes: of Python's functions for C, by name, and of functions of C and of Numba's at an address."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from gpuadam.kernels import llvm


def call_python(b, name, *values, returns=True):
    """Call a function of Python's interface for C, by its name. It takes addresses, and its value is one or nothing."""
    kind = ir.FunctionType(llvm.U64 if returns else ir.VoidType(), [llvm.U64] * len(values))
    value = b.call(cgutils.get_or_insert_function(b.module, kind, name), values)
    return value if returns else None


def of_python(name, n, returns=True):
    """Return such a function of n addresses for compiled code."""

    def emit(b, *values):
        return call_python(b, name, *values, returns=returns)

    result = types.int64 if returns else types.void
    return llvm.function(intrinsic, name, emit, result(*[types.int64] * n))


def c_function(n):
    """Return a function from the address of a function of C, and n addresses that it takes, to the int that it returns."""

    def emit(b, function, *values):
        kind = ir.FunctionType(llvm.U32, [llvm.U64] * n)
        return b.sext(b.call(b.inttoptr(function, kind.as_pointer()), values), llvm.U64)

    return llvm.function(intrinsic, "c_function", emit, types.int64(*[types.int64] * (n + 1)))


def code_of(dispatcher, takes):
    """Return the address of the machine code of a Numba function that has been compiled for arguments of some types."""
    made = dispatcher.overloads[takes]
    return made.library.get_pointer_to_function(made.fndesc.llvm_func_name)


def caller_at(returns, takes, unlocked=False):
    """Return a function that calls a Numba function at an address. It must raise nothing.

    A call by name would make all of the function a part of the code. returns, takes: Numba's types. unlocked: Python's lock is
    let go meanwhile.
    """

    def emit(b, address, *arguments):
        convention = cpu_target.target_context.call_conv
        function = b.inttoptr(address, convention.get_function_type(returns, takes).as_pointer())
        thread = call_python(b, "PyEval_SaveThread") if unlocked else None
        _, value = convention.call_function(b, function, returns, takes, arguments)
        if unlocked:
            call_python(b, "PyEval_RestoreThread", thread, returns=False)
        return value

    return llvm.function(intrinsic, "caller_at", emit, returns(types.int64, *takes))


get_item, clear_error = of_python("PyDict_GetItemWithError", 2), of_python("PyErr_Clear", 0, returns=False)
incref, decref = (of_python(name, 1, returns=False) for name in ("Py_IncRef", "Py_DecRef"))
