"""A rule as a Numba CUDA kernel: the backend `numba-cuda`. The only file that imports numba.cuda.

Numba has no vector type for array elements, and passing an array to a kernel takes it longer than launching one. So a kernel
here takes addresses, and loads and stores 16 bytes through two intrinsics.
"""

import contextlib
import functools
import importlib
import warnings
from unittest import mock

import numpy as np
from cuda.bindings import driver
from llvmlite import ir
from numba import cuda, types
from numba.cuda.cudadrv.driver import device_memset
from numba.cuda.cudadrv.error import CudaSupportError
from numba.cuda.extending import intrinsic

from gpuadam.arrays import on_cuda
from gpuadam.kernels import adam, primitives
from gpuadam.kernels.alignment import VECTOR_BYTES, split

if not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30.4 names np.row_stack when it first loads its array functions. NumPy 2.5 has it no more, so no kernel
    # could be compiled. It was another name for vstack, and is one again while they load.
    with mock.patch.object(np, "row_stack", np.vstack, create=True):
        importlib.import_module("numba.cuda.cudaimpl")

BLOCK = 128


def driver_problem():
    """Return why no CUDA device can be used, or an empty string."""
    try:
        return "" if len(cuda.gpus) else "the driver lists none"
    except CudaSupportError as error:
        return " ".join(str(error).split()).strip(" :.")


def device_name():
    """Return the name of the current device."""
    name = cuda.get_current_device().name
    return name if isinstance(name, str) else name.decode()  # bytes before numba-cuda used cuda.core


def view(name, array):
    """View a Numba device array, or anything with `__cuda_array_interface__`."""
    return on_cuda(name, array, _device_of)


def _device_of(pointer):
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, device = driver.cuPointerGetAttribute(attribute, pointer)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"address {pointer:#x} is not CUDA memory: {status.name}")
    return int(device)


def zeros_like(view):
    """Return zeros for a moment of an array: the same shape, order of memory and offset from a 16-byte boundary."""
    with cuda.gpus[view.device or 0]:
        head = view.pointer % VECTOR_BYTES // view.dtype.itemsize
        if view.size == 0:
            return cuda.device_array(view.shape, view.dtype)
        flat = cuda.device_array(head + view.size, view.dtype)
        with _streams([view]) as stream:
            device_memset(flat, 0, flat.nbytes, _stream(stream))
        zeros = flat[head:].reshape(*view.shape)
        _, (strides,) = collapse(view.shape, [view.strides])
        if strides not in ((), (view.dtype.itemsize,)):
            return zeros  # the array has gaps; its moments need none
        described = zeros.__cuda_array_interface__ | {"strides": view.strides}
        return cuda.from_cuda_array_interface(described, owner=zeros, sync=False)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory."""
    return cuda.to_device(array)


def to_host(array):
    """Return a copy of an array of this backend as a NumPy array."""
    return array.copy_to_host()


def now():
    """Return a moment of the default stream for `seconds_between`."""
    event = cuda.event()
    event.record()
    return event


def seconds_between(start, end):
    """Return the device's time between two moments, after waiting for the later one."""
    end.synchronize()
    return start.elapsed_time(end) / 1e3


copies_any_layout = False


def copy(to, source):
    """Copy one array into another of the same shape, strides and dtype."""
    if to.size:
        with cuda.gpus[to.device], _streams((to, source)) as stream:
            (status,) = driver.cuMemcpyDtoDAsync(to.pointer, source.pointer, to.nbytes, stream)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"copying {source.name} failed: {status.name}")


def launch(form, views, scalars, rule=adam):
    """Update arrays in CUDA memory in place, on their device and the stream that they name, or else the default one.

    views: of param, grad, m, v, max_v (None without AMSGrad), of one shape and device and of form.dtype, checked.
    scalars: `adam.Scalars` of form.dtype.
    """
    used = [view for view in views if view is not None]
    size, itemsize = used[0].size, form.dtype.itemsize
    if size == 0:
        return
    pointers = [0 if view is None else view.pointer for view in views]
    shape, strides = collapse(used[0].shape, [view.strides for view in used])
    with cuda.gpus[used[0].device], _streams(used) as stream:
        if all(s in ((), (itemsize,)) for s in strides):
            head, vectors, threads = split([view.pointer for view in used], size, itemsize)
            kernel = _configured(rule, form, "contiguous", -(-threads // BLOCK), stream)
            kernel(*pointers, head, vectors, threads, *scalars)
        else:
            strides = [*strides, strides[0]][:5]  # max_v's, which is not read without AMSGrad
            kernel = _configured(rule, form, f"strided {len(shape)}", -(-size // BLOCK), stream)
            kernel(*pointers, shape, *strides, size, *scalars)


@contextlib.contextmanager
def _streams(views):
    """Give the first stream that the arrays name, ordered after the others and, afterwards, before them."""
    first, *others = dict.fromkeys(view.stream for view in views if view.stream is not None) or [LEGACY_DEFAULT]
    for other in others:
        _order(other, first)
    yield first
    for other in others:
        _order(first, other)


def _order(before, after):
    event = cuda.event(timing=False)
    event.record(_stream(before))
    event.wait(_stream(after))


LEGACY_DEFAULT = 1  # the stream's name in __cuda_array_interface__


@functools.cache
def _stream(number):
    # one object for each stream: Numba caches launch configurations by its identity
    return 0 if number == LEGACY_DEFAULT else cuda.external_stream(number)


@functools.lru_cache(maxsize=1024)
def _configured(rule, form, loop, blocks, stream):
    """Return a kernel with its grid; Numba would warn of every array that is too small to fill a GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")
        return compiled(rule, form, loop)[blocks, BLOCK, _stream(stream)]


@functools.cache
def compiled(rule, form, loop):
    """Return the kernel of a form as a Numba dispatcher, which compiles it at its first launch."""
    return cuda.jit(build(rule, form, loop))


def build(rule, form, loop):
    """Return the kernel of a form as a Python function. loop: "contiguous" or "strided N", N the number of dimensions."""
    update = cuda.jit(device=True)(rule.in_python(form, primitives.for_numba(intrinsic, contracts=True)))
    ITEMSIZE, AMSGRAD = form.dtype.itemsize, form.amsgrad
    LANES = VECTOR_BYTES // ITEMSIZE
    load, store = _access(form.dtype, 1)
    load_vector, store_vector = _access(form.dtype, LANES)
    update_vector = cuda.jit(device=True)(_lanes(update, LANES))

    def contiguous(param, grad, m, v, max_v, head, vectors, threads, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        scalars = (grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr)
        i = cuda.grid(1)
        if i < vectors:
            at = (head + i * LANES) * ITEMSIZE
            P, G, M, V = load_vector(param + at), load_vector(grad + at), load_vector(m + at), load_vector(v + at)
            X = load_vector(max_v + at) if AMSGRAD else V
            P, M, V, X = update_vector(P, G, M, V, X, scalars)
            store_vector(param + at, P)
            store_vector(m + at, M)
            store_vector(v + at, V)
            if AMSGRAD:
                store_vector(max_v + at, X)
        elif i < threads:
            k = i - vectors
            at = (k if k < head else k + vectors * LANES) * ITEMSIZE
            P, G, M, V = load(param + at), load(grad + at), load(m + at), load(v + at)
            X = load(max_v + at) if AMSGRAD else V
            p, m1, v1, x = update(P[0], G[0], M[0], V[0], X[0], *scalars)
            store(param + at, (p,))
            store(m + at, (m1,))
            store(v + at, (v1,))
            if AMSGRAD:
                store(max_v + at, (x,))

    if loop == "contiguous":
        return contiguous
    NDIM = int(loop.split()[1])

    def strided(
        param, grad, m, v, max_v, shape, param_strides, grad_strides, m_strides, v_strides, max_v_strides, size,
        grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr,
    ):  # fmt: skip
        rest = cuda.grid(1)
        if rest < size:
            for d in range(NDIM):
                # the last dimension varies fastest
                k = rest % shape[NDIM - 1 - d]
                rest = rest // shape[NDIM - 1 - d]
                param += k * param_strides[NDIM - 1 - d]
                grad += k * grad_strides[NDIM - 1 - d]
                m += k * m_strides[NDIM - 1 - d]
                v += k * v_strides[NDIM - 1 - d]
                max_v += k * max_v_strides[NDIM - 1 - d]
            P, G, M, V = load(param), load(grad), load(m), load(v)
            X = load(max_v) if AMSGRAD else V
            p, m1, v1, x = update(P[0], G[0], M[0], V[0], X[0], grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr)
            store(param, (p,))
            store(m, (m1,))
            store(v, (v1,))
            if AMSGRAD:
                store(max_v, (x,))

    return strided


def _lanes(update, n):
    """Return the rule over tuples of n elements."""

    def two(P, G, M, V, X, s):
        p0, m0, v0, x0 = update(P[0], G[0], M[0], V[0], X[0], *s)
        p1, m1, v1, x1 = update(P[1], G[1], M[1], V[1], X[1], *s)
        return (p0, p1), (m0, m1), (v0, v1), (x0, x1)

    def four(P, G, M, V, X, s):
        p0, m0, v0, x0 = update(P[0], G[0], M[0], V[0], X[0], *s)
        p1, m1, v1, x1 = update(P[1], G[1], M[1], V[1], X[1], *s)
        p2, m2, v2, x2 = update(P[2], G[2], M[2], V[2], X[2], *s)
        p3, m3, v3, x3 = update(P[3], G[3], M[3], V[3], X[3], *s)
        return (p0, p1, p2, p3), (m0, m1, m2, m3), (v0, v1, v2, v3), (x0, x1, x2, x3)

    return {2: two, 4: four}[n]


@functools.cache
def _access(dtype, lanes):
    """Return load(address) -> tuple and store(address, tuple) of `lanes` neighbours, each one instruction.

    Addresses are int64. They are cast to addrspace(1), global memory: a pointer of no address space makes generic loads.
    """
    element = {"float32": types.float32, "float64": types.float64}[dtype.name]
    values = types.UniTuple(element, lanes)

    def pointer(builder, address):
        llvm = ir.FloatType() if element is types.float32 else ir.DoubleType()
        vector = llvm if lanes == 1 else ir.VectorType(llvm, lanes)
        return builder.inttoptr(address, ir.PointerType(vector, addrspace=1)), vector

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            at, _ = pointer(builder, args[0])
            loaded = builder.load(at, align=lanes * dtype.itemsize)
            lane = [loaded] if lanes == 1 else [builder.extract_element(loaded, _index(k)) for k in range(lanes)]
            return context.make_tuple(builder, signature.return_type, lane)

        return values(types.int64), codegen

    @intrinsic
    def store(typingctx, address, elements):
        def codegen(context, builder, signature, args):
            at, vector = pointer(builder, args[0])
            lane = [builder.extract_value(args[1], k) for k in range(lanes)]
            stored = lane[0] if lanes == 1 else ir.Constant(vector, ir.Undefined)
            for k in range(lanes if lanes > 1 else 0):
                stored = builder.insert_element(stored, lane[k], _index(k))
            builder.store(stored, at, align=lanes * dtype.itemsize)
            return context.get_dummy_value()

        return types.void(types.int64, values), codegen

    return load, store


def _index(k):
    return ir.Constant(ir.IntType(32), k)


def collapse(shape, strides):
    """Merge the dimensions that all arrays step through as one, and drop those of one element.

    strides: one tuple of bytes for each array. Dimensions are first put in the order of the first array's memory.

    >>> collapse((2, 3, 4), [(48, 16, 4), (48, 16, 4)])
    ((24,), [(4,), (4,)])
    >>> collapse((2, 3), [(4, 8), (12, 4)])  # F order beside C order
    ((3, 2), [(8, 4), (4, 12)])
    """
    dims = [(n, *steps) for n, *steps in zip(shape, *strides, strict=True) if n != 1]
    dims.sort(key=lambda dim: -abs(dim[1]))
    merged: list[list[int]] = []
    for n, *steps in dims:
        if merged and merged[-1][1:] == [n * step for step in steps]:
            merged[-1] = [merged[-1][0] * n, *steps]
        else:
            merged.append([n, *steps])
    return tuple(dim[0] for dim in merged), [tuple(dim[k + 1] for dim in merged) for k in range(len(strides))]
