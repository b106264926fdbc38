"""A rule as a Numba CUDA kernel: the backend `numba-cuda`. The only file that imports numba.cuda.

Numba has no vector type for array elements, and passing an array to a kernel takes it longer than launching one. So a kernel
here takes addresses, and loads and stores 16 bytes through two intrinsics.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from unittest import mock

import numpy as np
from cuda.bindings import driver
from llvmlite import ir
from numba import cuda, types
from numba.cuda.cudadrv.driver import device_memset
from numba.cuda.cudadrv.error import CudaSupportError
from numba.cuda.extending import intrinsic

from gpuadam.arrays import View, on_cuda
from gpuadam.kernels import adam, device_scalars, gpu_launch, primitives, streams
from gpuadam.kernels.layout import VECTOR_BYTES, collapse, dense
from gpuadam.kernels.pointer_table import BLOCK, CHUNK, COLUMNS, FIRST_CHUNK, GRAD, HEAD, ITEMS, MAX_V, PARAM, VECTORS
from gpuadam.kernels.pointer_table import M as M_
from gpuadam.kernels.pointer_table import V as V_
from gpuadam.kernels.streams import LEGACY_DEFAULT

if not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30.4 names np.row_stack when it first loads its array functions. NumPy 2.5 has it no more, so no kernel
    # could be compiled. It was another name for vstack, and is one again while they load.
    with mock.patch.object(np, "row_stack", np.vstack, create=True):
        importlib.import_module("numba.cuda.cudaimpl")

NAME = "numba-cuda"

REALS = {"float32": types.float32, "float64": types.float64}
LLVM_TYPES = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
}


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
    found = on_cuda(name, array, _device_of)
    # CuPy's arrays name whatever stream is current when they are asked
    return found._replace(stream=None) if type(array).__module__.startswith("cupy") else found


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
        stream, _ = streams.choose(None, current_stream(), [view.stream])
        device_memset(flat, 0, flat.nbytes, _stream(stream))
        zeros = flat[head:].reshape(*view.shape)
        if not dense([view]):
            return zeros  # the array has gaps; its moments need none
        described = zeros.__cuda_array_interface__ | {"strides": view.strides}
        return cuda.from_cuda_array_interface(described, owner=zeros, sync=False)


def zeros(n, dtype, device):
    """Return a 1-D array of n zeros."""
    with cuda.gpus[device or 0]:
        array = cuda.device_array(n, dtype)
        if n:
            stream, _ = streams.choose(None, current_stream(), [])
            device_memset(array, 0, array.nbytes, _stream(stream))
        return array


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
        with cuda.gpus[to.device]:
            stream, others = streams.choose(None, current_stream(), [to.stream, source.stream])
            for other in others:
                order(other, stream)
            _ok(driver.cuMemcpyDtoDAsync(to.pointer, source.pointer, to.nbytes, stream))
            for other in others:
                order(stream, other)


def launch(form, views, scalars, rule=adam, stream=None):
    """Update arrays, as `gpu_launch.launch` says."""
    gpu_launch.launch(_this_module, form, views, scalars, rule, stream)


def batches(updates):
    """Return the `gpu_launch.Batch`es of several updates, of any shapes, on one device."""
    return gpu_launch.batches(_this_module, updates)


def run(batch, form, scalars, rule, stream):
    """Launch a Batch; its device is the current one."""
    on_device = isinstance(scalars, device_scalars.Memory)
    # a kernel takes all scalars as one argument; Numba takes a Python float for a float64
    given = scalars.address if on_device else tuple(map(form.dtype.type, scalars))
    if batch.loop == "table":
        kernel = _configured(rule, form, "table", on_device, batch.table.owners.size, stream)
        kernel(*batch.table.addresses(stream), given)
    elif batch.loop == "contiguous":
        head, vectors, threads = batch.split
        kernel = _configured(rule, form, "contiguous", on_device, -(-threads // BLOCK), stream)
        kernel(*_five(batch.pointers, 0), head, vectors, threads, given)
    else:
        shape, strides = collapse(batch.views[0].shape, [view.strides for view in batch.views])
        kernel = _configured(rule, form, f"strided {len(shape)}", on_device, -(-batch.size // BLOCK), stream)
        kernel(*_five(batch.pointers, 0), shape, *_five(strides, strides[0]), batch.size, given)


def _five(values, last):
    return [*values, last][:5]  # max_v's, which is not read without AMSGrad


_this_module = sys.modules[__name__]


def on(device, stream):
    """Make a device the current one. Kernels name their stream."""
    gpu = cuda.gpus[device]
    (current,) = _ok(driver.cuCtxGetCurrent())
    # what Numba's own context manager calls of the driver takes as long as a launch
    return _UNCHANGED if int(current) == int(gpu.get_primary_context().handle) else gpu


_UNCHANGED = contextlib.nullcontext()


def current_stream():
    """Return the handle of CuPy's current stream on the current device, if CuPy is in use: it is the program's stream."""
    cupy = sys.modules.get("cupy")
    return cupy and (cupy.cuda.get_current_stream().ptr or LEGACY_DEFAULT)


def is_capturing(stream):
    """Whether a graph is being captured on a stream; it cannot be on the default one."""
    if stream == LEGACY_DEFAULT:
        return False
    (status,) = _ok(driver.cuStreamIsCapturing(stream))
    return status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def order(before, after):
    """Make what comes next on one stream wait for what is on another."""
    wait(after, record(before))


def record(stream):
    """Return an event that is done when what is on a stream so far is. The stream is the current device's."""
    (handle,) = _ok(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value))
    event = _Event(handle)
    _ok(driver.cuEventRecord(handle, stream))
    return event


class _Event:
    """Numba puts its own into the queue of the memory it has to free, and frees that, which waits for the device, every ten."""

    def __init__(self, handle):
        self.handle = handle

    def __del__(self, destroy=driver.cuEventDestroy):
        destroy(self.handle)


def wait(stream, event):
    """Make what comes next on a stream wait for an event."""
    _ok(driver.cuStreamWaitEvent(stream, event.handle, 0))


def done(event):
    """Whether an event is done."""
    (status,) = driver.cuEventQuery(event.handle)
    return status == driver.CUresult.CUDA_SUCCESS


def pinned(n_bytes):
    """Return pinned memory of the host, as an array of bytes."""
    return cuda.pinned_array(n_bytes, np.uint8)


def device_bytes(n_bytes):
    """Return memory of the current device: its owner, and its address."""
    memory = cuda.device_array(n_bytes, np.uint8)
    return memory, memory.__cuda_array_interface__["data"][0]


def send(address, pinned, n_bytes, stream):
    """Copy from pinned memory to the device, on a stream."""
    _ok(driver.cuMemcpyHtoDAsync(address, pinned.ctypes.data, n_bytes, stream))


def _ok(result):
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values


@functools.cache
def _stream(handle):
    # one object for each stream: Numba caches launch configurations by its identity
    return 0 if handle == LEGACY_DEFAULT else cuda.external_stream(handle)


@functools.lru_cache(maxsize=1024)
def _configured(rule, form, loop, on_device, blocks, stream):
    return _with_grid(compiled(rule, form, loop, on_device), blocks, BLOCK, stream)


def _with_grid(kernel, blocks, threads, stream):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")  # Numba would warn of every array too small to fill a GPU
        return kernel[blocks, threads, _stream(stream)]


@functools.cache
def compiled(rule, form, loop, on_device=False):
    """Return the kernel of a form as a Numba dispatcher, which compiles it at its first launch."""
    return cuda.jit(build(rule, form, loop, on_device))


def build(rule, form, loop, on_device=False):
    """Return the kernel of a form as a Python function.

    loop: "contiguous", "table" or "strided N", N the number of dimensions. on_device: whether the scalars are in device memory,
    and the kernel's last argument is their address.
    """
    update = cuda.jit(device=True)(rule.in_python(form, primitives.for_numba(intrinsic, contracts=True)))
    ITEMSIZE, AMSGRAD = form.dtype.itemsize, form.amsgrad
    LANES = VECTOR_BYTES // ITEMSIZE
    load, store = _access(REALS[form.dtype.name], 1)
    load_vector, store_vector = _access(REALS[form.dtype.name], LANES)
    update_vector = cuda.jit(device=True)(_lanes(update, LANES))

    @cuda.jit(device=True)
    def update_16_bytes(param, grad, m, v, max_v, scalars):
        P, G, M, V = load_vector(param), load_vector(grad), load_vector(m), load_vector(v)
        X = load_vector(max_v) if AMSGRAD else V
        P, M, V, X = update_vector(P, G, M, V, X, scalars)
        store_vector(param, P)
        store_vector(m, M)
        store_vector(v, V)
        if AMSGRAD:
            store_vector(max_v, X)

    @cuda.jit(device=True)
    def update_element(param, grad, m, v, max_v, scalars):
        P, G, M, V = load(param), load(grad), load(m), load(v)
        X = load(max_v) if AMSGRAD else V
        p, m1, v1, x = update(P[0], G[0], M[0], V[0], X[0], *scalars)
        store(param, (p,))
        store(m, (m1,))
        store(v, (v1,))
        if AMSGRAD:
            store(max_v, (x,))

    given = _scalars_in_memory(load, ITEMSIZE) if on_device else _scalars_as_arguments

    if loop == "contiguous":

        def contiguous(param, grad, m, v, max_v, head, vectors, threads, scalars):
            i = cuda.grid(1)
            if i < vectors:
                at = (head + i * LANES) * ITEMSIZE
                update_16_bytes(param + at, grad + at, m + at, v + at, max_v + at, given(scalars))
            elif i < threads:
                k = i - vectors
                at = (k if k < head else k + vectors * LANES) * ITEMSIZE
                update_element(param + at, grad + at, m + at, v + at, max_v + at, given(scalars))

        return contiguous

    if loop == "table":
        load_int32, _ = _access(types.int32, 1)
        load_int64, _ = _access(types.int64, 1)

        def table(rows, owners, scalars):
            chunk = cuda.blockIdx.x
            row = rows + 8 * COLUMNS * types.int64(load_int32(owners + 4 * chunk)[0])
            first = (chunk - load_int64(row + 8 * FIRST_CHUNK)[0]) * CHUNK
            vectors_here = min(load_int64(row + 8 * VECTORS)[0] - first, CHUNK)
            items_here = min(load_int64(row + 8 * ITEMS)[0] - first, CHUNK)
            start = (load_int64(row + 8 * HEAD)[0] + first * LANES) * ITEMSIZE
            param, grad = load_int64(row + 8 * PARAM)[0] + start, load_int64(row + 8 * GRAD)[0] + start
            m, v = load_int64(row + 8 * M_)[0] + start, load_int64(row + 8 * V_)[0] + start
            max_v = load_int64(row + 8 * MAX_V)[0] + start
            s = given(scalars)
            item = types.int64(cuda.threadIdx.x)
            while item < items_here:
                if item < vectors_here:
                    at = item * VECTOR_BYTES
                    update_16_bytes(param + at, grad + at, m + at, v + at, max_v + at, s)
                else:
                    # read from the row again, so that it takes no registers
                    head, vectors = load_int64(row + 8 * HEAD)[0], load_int64(row + 8 * VECTORS)[0]
                    k = item + first - vectors
                    at = (k if k < head else k + vectors * LANES) * ITEMSIZE - start
                    update_element(param + at, grad + at, m + at, v + at, max_v + at, s)
                item += BLOCK

        return table

    NDIM = int(loop.split()[1])

    def strided(
        param, grad, m, v, max_v, shape, param_strides, grad_strides, m_strides, v_strides, max_v_strides, size, scalars
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
            update_element(param, grad, m, v, max_v, given(scalars))

    return strided


@cuda.jit(device=True)
def _scalars_as_arguments(scalars):
    return scalars


def _scalars_in_memory(load, ITEMSIZE):
    @cuda.jit(device=True)
    def given(a):
        return (
            load(a)[0], load(a + ITEMSIZE)[0], load(a + 2 * ITEMSIZE)[0], load(a + 3 * ITEMSIZE)[0],
            load(a + 4 * ITEMSIZE)[0], load(a + 5 * ITEMSIZE)[0], load(a + 6 * ITEMSIZE)[0],
        )  # fmt: skip

    return given


def launch_scalars(form, settings, step, lr, grad_scale, out, stream):
    """Advance the step count and compute the scalars of a step on the device.

    form: a `device_scalars.Form`. settings: its `Settings`. step: a View of one int64. lr, grad_scale: views of one number, or
    numbers. out: the `device_scalars.Memory` to write. stream: a handle.
    """
    given = [x.pointer if isinstance(x, View) else float(x) for x in (lr, grad_scale)]
    with on(out.device, stream):
        _launch_scalars(form, stream, step.pointer, *given, out.address, *settings)


def _launch_scalars(form, stream, *arguments):
    _configured_scalars(form, stream)(*arguments)


@functools.lru_cache(maxsize=1024)
def _configured_scalars(form, stream):
    return _with_grid(compiled_scalars(form), 1, 1, stream)


@functools.cache
def compiled_scalars(form):
    """Return the kernel of a `device_scalars.Form` as a Numba dispatcher."""
    return cuda.jit(build_scalars(form))


def build_scalars(form):
    """Return the kernel of a `device_scalars.Form` as a Python function. An lr or grad_scale on the device is its address."""
    real = REALS[form.dtype.name]
    # Numba's casts between float32 and float64 round to nearest and keep subnormal numbers
    compute = cuda.jit(device=True)(device_scalars.in_python(form, primitives.for_numba(intrinsic, contracts=True), real))
    load_step, store_step = _access(types.int64, 1)
    _, store = _access(real, 1)
    lr_of, grad_scale_of = (
        _number if dtype is None else _number_at(REALS[dtype.name]) for dtype in (form.lr, form.grad_scale)
    )
    ITEMSIZE = form.dtype.itemsize

    def scalars(step, lr, grad_scale, out, advance, sign, beta1, beta2, weight_decay, w1, w2, eps):
        t = load_step(step)[0] + advance
        store_step(step, (t,))
        results = compute(t, lr_of(lr), grad_scale_of(grad_scale), sign, beta1, beta2, weight_decay, w1, w2, eps)
        for k in range(len(results)):
            store(out + k * ITEMSIZE, (results[k],))

    return scalars


@cuda.jit(device=True)
def _number(x):
    return x


def _number_at(real):
    load, _ = _access(real, 1)

    @cuda.jit(device=True)
    def number_at(address):
        return types.float64(load(address)[0])

    return number_at


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
def _access(element, lanes):
    """Return load(address) -> tuple and store(address, tuple) of `lanes` neighbours, each one instruction.

    Addresses are int64. They are cast to addrspace(1), global memory: a pointer of no address space makes generic loads.
    """
    values, itemsize = types.UniTuple(element, lanes), element.bitwidth // 8

    def pointer(builder, address):
        llvm = LLVM_TYPES[element]
        vector = llvm if lanes == 1 else ir.VectorType(llvm, lanes)
        return builder.inttoptr(address, ir.PointerType(vector, addrspace=1)), vector

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            at, _ = pointer(builder, args[0])
            loaded = builder.load(at, align=lanes * itemsize)
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
            builder.store(stored, at, align=lanes * itemsize)
            return context.get_dummy_value()

        return types.void(types.int64, values), codegen

    return load, store


def _index(k):
    return ir.Constant(ir.IntType(32), k)
