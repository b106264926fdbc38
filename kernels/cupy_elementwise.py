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

from gpuadam.kernels import adam, cuda_c_access, gpu_launch, pointer_table, primitives
from gpuadam.kernels.layout import VECTOR_BYTES, offset_like, strides_like
from gpuadam.kernels.operands import FORMATS, lanes_of, operands_of_form, widened
from gpuadam.kernels.scalars import REALS_AT, ScalarsMemory, Settings, formula_in_cuda_c
from gpuadam.kernels.streams import LEGACY_DEFAULT
from gpuadam.kernels.view import View, on_cuda, on_device

name = "cupy"

# i is CuPy's: the number of this thread, 64 bits wide.
CONTIGUOUS = r"""
if (i < vectors) {
    const ptrdiff_t at = head + i * LANES;
    update_lanes<LANES>(%(at)s, start + at, row_key ^ step_key, skip, %(scalars)s);
} else {
    const ptrdiff_t k = i - vectors, at = k < head ? k : k + vectors * LANES;
    update_lanes<1>(%(at)s, start + at, row_key ^ step_key, skip, %(scalars)s);
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
const long long begin = row[HEAD] + first * LANES;
%(pointers)s
#pragma unroll 1
for (int item = i %% BLOCK; item < items_here; item += BLOCK) {
    if (item < vectors_here) {
        const int at = item * LANES;
        update_lanes<LANES>(%(at)s, START_OF_ROW + begin + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
    } else {
        const long long k = item + first - row[VECTORS], at = k < row[HEAD] ? k : k + row[VECTORS] * LANES;
        update_lanes<1>(%(at_row)s, START_OF_ROW + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
    }
}
break;  // there are as many blocks as chunks: a thread has only one i
"""

# Groups of 8-bit state: an item is a part of a group, and whole warps go through the loop together, because they exchange maxima.
GROUPS = r"""
const long long chunk = i / BLOCK;
const long long* const row = &rows[owners[chunk] * (ptrdiff_t)COLUMNS];
const long long first = (chunk - row[FIRST_CHUNK]) * CHUNK;
const int vectors_here = max(min(row[VECTORS] - first, (long long)CHUNK), 0LL);
const int items_here = min(row[ITEMS] - first, (long long)CHUNK);
const long long size = row[SIZE];
%(pointers)s
#pragma unroll 1
for (int item = i %% BLOCK; item < (items_here + 31) / 32 * 32; item += BLOCK) {
    const long long at = (first + item) * LANES;
    update_group(%(names)s, at, size, item < vectors_here, START_OF_ROW + at, KEY_OF_ROW ^ step_key, skip, %(scalars)s);
}
break;
"""

# A plain cast of an address to a pointer makes generic loads.
TABLE_PREAMBLE = """
template <class S> __device__ __forceinline__ S* at_address(long long a) { return (S*)__cvta_global_to_generic((size_t)a); }
""" + "".join(
    f"#define {name} {getattr(pointer_table, name)}\n"
    for name in ("BLOCK", "CHUNK", "HEAD", "VECTORS", "ITEMS", "FIRST_CHUNK", "KEY", "START", "SIZE", "OPERANDS")
)

# Not raw: CuPy finds the element of each array, whatever its strides. i counts them in C order.
STRIDED = r"""
update_lanes<1>(%(element)s, start + i, row_key ^ step_key, skip, %(scalars)s);
"""


def view(name, array):
    """View a CuPy array, or anything with `__cuda_array_interface__` or DLPack."""
    if not isinstance(array, cupy.ndarray):
        return on_cuda(name, on_device(name, array, _this_module), _device_of)
    memory = array.data
    contiguous = array.flags.c_contiguous
    return View(name, array, memory.ptr, array.shape, array.strides, array.dtype, True, contiguous, memory.device_id)


def _device_of(pointer):
    device = cupy.cuda.runtime.pointerGetAttributes(pointer).device
    if device < 0:
        raise ValueError(f"address {pointer:#x} is not CUDA memory")
    return device


def zeros_like(view, dtype=None):
    """Return zeros for the state of an array: the same shape and order of memory, 16-byte boundaries at the same elements.

    dtype: another one than the array's.
    """
    dtype = view.dtype if dtype is None else dtype
    offset = offset_like(view, dtype, VECTOR_BYTES)
    flat = zeros(offset + view.size, dtype, view.device)[offset:]
    return cupy.ndarray(view.shape, dtype, flat.data, strides_like(view, dtype))


def zeros(n, dtype, device):
    """Return a 1-D array of n zeros, which are there, for any stream, when this returns."""
    with cupy.cuda.Device(device):
        array = cupy.zeros(n, dtype)
        cupy.cuda.get_current_stream().synchronize()
        return array


def fill_zero(view, stream=None):
    """Store zeros in an array, in the order of a launch. stream: the handle of one, or None."""
    with gpu_launch.ordered(_this_module, view.device or 0, [view], stream):
        native(view).fill(0)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory, which is there when this returns."""
    return cupy.asarray(array, blocking=True)


def to_host(array):
    """Return a copy of an array of this backend, or of another library, as a NumPy array. It waits for its device."""
    found = view("", array)
    with on(found.device or 0, None):
        synchronize()  # whichever stream writes it
        return cupy.asnumpy(native(found))


def now():
    """Return a moment of the current stream for `seconds_between`."""
    return cupy.cuda.get_current_stream().record()


def seconds_between(start, end):
    """Return the device's time between two moments, after waiting for the later one."""
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


copies_any_layout = True


def copy(to, source):
    """Copy one array into another of the same shape, of its dtype or of a wider one, in the order of a launch."""
    with gpu_launch.ordered(_this_module, to.device or 0, [to, source]):
        given = native(source)
        native(to)[...] = given if to.dtype == source.dtype else widened(given, source.format)


def launch(form, views, scalars, rule=adam, stream=None, key=0):
    """Update arrays, as `gpu_launch.launch` says."""
    gpu_launch.launch(_this_module, form, views, scalars, rule, stream, key)


def batches(updates, arrays):
    """Return the `gpu_launch.Batch`es of several updates, of any shapes, on one device."""
    return gpu_launch.batches(_this_module, updates, arrays)


def run(batch, form, scalars, rule, stream, key):
    """Launch a Batch; device and stream are the current ones."""
    on_device = isinstance(scalars, ScalarsMemory)
    random = form.arrays.random
    kernel = build(rule, form, batch.loop, on_device)
    if on_device:
        given = [_unowned(scalars.address + REALS_AT, (len(adam.scalar_names(form)),), scalars.dtype, batch.device)]
        if random or form.skips:
            given.append(_unowned(scalars.address, (2,), np.int64, batch.device))
    else:
        given = [*scalars, *([key] if random else [])]
    if batch.loop == "table":
        rows, owners = batch.at
        rows = _unowned(rows, (batch.table.rows.size,), np.int64, batch.device)
        owners = _unowned(owners, batch.table.owners.shape, np.int32, batch.device)
        kernel(owners, *given, rows, size=owners.size * pointer_table.BLOCK, block_size=pointer_table.BLOCK)
        return
    of_row = [batch.updates[0].key, batch.updates[0].start] if random else []
    operands = operands_of_form(form)
    if batch.loop == "contiguous":
        if batch.arguments is None:
            batch.arguments = [
                _unowned(pointer, (batch.size,), IN_MEMORY[operand.format], batch.device)
                for pointer, operand in zip(batch.pointers, operands, strict=True)
            ]
        head, vectors, threads = batch.split
        read, written = _in_and_out(operands, batch.arguments)
        kernel(*read, head, vectors, *of_row, *given, *written, size=threads)
    else:
        views = zip(batch.updates[0].views, operands, strict=True)
        arrays = [_unowned(v.pointer, v.shape, IN_MEMORY[o.format], v.device, v.strides) for v, o in views]
        read, written = _in_and_out(operands, arrays)
        kernel(*read, *of_row, *given, *written)


def _in_and_out(operands, values):
    """Return what belongs to the operands that are only read, and to the others."""
    pairs = list(zip(operands, values, strict=True))
    return [x for operand, x in pairs if not operand.stores], [x for operand, x in pairs if operand.stores]


# CuPy has no arithmetic on what a rule converts from bits
IN_MEMORY = {format: f"uint{8 * n}" if n < 4 else format for format, n in FORMATS.items()}


def native(view):
    """Return an array as CuPy's."""
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


def begin_capture(stream):
    """Begin to capture a graph of what is enqueued on a stream of the current device, and forbid nothing meanwhile."""
    cupy.cuda.runtime.streamBeginCapture(stream, cupy.cuda.runtime.streamCaptureModeRelaxed)


def drop_capture(stream):
    """End a capture and throw the graph away."""
    cupy.cuda.runtime.graphDestroy(cupy.cuda.runtime.streamEndCapture(stream))


def synchronize_stream(stream):
    """Wait for what is on a stream of the current device."""
    cupy.cuda.runtime.streamSynchronize(stream)


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


MOST_OF_POOL = 1 << 20  # bytes of pinned memory


def pinned(n_bytes):
    """Return pinned memory of the host, as an array of bytes."""
    if n_bytes <= MOST_OF_POOL:
        memory = cupy.cuda.alloc_pinned_memory(n_bytes)
    else:  # CuPy's pool rounds up to a power of two, and keeps what was freed: of state that fills the host's memory
        memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(n_bytes, cupy.cuda.runtime.hostAllocPortable), 0)
    return np.frombuffer(memory, np.uint8, n_bytes)


def device_bytes(n_bytes):
    """Return memory of the current device and stream: its owner, and its address."""
    memory = cupy.cuda.alloc(n_bytes)
    return memory, memory.ptr


def send(address, pinned, n_bytes, stream):
    """Copy from pinned memory to the device, on a stream."""
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(address, pinned.ctypes.data, n_bytes, runtime.memcpyHostToDevice, stream)


def receive(host, address, n_bytes, stream):
    """Copy from the device to an array of the host, on a stream."""
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(host.ctypes.data, address, n_bytes, runtime.memcpyDeviceToHost, stream)


def synchronize():
    """Wait for all that is enqueued on the current device."""
    cupy.cuda.runtime.deviceSynchronize()


def new_stream():
    """Return a stream of the current device that waits for no other: its owner, and its handle."""
    stream = cupy.cuda.Stream(non_blocking=True)
    return stream, stream.ptr


def finish(event):
    """Wait until an event is done."""
    event.synchronize()


LOOPS = {"contiguous": CONTIGUOUS, "table": TABLE, "strided": STRIDED}


@functools.cache
def build(rule, form, loop, on_device=False):
    """Return the ElementwiseKernel of a form; CuPy compiles it at its first call.

    loop: "contiguous", "table" or "strided". on_device: whether the scalars are in device memory.
    """
    operands, names = operands_of_form(form), adam.scalar_names(form)
    random = form.arrays.random
    kinds = {o.name: cuda_c_access.C_TYPES[o.format] for o in operands}
    raw = "" if loop == "strided" else "raw "
    arrays = [] if loop == "table" else [f"{raw}{IN_MEMORY[o.format]} {o.name}" for o in operands]
    inputs, outputs = _in_and_out(operands, arrays) if arrays else (["raw int32 owners"], ["raw int64 rows"])
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
    pointers = {o.name: f"at_address<{kinds[o.name]}>(row[OPERANDS + {k}])" for k, o in enumerate(operands)}
    begin = "" if form.arrays.grouped else " + begin"
    conversions, update = cuda_c_access.for_cuda_c(form, names)
    parts = {
        "scalars": ", ".join(names),
        "pointers": "\n".join(
            f"{'' if o.stores else 'const '}{kinds[o.name]}* const {o.name} = {pointers[o.name]}{begin};" for o in operands
        ),
        "names": ", ".join(o.name for o in operands),
        "at": ", ".join(f"{o.name} + at" if loop == "table" else f"as<{kinds[o.name]}>(&{o.name}[at])" for o in operands),
        "at_row": ", ".join(f"{pointers[o.name]} + at" for o in operands),
        "element": ", ".join(f"as<{kinds[o.name]}>(&{o.name})" for o in operands),
    }
    defined = {
        "COLUMNS": pointer_table.OPERANDS + len(operands),
        "KEY_OF_ROW": "row[KEY]" if random else "0LL",
        "START_OF_ROW": "row[START]" if random else "0LL",
    }
    return cupy.ElementwiseKernel(
        ", ".join(inputs),
        ", ".join(outputs),
        body + (GROUPS if form.arrays.grouped else LOOPS[loop]) % parts,
        f"gpuadam_{rule.__name__.rpartition('.')[2]}_{form.dtype}_{loop}{'_device' * on_device}",
        preamble=f"typedef {CTYPES[form.dtype.name]} T;\nconstexpr int LANES = {lanes_of(form)};\n"
        + "".join(f"#define {name} {value}\n" for name, value in defined.items())
        + TABLE_PREAMBLE * (loop == "table")
        + primitives.for_cuda_c(form.dtype)
        + conversions
        + rule.in_cuda_c(form)
        + update,
    )


CTYPES = {"float32": "float", "float64": "double"}


def launch_scalars(form, settings, given, out, stream):
    """Advance the step count and compute the scalars of a step on the device.

    form: a `scalars.ScalarsForm`. settings: its `Settings`. given: name -> View of one number on the device, or a number: "lr",
    "grad_scale", and those of "step", "found_inf" and "norm" that the form has. out: the `scalars.ScalarsMemory` to write.
    stream: a handle.
    """
    inputs, outputs = _scalar_arguments(form)
    arrays = {name: _one(x, x.dtype) if isinstance(x, View) else x for name, x in given.items()}
    arrays |= settings._asdict() | {
        "scalars": _unowned(out.address + REALS_AT, (form.reals,), out.dtype, out.device),
        "words": _unowned(out.address, (2,), np.int64, out.device),
    }
    if "found_inf" in given:
        arrays["found_inf"] = _one(given["found_inf"], _bits_of(given["found_inf"].dtype))
    with on(out.device, stream):
        build_scalars(form)(*(arrays[name] for _, name in [*inputs, *outputs]), size=1)


def _one(view, dtype):
    return _unowned(view.pointer, (1,), dtype, view.device)


def _bits_of(dtype):
    return f"uint{8 * dtype.itemsize}"


def _scalar_arguments(form):
    """Return the (type, name) of the inputs and outputs of the kernel, and how many scalars it makes."""

    def number(name, dtype):
        return ("float64" if dtype is None else f"raw {dtype}", name)

    inputs = [number("lr", form.lr), number("grad_scale", form.grad_scale)]
    if form.found_inf is not None:
        inputs.append((f"raw {_bits_of(form.found_inf)}", "found_inf"))
    if form.norm or form.checks:
        inputs.append(("raw float64", "norm"))
    inputs += [("int64" if k < 2 else "float64", name) for k, name in enumerate(Settings._fields)]
    outputs = [("raw int64", "step")] if form.counts else []
    outputs.append((f"raw {form.dtype}", "scalars"))
    if form.random or form.skips:
        outputs.append(("raw int64", "words"))
    return inputs, outputs


@functools.cache
def build_scalars(form):
    """Return the ElementwiseKernel of a `scalars.ScalarsForm`."""
    inputs, outputs = _scalar_arguments(form)
    before, body = formula_in_cuda_c(form)
    return cupy.ElementwiseKernel(
        ", ".join(map(" ".join, inputs)),
        ", ".join(map(" ".join, outputs)),
        body,
        f"gpuadam_scalars_{form.dtype}",
        preamble="typedef double T;\n" + primitives.for_cuda_c("float64") + before,
    )
