"""The rule in kernels of users, for Numba: functions of one element that @njit and @cuda.jit code calls.

`numba_cuda_kernels.py` builds those of @cuda.jit code.
"""

import functools

from numba import from_dtype, njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from gpuadam.kernels import adam, compiled_cache, llvm, primitives
from gpuadam.kernels.element import arguments
from gpuadam.kernels.operands import RESULTS, VALUES


@functools.cache
def build(form):
    """Return the update of a form as a function for @njit code."""
    # A function inherits options, such as fastmath, from the code that first calls it; so both are set here.
    compiled = njit(error_model="numpy", fastmath=False)
    rule = compiled(compiled_cache.named(adam.in_python(form, primitives.for_numba(intrinsic)), adam.__name__, form))
    return compiled(compiled_cache.named(in_python(form, intrinsic, rule, TypingError), adam.__name__, form))


def in_python(form, intrinsic, rule, error):
    """Return the update of a form, for Numba to compile. rule: what adam.in_python returns, compiled. error: of wrong types."""
    given, real = arguments(form), from_dtype(form.dtype)
    scalars = types.UniTuple(real, len(adam.scalar_names(form)))
    checked = {
        f"as_{name}": _of_type(intrinsic, real, error, f"{name} is {{}}, and must be {form.dtype}: {form.dtype}({name})")
        for name in given
    }
    checked["as_s"] = _of_type(intrinsic, scalars, error, "s is {}, and must be what scalars() of the same Rule returns")
    values = ", ".join(f"as_{name}({name})" if name in given else "param" for name in VALUES)
    results = ", ".join(f"new[{RESULTS.index(name)}]" for name in given if name != "grad")
    text = f"""
def update({", ".join(given)}, s):
    new = rule({values}, as_s(s))
    return {results}
"""
    namespace = {"__name__": __name__, "rule": rule} | checked
    exec(compile(text, "<gpuadam.Rule>", "exec"), namespace)
    return namespace["update"]


def _of_type(intrinsic, kind, error, message):
    """Return a function that returns its argument, and does not compile for one of another type."""

    def signature(x):
        if x != kind:
            raise error(message.format(x))
        return kind(x)

    return llvm.function(intrinsic, "of_type", lambda b, x: x, signature)
