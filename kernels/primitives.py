"""The float operations that a rule may use: one row each, as LLVM for Numba and as PTX for CuPy's CUDA C.

A row is one IEEE-754 operation, rounded to nearest even, with subnormals kept. Nothing else may touch a float in a rule:

- CuPy appends `-ftz=true` to every compile, and the optimiser may then turn a C operator, a flipped sign bit or a
  ternary of two floats into an instruction that flushes subnormals (it does so on some architectures and not on others).
  Inline PTX is left as written.
- Numba's CUDA target contracts `a * b + c`. The `llvm.nvvm.*.rn` forms are never contracted, nor are the `.rn`
  instructions that they become.
- `error_model` and NaN handling differ between Numba's operators on the CPU and CUDA. LLVM instructions do not.

Where an element has several numbers, a value of it is a vector, and an operation is made number by number; an operand that is
one number is the same for all. `REDUCTIONS` are the operations that make one number of a vector.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from gpuadam.kernels import llvm


class Operation(NamedTuple):
    """An operation in both languages. Its types are "f32", "f64" and "u32", or "T", the float type of a kernel."""

    result: str
    operands: list[str]
    llvm: Callable  # emitter (builder, rn, *operands); rn is `llvm.nvvm_rn` on the CUDA target, where add and mul are calls
    ptx: str  # %0 is the result, %1 ... the operands; of "T" in braces what TYPES_OF_PTX has


def operation(table, types, *ptx):
    """Put the function below into a table, by its name, beside its PTX. types: "operand, operand -> result"."""
    operands, result = types.split(" -> ")

    def add_row(emit):
        table[emit.__name__.rstrip("_")] = Operation(result, operands.split(", "), emit, " ".join(ptx))
        return emit

    return add_row


PRIMITIVES: dict[str, Operation] = {}
primitive = functools.partial(operation, PRIMITIVES)


@primitive("T, T, T -> T", "fma.rn.{t} %0, %1, %2, %3;")
def fma(b, rn, x, y, z):
    return b.fma(x, y, z)


@primitive("T, T -> T", "add.rn.{t} %0, %1, %2;")
def add(b, rn, x, y):
    return rn("add", x, y) if rn else b.fadd(x, y)


@primitive("T, T -> T", "sub.rn.{t} %0, %1, %2;")
def sub(b, rn, x, y):
    return rn("add", x, neg(b, rn, y)) if rn else b.fsub(x, y)


@primitive("T, T -> T", "mul.rn.{t} %0, %1, %2;")
def mul(b, rn, x, y):
    return rn("mul", x, y) if rn else b.fmul(x, y)


@primitive("T, T -> T", "div.rn.{t} %0, %1, %2;")
def div(b, rn, x, y):
    return b.fdiv(x, y)


@primitive("T -> T", "sqrt.rn.{t} %0, %1;")
def sqrt(b, rn, x):
    return b.call(b.module.declare_intrinsic("llvm.sqrt", [x.type]), [x])


@primitive("T -> T", "neg.{t} %0, %1;")
def neg(b, rn, x):
    return b.fsub(x.type(-0.0), x)  # the same bits; NVVM's older dialect of LLVM has no fneg


@primitive("T -> T", "abs.{t} %0, %1;")
def abs_(b, rn, x):
    bits = _bits_of(x)  # NVVM has no llvm.fabs
    return b.bitcast(b.and_(b.bitcast(x, bits), bits((1 << (bits.width - 1)) - 1)), x.type)


# The larger of two numbers that are not negative; a NaN wins. As unsigned integers such floats are in the same order
# and every NaN is above infinity. The sum with +0 clears the sign of a -0, which would win as well. `max.NaN` would be
# one instruction for both, but sm_75 has none.
@primitive(
    "T, T -> T",
    "{{ .reg .{t} z; .reg .{b} x, y; add.rn.{t} z, %1, {zero}; mov.{b} x, z; mov.{b} y, %2;",
    "max.{u} x, x, y; mov.{b} %0, x; }}",
)
def larger(b, rn, x, y):
    number, bits = x.type, _bits_of(x)
    x, y = b.bitcast(add(b, rn, x, number(0.0)), bits), b.bitcast(y, bits)
    return b.bitcast(b.select(b.icmp_unsigned(">", x, y), x, y), number)


# Bounds of x. Both comparisons are false for a NaN, so a NaN stays.
@primitive("T, T -> T", "{{ .reg .pred p; setp.lt.{t} p, %1, %2; selp.{t} %0, %2, %1, p; }}")
def at_least(b, rn, x, low):
    return b.select(b.fcmp_ordered("<", x, low), low, x)


@primitive("T, T -> T", "{{ .reg .pred p; setp.gt.{t} p, %1, %2; selp.{t} %0, %2, %1, p; }}")
def at_most(b, rn, x, high):
    return b.select(b.fcmp_ordered(">", x, high), high, x)


# y where c is 0, else x. A NaN is not 0.
@primitive("T, T, T -> T", "{{ .reg .pred p; setp.neu.{t} p, %1, {zero}; selp.{t} %0, %2, %3, p; }}")
def choose(b, rn, c, x, y):
    return b.select(b.fcmp_unordered("!=", c, c.type(0.0)), x, y)


# +0 where y is below the smallest normal number, else x. The comparison is false for a NaN, so a NaN stays.
@primitive("T, T -> T", "{{ .reg .pred p; setp.lt.{t} p, %2, {tiny}; selp.{t} %0, {zero}, %1, p; }}")
def zero_below(b, rn, x, y):
    tiny = np.finfo("float32" if y.type == llvm.F32 else "float64").smallest_normal
    return b.select(b.fcmp_ordered("<", y, y.type(float(tiny))), x.type(0.0), x)


def _bits_of(x):
    return llvm.U32 if x.type == llvm.F32 else llvm.U64


# Reductions of the numbers of an element, in their order: of `op`, which has the primitives, and CUDA C over the vector `g`, of
# which g(k) is a number
REDUCTIONS: dict[str, tuple[Callable, str]] = {}


def reduction(text):
    """Put the function below into REDUCTIONS, by its name, beside its CUDA C."""

    def add_row(function):
        REDUCTIONS[function.__name__] = function, text
        return function

    return add_row


@reduction("T r = mul_(g(0), g(0)); for (int k = 1; k < NUMBERS; ++k) r = fma_(g(k), g(k), r); return r;")
def squares(op, *g):
    return plus_squares(op, op.mul(g[0], g[0]), *g[1:])


@reduction("T r = x; for (int k = 0; k < NUMBERS; ++k) r = fma_(g(k), g(k), r); return r;")
def plus_squares(op, x, *g):
    return functools.reduce(lambda total, number: op.fma(number, number, total), g, x)


# The length of a vector, |g| of one number
@reduction("return NUMBERS == 1 ? abs_(g(0)) : sqrt_(squares_(g));")
def length(op, *g):
    return op.abs(*g) if len(g) == 1 else op.sqrt(squares(op, *g))


# 0 if all numbers are 0, else another number
@reduction("T r = g(0); for (int k = 1; k < NUMBERS; ++k) r = larger_(abs_(r), abs_(g(k))); return r;")
def nonzero(op, *g):
    return functools.reduce(lambda most, number: op.larger(op.abs(most), op.abs(number)), g)


def for_numba(intrinsic, contracts=False):
    """Return the primitives as functions for Numba.

    intrinsic: `numba.extending.intrinsic`, or the one of Numba's CUDA target.
    contracts: whether the target fuses a bare product with a bare sum, so that it has to be told not to.
    """
    return _functions(intrinsic, _in_llvm(contracts))


def emitting(builder, contracts):
    """Return the primitives as functions that append instructions to a builder. They take and return values of LLVM.

    A rule in Python that is called with them appends the instructions of an update: it has no branch that depends on a number.
    """
    functions = _of_values(_in_llvm(contracts))
    return SimpleNamespace(**{name: functools.partial(emit, builder) for name, emit in functions.items()})


def in_assembly(intrinsic, dtype):
    """Return the primitives as inline PTX, which no option of a kernel changes, fast-math included.

    intrinsic: of Numba's CUDA target. dtype: of T.
    """
    types = TYPES_OF_PTX[np.dtype(dtype).name]
    _, letter = KINDS[types["t"]]

    def emit(builder, row, *operands):
        text, constraints = row.ptx.format(**types).replace("%", "$"), ",".join([f"={letter}", *letter * len(row.operands)])
        return llvm.assembly(builder, text, constraints, operands[0].type, *operands)

    return _functions(intrinsic, emit)


def _in_llvm(contracts):
    return lambda builder, row, *operands: row.llvm(builder, llvm.nvvm_rn(builder) if contracts else None, *operands)


def _functions(intrinsic, emit):
    """Return the primitives and REDUCTIONS as functions for Numba. emit(builder, row, *operands): one of numbers."""
    functions = {}
    for name, emit_all in _of_values(emit).items():
        is_primitive = name in PRIMITIVES
        operands = PRIMITIVES[name].operands if is_primitive else operands_of_reduction(name)
        signature = _of_vectors if is_primitive else _of_a_vector
        functions[name] = llvm.function(intrinsic, name, emit_all, signature, len(operands))
    return SimpleNamespace(**functions)


def _of_values(emit):
    """Return emitters of the primitives and REDUCTIONS: of numbers, and of vectors, which are lists of them."""

    def number_by_number(row, builder, *operands):
        n = max(len(x) if isinstance(x, list) else 0 for x in operands)
        if not n:
            return emit(builder, row, *operands)
        vectors = [x if isinstance(x, list) else [x] * n for x in operands]
        return [emit(builder, row, *numbers) for numbers in zip(*vectors, strict=True)]

    def to_a_number(reduce, builder, *operands):
        *before, g = operands
        op = SimpleNamespace(**{x: functools.partial(emit, builder, row) for x, row in PRIMITIVES.items()})
        return reduce(op, *before, *(g if isinstance(g, list) else [g]))

    emitters = {name: functools.partial(number_by_number, row) for name, row in PRIMITIVES.items()}
    return emitters | {name: functools.partial(to_a_number, reduce) for name, (reduce, _) in REDUCTIONS.items()}


def operands_of_reduction(name):
    """Return the names of the operands of a row of REDUCTIONS."""
    return ("x", "g") if name == "plus_squares" else ("g",)


def _of_vectors(*operands):
    """Return the signature of an operation that is made number by number."""
    return next((x for x in operands if hasattr(x, "types")), operands[0])(*operands)


def _of_a_vector(*operands):
    """Return the signature of a reduction, of which the vector is the last operand."""
    g = operands[-1]
    return (g.dtype if hasattr(g, "types") else g)(*operands)


# `tiny` is the smallest normal number
TYPES_OF_PTX = {
    "float32": {"t": "f32", "u": "u32", "b": "b32", "tiny": "0f00800000", "zero": "0f00000000"},
    "float64": {"t": "f64", "u": "u64", "b": "b64", "tiny": "0d0010000000000000", "zero": "0d0000000000000000"},
}


VECTORS = """
struct V {
    T number[NUMBERS];
    V() = default;
    __device__ __forceinline__ V(T x) { for (int k = 0; k < NUMBERS; ++k) number[k] = x; }
};
"""


# Number j of a vector. An index that is not known when it is compiled would need memory, and so would a choice by C.
NUMBER_OF = """
__device__ __forceinline__ T number_of(V g, int j) {
    T r = g(0);
    #pragma unroll
    for (int k = 1; k < NUMBERS; ++k) r = choose_(j == k ? T(1) : T(0), g(k), r);
    return r;
}
"""


def for_cuda_c(dtype, numbers=1):
    """Return the primitives as CUDA C: `T`, which is float or double, vectors of it, `V`, and inline functions over both.

    numbers: of an element.
    """
    name = np.dtype(dtype).name
    text = f"typedef {KINDS[TYPES_OF_PTX[name]['t']][0]} T;\n" + in_cuda_c(PRIMITIVES, name)
    text += f"constexpr int NUMBERS = {numbers};\n"
    if numbers == 1:
        text += "typedef T V;\n"
    else:
        text += VECTORS
        for name, row in PRIMITIVES.items():
            declared, given = (
                ", ".join(f"{x}{k}{y}" for k in range(len(row.operands))) for x, y in (("V x", ""), ("x", ".number[k]"))
            )
            body = f"V r; for (int k = 0; k < NUMBERS; ++k) r.number[k] = {name}_({given}); return r;"
            text += f"__device__ __forceinline__ V {name}_({declared}) {{ {body} }}\n"
    text += f"#define g(k) {'g' if numbers == 1 else 'g.number[k]'}\n"
    text += NUMBER_OF
    for name, (_, body) in REDUCTIONS.items():
        declared = ", ".join(f"{'V' if x == 'g' else 'T'} {x}" for x in operands_of_reduction(name))
        text += f"__device__ __forceinline__ T {name}_({declared}) {{ {body} }}\n"
    return text + "#undef g\n"


KINDS = {"f32": ("float", "f"), "f64": ("double", "d"), "u32": ("unsigned", "r")}  # in C, and as operands of inline PTX


def in_cuda_c(table, dtype="float32"):
    """Return the operations of a table as inline functions of CUDA C. dtype: of T."""
    kinds = KINDS | {"T": ("T", KINDS[TYPES_OF_PTX[dtype]["t"]][1])}
    functions = []
    for name, row in table.items():
        kind, letter = kinds[row.result]
        declared = ", ".join(f"{kinds[x][0]} x{k}" for k, x in enumerate(row.operands))
        bound = ", ".join(f'"{kinds[x][1]}"(x{k})' for k, x in enumerate(row.operands))
        ptx = row.ptx.format(**TYPES_OF_PTX[dtype]) if row.result == "T" else row.ptx
        body = f'{kind} r; asm("{ptx}" : "={letter}"(r) : {bound}); return r;'
        functions.append(f"__device__ __forceinline__ {kind} {name}_({declared}) {{ {body} }}\n")
    return "".join(functions)
