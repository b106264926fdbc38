"""Numbers in memory, for code that Numba compiles on the CPU and on a GPU: loads, stores, and formats as float64.

Addresses are int64. In CUDA C the formats are in `norm_cuda_c.py`.
"""

import functools

from llvmlite import ir
from numba import types

from gpuadam.kernels import conversions, llvm, norm_order
from gpuadam.kernels.processor import CACHE_LINE

# how an element of a format is loaded
RAW = {"float64": types.float64, "float32": types.float32, "uint8": types.uint8} | dict.fromkeys(
    ("bfloat16", "float16", "int16"), types.uint16
)


def llvm_type(element):
    """Return the LLVM type of a number's Numba type."""
    return (llvm.FLOATS if isinstance(element, types.Float) else llvm.INTS)[element.bitwidth // 8]


@functools.cache
def load_at(intrinsic, element, addrspace=0, align=None):
    """Return a function from an address to the number there.

    intrinsic: Numba's, or that of its CUDA target. element: the number's type. addrspace: 1 on the CUDA target. align: of the
    address, by default the number's bytes.
    """

    def load(b, address):
        pointer = llvm.pointer(b, address, llvm_type(element), addrspace)
        return b.load(pointer, align=align or element.bitwidth // 8)

    return llvm.function(intrinsic, "load", load, element(types.int64))


def tuple_at(intrinsic, n, element=types.int64, addrspace=0, stored=None):
    """Return a function from an address to the n numbers from there on, a tuple. The arguments are those of `load_at`.

    stored: the type in memory, if it is a wider float.
    """
    stored = stored or element

    def load_all(b, address):
        start = llvm.pointer(b, address, llvm_type(stored), addrspace)
        numbers = [b.load(b.gep(start, [llvm.U64(k)]), align=stored.bitwidth // 8) for k in range(n)]
        return numbers if stored == element else [b.fptrunc(x, llvm_type(element)) for x in numbers]

    return llvm.function(intrinsic, "tuple_at", load_all, types.UniTuple(element, n)(types.int64))


@functools.cache
def store_at(intrinsic, element, addrspace=0, align=None):
    """Return a function that stores a number at an address. The arguments are those of `load_at`."""

    def store(b, address, value):
        b.store(value, llvm.pointer(b, address, llvm_type(element), addrspace), align=align or element.bitwidth // 8)

    return llvm.function(intrinsic, "store", store, types.void(types.int64, element))


def fetch(b, address, n_bytes):
    """Ask for the cache lines of some bytes, which need not be there. b: an llvmlite builder."""
    byte, name = llvm.U8.as_pointer(), "llvm.prefetch.p0i8"
    kind = ir.FunctionType(ir.VoidType(), [byte, llvm.U32, llvm.U32, llvm.U32])
    prefetch = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    for line in range(0, n_bytes, CACHE_LINE):
        place = b.inttoptr(b.add(address, llvm.U64(line)), byte)
        b.call(prefetch, [place, llvm.U32(0), llvm.U32(3), llvm.U32(1)])  # to read it, which is faster; keep it; data


def fetch_at(intrinsic, n_bytes):
    """Return a function that asks for the bytes from an address on."""
    return llvm.function(intrinsic, "fetch", lambda b, address: fetch(b, address, n_bytes), types.void(types.int64))


@functools.cache
def pointer_to(intrinsic, element):
    """Return a function from an address to a pointer that `numba.carray` takes. The arguments are those of `load_at`."""
    kind = llvm_type(element)
    return llvm.function(
        intrinsic, "pointer", lambda b, address: llvm.pointer(b, address, kind, 0), types.CPointer(element)(types.int64)
    )


def on_stack(intrinsic, n_bytes):
    """Return a function whose value is the address of some bytes, which are there until its caller returns.

    They start at a cache line. Unlike an array they cannot be refused, so a loop that has begun cannot fail.
    """

    def allocate(b):
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(llvm.U8, n_bytes))
        memory.align = CACHE_LINE
        return b.ptrtoint(memory, llvm.U64)

    return llvm.function(intrinsic, "on_stack", allocate, types.int64())


def written_out(head, item, n, **names):
    """Return a function whose value is the tuple of item for k = 0 ... n - 1: Numba has no loop that makes a tuple.

    head: its arguments. item: the text of an expression, with {k}. names: of the functions that the text calls.

    >>> written_out("x, y", "x + {k} * y", 3)(1, 10)
    (1, 11, 21)
    """
    text = f"def written_out({head}):\n    return ({''.join(item.format(k=k) + ', ' for k in range(n))})"
    exec(compile(text, __file__, "exec"), names)
    return names["written_out"]


def to_float64(b, format, x, on_gpu):
    """Return an element as a double, which is exact. b: an llvmlite builder."""
    for row in norm_order.FORMATS[format]:
        x = conversions.CONVERSIONS[row].llvm(b, on_gpu, b.zext(x, llvm.U32) if x.type == llvm.U16 else x)
    return x


def widened(intrinsic, format, on_gpu):
    """Return a function from an element as it is in memory to a float64."""
    return llvm.function(intrinsic, "widened", lambda b, x: to_float64(b, format, x, on_gpu), types.float64(RAW[format]))
