"""The limit rule: the bytes of an Adam step and no arithmetic worth the name.

The speed of the fastest of its `movers` is the memory's limit, the measure of every other rule: `python -m gpuadam bench` runs
all of them in turn, through the same kernels and on the same arrays.

It adds decay * grad to every value. decay is 0 in a step without weight decay, but a compiler does not know this: every byte is
read and written, and no number changes, however often it runs.
"""

import sys

from gpuadam.kernels import processor
from gpuadam.kernels.adam import scalar_names
from gpuadam.kernels.operands import operands_of_form


def in_python(form, op):
    """Return the rule as a Python function of an element; op holds the primitives."""
    fma, sqrt, nonzero, ROOT = op.fma, op.sqrt, op.nonzero, form.arrays.grouped
    LR_SCALE, WHERE, LOW, HIGH = (name in _read_alone(form) for name in READ_ALONE)

    def update(param, grad, m, v, max_v, ema, lr_scale, where, low, high, s):
        decay, one = s[1], nonzero(grad)  # a number of the vector that an element may be
        root = sqrt(v) if ROOT else max_v  # 8-bit state keeps the root of v
        param = fma(decay, lr_scale, param) if LR_SCALE else param
        param = fma(decay, where, param) if WHERE else param
        param = fma(decay, low, param) if LOW else param
        param = fma(decay, high, param) if HIGH else param
        return (
            fma(decay, grad, param), fma(decay, grad, m), fma(decay, one, v), fma(decay, one, root), fma(decay, grad, ema),
        )  # fmt: skip

    return update


def in_cuda_c(form):
    """Return the rule as CUDA C over `T`."""
    root = "sqrt_(v)" if form.arrays.grouped else "max_v"
    declared = ", ".join("T decay" if name == "decay" else "T" for name in scalar_names(form))
    alone = "".join(f"param = fma_(decay, {name}, param); " for name in _read_alone(form))
    return f"""
__device__ __forceinline__ void update(
    V& param, V grad, V& m, T& v, T& max_v, V& ema, T lr_scale, T where, V low, V high, {declared}) {{
    const T one = nonzero_(grad);  // a number of the vector that an element may be
    {alone}
    param = fma_(decay, grad, param);
    m = fma_(decay, grad, m);
    max_v = fma_(decay, one, {root});
    v = fma_(decay, one, v);
    ema = fma_(decay, grad, ema);
}}
"""


READ_ALONE = "lr_scale", "where", "low", "high"  # operands that an update does not write


def _read_alone(form):
    """Return the names among READ_ALONE that a form has. A compiler leaves out the load of what a rule does not use."""
    there = {operand.name for operand in operands_of_form(form)}
    return [name for name in READ_ALONE if name in there]


class Looped:
    """A rule with a Loop of its own on the CPU, not with the one that suits the processor."""

    def __init__(self, rule, loop):
        self.in_python, self.LOOP, self.__name__ = rule.in_python, loop, "_".join(map(str, (rule.__name__, *loop)))


def movers(memory):
    """Return the rules that move the bytes of a step, by what they are called. memory: of the backend, "CPU" or "CUDA"."""
    this = sys.modules[__name__]
    if memory != "CPU":
        return {"a kernel": this}
    return {str(loop): Looped(this, loop) for loop in processor.loops()}
