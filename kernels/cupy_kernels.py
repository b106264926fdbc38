"""The CUDA C of a rule, as `cupy.ElementwiseKernel`s.

CuPy's own indexing gives each thread one element and 4-byte accesses. Here the arrays are `raw`, or addresses in a table, and a
thread takes one or several vectors of 16 bytes of each, so `size` counts threads, not elements.
"""

import functools

import cupy

from gpuadam.kernels import adam, change_cuda_c, cuda_c_access, gpu_table, norm_cuda_c, primitives
from gpuadam.kernels.cuda_c_access import C_TYPES, place, pointer_to
from gpuadam.kernels.layout import WARP
from gpuadam.kernels.operands import FORMATS, lanes_of, operands_of_form
from gpuadam.kernels.scalars import REALS_AT, Settings, formula_in_cuda_c

# i is CuPy's: the number of this thread, 64 bits wide. `layout.Split` says which elements it has.
CONTIGUOUS = r"""
const ptrdiff_t several = VECTORS_A_THREAD > 1 ? vectors / (WARP * VECTORS_A_THREAD) * WARP : 0;
if (VECTORS_A_THREAD > 1 && i < several) {
    const ptrdiff_t at = head + (i / WARP * (WARP * VECTORS_A_THREAD) + i %% WARP) * LANES;
    update_lanes<LANES, VECTORS_A_THREAD>(%(at)s, start + at, row_key ^ step_key, skip, %(scalars)s);
} else {
    const ptrdiff_t j = i + several * (VECTORS_A_THREAD - 1);
    if (j < vectors) {
        const ptrdiff_t at = head + j * LANES;
        update_lanes<LANES, 1>(%(at)s, start + at, row_key ^ step_key, skip, %(scalars)s);
    } else {
        const ptrdiff_t k = j - vectors, at = k < head ? k : k + vectors * LANES;
        update_lanes<1, 1>(%(at)s, start + at, row_key ^ step_key, skip, %(scalars)s);
    }
}
"""

# With BLOCK threads in each block and enough blocks, i / BLOCK is the number of the block.
CHUNK_OF_TABLE = r"""
const long long chunk = i / BLOCK;
const long long* const row = &rows[owners[chunk] * (ptrdiff_t)COLUMNS];
const long long first = (chunk - row[FIRST_CHUNK]) * CHUNK;
// clamped before they are narrowed: after the vectors the difference is negative, and may be below -2^31
const int vectors_here = max(min(row[VECTORS] - first, (long long)CHUNK), 0LL);
const int items_here = min(row[ITEMS] - first, (long long)CHUNK);
"""

# The few elements before and after the vectors read what they need from the row again, so that it takes no registers.
TABLE = (
    CHUNK_OF_TABLE
    + r"""
const long long begin = row[HEAD] + first * LANES;
%(pointers)s
#pragma unroll 1
for (int item = i %% BLOCK; item < items_here; item += BLOCK) {
    if (VECTORS_A_THREAD > 1 && item + (VECTORS_A_THREAD - 1) * BLOCK < vectors_here) {
        const int at = item * LANES;
        update_lanes<LANES, VECTORS_A_THREAD>(
            %(at)s, START_OF_ROW + begin + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
        item += (VECTORS_A_THREAD - 1) * BLOCK;
    } else if (item < vectors_here) {
        const int at = item * LANES;
        update_lanes<LANES, 1>(%(at)s, START_OF_ROW + begin + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
    } else {
        const long long k = item + first - row[VECTORS], at = k < row[HEAD] ? k : k + row[VECTORS] * LANES;
        update_lanes<1, 1>(%(at_row)s, START_OF_ROW + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
    }
}
break;  // there are as many blocks as chunks: a thread has only one i
"""
)

# Groups of 8-bit state: an item is a part of a group, and whole warps go through the loop together, because they exchange maxima.
GROUPS = (
    CHUNK_OF_TABLE
    + r"""
const long long size = row[SIZE];
%(pointers)s
#pragma unroll 1
for (int item = i %% BLOCK; item < (items_here + 31) / 32 * 32; item += BLOCK) {
    const long long at = (first + item) * LANES;
    if (VECTORS_A_THREAD > 1 && (item | 31) + (VECTORS_A_THREAD - 1) * BLOCK < vectors_here) {  // of the last of the warp
        update_group<VECTORS_A_THREAD>(
            %(names)s, at, size, true, START_OF_ROW + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
        item += (VECTORS_A_THREAD - 1) * BLOCK;
    } else {
        update_group<1>(
            %(names)s, at, size, item < vectors_here, START_OF_ROW + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
    }
}
break;
"""
)

TABLE_PREAMBLE = norm_cuda_c.AT_ADDRESS + "".join(
    f"#define {name} {getattr(gpu_table, name)}\n"
    for name in ("BLOCK", "CHUNK", "HEAD", "VECTORS", "ITEMS", "FIRST_CHUNK", "KEY", "START", "SIZE", "OPERANDS")
)

# Not raw: CuPy finds the element of each array, whatever its strides. i counts them in C order.
STRIDED = r"""
update_lanes<1, 1>(%(element)s, start + i, row_key ^ step_key, skip, %(scalars)s);
"""


def in_and_out(operands, values):
    """Split values, one for each operand: those of operands that are only read, and the rest."""
    pairs = list(zip(operands, values, strict=True))
    return [x for operand, x in pairs if not operand.stores], [x for operand, x in pairs if operand.stores]


# CuPy has no arithmetic on what a rule converts from bits
IN_MEMORY = {format: f"uint{8 * n}" if n < 4 else format for format, n in FORMATS.items()}


@functools.cache
def build(rule, form, loop, on_device=False, vectors=1):
    """Return the ElementwiseKernel of a form; CuPy compiles it at its first call.

    loop: "contiguous", "table" or "strided". on_device: whether the scalars are in device memory. vectors: that a thread takes
    at once, where there are enough.
    """
    operands, names = operands_of_form(form), adam.scalar_names(form)
    random = form.arrays.random
    raw = "" if loop == "strided" else "raw "
    arrays = [] if loop == "table" else [f"{raw}{IN_MEMORY[o.format]} {o.name}" for o in operands]
    inputs, outputs = in_and_out(operands, arrays) if arrays else (["raw int32 owners"], ["raw int64 rows"])
    if loop == "contiguous":
        inputs += ["int64 head", "int64 vectors"]
    body = ""
    if loop != "table":
        inputs += ["int64 row_key", "int64 start"] if random else []
        body += "" if random else "const long long row_key = 0, start = 0;\n"
    if on_device:
        inputs.append(f"raw {form.dtype} device_scalars")
        body += "".join(f"const T {name} = device_scalars[{k}];\n" for k, name in enumerate(names))
        if random or form.skips:
            inputs.append("raw int64 device_words")
        body += f"const long long step_key = {'device_words[0]' if random else 0};\n"
        body += f"const long long skip = {'device_words[1]' if form.skips else 0};\n"
    else:
        inputs += [f"{form.dtype} {name}" for name in names] + (["int64 step_key"] if random else [])
        body += ("" if random else "const long long step_key = 0;\n") + "const long long skip = 0;\n"
    kinds = [C_TYPES[o.format] for o in operands]
    in_row = [f"at_address<{kind}>(row[OPERANDS + {k}])" for k, kind in enumerate(kinds)]
    begin, at = ([place(o, first) for o in operands] for first in ("0" if form.arrays.grouped else "begin", "at"))
    of_all = list(zip(operands, kinds, in_row, begin, at, strict=True))
    conversions, update = cuda_c_access.for_cuda_c(form, names)
    parts = {
        "scalars": ", ".join(names),
        "pointers": "\n".join(f"{pointer_to(o)} const {o.name} = {row} + {begin};" for o, _, row, begin, _ in of_all),
        "names": ", ".join(o.name for o in operands),
        "at": ", ".join(
            f"{o.name} + {at}" if loop == "table" else f"as<{kind}>(&{o.name}[{at}])" for o, kind, _, _, at in of_all
        ),
        "at_row": ", ".join(f"{row} + {at}" for *_, row, _, at in of_all),
        "element": ", ".join(f"as<{kind}>(&{o.name})" for o, kind, *_ in of_all),
    }
    defined = {
        "VECTORS_A_THREAD": vectors,
        "WARP": WARP,
        "COLUMNS": gpu_table.OPERANDS + len(operands),
        "KEY_OF_ROW": "row[KEY]" if random else "0LL",
        "START_OF_ROW": "row[START]" if random else "0LL",
    }
    text = {"contiguous": CONTIGUOUS, "table": GROUPS if form.arrays.grouped else TABLE, "strided": STRIDED}[loop]
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        body + text % parts,
        f"gpuadam_{rule.__name__.rpartition('.')[2]}_{form.dtype}_{loop}{'_device' * on_device}"
        + f"_{vectors}_vectors" * (vectors > 1),
        preamble=f"constexpr int LANES = {lanes_of(form)};\n"
        + f"constexpr int APART = LANES * {WARP if loop == 'contiguous' else gpu_table.BLOCK};\n"
        + "".join(f"#define {name} {value}\n" for name, value in defined.items())
        + TABLE_PREAMBLE * (loop == "table")
        + primitives.for_cuda_c(form.dtype, form.arrays.numbers)
        + conversions
        + rule.in_cuda_c(form)
        + update,
    )


@functools.cache
def build_scalars(form):
    """Return the kernel of a `scalars.ScalarsForm`, of one thread. Its arguments: `GpuBackend.launch_scalars`."""
    before, body = formula_in_cuda_c(form)
    # a flag is read as bits
    flag = {None: "char", 1: "char", 2: "short", 4: "int", 8: "long long"}[form.found_inf and form.found_inf.itemsize]
    lr, grad_scale = ("double" if dtype is None else f"const {C_TYPES[dtype.name]}*" for dtype in (form.lr, form.grad_scale))
    settings = ", ".join(f"{'long long' if k < 2 else 'double'} {name}" for k, name in enumerate(Settings._fields))
    name = f"gpuadam_scalars_{form.dtype}"
    text = f"""{primitives.for_cuda_c("float64")}{before}
extern "C" __global__ void {name}(
    long long* step, const unsigned {flag}* found_inf, const double* norm, {lr} lr, {grad_scale} grad_scale, long long* words,
    {settings}) {{
    {C_TYPES[form.dtype.name]}* const scalars = ({C_TYPES[form.dtype.name]}*)(words + {REALS_AT // 8});
{body}}}
"""
    return cupy.RawKernel(text, name)


@functools.cache
def build_sums(form):
    """Return the RawKernel of a `norm_order.Form`, or of the changes of an `adam.Form`; CuPy compiles it at its first call."""
    kernel = change_cuda_c if isinstance(form, adam.Form) else norm_cuda_c
    return cupy.RawKernel(*kernel.text_and_name(form))
