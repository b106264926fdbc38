"""The operations a rule may use: one row each, as LLVM for Numba and as PTX for CuPy's CUDA C.

A row is one IEEE-754 operation, rounded to nearest even, with subnormals kept. Nothing else may touch a float in a rule:

- CuPy appends `-ftz=true` to every compile, and the optimiser may then turn a C operator, a flipped sign bit or a
  ternary of two floats into an instruction that flushes subnormals (it does so on some architectures and not on others).
  Inline PTX is left as written.
- Numba's CUDA target contracts `a * b + c`. The `llvm.nvvm.*.rn` forms are never contracted, nor are the `.rn`
  instructions that they become.
- `error_model` and NaN handling differ between Numba's operators on the CPU and CUDA. LLVM instructions do not.
"""

from types import SimpleNamespace

import numpy as np

# The smallest normal number, and zero, as the bits that PTX takes.
PTX_TYPES = {
    np.dtype("float32"): {"t": "f32", "u": "u32", "b": "b32", "r": "f", "tiny": "0f00800000", "zero": "0f00000000"},
    np.dtype("float64"): {
        "t": "f64",
        "u": "u64",
        "b": "b64",
        "r": "d",
        "tiny": "0d0010000000000000",
        "zero": "0d0000000000000000",
    },
}


# Each emitter takes an llvmlite builder and operands of one float type and returns the result. `rn` names what differs on
# the CUDA target: there add, sub and mul are calls that no later pass may fuse.
def _fma(b, rn, x, y, z):
    return b.fma(x, y, z)


def _add(b, rn, x, y):
    return rn("add", x, y) if rn else b.fadd(x, y)


def _sub(b, rn, x, y):
    return rn("add", x, _neg(b, rn, y)) if rn else b.fsub(x, y)


def _mul(b, rn, x, y):
    return rn("mul", x, y) if rn else b.fmul(x, y)


def _div(b, rn, x, y):
    return b.fdiv(x, y)


def _sqrt(b, rn, x):
    return b.call(b.module.declare_intrinsic("llvm.sqrt", [x.type]), [x])


def _neg(b, rn, x):
    return b.fsub(x.type(-0.0), x)  # the same bits; NVVM's older dialect of LLVM has no fneg


def _abs(b, rn, x):
    bits = _int_type(x)  # NVVM has no llvm.fabs
    return b.bitcast(b.and_(b.bitcast(x, bits), bits((1 << (bits.width - 1)) - 1)), x.type)


def _larger(b, rn, x, y):
    number, bits = x.type, _int_type(x)
    x, y = b.bitcast(_add(b, rn, x, number(0.0)), bits), b.bitcast(y, bits)
    return b.bitcast(b.select(b.icmp_unsigned(">", x, y), x, y), number)


def _zero_below(b, rn, x, y):
    return b.select(b.fcmp_ordered("<", y, y.type(_tiny(y))), x.type(0.0), x)


PRIMITIVES = {
    # name: (LLVM for Numba, PTX for CUDA C: %0 is the result, %1 ... the operands)
    "fma": (_fma, "fma.rn.{t} %0, %1, %2, %3;"),  # x * y + z, rounded once
    "add": (_add, "add.rn.{t} %0, %1, %2;"),
    "sub": (_sub, "sub.rn.{t} %0, %1, %2;"),
    "mul": (_mul, "mul.rn.{t} %0, %1, %2;"),
    "div": (_div, "div.rn.{t} %0, %1, %2;"),
    "sqrt": (_sqrt, "sqrt.rn.{t} %0, %1;"),
    "neg": (_neg, "neg.{t} %0, %1;"),
    "abs": (_abs, "abs.{t} %0, %1;"),
    # The larger of two numbers that are not negative; a NaN wins. As unsigned integers such floats are in the same order
    # and every NaN is above infinity. The sum with +0 clears the sign of a -0, which would win as well. `max.NaN` would be
    # one instruction for both, but sm_75 has none.
    "larger": (
        _larger,
        "{{ .reg .{t} z; .reg .{b} x, y; add.rn.{t} z, %1, {zero}; mov.{b} x, z; mov.{b} y, %2;"
        " max.{u} x, x, y; mov.{b} %0, x; }}",
    ),
    # +0 where y is below the smallest normal number, else x. False for NaN, so a NaN stays.
    "zero_below": (_zero_below, "{{ .reg .pred p; setp.lt.{t} p, %2, {tiny}; selp.{t} %0, {zero}, %1, p; }}"),
}


def for_numba(intrinsic, contracts=False):
    """Return the primitives as functions that a rule in Python can call.

    intrinsic: `numba.extending.intrinsic`, or the one of Numba's CUDA target.
    contracts: whether the target fuses a bare product with a bare sum, so that it has to be told not to.
    """
    return SimpleNamespace(**{name: _numba(intrinsic, name, emit, contracts) for name, (emit, _) in PRIMITIVES.items()})


def _numba(intrinsic, name, emit, contracts):
    # Numba reads the number of operands off the signature, so there is one wrapper for each.
    def codegen(context, builder, signature, args):
        rn = _nvvm_rn(builder) if contracts else None
        return emit(builder, rn, *args)

    def unary(typingctx, x):
        return x(x), codegen

    def binary(typingctx, x, y):
        return x(x, x), codegen

    def ternary(typingctx, x, y, z):
        return x(x, x, x), codegen

    function = {1: unary, 2: binary, 3: ternary}[emit.__code__.co_argcount - 2]
    function.__name__ = function.__qualname__ = name
    return intrinsic(function)


def _nvvm_rn(builder):
    from llvmlite import ir

    def call(operation, x, y):
        name = f"llvm.nvvm.{operation}.rn.{'f' if isinstance(x.type, ir.FloatType) else 'd'}"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(x.type, [x.type, x.type]), name)
        return builder.call(function, [x, y])

    return call


def _int_type(x):
    from llvmlite import ir

    return ir.IntType(32 if isinstance(x.type, ir.FloatType) else 64)


def _tiny(x):
    return float(np.finfo("float32" if _int_type(x).width == 32 else "float64").smallest_normal)


def for_cuda_c(dtype):
    """Return the primitives as CUDA C: inline functions over `T`, which is float or double."""
    types = PTX_TYPES[np.dtype(dtype)]
    return "".join(_c(name, emit, ptx.format(**types), types["r"]) for name, (emit, ptx) in PRIMITIVES.items())


def _c(name, emit, ptx, r):
    operands = "xyz"[: emit.__code__.co_argcount - 2]
    declared = ", ".join(f"T {x}" for x in operands)
    bound = ", ".join(f'"{r}"({x})' for x in operands)
    return f'__device__ __forceinline__ T {name}_({declared}) {{ T r; asm("{ptx}" : "={r}"(r) : {bound}); return r; }}\n'
