"""THE ORDER: the square root of the sum of the squares of all elements of many arrays, in an order that no machine can change.

A sum in floating point depends on its order. Here the order follows from the place of an element alone, in its array in C order
and among the arrays in the order of the list. So every backend, alignment, layout and number of threads gives the same bits.

    chunk     CHUNK = 4096 neighbours of one array, the last one of an array shorter; no chunk has elements of two arrays
    lane      a chunk is 4 quarters of QUARTER = 1024, and a quarter has WIDTH = 64 lanes: element i of a chunk belongs to lane
              i // QUARTER * WIDTH + i % WIDTH of LANES = 256. A lane starts at +0 and takes its 16 elements in order:
                  s = fma(x, x, s)
    tree      the lanes are added in halves, until one is left:
                  s[j] = s[j] + s[j + half]   for j < half = 128, 64, 32, 16, 8, 4, 2, 1
    level     the sums of all chunks, in the order of the arrays, are an array of their own, which is summed likewise, by chunks,
              lanes and the tree, with s = s + x in place of the fma; so are its sums, until one is left
    norm      sqrt of that

All of it is float64, and elements become float64 exactly. What a lane has no element for counts as +0, which changes nothing: no
sum is ever -0. Squares of float32, bfloat16 and float16 are exact and far from overflow. Squares of float64 overflow from
1.3e154, and the norm is then infinite; below 1.5e-162 they are 0. A NaN makes the norm NaN.

On a GPU a chunk is summed by a warp. A thread holds 8 lanes, those of the elements that it loads 16 bytes at a time, and the
middle of the tree goes through shuffles. On a CPU the lanes lie in memory, and the loop over a quarter's is LLVM's to vectorise;
four rows of WIDTH are neighbours, so that it goes through memory in order.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from gpuadam.kernels import conversions, primitives
from gpuadam.kernels.layout import VECTOR_BYTES

CHUNK = 4096
QUARTER = 1024
WIDTH = 64
LANES = CHUNK // QUARTER * WIDTH

BLOCK = 128  # threads of a GPU
WARP = 32
LANES_PER_THREAD = LANES // WARP

# name: (bytes of an element, its type in C, how it becomes a double there)
FORMATS = {
    "float64": (8, "double", "x"),
    "float32": (4, "float", "widened_(x)"),
    "bfloat16": (2, "unsigned short", "widened_(from_bfloat16_(x))"),
    "float16": (2, "unsigned short", "widened_(from_float16_(x))"),
}


def format_of(view):
    """Return the format of a View's elements, or None if a norm does not take it. NumPy's bfloat16 is that of ml_dtypes."""
    return view.bits or _format(view.dtype)


@functools.lru_cache(maxsize=64)  # a dtype takes longer to say its name than the rest of a view takes
def _format(dtype):
    return dtype.name if dtype.name in FORMATS and dtype.isnative else None


class Form(NamedTuple):
    """What is known when a kernel is compiled."""

    format: str = "float32"
    squares: bool = True  # whether to sum the squares of the elements, or the elements

    @property
    def itemsize(self):
        return FORMATS[self.format][0]

    @property
    def lanes(self):
        """How many elements 16 bytes hold."""
        return VECTOR_BYTES // self.itemsize

    @property
    def part(self):
        """How many elements lie between two vectors of a thread in a row: a warp takes some quarters at once."""
        return WARP * self.lanes // WIDTH * QUARTER


# The table of the arrays, of int64: a row for each array, then the length and the stride in bytes of each dimension. A kernel
# takes rows first_row ... first_row + n_rows - 1, whose chunks it counts from 0.
POINTER, SIZE, RUN, NDIM, DIMS, FIRST_CHUNK, FIRST_SUM = range(
    7
)  # RUN: whether vectors can be loaded. DIMS: where they start
COLUMNS = 8


class Pass(NamedTuple):
    """One launch: some rows of the table, and where the sums of their chunks go, in bytes from the start of the workspace."""

    form: Form
    first_row: int
    n_rows: int
    chunks: int
    elements: int
    out: int


class Plan(NamedTuple):
    """The passes of a norm; what the last one writes is not a sum but the norm. The first row of each level has an offset for
    an address, to which the workspace's is to be added.
    """

    table: np.ndarray
    passes: list[Pass]
    levels: list[int]  # rows
    workspace: int  # bytes

    def placed(self, workspace):
        """Return the table for a workspace at an address."""
        table = self.table.copy()
        for row in self.levels:
            table[row * COLUMNS + POINTER] += workspace
        return table


def plan(views, alignment=None):
    """Return the Plan of a norm. alignment: of the address of a vector; by default that of the elements."""
    rows: list[list[int]] = []
    dims: list[int] = []
    passes, levels = [], []
    placed: dict[str, list[tuple]] = {}  # one launch for the arrays of a format
    total = 0
    for view in views:
        if view.size:
            placed.setdefault(format_of(view), []).append((view, total))
            total += chunks_of(view.size)
    for format, own in placed.items():
        form, chunks, elements = Form(format), 0, 0
        for view, first_sum in own:
            dimensions = merged(view.shape, view.strides, form.itemsize)
            run = len(dimensions) == 1 and dimensions[0][1] == form.itemsize
            run = run and view.pointer % (alignment or form.itemsize) == 0
            size = view.size
            rows.append([view.pointer, size, run, len(dimensions), len(dims), chunks, first_sum, 0])
            dims += itertools.chain.from_iterable(dimensions)
            chunks += chunks_of(size)
            elements += size
        passes.append(Pass(form, len(rows) - len(own), len(own), chunks, elements, 0))
    sums, n = 0, total
    workspace = _bytes(n)
    while n != 1:  # no chunks at all are an array of no elements, whose sum is +0
        levels.append(len(rows))
        rows.append([sums, n, 1, 1, len(dims), 0, 0, 0])
        dims += [n, 8]
        elements, n = n, max(1, chunks_of(n))
        passes.append(Pass(Form("float64", squares=False), len(rows) - 1, 1, n, elements, workspace))
        sums, workspace = workspace, workspace + _bytes(n)
    table = np.array([*itertools.chain.from_iterable(rows), *dims], np.int64)
    table[DIMS : len(rows) * COLUMNS : COLUMNS] += len(rows) * COLUMNS
    return Plan(table, passes, levels, workspace)


def chunks_of(n):
    return -(-n // CHUNK)


def chunks_of_all(views):
    return sum(chunks_of(view.size) for view in views)


def _bytes(n):
    return -(-8 * n // VECTOR_BYTES) * VECTOR_BYTES


def merged(shape, strides, itemsize):
    """Return (length, stride) of the dimensions of an array, one for those that C order steps through as one.

    >>> merged((2, 3, 1), (12, 4, 4), itemsize=4)
    [(6, 4)]
    >>> merged((2, 3), (4, 8), itemsize=4)
    [(2, 4), (3, 8)]
    >>> merged((), (), itemsize=4)
    [(1, 4)]
    """
    dimensions: list[tuple[int, int]] = []
    for n, stride in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if dimensions and dimensions[-1][1] == n * stride:
            dimensions[-1] = (dimensions[-1][0] * n, stride)
        else:
            dimensions.append((n, stride))
    return dimensions or [(1, itemsize)]


# LLVM, for Numba. In CUDA C the same follows below.


def to_float64(b, format, x, on_gpu):
    """Return an element as a double, which is exact. b: an llvmlite builder."""
    from llvmlite import ir

    def convert(name, x):
        emit: Any = conversions.CONVERSIONS[name].llvm
        return emit(b, on_gpu, x)

    if format in ("bfloat16", "float16"):
        x = convert(f"from_{format}", b.zext(x, ir.IntType(32)))
    return x if format == "float64" else convert("widened", x)


def memory_type(format):
    """Return the LLVM type of an element in memory."""
    from llvmlite import ir

    return {"float64": ir.DoubleType(), "float32": ir.FloatType()}.get(format, ir.IntType(16))


IN_CUDA_C = r"""
struct alignas(VECTOR_BYTES) Vector { Element element[PER_VECTOR]; };

__device__ __forceinline__ double to_float64(Element x) { return TO_FLOAT64; }

__device__ __forceinline__ double plus(double s, Element element) {
    const double x = to_float64(element);
    return SQUARES ? fma_(x, x, s) : add_(s, x);
}

// A plain cast of an address to a pointer makes generic loads.
template <typename Type>
__device__ __forceinline__ Type* at_address(long long a) { return (Type*)__cvta_global_to_generic((size_t)a); }

// The address of element i of an array, in C order. Sums of chunks have no gaps.
__device__ __forceinline__ long long address_of(const long long* table, const long long* row, long long i) {
    long long address = row[POINTER];
#if SQUARES
    const long long* const first = table + row[DIMS];
    const long long* dimension = first + 2 * row[NDIM];
#pragma unroll 1
    while ((dimension -= 2) > first) {
        const long long rest = (unsigned long long)i / dimension[0];
        address += (i - rest * dimension[0]) * dimension[1];
        i = rest;
    }
    return address + i * first[1];
#else
    return address + i * (long long)sizeof(Element);
#endif
}

extern "C" __global__ void __launch_bounds__(BLOCK)
NAME(long long table_address, long long first_row, long long n_rows, long long out, long long chunks, long long last) {
    const int thread = threadIdx.x % WARP;
    const long long chunk = (long long)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (chunk >= chunks)
        return;  // the whole warp
    const long long* const table = at_address<const long long>(table_address);
    long long low = first_row, high = first_row + n_rows;
    while (high - low > 1) {
        const long long middle = (low + high) / 2;
        if (table[middle * COLUMNS + FIRST_CHUNK] <= chunk)
            low = middle;
        else
            high = middle;
    }
    const long long* const row = table + low * COLUMNS;
    const long long start = (chunk - row[FIRST_CHUNK]) * CHUNK;
    const int n = min(row[SIZE] - start, (long long)CHUNK);
    double s[LANES_PER_THREAD] = {};
    const int first = thread * PER_VECTOR / WIDTH * QUARTER + thread * PER_VECTOR % WIDTH;
    if (row[RUN] && n == CHUNK) {
        const Vector* const at = at_address<const Vector>(row[POINTER] + (start + first) * (long long)sizeof(Element));
#pragma unroll ROWS_AT_ONCE
        for (int r = 0; r < QUARTER / WIDTH; ++r) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const Vector v = at[(r * WIDTH + part * PART) / PER_VECTOR];
#pragma unroll
                for (int k = 0; k < PER_VECTOR; ++k)
                    s[part * PER_VECTOR + k] = plus(s[part * PER_VECTOR + k], v.element[k]);
            }
        }
    } else {
#pragma unroll 1
        for (int r = 0; r < QUARTER / WIDTH; ++r) {
#pragma unroll
            for (int k = 0; k < LANES_PER_THREAD; ++k) {
                const int i = first + r * WIDTH + k / PER_VECTOR * PART + k % PER_VECTOR;
                if (i < n)
                    s[k] = plus(s[k], *at_address<const Element>(address_of(table, row, start + i)));
            }
        }
    }

    // The tree. A lane is (part * WARP + thread) * PER_VECTOR + k.
#pragma unroll
    for (int half = PARTS / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < half * PER_VECTOR; ++k)
            s[k] = add_(s[k], s[k + half * PER_VECTOR]);
#pragma unroll
    for (int half = WARP / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < PER_VECTOR; ++k)
            s[k] = add_(s[k], __shfl_xor_sync(0xffffffff, s[k], half));
#pragma unroll
    for (int half = PER_VECTOR / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k)
            s[k] = add_(s[k], s[k + half]);
    if (thread == 0)
        at_address<double>(out)[row[FIRST_SUM] + chunk - row[FIRST_CHUNK]] = last ? sqrt_(s[0]) : s[0];
}
"""


@functools.cache
def in_cuda_c(form):
    """Return (the CUDA C of a form's kernel, its name)."""
    _, element, to_float64 = FORMATS[form.format]
    name = f"gpuadam_sums_{form.format}" + "_squares" * form.squares
    constants = {
        "NAME": name,
        "TO_FLOAT64": to_float64,
        "SQUARES": int(form.squares),
        "PER_VECTOR": form.lanes,
        "PARTS": LANES_PER_THREAD // form.lanes,
        "PART": form.part,
        "ROWS_AT_ONCE": rows_at_once(form),
    }
    for constant in (
        "VECTOR_BYTES", "CHUNK", "QUARTER", "WIDTH", "BLOCK", "WARP", "LANES_PER_THREAD", "COLUMNS",
        "POINTER", "SIZE", "RUN", "NDIM", "DIMS", "FIRST_CHUNK", "FIRST_SUM",
    ):  # fmt: skip
        constants[constant] = globals()[constant]
    defines = "".join(f"#define {constant} {value}\n" for constant, value in constants.items())
    operations = "typedef double T;\n" + primitives.for_cuda_c("float64") + conversions.for_cuda_c()
    return f"{operations}typedef {element} Element;\n{defines}{IN_CUDA_C}", name


def rows_at_once(form):
    """How many rows of all quarters a warp loads before it adds the first: 8 vectors of 16 bytes a thread."""
    return form.lanes
