"""The sums of `global_norm.py` as Numba CUDA kernels: line by line what IN_CUDA_C is there, with what loops over the lanes of a
thread as LLVM.
"""

import functools
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from gpuadam.kernels import global_norm, global_norm_gpu, llvm, numba_cuda, primitives
from gpuadam.kernels.global_norm import (
    BLOCK,
    CHUNK,
    COLUMNS,
    DIMS,
    FIRST_CHUNK,
    FIRST_SUM,
    LANES_PER_THREAD,
    NDIM,
    POINTER,
    QUARTER,
    RUN,
    SIZE,
    WARP,
    WIDTH,
)
from gpuadam.kernels.layout import VECTOR_BYTES
from gpuadam.kernels.streams import LEGACY_DEFAULT

I32, I64 = ir.IntType(32), ir.IntType(64)


def launch(views, out, device, stream):
    """Enqueue the norm, as `global_norm_gpu.launch` says."""
    return global_norm_gpu.launch(numba_cuda, sys.modules[__name__], views, out, device, stream)


def current_device():
    """Return the number of the current device."""
    return cuda.get_current_device().id


NAMED = LEGACY_DEFAULT


def empty():
    """Return a new result on the current device, which may outlive every stream but the default one, and its address."""
    result = cuda.device_array((), np.float64)
    return result, result.device_ctypes_pointer.value


def run(form, stream, chunks, arguments):
    """Launch a pass on a stream of the current device."""
    _configured(form, -(-chunks // (BLOCK // WARP)), stream)(*arguments)


@functools.lru_cache(maxsize=1024)
def _configured(form, blocks, stream):
    return numba_cuda._with_grid(compiled(form), blocks, BLOCK, stream)


@functools.cache
def compiled(form):
    """Return the kernel of a form as a Numba dispatcher, which compiles it at its first launch."""
    return cuda.jit(build(form))


def build(form):
    """Return the kernel of a form as a Python function."""
    op = primitives.for_numba(intrinsic, contracts=True)
    fma, add, sqrt = op.fma, op.add, op.sqrt
    PER_VECTOR, ITEMSIZE, SQUARES, ROWS_AT_ONCE = form.lanes, form.itemsize, form.squares, global_norm.rows_at_once(form)
    int64_at, element_at, store = _accesses(form.format)
    add_rows, tree = _add_rows(form, ROWS_AT_ONCE), _tree(form)
    # from the first element of a thread in a row to those of its lanes
    K0, K1, K2, K3, K4, K5, K6, K7 = (k // PER_VECTOR * form.part + k % PER_VECTOR for k in range(LANES_PER_THREAD))

    @cuda.jit(device=True)
    def plus(s, x):
        return fma(x, x, s) if SQUARES else add(s, x)

    @cuda.jit(device=True)
    def address_of(table, row, i):
        """Return the address of element i of an array, in C order. Sums of chunks have no gaps."""
        address = int64_at(row + 8 * POINTER)
        if not SQUARES:
            return address + i * ITEMSIZE
        first = table + 8 * int64_at(row + 8 * DIMS)
        dimension = first + 16 * (int64_at(row + 8 * NDIM) - 1)
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
        return plus(s, element_at(address_of(table, row, start + i))) if i < n else s

    def sums(table, first_row, n_rows, out, chunks, last):
        thread = types.int64(cuda.threadIdx.x) % WARP
        chunk = types.int64(cuda.blockIdx.x) * (BLOCK // WARP) + types.int64(cuda.threadIdx.x) // WARP
        if chunk >= chunks:
            return  # the whole warp
        low, high = first_row, first_row + n_rows
        while high - low > 1:
            middle = (low + high) // 2
            if int64_at(table + 8 * (middle * COLUMNS + FIRST_CHUNK)) <= chunk:
                low = middle
            else:
                high = middle
        row = table + 8 * COLUMNS * low
        k = chunk - int64_at(row + 8 * FIRST_CHUNK)
        start = k * CHUNK
        n = min(int64_at(row + 8 * SIZE) - start, CHUNK)

        s = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        first = thread * PER_VECTOR // WIDTH * QUARTER + thread * PER_VECTOR % WIDTH
        if int64_at(row + 8 * RUN) and n == CHUNK:
            at = int64_at(row + 8 * POINTER) + (start + first) * ITEMSIZE
            for r in range(0, QUARTER // WIDTH, ROWS_AT_ONCE):
                s = add_rows(s, at + r * WIDTH * ITEMSIZE)
        else:
            for r in range(QUARTER // WIDTH):
                i = first + r * WIDTH
                s = (
                    add_element(s[0], table, row, start, i + K0, n),
                    add_element(s[1], table, row, start, i + K1, n),
                    add_element(s[2], table, row, start, i + K2, n),
                    add_element(s[3], table, row, start, i + K3, n),
                    add_element(s[4], table, row, start, i + K4, n),
                    add_element(s[5], table, row, start, i + K5, n),
                    add_element(s[6], table, row, start, i + K6, n),
                    add_element(s[7], table, row, start, i + K7, n),
                )
        total = tree(s)
        if thread == 0:
            store(out + 8 * (int64_at(row + 8 * FIRST_SUM) + k), sqrt(total) if last else total)

    return sums


LANES_OF_A_THREAD = types.UniTuple(types.float64, LANES_PER_THREAD)


def _add_rows(form, rows):
    """Return a function that adds the elements of some rows to the lanes of a thread. It loads all, then adds the first."""
    parts = LANES_PER_THREAD // form.lanes

    @intrinsic
    def add_rows(typingctx, s, at):
        def codegen(context, b, signature, args):
            s, at = args
            lanes = [b.extract_value(s, k) for k in range(LANES_PER_THREAD)]
            places = [(r * WIDTH + part * form.part) * form.itemsize for r in range(rows) for part in range(parts)]
            vectors = [_vector_at(b, form, b.add(at, I64(place))) for place in places]
            for k, vector in enumerate(vectors):
                for e in range(form.lanes):
                    x = global_norm.to_float64(b, form.format, vector[e], on_gpu=True)
                    lane = k % parts * form.lanes + e
                    lanes[lane] = _fma(b, x, lanes[lane]) if form.squares else _add(b, lanes[lane], x)
            return context.make_tuple(b, signature.return_type, lanes)

        return LANES_OF_A_THREAD(LANES_OF_A_THREAD, types.int64), codegen

    return add_rows


def _vector_at(b, form, address):
    """Return the elements in 16 bytes. A vector of 8 short ones would be two loads of 8 bytes: they come in words."""
    halves = form.itemsize == 2
    kind = ir.VectorType(I32, 4) if halves else ir.VectorType(global_norm.memory_type(form.format), form.lanes)
    vector = b.load(_pointer(b, address, kind), align=VECTOR_BYTES)
    if not halves:
        return [b.extract_element(vector, I32(k)) for k in range(form.lanes)]
    words = [b.extract_element(vector, I32(k)) for k in range(4)]
    return [b.trunc(x, ir.IntType(16)) for word in words for x in (word, b.lshr(word, I32(16)))]


def _tree(form):
    """Return a function that adds all lanes of a warp, of which a thread has (part * WARP + thread) * form.lanes + k."""
    parts = LANES_PER_THREAD // form.lanes

    @intrinsic
    def tree(typingctx, s):
        def codegen(context, b, signature, args):
            lanes = [b.extract_value(args[0], k) for k in range(LANES_PER_THREAD)]
            for half in _halves(parts):
                lanes = _folded(b, lanes, half * form.lanes)
            for half in _halves(WARP):
                lanes = [_add(b, x, _from_other_thread(b, x, half)) for x in lanes]
            for half in _halves(form.lanes):
                lanes = _folded(b, lanes, half)
            return lanes[0]

        return types.float64(LANES_OF_A_THREAD), codegen

    return tree


def _halves(n):
    return [1 << k for k in reversed(range(n.bit_length() - 1))]


def _folded(b, lanes, half):
    return [_add(b, lanes[k], lanes[k + half]) for k in range(half)]


def _fma(b, x, s):
    emit: Any = primitives.PRIMITIVES["fma"].llvm
    return emit(b, None, x, x, s)


def _add(b, x, y):
    emit: Any = primitives.PRIMITIVES["add"].llvm
    return emit(b, llvm.nvvm_rn(b), x, y)


def _from_other_thread(b, x, mask):
    """Return the x of the thread whose number differs in a bit: a shuffle of both halves."""
    result = ir.LiteralStructType((I32, ir.IntType(1)))
    name = "llvm.nvvm.shfl.sync.i32"
    shuffle = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, [I32] * 5), name)
    bits = b.bitcast(x, I64)
    low, high = (
        b.extract_value(b.call(shuffle, [I32(0xFFFFFFFF), I32(3), b.trunc(part, I32), I32(mask), I32(WARP - 1)]), 0)
        for part in (bits, b.lshr(bits, I64(32)))
    )
    return b.bitcast(b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), I64(32))), x.type)


def _pointer(b, address, kind):
    # in global memory: a pointer of no address space makes generic loads
    return b.inttoptr(address, ir.PointerType(kind, addrspace=1))


def _accesses(format):
    """Return functions of addresses: the int64 there, the element there as float64, and a store of a float64."""

    @intrinsic
    def int64_at(typingctx, address):
        def codegen(context, b, signature, args):
            return b.load(_pointer(b, args[0], I64), align=8)

        return types.int64(types.int64), codegen

    @intrinsic
    def element_at(typingctx, address):
        def codegen(context, b, signature, args):
            itemsize, *_ = global_norm.FORMATS[format]
            x = b.load(_pointer(b, args[0], global_norm.memory_type(format)), align=itemsize)
            return global_norm.to_float64(b, format, x, on_gpu=True)

        return types.float64(types.int64), codegen

    @intrinsic
    def store(typingctx, address, x):
        def codegen(context, b, signature, args):
            b.store(args[1], _pointer(b, args[0], ir.DoubleType()), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64), codegen

    return int64_at, element_at, store
