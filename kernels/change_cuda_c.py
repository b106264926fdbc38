"""The sums of `change_sums.py` as CUDA C, for CuPy."""

import functools

from gpuadam.kernels import adam, cuda_c_access, norm_order, primitives
from gpuadam.kernels.norm_cuda_c import AT_ADDRESS, CHUNK_OF_WARP, TREE, defined
from gpuadam.kernels.operands import operands_of_form
from gpuadam.kernels.scalars import REALS_AT, SKIP_AT

# The rule has the primitives of its type, and these have the names of float64's: hence the namespace. A lane that the chunk has
# no element for reads the last element, so that no load waits for a comparison, and adds 0, which changes nothing. Arrays with
# gaps go element by element: of that loop 8 copies would be too much code.
IN_CUDA_C = (
    r"""
__device__ __forceinline__ double to_float64(float x) { return widened_(x); }
__device__ __forceinline__ double to_float64(double x) { return x; }

namespace sums {
%(float64)s
__device__ __forceinline__ double change_of(::T old_param, ::T new_param) {
    return CHANGE ? to_float64(new_param) : sub_(to_float64(new_param), to_float64(old_param));
}
"""
    + AT_ADDRESS
    + r"""
extern "C" __global__ void __launch_bounds__(BLOCK)
%(name)s(long long table_address, long long first_row, long long n_rows, long long out, long long chunks, long long scalars) {
"""
    + CHUNK_OF_WARP.replace("%", "%%")
    + r"""    ::T old_param, new_param;
    %(reals)s
    if (SKIPS && *at_address<const long long>(scalars + SKIP_AT)) {
    } else if (GROUPED || row[RUN]) {
        %(pointers)s
#pragma unroll 1
        for (int r = 0; r < QUARTER / WIDTH; ++r) {
#pragma unroll
            for (int k = 0; k < LANES_PER_THREAD; ++k) {
                const int i = thread + r * WIDTH + k * WARP / WIDTH * QUARTER + k * WARP %% WIDTH;
                param_of(old_param, new_param, %(operands)s, start + min(i, n - 1), %(scalars)s);
                const double x = i < n ? change_of(old_param, new_param) : 0.0;
                s[k] = fma_(x, x, s[k]);
            }
        }
    } else {
#pragma unroll 1
        for (int part = 0; part < CHUNK / WARP; ++part) {
            const int i = thread + part * WARP, lane = i / QUARTER * (WIDTH / WARP) + i %% WIDTH / WARP;
            long long at[N_OPERANDS], number = start + min(i, n - 1);
            long long rest = number / ::NUMBERS;
#pragma unroll
            for (int j = 0; j < N_OPERANDS; ++j)
                at[j] = row[OPERANDS + j];
#pragma unroll 1
            for (long long d = row[NDIM] - 1; d >= 0; --d) {
                const long long* const dimension = table + row[DIMS] + d * (N_OPERANDS + 1);
                const long long next = d ? (unsigned long long)rest / dimension[0] : 0, here = rest - next * dimension[0];
#pragma unroll
                for (int j = 0; j < N_OPERANDS; ++j)
                    at[j] += here * dimension[1 + j];
                rest = next;
            }
            param_of(old_param, new_param, %(element)s, number %% ::NUMBERS, %(scalars)s);
            const double x = i < n ? change_of(old_param, new_param) : 0.0;
#pragma unroll
            for (int k = 0; k < LANES_PER_THREAD; ++k)
                s[k] = k == lane ? fma_(x, x, s[k]) : s[k];
        }
    }
"""
    + TREE
    + r"""    if (thread == 0)
        at_address<double>(out)[row[FIRST_SUM] + chunk - row[FIRST_CHUNK]] = s[0];
}
}  // namespace sums
"""
)


@functools.cache
def text_and_name(form):
    """Return the CUDA C of the kernel of an `adam.Form`, and the kernel's name."""
    operands, names = operands_of_form(form), adam.scalar_names(form)
    kinds = [cuda_c_access.C_TYPES[o.format] for o in operands]
    constants = {
        "N_OPERANDS": len(operands),
        "COLUMNS": norm_order.OPERANDS + len(operands),
        "PER_VECTOR": 1,
        "PARTS": norm_order.LANES_PER_THREAD,
        "SKIPS": int(form.skips),
        "SKIP_AT": SKIP_AT,
        "GROUPED": int(form.arrays.grouped),
    }
    name = f"gpuadam_change_{form.dtype}"
    parts = {
        "name": name,
        "float64": primitives.for_cuda_c("float64"),
        "reals": "\n".join(
            f"const ::T {x} = at_address<const ::T>(scalars + {REALS_AT})[{k}];" for k, x in enumerate(names)
        ),
        "pointers": "\n".join(
            f"const {kind}* const {o.name} = at_address<const {kind}>(row[OPERANDS + {j}]);"
            for j, (o, kind) in enumerate(zip(operands, kinds, strict=True))
        ),
        "operands": ", ".join(o.name for o in operands),
        "element": ", ".join(f"at_address<const {kind}>(at[{j}])" for j, kind in enumerate(kinds)),
        "scalars": ", ".join(names),
    }
    conversions, _ = cuda_c_access.for_cuda_c(form, names)
    text = (
        primitives.for_cuda_c(form.dtype, form.arrays.numbers)
        + conversions
        + adam.in_cuda_c(form)
        + cuda_c_access.param_for_cuda_c(form, names)
        + defined(constants)
        + IN_CUDA_C % parts
    )
    return text, name
