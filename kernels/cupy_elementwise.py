"""A rule as a `cupy.ElementwiseKernel`: the backend `cupy`.

CuPy's own indexing gives each thread one element and 4-byte accesses. Here the arrays are `raw`, or addresses in a table, and a
thread takes 16 bytes of each, so `size` counts threads, not elements.
"""

import contextlib
import functools
import math
import sys
import warnings

import cupy
import numpy as np

from gpuadam.arrays import View, kind, on_cuda
from gpuadam.kernels import adam, device_scalars, gpu_launch, pointer_table, primitives
from gpuadam.kernels.layout import VECTOR_BYTES, dense
from gpuadam.kernels.streams import LEGACY_DEFAULT

NAME = "cupy"

PREAMBLE = r"""
typedef %(ctype)s T;
constexpr int LANES = %(vector_bytes)d / sizeof(T);
struct alignas(%(vector_bytes)d) Vector { T lane[LANES]; };
__device__ __forceinline__ Vector& vector_at(T* p) { return *reinterpret_cast<Vector*>(p); }
__device__ __forceinline__ const Vector& vector_at(const T* p) { return *reinterpret_cast<const Vector*>(p); }
"""

# 16 bytes of each array, from the element `at`. Everything is loaded before the first store, because the compiler must take it
# that the arrays might overlap, and would load again.
VECTOR = r"""
const Vector G = vector_at(&grad[at]);
Vector P = vector_at(&param[at]), M = vector_at(&m[at]), V = vector_at(&v[at]);
#if AMSGRAD
Vector X = vector_at(&max_v[at]);
#else
Vector X = V;
#endif
#pragma unroll
for (int k = 0; k < LANES; ++k)
    update(P.lane[k], G.lane[k], M.lane[k], V.lane[k], X.lane[k], %(scalars)s);
vector_at(&param[at]) = P;
vector_at(&m[at]) = M;
vector_at(&v[at]) = V;
#if AMSGRAD
vector_at(&max_v[at]) = X;
#endif
"""

ELEMENT = r"""
const T G = grad[at];
T P = param[at], M = m[at], V = v[at];
#if AMSGRAD
T X = max_v[at];
#else
T X = V;
#endif
update(P, G, M, V, X, %(scalars)s);
param[at] = P;
m[at] = M;
v[at] = V;
#if AMSGRAD
max_v[at] = X;
#endif
"""

# i is CuPy's: the number of this thread, 64 bits wide.
CONTIGUOUS = r"""
if (i < vectors) {
    const ptrdiff_t at = head + i * LANES;
%(vector)s
} else {
    const ptrdiff_t k = i - vectors, at = k < head ? k : k + vectors * LANES;
%(element)s
}
"""

# With BLOCK threads in each block and enough blocks, i / BLOCK is the number of the block. What the few elements before and after
# the vectors need is read from the row again, so that it takes no registers.
TABLE = r"""
const long long chunk = i / BLOCK;
const long long* const row = &rows[owners[chunk] * (ptrdiff_t)COLUMNS];
const long long first = (chunk - row[FIRST_CHUNK]) * CHUNK;
// clamped before they are narrowed: after the vectors the difference is negative, and may be below -2^31
const int vectors_here = max(min(row[VECTORS] - first, (long long)CHUNK), 0LL);
const int items_here = min(row[ITEMS] - first, (long long)CHUNK);
const long long start = row[HEAD] + first * LANES;
T* const param = at_address(row[PARAM]) + start;
const T* const grad = at_address(row[GRAD]) + start;
T* const m = at_address(row[M_]) + start;
T* const v = at_address(row[V_]) + start;
#if AMSGRAD
T* const max_v = at_address(row[MAX_V]) + start;
#endif
#pragma unroll 1
for (int item = i %% BLOCK; item < items_here; item += BLOCK) {
    if (item < vectors_here) {
        const int at = item * LANES;
%(vector)s
    } else {
        const long long k = item + first - row[VECTORS], at = k < row[HEAD] ? k : k + row[VECTORS] * LANES;
        T* const param = at_address(row[PARAM]);
        const T* const grad = at_address(row[GRAD]);
        T* const m = at_address(row[M_]);
        T* const v = at_address(row[V_]);
#if AMSGRAD
        T* const max_v = at_address(row[MAX_V]);
#endif
%(element)s
    }
}
break;  // there are as many blocks as chunks: a thread has only one i
"""

# A plain cast of an address to a pointer makes generic loads.
TABLE_PREAMBLE = """
__device__ __forceinline__ T* at_address(long long a) { return (T*)__cvta_global_to_generic((size_t)a); }
""" + "".join(
    f"#define {name} {getattr(pointer_table, name.strip('_'))}\n"
    for name in (
        "BLOCK",
        "CHUNK",
        "COLUMNS",
        "PARAM",
        "GRAD",
        "M_",
        "V_",
        "MAX_V",
        "HEAD",
        "VECTORS",
        "ITEMS",
        "FIRST_CHUNK",
    )
)

# Not raw: CuPy finds the element of each array, whatever its strides.
STRIDED = r"""
T P = param, M = m, V = v;
#if AMSGRAD
T X = max_v;
#else
T X = V;
#endif
update(P, grad, M, V, X, %(scalars)s);
param = P;
m = M;
v = V;
#if AMSGRAD
max_v = X;
#endif
"""


def view(name, array):
    """View a CuPy array, or anything with `__cuda_array_interface__` or DLPack."""
    if not isinstance(array, cupy.ndarray):
        if hasattr(array, "__cuda_array_interface__"):
            return on_cuda(name, array, _device_of)
        try:
            array = cupy.from_dlpack(array)  # whose library makes CuPy's current stream wait for its own
        except Exception as error:  # what a producer raises is up to it
            raise TypeError(f"{name}, a {kind(array)}, cannot be shared with CuPy: {error}") from error
    memory = array.data
    contiguous = array.flags.c_contiguous
    return View(name, array, memory.ptr, array.shape, array.strides, array.dtype, True, contiguous, memory.device_id)


def _device_of(pointer):
    device = cupy.cuda.runtime.pointerGetAttributes(pointer).device
    if device < 0:
        raise ValueError(f"address {pointer:#x} is not CUDA memory")
    return device


def zeros_like(view):
    """Return zeros for a moment of an array: the same shape, order of memory and offset from a 16-byte boundary."""
    with cupy.cuda.Device(view.device):
        head = view.pointer % VECTOR_BYTES // view.dtype.itemsize
        flat = cupy.zeros(head + view.size, view.dtype)[head:]
        cupy.cuda.get_current_stream().synchronize()  # the first step may be on another
        return cupy.ndarray(view.shape, view.dtype, flat.data, view.strides if dense([view]) else None)


def zeros(n, dtype, device):
    """Return a 1-D array of n zeros."""
    with cupy.cuda.Device(device):
        return cupy.zeros(n, dtype)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory, which is there when this returns."""
    return cupy.asarray(array, blocking=True)


def to_host(array):
    """Return a copy of an array of this backend as a NumPy array."""
    return cupy.asnumpy(array)


def now():
    """Return a moment of the current stream for `seconds_between`."""
    return cupy.cuda.get_current_stream().record()


def seconds_between(start, end):
    """Return the device's time between two moments, after waiting for the later one."""
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


copies_any_layout = True


def copy(to, source):
    """Copy one array into another of the same shape and dtype, on the current stream."""
    with cupy.cuda.Device(to.device):
        current = current_stream()
        others = {view.stream for view in (to, source)} - {None, current}
        for other in others:
            order(other, current)
        _native(to)[...] = _native(source)
        for other in others:
            order(current, other)


def launch(form, views, scalars, rule=adam, stream=None):
    """Update arrays, as `gpu_launch.launch` says."""
    gpu_launch.launch(_this_module, form, views, scalars, rule, stream)


def batches(updates):
    """Return the `gpu_launch.Batch`es of several updates, of any shapes, on one device."""
    return gpu_launch.batches(_this_module, updates)


def run(batch, form, scalars, rule, stream):
    """Launch a Batch; device and stream are the current ones."""
    on_device = isinstance(scalars, device_scalars.Memory)
    kernel = build(rule, form, batch.loop, on_device)
    if on_device:
        scalars = [_unowned(scalars.address, (len(scalars),), scalars.dtype, batch.device)]
    if batch.loop == "table":
        rows, owners = batch.table.addresses(stream)
        rows = _unowned(rows, (batch.table.rows.size,), np.int64, batch.device)
        owners = _unowned(owners, batch.table.owners.shape, np.int32, batch.device)
        kernel(owners, *scalars, rows, size=owners.size * pointer_table.BLOCK, block_size=pointer_table.BLOCK)
    elif batch.loop == "contiguous":
        if batch.arguments is None:
            batch.arguments = [_unowned(pointer, (batch.size,), batch.dtype, batch.device) for pointer in batch.pointers]
        param, grad, *state = batch.arguments
        head, vectors, threads = batch.split
        kernel(grad, head, vectors, *scalars, param, *state, size=threads)
    else:
        param, grad, *state = map(_native, batch.views)
        kernel(grad, *scalars, param, *state)


def _native(view):
    if isinstance(view.array, cupy.ndarray):
        return view.array
    if view.size == 0:
        return cupy.empty(view.shape, view.dtype)
    return _unowned(view.pointer, view.shape, view.dtype, view.device, view.strides)


@functools.lru_cache(maxsize=1024)
def _unowned(address, shape, dtype, device, strides=None):
    """Return a CuPy array over memory that others keep: the caller its arrays, a table its buffer, until it is enqueued."""
    dtype = np.dtype(dtype)
    memory = cupy.cuda.UnownedMemory(address, math.prod(shape) * dtype.itemsize, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


_this_module = sys.modules[__name__]


def on(device, stream):
    """Make a device and a stream the current ones. stream: a handle; None for the one that is current on the device."""
    if cupy.cuda.runtime.getDevice() == device:
        return _UNCHANGED if stream is None or current_stream() == stream else _stream(stream)
    return _on_another(device, stream)


_UNCHANGED = contextlib.nullcontext()


@contextlib.contextmanager
def _on_another(device, stream):
    with cupy.cuda.Device(device), on(device, stream):
        yield


@functools.cache
def _stream(handle):
    """Return a CuPy stream of any device for a handle. It is only to be entered: the calls below take the handle."""
    with warnings.catch_warnings():
        # What CuPy names instead takes an object, asks for the device that is current now and keeps to it. Handle 1 has several.
        warnings.simplefilter("ignore", DeprecationWarning)
        return cupy.cuda.ExternalStream(handle)


def current_stream():
    """Return the handle of CuPy's current stream on the current device."""
    return cupy.cuda.get_current_stream().ptr or LEGACY_DEFAULT


def is_capturing(stream):
    """Whether a graph is being captured on a stream; it cannot be on the default one."""
    return stream != LEGACY_DEFAULT and cupy.cuda.runtime.streamIsCapturing(stream)


def order(before, after):
    """Make what comes next on one stream wait for what is on another."""
    wait(after, record(before))


def record(stream):
    """Return an event that is done when what is on a stream so far is. The stream is the current device's."""
    event = cupy.cuda.Event(disable_timing=True)
    cupy.cuda.runtime.eventRecord(event.ptr, stream)
    return event


def wait(stream, event):
    """Make what comes next on a stream wait for an event."""
    cupy.cuda.runtime.streamWaitEvent(stream, event.ptr)


def done(event):
    """Whether an event is done."""
    return event.done


def pinned(n_bytes):
    """Return pinned memory of the host, as an array of bytes."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes)


def device_bytes(n_bytes):
    """Return memory of the current device and stream: its owner, and its address."""
    memory = cupy.cuda.alloc(n_bytes)
    return memory, memory.ptr


def send(address, pinned, n_bytes, stream):
    """Copy from pinned memory to the device, on a stream."""
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(address, pinned.ctypes.data, n_bytes, runtime.memcpyHostToDevice, stream)


LOOPS = {
    # name: (body, inputs but the scalars)
    "contiguous": (CONTIGUOUS, ["raw {dtype} grad", "int64 head", "int64 vectors"]),
    "table": (TABLE, ["raw int32 owners"]),
    "strided": (STRIDED, ["{dtype} grad"]),
}


@functools.cache
def build(rule, form, loop, on_device=False):
    """Return the ElementwiseKernel of a form; CuPy compiles it at its first call.

    loop: "contiguous", "table" or "strided". on_device: whether the scalars are in device memory.
    """
    body, inputs = LOOPS[loop]
    names = {"ctype": CTYPES[form.dtype.name], "vector_bytes": VECTOR_BYTES, "scalars": ", ".join(adam.SCALARS)}
    inputs = [x.format(dtype=form.dtype) for x in inputs]
    if on_device:
        inputs.append(f"raw {form.dtype} device_scalars")
        body = "".join(f"const T {name} = device_scalars[{k}];\n" for k, name in enumerate(adam.SCALARS)) + body
    else:
        inputs += [f"{form.dtype} {name}" for name in adam.SCALARS]
    if loop == "table":
        outputs = ["raw int64 rows"]  # which is only read; but a kernel must have an output
    else:
        raw = "raw " if loop == "contiguous" else ""
        outputs = [f"{raw}{form.dtype} {name}" for name in ("param", "m", "v", "max_v")[: 3 + form.amsgrad]]
    options = [name for name, used in form._asdict().items() if used is True]
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        body % (names | {"vector": VECTOR % names, "element": ELEMENT % names}),
        "_".join(["gpuadam", rule.__name__.rpartition(".")[2], form.dtype.name, *options, loop] + ["device"] * on_device),
        preamble=PREAMBLE % names
        + TABLE_PREAMBLE * (loop == "table")
        + primitives.for_cuda_c(form.dtype)
        + rule.in_cuda_c(form),
    )


CTYPES = {"float32": "float", "float64": "double"}


def launch_scalars(form, settings, step, lr, grad_scale, out, stream):
    """Advance the step count and compute the scalars of a step on the device.

    form: a `device_scalars.Form`. settings: its `Settings`. step: a View of one int64. lr, grad_scale: views of one number, or
    numbers. out: the `device_scalars.Memory` to write. stream: a handle.
    """
    arguments = [_native(x) if isinstance(x, View) else x for x in (lr, grad_scale)]
    written = _unowned(out.address, (len(out),), out.dtype, out.device)
    with on(out.device, stream):
        build_scalars(form)(*arguments, *settings, _native(step), written, size=1)


@functools.cache
def build_scalars(form):
    """Return the ElementwiseKernel of a `device_scalars.Form`."""

    def given(name, dtype):
        return f"float64 {name}" if dtype is None else f"raw {dtype} {name}"

    inputs = [given("lr", form.lr), given("grad_scale", form.grad_scale), "int64 advance"]
    inputs += [f"float64 {name}" for name in device_scalars.Settings._fields[1:]]
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        f"raw int64 step, raw {form.dtype} scalars",
        device_scalars.IN_CUDA_C,
        f"gpuadam_scalars_{form.dtype}",
        preamble="typedef double T;\n" + primitives.for_cuda_c("float64") + device_scalars.preamble(form),
    )
