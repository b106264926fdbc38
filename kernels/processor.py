"""How a loop goes on a processor of the CPU: how far ahead it prefetches, and how wide its vectors are.

No bit follows from either. `benchmarks/large.py` and `narrow.py` measure what comes of them.
"""

from typing import NamedTuple

from gpuadam.kernels.operands import NARROW, operands_of_form


class Loop(NamedTuple):
    """What may differ between loops that do the same."""

    ahead: int = 0  # how many elements ahead it prefetches, if its arrays fit in no cache; 0 leaves that to the processor
    wide: bool = False  # its vectors have 512 bits, if the processor has such, also where LLVM would rather take 256
    by_line: bool = False  # it asks for one cache line of each array at a time, not for FETCHED elements

    def __str__(self):
        ahead = f", {self.ahead} elements ahead{', line by line' if self.by_line else ''}" if self.ahead else ""
        return f"a loop{' of 512 bits' if self.wide else ''}{ahead}"

    def fetched(self, operands):
        """Return how many elements it asks for at once."""
        return max(1, CACHE_LINE // max(operand.itemsize for operand in operands)) if self.by_line else FETCHED


# Intel's Xeons since 2023, as LLVM calls them. A virtual machine may give the number of another model, as one did whose Xeon
# LLVM then called a rocketlake; so they are also known by what no AMD has. The figures are of an emeraldrapids. While it
# divides and takes roots, it asks for few of the elements that follow: with a prefetch a step of 20 million elements takes 0.89
# of the time. AMD's processors, of three kinds, gained nothing by prefetches to write, and one of them, a znver3, nothing by
# prefetches to read. And LLVM takes vectors of 256 bits, because older Xeons slowed down with wider ones. The unit that divides
# is no quicker with wide vectors, but conversions are: a step with bfloat16 state takes 0.85 of the time, and one in float32 1.02
# in the caches. The sums of a step's changes take 0.79 of the time with both, and 0.75 in the caches; those of a norm 0.93.
# On a graniterapids a step in float32 that asks for one line of each array at a time takes 0.96 of the time of one that asks for
# FETCHED elements, four lines. Where the arrays of a form differ in the size of an element, some lines would be asked for several
# times: 1.13 of the time with bfloat16 state, and 1.75 with complex numbers. All bfloat16 takes 1.02. Where an element is several
# numbers, a step that asks 256 ahead takes 0.92 to 0.99 of the time of 512.
_XEONS = ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d")
_OF_INTEL = {"+amx-tile", "+cldemote", "+serialize"}

CACHE_LINE = 64  # bytes
FETCHED = 64  # elements that are asked for at once: whole cache lines of every format
CACHED = 2**20  # bytes of arrays that a core's own cache holds from one step to the next, on these processors


def loops():
    """Return the Loops of which one may be the fastest here."""
    wide = [Loop(ahead, wide=True) for ahead in (0, 512) if _is_xeon()]
    return [*(Loop(ahead) for ahead in (0, 128, 512, 2048)), Loop(512, by_line=True), *wide]


def loop_of(form):
    """Return the Loop that suits a form here."""
    if not _is_xeon():
        return Loop()
    operands = operands_of_form(form)
    narrow = any(operand.format in NARROW or operand.of_groups for operand in operands)
    one_size = len({operand.itemsize for operand in operands}) == 1
    return Loop(512 if form.arrays.numbers == 1 else 256, wide=narrow, by_line=one_size and not narrow)


def loop_of_sums():
    """Return the Loop that suits sums of squares, which are float64 whatever is summed."""
    return Loop(512, wide=True) if _is_xeon() else Loop()


def cached(form):
    """Return how many elements of a form's arrays a core's own cache holds: of no more, a prefetch would only take time."""
    return CACHED // sum(operand.itemsize for operand in operands_of_form(form))


def converts_float16():
    """Whether the processor has instructions that convert float16: those of x86 since 2013, rounded to nearest even (F16C)."""
    return "+f16c" in _target()[1]


def _is_xeon():
    """Whether Numba compiles for one of _XEONS."""
    name, features = _target()
    return name in _XEONS or ("+avx512fp16" in features and not features.isdisjoint(_OF_INTEL))


def _target():
    """Return the processor for which Numba compiles, as LLVM calls it, and the set of its features, as in "+avx2"."""
    from numba.core.registry import cpu_target  # a plan asks for no Loop, and needs no Numba

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name, set(features.split(","))
