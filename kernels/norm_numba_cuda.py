"""The sums of `norm_order.py` as Numba CUDA kernels.

Line by line they are IN_CUDA_C of `norm_cuda_c.py`. Where that loops over the lanes of a thread, LLVM is written here.
"""

from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from gpuadam.kernels import llvm, primitives
from gpuadam.kernels import norm_order as order
from gpuadam.kernels.layout import VECTOR_BYTES
from gpuadam.kernels.llvm import U16, U32, U64
from gpuadam.kernels.norm_order import LANES_PER_THREAD, WARP, WIDTH
from gpuadam.kernels.numba_memory import RAW, llvm_type, load_at, store_at, to_float64, widened, written_out

int64_at = load_at(intrinsic, types.int64, addrspace=1)
LANES_OF_A_THREAD = types.UniTuple(types.float64, LANES_PER_THREAD)
NO_SUMS = (0.0,) * LANES_PER_THREAD


def build(form):
    """Return the kernel of a form as a Python function."""
    op = primitives.for_numba(intrinsic, contracts=True)
    fma, add, sqrt = op.fma, op.add, op.sqrt
    PER_VECTOR, ITEMSIZE, SQUARES = form.lanes, form.itemsize, form.squares
    ROWS_AT_ONCE = form.lanes  # of all quarters, which a warp loads before it adds the first: 8 vectors of 16 bytes a thread
    raw_at, as_float64 = load_at(intrinsic, RAW[form.format], addrspace=1), widened(intrinsic, form.format, on_gpu=True)
    store = store_at(intrinsic, types.float64, addrspace=1)
    add_rows, tree, chunk_of_warp = _add_rows(form), tree_of(form.lanes), chunk_of_warp_in(order.COLUMNS)

    @cuda.jit(device=True)
    def plus(s, x):
        return fma(x, x, s) if SQUARES else add(s, x)

    @cuda.jit(device=True)
    def address_of(table, row, i):
        """Return the address of element i of an array, in C order. Sums of chunks have no gaps."""
        address = int64_at(row + 8 * order.OPERANDS)
        if not SQUARES:
            return address + i * ITEMSIZE
        first = table + 8 * int64_at(row + 8 * order.DIMS)
        dimension = first + 16 * (int64_at(row + 8 * order.NDIM) - 1)
        while dimension > first:
            length = int64_at(dimension)
            rest = types.int64(types.uint64(i) // types.uint64(length))
            address += (i - rest * length) * int64_at(dimension + 8)
            i = rest
            dimension -= 16
        return address + i * int64_at(first + 8)

    @cuda.jit(device=True)
    def add_element(s, table, row, start, i, n):
        """Add element i of a chunk to its lane, if the chunk has it."""
        return plus(s, as_float64(raw_at(address_of(table, row, start + i)))) if i < n else s

    # from the first element of a thread in a row to those of its lanes
    PLACES = tuple(k // PER_VECTOR * form.part + k % PER_VECTOR for k in range(LANES_PER_THREAD))
    arguments, item = "s, table, row, start, i, n", "add_element(s[{k}], table, row, start, i + PLACES[{k}], n)"
    add_elements = tuple_of(arguments, item, LANES_PER_THREAD, add_element=add_element, PLACES=PLACES)

    def sums(table, first_row, n_rows, out, chunks, last):
        thread, chunk = place_of_warp()
        if chunk >= chunks:
            return  # the whole warp
        row, k, start, n = chunk_of_warp(table, first_row, n_rows, chunk)
        s = NO_SUMS
        first = thread * PER_VECTOR // WIDTH * order.QUARTER + thread * PER_VECTOR % WIDTH
        if int64_at(row + 8 * order.RUN) and n == order.CHUNK:
            at = int64_at(row + 8 * order.OPERANDS) + (start + first) * ITEMSIZE
            for r in range(0, order.QUARTER // WIDTH, ROWS_AT_ONCE):
                s = add_rows(s, at + r * WIDTH * ITEMSIZE)
        else:
            for r in range(order.QUARTER // WIDTH):
                s = add_elements(s, table, row, start, first + r * WIDTH, n)
        total = tree(s)
        if thread == 0:
            store(out + 8 * (int64_at(row + 8 * order.FIRST_SUM) + k), sqrt(total) if last else total)

    return sums


@cuda.jit(device=True)
def place_of_warp():
    """Return the number of a thread in its warp, and that of the warp's chunk."""
    thread = types.int64(cuda.threadIdx.x)
    return thread % WARP, types.int64(cuda.blockIdx.x) * (order.BLOCK // WARP) + thread // WARP


def tuple_of(head, item, n, **names):
    """Return a device function whose value is a tuple, as `written_out` says."""
    return cuda.jit(device=True)(written_out(head, item, n, **names))


def chunk_of_warp_in(columns):
    """Return a function to the address of a chunk's row in a table, the chunk's number there, its first element and its size."""

    @cuda.jit(device=True)
    def chunk_of_warp(table, first_row, n_rows, chunk):
        low, high = first_row, first_row + n_rows
        while high - low > 1:
            middle = (low + high) // 2
            if int64_at(table + 8 * (middle * columns + order.FIRST_CHUNK)) <= chunk:
                low = middle
            else:
                high = middle
        row = table + 8 * columns * low
        k = chunk - int64_at(row + 8 * order.FIRST_CHUNK)
        start = k * order.CHUNK
        return row, k, start, min(int64_at(row + 8 * order.SIZE) - start, order.CHUNK)

    return chunk_of_warp


def _add_rows(form):
    """Return a function that adds the elements of form.lanes rows to the lanes of a thread. It loads all, then adds the first."""
    parts = LANES_PER_THREAD // form.lanes

    def add_rows(b, lanes, at):
        op = primitives.emitting(b, contracts=True)
        places = [(r * WIDTH + part * form.part) * form.itemsize for r in range(form.lanes) for part in range(parts)]
        vectors = [_vector_at(b, form, b.add(at, U64(place))) for place in places]
        for k, vector in enumerate(vectors):
            for e in range(form.lanes):
                x = to_float64(b, form.format, vector[e], on_gpu=True)
                lane = k % parts * form.lanes + e
                lanes[lane] = op.fma(x, x, lanes[lane]) if form.squares else op.add(lanes[lane], x)
        return lanes

    return llvm.function(intrinsic, "add_rows", add_rows, LANES_OF_A_THREAD(LANES_OF_A_THREAD, types.int64))


def _vector_at(b, form, address):
    """Return the elements in 16 bytes. A vector of 8 short ones would be two loads of 8 bytes: they come in words."""
    halves = form.itemsize == 2
    kind = ir.VectorType(U32, 4) if halves else ir.VectorType(llvm_type(RAW[form.format]), form.lanes)
    vector = b.load(llvm.pointer(b, address, kind, addrspace=1), align=VECTOR_BYTES)
    if not halves:
        return [b.extract_element(vector, U32(k)) for k in range(form.lanes)]
    words = [b.extract_element(vector, U32(k)) for k in range(4)]
    return [b.trunc(x, U16) for word in words for x in (word, b.lshr(word, U32(16)))]


def tree_of(per_vector):
    """Return a function that adds all lanes of a warp, of which a thread has (part * WARP + thread) * per_vector + k."""
    parts = LANES_PER_THREAD // per_vector

    def tree(b, lanes):
        op = primitives.emitting(b, contracts=True)
        for half in _halves(parts):
            lanes = _folded(op, lanes, half * per_vector)
        for half in _halves(WARP):
            lanes = [op.add(x, _from_other_thread(b, x, half)) for x in lanes]
        for half in _halves(per_vector):
            lanes = _folded(op, lanes, half)
        return lanes[0]

    return llvm.function(intrinsic, "tree", tree, types.float64(LANES_OF_A_THREAD))


def _halves(n):
    return [1 << k for k in reversed(range(n.bit_length() - 1))]


def _folded(op, lanes, half):
    return [op.add(lanes[k], lanes[k + half]) for k in range(half)]


def _from_other_thread(b, x, mask):
    """Return the x of the thread whose number differs in a bit: a shuffle of both halves."""
    result = ir.LiteralStructType((U32, ir.IntType(1)))
    name = "llvm.nvvm.shfl.sync.i32"
    shuffle = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, [U32] * 5), name)
    bits = b.bitcast(x, U64)
    low, high = (
        b.extract_value(b.call(shuffle, [U32(0xFFFFFFFF), U32(3), b.trunc(part, U32), U32(mask), U32(WARP - 1)]), 0)
        for part in (bits, b.lshr(bits, U64(32)))
    )
    return b.bitcast(b.or_(b.zext(low, U64), b.shl(b.zext(high, U64), U64(32))), x.type)
