"""The sums of `norm_order.py` as CUDA C, for CuPy."""

import functools

from gpuadam.kernels import conversions, norm_order, primitives
from gpuadam.kernels.cuda_c_access import C_TYPES

# The row of the chunk that a warp sums, and the chunk's place in its array.
CHUNK_OF_WARP = r"""
    const int thread = threadIdx.x % WARP;
    const long long chunk = (long long)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (chunk >= chunks)
        return;  // the whole warp
    const long long* const table = at_address<const long long>(table_address);
    long long this_row = first_row, end_row = first_row + n_rows;
    while (end_row - this_row > 1) {
        const long long middle = (this_row + end_row) / 2;
        if (table[middle * COLUMNS + FIRST_CHUNK] <= chunk)
            this_row = middle;
        else
            end_row = middle;
    }
    const long long* const row = table + this_row * COLUMNS;
    const long long start = (chunk - row[FIRST_CHUNK]) * CHUNK;
    const int n = min(row[SIZE] - start, (long long)CHUNK);
    double s[LANES_PER_THREAD] = {};
"""

# The tree. A lane is (part * WARP + thread) * PER_VECTOR + k.
TREE = r"""
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
"""

# A plain cast of an address to a pointer makes generic loads.
AT_ADDRESS = r"""
template <typename Type>
__device__ __forceinline__ Type* at_address(long long a) { return (Type*)__cvta_global_to_generic((size_t)a); }
"""

IN_CUDA_C = (
    r"""
struct alignas(VECTOR_BYTES) Vector { Element element[PER_VECTOR]; };

__device__ __forceinline__ double to_float64(Element x) { return TO_FLOAT64; }

__device__ __forceinline__ double plus(double s, Element element) {
    const double x = to_float64(element);
    return SQUARES ? fma_(x, x, s) : add_(s, x);
}
"""
    + AT_ADDRESS
    + r"""
// The address of element i of an array, in C order. Sums of chunks have no gaps.
__device__ __forceinline__ long long address_of(const long long* table, const long long* row, long long i) {
    long long address = row[OPERANDS];
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
"""
    + CHUNK_OF_WARP
    + r"""    const int first = thread * PER_VECTOR / WIDTH * QUARTER + thread * PER_VECTOR % WIDTH;
    if (row[RUN] && n == CHUNK) {
        const Vector* const at = at_address<const Vector>(row[OPERANDS] + (start + first) * (long long)sizeof(Element));
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
"""
    + TREE
    + r"""    if (thread == 0)
        at_address<double>(out)[row[FIRST_SUM] + chunk - row[FIRST_CHUNK]] = last ? sqrt_(s[0]) : s[0];
}
"""
)


@functools.cache
def text_and_name(form):
    """Return the CUDA C of a form's kernel, and the kernel's name."""
    to_float64 = functools.reduce(lambda x, row: f"{row}_({x})", norm_order.FORMATS[form.format], "x")
    name = f"gpuadam_sums_{form.format}" + "_squares" * form.squares
    constants = {
        "NAME": name,
        "TO_FLOAT64": to_float64,
        "SQUARES": int(form.squares),
        "PER_VECTOR": form.lanes,
        "PARTS": norm_order.LANES_PER_THREAD // form.lanes,
        "PART": form.part,
        "ROWS_AT_ONCE": form.lanes,  # 8 vectors of 16 bytes a thread
    }
    defines = defined(constants)
    operations = primitives.for_cuda_c("float64") + conversions.for_cuda_c()
    return f"{operations}typedef {C_TYPES[form.format]} Element;\n{defines}{IN_CUDA_C}", name


def defined(constants):
    """Return the definitions of the order's constants and of a kernel's own, which go before those. constants: name -> value."""
    names = (
        "VECTOR_BYTES", "CHUNK", "QUARTER", "WIDTH", "BLOCK", "WARP", "LANES_PER_THREAD", "COLUMNS",
        "SIZE", "RUN", "NDIM", "DIMS", "FIRST_CHUNK", "FIRST_SUM", "OPERANDS",
    )  # fmt: skip
    of_order = {name: getattr(norm_order, name) for name in names}
    return "".join(f"#define {name} {value}\n" for name, value in (of_order | constants).items())
