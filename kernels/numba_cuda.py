"""A rule as a Numba CUDA kernel: the backend `numba-cuda`. Only it and `global_norm_numba_cuda.py` import numba.cuda.

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

from gpuadam.kernels import adam, gpu_launch, numba_access, primitives
from gpuadam.kernels.layout import VECTOR_BYTES, bounds, collapse, offset_like, strides_like
from gpuadam.kernels.operands import GROUP, GROUP_LANES, lanes_of, operands_of_form
from gpuadam.kernels.pointer_table import BLOCK, CHUNK, FIRST_CHUNK, HEAD, ITEMS, KEY, OPERANDS, SIZE, START, VECTORS
from gpuadam.kernels.scalars import KEY_AT, REALS_AT, SKIP_AT, ScalarsMemory, formula_in_python
from gpuadam.kernels.streams import LEGACY_DEFAULT
from gpuadam.kernels.view import View, on_cuda, on_device

if not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30.4 names np.row_stack when it first loads its array functions. NumPy 2.5 has it no more, so no kernel
    # could be compiled. It was another name for vstack, and is one again while they load.
    with mock.patch.object(np, "row_stack", np.vstack, create=True):
        importlib.import_module("numba.cuda.cudaimpl")

name = "numba-cuda"

REALS = {"float32": types.float32, "float64": types.float64}
LLVM_TYPES = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()} | {
    kind: ir.IntType(kind.bitwidth)
    for kind in (types.uint8, types.uint16, types.int32, types.uint32, types.int64, types.uint64)
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
    """View a Numba device array, or anything with `__cuda_array_interface__` or DLPack."""
    found = on_cuda(name, on_device(name, array, _this_module), _device_of)
    # CuPy's arrays name whatever stream is current when they are asked
    return found._replace(stream=None) if type(array).__module__.startswith("cupy") else found


def _device_of(pointer):
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, device = driver.cuPointerGetAttribute(attribute, pointer)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"address {pointer:#x} is not CUDA memory: {status.name}")
    return int(device)


def zeros_like(view, dtype=None):
    """Return zeros for the state of an array: the same shape and order of memory, 16-byte boundaries at the same elements.

    dtype: another one than the array's.
    """
    dtype = view.dtype if dtype is None else dtype
    with cuda.gpus[view.device or 0]:
        if view.size == 0:
            return cuda.device_array(view.shape, dtype)
        offset = offset_like(view, dtype, VECTOR_BYTES)
        like = zeros(offset + view.size, dtype, view.device)[offset:].reshape(*view.shape)
        strides = strides_like(view, dtype)
        if strides is None:
            return like  # the array has gaps; its moments need none
        described = like.__cuda_array_interface__ | {"strides": strides}
        return cuda.from_cuda_array_interface(described, owner=like, sync=False)


def zeros(n, dtype, device):
    """Return a 1-D array of n zeros, which are there, for any stream, when this returns."""
    with cuda.gpus[device or 0]:
        array = cuda.device_array(n, dtype)
        if n:
            device_memset(array, 0, array.nbytes)
            synchronize_stream(LEGACY_DEFAULT)
        return array


def fill_zero(view, stream=None):
    """Store zeros in an array, in the order of a launch. stream: the handle of one, or None."""
    if not view.size:
        return
    shape, (strides,) = collapse(view.shape, [view.strides])
    with gpu_launch.ordered(_this_module, view.device, [view], stream) as stream:
        if strides in ((), (view.dtype.itemsize,)):
            _ok(driver.cuMemsetD8Async(view.pointer, 0, view.nbytes, stream))
        else:
            kernel = _with_grid(_fill_zero(view.dtype.itemsize, len(shape)), -(-view.size // BLOCK), BLOCK, stream)
            kernel(view.pointer, shape, strides, view.size)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory, which is there when this returns."""
    there = cuda.to_device(array)
    # what is copied from pageable memory may still be on its way, and only the default stream waits for it
    synchronize_stream(LEGACY_DEFAULT)
    return there


def to_host(array):
    """Return a copy of an array of this backend, or of another library, as a NumPy array. It waits for its device."""
    found = view("", array)
    if not found.size:
        return np.empty(found.shape, found.dtype)
    start, end = bounds(found)
    memory = np.empty(end - start, np.uint8)
    with on(found.device, None):
        synchronize()  # whichever stream writes it
        receive(memory, start, memory.nbytes, LEGACY_DEFAULT)
        synchronize_stream(LEGACY_DEFAULT)
    return np.ndarray(found.shape, found.dtype, memory, found.pointer - start, found.strides)


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
    """Copy one array into another of the same shape, strides and dtype, without gaps, in the order of a launch."""
    if to.size:
        with gpu_launch.ordered(_this_module, to.device, [to, source]) as stream:
            _ok(driver.cuMemcpyDtoDAsync(to.pointer, source.pointer, to.nbytes, stream))


def launch(form, views, scalars, rule=adam, stream=None, key=0):
    """Update arrays, as `gpu_launch.launch` says."""
    gpu_launch.launch(_this_module, form, views, scalars, rule, stream, key)


def batches(updates, arrays):
    """Return the `gpu_launch.Batch`es of several updates, of any shapes, on one device."""
    return gpu_launch.batches(_this_module, updates, arrays)


def run(batch, form, scalars, rule, stream, key):
    """Launch a Batch; its device is the current one."""
    on_device = isinstance(scalars, ScalarsMemory)
    # a kernel takes all scalars as one argument; Numba takes a Python float for a float64
    given = scalars.address if on_device else tuple(map(form.dtype.type, scalars))
    if batch.loop == "table":
        kernel = _configured(rule, form, "table", on_device, batch.table.owners.size, stream)
        kernel(*batch.at, key, given)
        return
    (update,) = batch.updates
    if batch.loop == "contiguous":
        head, vectors, threads = batch.split
        kernel = _configured(rule, form, "contiguous", on_device, -(-threads // BLOCK), stream)
        kernel(tuple(batch.pointers), head, vectors, threads, update.start, update.key ^ key, given)
    else:
        views = update.views
        shape, strides = collapse(views[0].shape, [view.strides for view in views], form.arrays.random)
        kernel = _configured(rule, form, f"strided {len(shape)}", on_device, -(-batch.size // BLOCK), stream)
        steps = tuple(zip(*strides, strict=True))  # by dimension
        kernel(tuple(batch.pointers), shape, steps, batch.size, update.start, update.key ^ key, given)


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


def begin_capture(stream):
    """Begin to capture a graph of what is enqueued on a stream of the current device, and forbid nothing meanwhile."""
    _ok(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))


def drop_capture(stream):
    """End a capture and throw the graph away."""
    (graph,) = _ok(driver.cuStreamEndCapture(stream))
    _ok(driver.cuGraphDestroy(graph))


def synchronize_stream(stream):
    """Wait for what is on a stream of the current device."""
    _ok(driver.cuStreamSynchronize(stream))


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


def receive(host, address, n_bytes, stream):
    """Copy from the device to an array of the host, on a stream."""
    _ok(driver.cuMemcpyDtoHAsync(host.ctypes.data, address, n_bytes, stream))


def synchronize():
    """Wait for all that is enqueued on the current device."""
    _ok(driver.cuCtxSynchronize())


def new_stream():
    """Return a stream of the current device that waits for no other: its owner, and its handle."""
    (stream,) = _ok(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
    return _Stream(stream), int(stream)


class _Stream:
    def __init__(self, handle):
        self.handle = handle

    def __del__(self, destroy=driver.cuStreamDestroy):
        destroy(self.handle)


def finish(event):
    """Wait until an event is done."""
    _ok(driver.cuEventSynchronize(event.handle))


def _ok(result):
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"the CUDA driver reports {status.name}. It may be of work enqueued earlier: with the environment variable "
            "GPUADAM_SYNC=1 gpuadam waits for each of its launches and names the one that failed"
        )
    return values


@functools.cache
def _stream(handle):
    # one object for each stream: Numba caches launch configurations by its identity
    return 0 if handle == LEGACY_DEFAULT else cuda.external_stream(handle)


@functools.cache
def _fill_zero(itemsize, ndim):
    """Return the kernel that stores zeros in elements of some bytes, whatever lies between them."""
    bits = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[itemsize]
    store = _store(bits)

    def fill_zero(address, shape, strides, size):
        i = cuda.grid(1)
        if i < size:
            for d in range(ndim):
                address += strides[ndim - 1 - d] * (i % shape[ndim - 1 - d])
                i = i // shape[ndim - 1 - d]
            store(address, bits(0))

    return cuda.jit(fill_zero)


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
    if form.arrays.grouped:
        return _over_groups(form, update, on_device)
    operands, LANES = operands_of_form(form), lanes_of(form)
    N, SKIPS, ZERO_GRAD, RANDOM = len(operands), form.skips, form.zero_grad, form.arrays.random
    one, several = (numba_access.functions(form, intrinsic, lanes, addrspace=1) for lanes in (1, LANES))
    given = _scalars_in_memory(form) if on_device else _scalars_as_arguments
    moved, stepped = one.moved, one.stepped

    def updating(access, lanes):
        load, store, zero_grad = access.load, access.store, access.zero_grad
        update_lanes = cuda.jit(device=True)(_lanes(update, lanes))

        @cuda.jit(device=True)
        def update_at(at, i, start, key, s):
            scalars, step_key, skip = s
            if SKIPS and skip:
                if ZERO_GRAD:
                    zero_grad(at, i)
            else:
                store(at, i, update_lanes(load(at, i), scalars), start, (start + i) >> 32, key ^ step_key)

        return update_at

    update_element, update_vector = updating(one, 1), updating(several, LANES)

    if loop == "contiguous":

        def contiguous(at, head, vectors, threads, start, key, scalars):
            i = cuda.grid(1)
            if i < vectors:
                k = head + i * LANES
                update_vector(at, k, start, key, given(scalars))
            elif i < threads:
                k = i - vectors
                k = k if k < head else k + vectors * LANES
                update_element(at, k, start, key, given(scalars))

        return contiguous

    if loop == "table":
        load_int32 = _load(types.int32)
        load_int64 = _load(types.int64)
        load_operands = numba_access.tuple_at(intrinsic, N, addrspace=1)
        COLUMNS = OPERANDS + N

        def table(rows, owners, key, scalars):
            chunk = cuda.blockIdx.x
            row = rows + 8 * COLUMNS * types.int64(load_int32(owners + 4 * chunk))
            first = (chunk - load_int64(row + 8 * FIRST_CHUNK)) * CHUNK
            vectors_here = min(load_int64(row + 8 * VECTORS) - first, CHUNK)
            items_here = min(load_int64(row + 8 * ITEMS) - first, CHUNK)
            begin = load_int64(row + 8 * HEAD) + first * LANES
            at = moved(load_operands(row + 8 * OPERANDS), begin)
            s = given(scalars)
            start, row_key = types.int64(0), types.int64(0)
            if RANDOM:
                start, row_key = load_int64(row + 8 * START), load_int64(row + 8 * KEY) ^ key
            item = types.int64(cuda.threadIdx.x)
            while item < items_here:
                if item < vectors_here:
                    k = item * LANES
                    update_vector(at, k, start + begin, row_key, s)
                else:
                    # read from the row again, so that it takes no registers
                    head, vectors = load_int64(row + 8 * HEAD), load_int64(row + 8 * VECTORS)
                    k = item + first - vectors
                    k = k if k < head else k + vectors * LANES
                    update_element(at, k - begin, start + begin, row_key, s)
                item += BLOCK

        return table

    NDIM = int(loop.split()[1])

    def strided(at, shape, strides, size, start, key, scalars):
        i = cuda.grid(1)
        if i < size:
            rest = i
            for d in range(NDIM):
                # the last dimension varies fastest
                at = stepped(at, strides[NDIM - 1 - d], rest % shape[NDIM - 1 - d])
                rest = rest // shape[NDIM - 1 - d]
            update_element(at, 0, start + i, key, given(scalars))

    return strided


def _over_groups(form, update, on_device):
    """Return the kernel of 8-bit state: an item is a part of a group, and whole warps go through the loop together."""
    operands, LANES = operands_of_form(form), GROUP_LANES
    N, SKIPS, ZERO_GRAD = len(operands), form.skips, form.zero_grad
    one, several = (numba_access.functions(form, intrinsic, lanes, addrspace=1) for lanes in (1, LANES))
    load, store, encode = one.load, one.store, one.encode
    units, codec, scales = one.units, one.codec, one.scales
    load_lanes, store_lanes, magnitudes, encode_lanes = several.load, several.store, several.magnitudes, several.encode
    update_lanes = cuda.jit(device=True)(_lanes(update, LANES))
    zero_grad = one.zero_grad
    given = _scalars_in_memory(form) if on_device else _scalars_as_arguments
    load_int32, load_int64 = _load(types.int32), _load(types.int64)
    load_operands = numba_access.tuple_at(intrinsic, N, addrspace=1)
    COLUMNS = OPERANDS + N

    @cuda.jit(device=True)
    def load_some(at, i, last, unit):
        return (
            load(at, min(i, last), unit), load(at, min(i + 1, last), unit),
            load(at, min(i + 2, last), unit), load(at, min(i + 3, last), unit),
            load(at, min(i + 4, last), unit), load(at, min(i + 5, last), unit),
            load(at, min(i + 6, last), unit), load(at, min(i + 7, last), unit),
        )  # fmt: skip

    @cuda.jit(device=True)
    def store_one(at, i, size, new, how, start, key):
        if i < size:
            store(at, i, new, start, (start + i) >> 32, key)
            encode(at, i, new, how, start, (start + i) >> 32, key)

    @cuda.jit(device=True)
    def store_some(at, i, size, new, how, start, key):
        store_one(at, i, size, new[0], how, start, key)
        store_one(at, i + 1, size, new[1], how, start, key)
        store_one(at, i + 2, size, new[2], how, start, key)
        store_one(at, i + 3, size, new[3], how, start, key)
        store_one(at, i + 4, size, new[4], how, start, key)
        store_one(at, i + 5, size, new[5], how, start, key)
        store_one(at, i + 6, size, new[6], how, start, key)
        store_one(at, i + 7, size, new[7], how, start, key)

    def table(rows, owners, key, scalars):
        chunk = cuda.blockIdx.x
        row = rows + 8 * COLUMNS * types.int64(load_int32(owners + 4 * chunk))
        first = (chunk - load_int64(row + 8 * FIRST_CHUNK)) * CHUNK
        vectors_here = min(load_int64(row + 8 * VECTORS) - first, CHUNK)
        items_here = min(load_int64(row + 8 * ITEMS) - first, CHUNK)
        size, at = load_int64(row + 8 * SIZE), load_operands(row + 8 * OPERANDS)
        s, step_key, skip = given(scalars)
        start, row_key = load_int64(row + 8 * START), load_int64(row + 8 * KEY) ^ key ^ step_key
        item = types.int64(cuda.threadIdx.x)
        while item < (items_here + 31) // 32 * 32:
            i = (first + item) * LANES
            if SKIPS and skip:
                if ZERO_GRAD:
                    for k in range(LANES):
                        if i + k < size:
                            zero_grad(at, i + k)
            else:
                group = min(i, size - 1) // GROUP
                unit = units(at, group)
                whole = item < vectors_here
                old = load_lanes(at, i, unit) if whole else load_some(at, i, size - 1, unit)
                new = update_lanes(old, s)
                m, root = magnitudes(new, size - i)
                for k in range(2):  # among the four threads of a group
                    m = max(m, cuda.shfl_xor_sync(0xFFFFFFFF, m, 1 << k))
                    root = max(root, cuda.shfl_xor_sync(0xFFFFFFFF, root, 1 << k))
                how = codec(m, root)
                if i < size and i % GROUP == 0:
                    scales(at, group, m, root)
                if whole:
                    store_lanes(at, i, new, start, (start + i) >> 32, row_key)
                    encode_lanes(at, i, new, how, start, (start + i) >> 32, row_key)
                else:
                    store_some(at, i, size, new, how, start, row_key)
            item += BLOCK

    return table


@cuda.jit(device=True)
def _scalars_as_arguments(scalars):
    return scalars, types.int64(0), types.int64(0)


def _scalars_in_memory(form):
    """Return a function from the address of a `scalars.ScalarsMemory` to the scalars, the step's key and whether to skip it."""
    names, real, RANDOM, SKIPS = adam.scalar_names(form), REALS[form.dtype.name], form.arrays.random, form.skips
    load_word, result = _load(types.int64), types.UniTuple(real, len(names))

    @intrinsic
    def load_scalars(typingctx, address):
        def codegen(context, builder, signature, args):
            base = builder.inttoptr(args[0], ir.PointerType(LLVM_TYPES[real], addrspace=1))
            at = [builder.gep(base, [ir.Constant(ir.IntType(64), k)]) for k in range(len(names))]
            return context.make_tuple(builder, result, [builder.load(x, align=form.dtype.itemsize) for x in at])

        return result(types.int64), codegen

    @cuda.jit(device=True)
    def given(address):
        key, skip = types.int64(0), types.int64(0)
        if RANDOM:
            key = load_word(address + KEY_AT)
        if SKIPS:
            skip = load_word(address + SKIP_AT)
        return load_scalars(address + REALS_AT), key, skip

    return given


def launch_scalars(form, settings, given, out, stream):
    """Advance the step count and compute the scalars of a step on the device.

    form: a `scalars.ScalarsForm`. settings: its `Settings`. given: name -> View of one number on the device, or a number: "lr",
    "grad_scale", and those of "step", "found_inf" and "norm" that the form has. out: the `scalars.ScalarsMemory` to write.
    stream: a handle.
    """
    numbers = [given.get(name, 0) for name in ("step", "found_inf", "norm")]
    numbers = [x.pointer if isinstance(x, View) else x for x in numbers]
    real = [x.pointer if isinstance(x, View) else float(x) for x in (given["lr"], given["grad_scale"])]
    with on(out.device, stream):
        _launch_scalars(form, stream, *numbers, *real, out.address, *settings)


def _launch_scalars(form, stream, *arguments):
    _configured_scalars(form, stream)(*arguments)


@functools.lru_cache(maxsize=1024)
def _configured_scalars(form, stream):
    return _with_grid(compiled_scalars(form), 1, 1, stream)


@functools.cache
def compiled_scalars(form):
    """Return the kernel of a `scalars.ScalarsForm` as a Numba dispatcher."""
    return cuda.jit(build_scalars(form))


def build_scalars(form):
    """Return the kernel of a `scalars.ScalarsForm` as a Python function. An lr or grad_scale on the device is its address."""
    # Numba's casts between float32 and float64 round to nearest and keep subnormal numbers
    op, real = primitives.for_numba(intrinsic, contracts=True), REALS[form.dtype.name]
    op.u64, op.i64 = types.uint64, types.int64
    formula = formula_in_python(form.algorithm, form.decoupled, op)
    powers, of_step, clipped, too_large, key_of = map(cuda.jit(device=True), formula)
    load_word, store_word = _load(types.int64), _store(types.int64)
    load_norm, store_real = _load(types.float64), _store(real)
    lr_of, grad_scale_of = (
        _number if dtype is None else _number_at(REALS[dtype.name]) for dtype in (form.lr, form.grad_scale)
    )
    CLIPS, CHECKS, COUNTS, WORDS = form.norm, form.checks, form.counts, form.random or form.skips
    ITEMSIZE, FLAG, OPTAX, N_SCALARS = form.dtype.itemsize, form.found_inf is not None, form.algorithm == "optax", form.reals
    flag, mul = form.found_inf or np.dtype("u1"), op.mul
    load_flag = _load({1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}[flag.itemsize])
    MAGNITUDE = types.uint64((1 << (8 * flag.itemsize - (flag.kind == "f"))) - 1)

    def scalars(
        step, found_inf, norm, lr, grad_scale, out,
        advance, seed, sign, beta1, beta2, weight_decay, w1, w2, eps, eps_root, w_ema, first_w_ema, max_norm, largest_norm,
    ):  # fmt: skip
        scale, skip = grad_scale_of(grad_scale), False
        if FLAG:
            skip = (types.uint64(load_flag(found_inf)) & MAGNITUDE) != 0
        if CHECKS:
            skip = skip or too_large(load_norm(norm), scale, largest_norm)
        t = advance
        if COUNTS:
            t = load_word(step)
            if not skip:
                t += advance
            store_word(step, t)
        power1, power2 = powers(t, beta1, beta2)
        decay, inv_sqrt_bias2, epsilon, neg_lr = of_step(t, power1, power2, lr_of(lr), beta2, weight_decay, eps)
        scale = mul(sign, scale)
        if CLIPS:
            scale = clipped(scale, load_norm(norm), max_norm)
        of_ema = first_w_ema if t == 1 else w_ema
        last = eps_root if OPTAX else of_ema
        numbers = scale, decay, w1, w2, inv_sqrt_bias2, epsilon, neg_lr, last, of_ema
        for k in range(N_SCALARS):
            store_real(out + REALS_AT + k * ITEMSIZE, real(numbers[k]))
        if WORDS:
            store_word(out + KEY_AT, key_of(seed, t))
            store_word(out + SKIP_AT, types.int64(skip))

    return scalars


@cuda.jit(device=True)
def _number(x):
    return x


def _number_at(real):
    load = _load(real)

    @cuda.jit(device=True)
    def number_at(address):
        return types.float64(load(address))

    return number_at


def _lanes(update, n):
    """Return the rule over the values of n elements."""

    def one(E, s):
        return update(*E, s)

    def two(E, s):
        return update(*E[0], s), update(*E[1], s)

    def four(E, s):
        return update(*E[0], s), update(*E[1], s), update(*E[2], s), update(*E[3], s)

    def eight(E, s):
        return (
            update(*E[0], s), update(*E[1], s), update(*E[2], s), update(*E[3], s),
            update(*E[4], s), update(*E[5], s), update(*E[6], s), update(*E[7], s),
        )  # fmt: skip

    return {1: one, 2: two, 4: four, 8: eight}[n]


# Addresses are int64. They are cast to addrspace(1), global memory: a pointer of no address space makes generic accesses.


@functools.cache
def _load(element):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.load(_pointer(builder, element, args[0]), align=element.bitwidth // 8)

        return element(types.int64), codegen

    return load


@functools.cache
def _store(element):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            builder.store(args[1], _pointer(builder, element, args[0]), align=element.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(types.int64, element), codegen

    return store


def _pointer(builder, element, address):
    return builder.inttoptr(address, ir.PointerType(LLVM_TYPES[element], addrspace=1))
