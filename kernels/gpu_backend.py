"""The base of both GPU backends: which arrays share a launch, on which stream it goes, which streams wait, and the global norm.

`cupy_backend.py` and `numba_cuda_backend.py` bring what differs: memory, the current
device and stream, and the launch of a kernel. The rest goes to the driver (`gpu_driver.py`).
"""

import collections
import contextlib
import ctypes
import functools
import threading
from typing import Any

import numpy as np

from gpuadam.kernels import gpu_driver, gpu_launch, gpu_step, streams, synchronous
from gpuadam.kernels.backend import Backend
from gpuadam.kernels.change_gpu import GpuNormPasses
from gpuadam.kernels.dlpack import Borrowed
from gpuadam.kernels.gpu_batch import GpuBatch, Place
from gpuadam.kernels.gpu_norm import GpuNorm
from gpuadam.kernels.layout import VECTOR_BYTES, bounds, dense, side_by_side
from gpuadam.kernels.streams import LEGACY_DEFAULT
from gpuadam.kernels.view import InParts, View

LARGE = 2 << 20  # bytes: arrays of state from here on have an allocation of their own
APART = 512  # bytes: others begin at multiples of it, as arrays of CuPy's pool do
LEGACY_ID = -1  # of the default stream, which never ends
UNCHANGED = contextlib.nullcontext()  # what `on` returns where device and stream are the current ones


class GpuBackend(Backend):
    """A backend of arrays in CUDA memory. A method without code is for the two backends to have.

    Methods without a device are about the current one: each device has a current stream of its own and a default stream of the
    same name, and an event serves the streams of its own device. Streams are driver handles.
    """

    memory = "CUDA"
    boundary = VECTOR_BYTES
    enters_streams = False  # whether kernels go on the stream that `on` makes the current one
    interleaves = False  # whether the compiler computes the lanes of a vector side by side, which takes more registers
    default_named: int | None = None  # the stream that the library names for a new array
    gpu_step = gpu_step
    struct: Any = None  # the module that reads objects of the library's arrays, as `cupy_struct.py` does
    attributes: Any = None  # or the one that compares their attributes, as `numba_attributes.py` does

    def __init__(self):
        self._rehearsed: set = set()  # (device, kernel)
        self._launched: set = set()  # likewise
        self.capture_refused = ""  # what the driver said when a capture of this package failed last
        self._in_use: collections.deque = collections.deque()  # (event, borrowed arrays), in the order of launches
        self._in_use_lock = threading.Lock()

    # Devices, streams and events

    def on(self, device, stream):
        """Return a context in which a device and a stream are the current ones. stream: None for the device's current one."""

    def at(self, device, place):
        """Return the context of a Place, which this thread has chosen and not left since."""
        return UNCHANGED if place.is_current else self.on(device, place.stream)

    def current_device(self):
        """Return the number of the current device."""

    def device_name(self):
        """Return the name of the current device."""
        name = ctypes.create_string_buffer(256)
        gpu_driver.call("cuDeviceGetName", name, len(name), self.current_device())
        return name.value.decode()

    def memory_info(self):
        """Return how many bytes of the current device's memory are free, and how many there are."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.on(self.current_device(), None):
            gpu_driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def current_stream(self):
        """Return the program's current stream, that of CuPy; None if CuPy is not in use."""

    def new_stream(self):
        """Return a stream that waits for no other: its owner, and its handle."""
        stream = gpu_driver.Owned("Stream", gpu_driver.NON_BLOCKING)
        return stream, stream.handle

    def stream_id(self, stream):
        """Return what tells a stream of the current device from every other, for what is kept of a stream.

        A handle does not: when a stream ends the next one gets its handle at once, even while there is work on the first.
        """
        return LEGACY_ID if stream == LEGACY_DEFAULT else gpu_driver.stream_id(stream)

    def record(self, stream, flags=gpu_driver.DISABLE_TIMING, event=None):
        """Return an event that is done when the work that is on a stream so far is: a new one, or the one that is given."""
        event = event or gpu_driver.Owned("Event", flags)
        gpu_driver.call("cuEventRecord", event.handle, stream)
        return event

    def wait(self, stream, event):
        """Make the next work on a stream wait for an event."""
        gpu_driver.call("cuStreamWaitEvent", stream, event.handle, 0)

    def done(self, event):
        """Whether an event is done."""
        return gpu_driver.status("cuEventQuery", event.handle) == 0

    def finish(self, event):
        """Wait until an event is done."""
        gpu_driver.call("cuEventSynchronize", event.handle)

    def finish_stream(self, stream):
        """Wait for the work that is on a stream so far. The thread sleeps: to ask again and again would take a processor."""
        self.finish(self.record(stream, gpu_driver.DISABLE_TIMING | gpu_driver.BLOCKING_SYNC))

    def synchronize_stream(self, stream):
        """Wait for the work on a stream."""
        gpu_driver.call("cuStreamSynchronize", stream)

    def synchronize(self):
        """Wait for all work on the device."""
        gpu_driver.call("cuCtxSynchronize")

    def is_capturing(self, stream):
        """Whether a graph is being captured on a stream; it cannot be on the default one."""
        return stream != LEGACY_DEFAULT and gpu_driver.is_capturing(stream)

    def now(self):
        return self.record(self.current_stream() or LEGACY_DEFAULT, flags=0)

    def seconds_between(self, start, end):
        self.finish(end)
        return gpu_driver.asked("cuEventElapsedTime", start.handle, end.handle, kind=ctypes.c_float) / 1e3

    # Memory

    def pinned(self, n_bytes):
        """Return pinned memory of the host, as an array of bytes."""

    def device_bytes(self, n_bytes):
        """Return memory of the current device and stream: its owner, and its address."""

    def zeros_in_one(self, sizes, dtype, device, operands=()):
        dtype = np.dtype(dtype)
        # A large array can then be freed while others stay, and lies on large pages of the GPU in any case
        small = [n for n in sizes if 0 < n * dtype.itemsize < LARGE]
        if len(small) < 2:
            return super().zeros_in_one(sizes, dtype, device, operands)
        in_elements = APART // dtype.itemsize
        places, end = side_by_side(small, in_elements)
        memory = self.zeros(end, dtype, device)
        parts = iter([memory[place : place + n] for place, n in zip(places, small, strict=True)])
        return [next(parts) if 0 < n * dtype.itemsize < LARGE else self.zeros(n, dtype, device) for n in sizes]

    def send(self, address, host, n_bytes, stream):
        """Copy from an array of the host, in pinned memory, to the device, on a stream."""
        gpu_driver.call("cuMemcpyHtoDAsync_v2", address, host.ctypes.data, n_bytes, stream)

    def receive(self, host, address, n_bytes, stream):
        """Copy from the device to an array of the host, on a stream."""
        gpu_driver.call("cuMemcpyDtoHAsync_v2", host.ctypes.data, address, n_bytes, stream)

    def copy_now(self, device, copy, target, source, n_bytes):
        """Copy by `send` or `receive` when the device is idle, and wait. It is the current device only here."""
        with self.on(device, None):
            self.synchronize()  # any stream may have work on the arrays
            copy(target, source, n_bytes, LEGACY_DEFAULT)
            self.synchronize()

    def empty_number(self):
        """Return a new array of shape () and dtype float64 on the current device and stream, and its address."""

    # Launches

    def run(self, batch, form, scalars, rule, stream, key):
        """Launch a `GpuBatch`. Its device and the stream are the current ones."""

    def changing(self, batch, form):
        """Return the `gpu_launch.Changing` of what `run` launched with scalars of the host; None if that cannot be repeated."""

    def launch_scalars(self, form, settings, numbers, out, stream):
        """Enqueue the kernel that advances the step count and computes the scalars of a step on the device.

        form: a `scalars.ScalarsForm`. settings: its `Settings`. numbers: name -> View of one number on the device, or a number:
        "lr", "grad_scale", and those of "step", "found_inf" and "norm" that the form has. out: the `scalars.ScalarsMemory` to
        write.
        """
        values = {name: x.pointer if isinstance(x, View) else float(x) for name, x in numbers.items()}
        arguments = [values.get(name, 0) for name in ("step", "found_inf", "norm", "lr", "grad_scale")]
        with self.on(out.device, stream):
            self.launch_one_thread(form, (*arguments, out.address, *settings), stream)

    def launch_one_thread(self, form, arguments, stream):
        """Launch the kernel of a `scalars.ScalarsForm` on the stream, on the current device."""

    def launch_sums(self, form, chunks, arguments, stream):
        """Launch a pass of a norm. The stream is the current one. arguments: those of the kernel, integers.

        form: a `norm_order.Form`; or an `adam.Form`, of the changes that its update will make.
        """

    # From here on, the part that both backends share

    def batches(self, updates, arrays):
        together, batches = [], []
        for update in updates:
            if not update.views[0].size:
                continue
            if dense(update.views, in_c_order=arrays.random):
                together.append(update)
            else:
                batches.append(GpuBatch(self, "strided", arrays, [update]))
        if together:
            loop = "table" if len(together) > 1 or arrays.grouped else "contiguous"
            batches.insert(0, GpuBatch(self, loop, arrays, together))
        return batches

    def order(self, before, after):
        """Make the next work on one stream wait for the work that is on another."""
        self.wait(after, self.record(before))

    def place(self, device, stream, named):
        """Return the Place of work on a device. stream: the one that the caller asks for. named: those that the arrays name."""
        context = self.on(device, None)
        if context is UNCHANGED:
            return self._place(stream, named, True)
        with context:
            return self._place(stream, named, False)

    def _place(self, stream, named, is_current):
        """Likewise on the current device. is_current: whether it will be that then."""
        current = self.current_stream()
        target, others = streams.choose(stream, current, named)
        capturing = self.is_capturing(target)
        if capturing:  # captured work cannot wait for the default stream: a graph is ordered where it is launched
            others = [other for other in others if other != LEGACY_DEFAULT]
        elif any(map(self.is_capturing, others)):  # the work would wait for that stream, and so become a part of its graph
            raise RuntimeError(
                f"a graph is being captured on a stream that arrays were last used on ({others}), and the work would go to "
                f"another one ({target}): make the stream that is captured the current one, and give no other as stream="
            )
        return Place(target, others, capturing, is_current and (target == current or not self.enters_streams))

    def before(self, place):
        """Make the next work at a Place, whose stream is current, wait for the other streams."""
        for other in place.others:
            self.order(other, place.stream)

    def after(self, place, borrowed):
        """Make the other streams wait for the work at a Place. borrowed: arrays that have to be kept until it is done."""
        for other in place.others:
            self.order(place.stream, other)
        if not place.capturing:
            self.keep_until_done(place.stream, borrowed)

    def ordered(self, device, views, stream=None):
        """Make a device and a stream current for work on arrays outside a Batch, order the work, and give the stream.

        The work is also ordered with the current stream, where others may have used the same memory.
        """
        return self.ordered_at(self.place(device, stream, [*(view.stream for view in views), None]), device, views)

    @contextlib.contextmanager
    def ordered_at(self, place, device, views):
        """Likewise for work at a Place."""
        with self.on(device, place.stream):
            self.before(place)
            yield place.stream
            self.after(place, self.borrowed(views))

    @staticmethod
    def borrowed(views):
        """Return those arrays of Views that were borrowed by DLPack."""
        owners = [view.array.array if type(view.array) is InParts else view.array for view in views]
        return [owner for owner in owners if type(owner) is Borrowed]

    def keep_until_done(self, stream, borrowed):
        """Keep borrowed arrays until the work that is on a stream is done: their producer does not know of it."""
        if not borrowed and not self._in_use:
            return
        with self._in_use_lock:
            with gpu_driver.allowed_while_capturing():
                while self._in_use and self.done(self._in_use[0][0]):
                    self._in_use.popleft()
            if borrowed:
                self._in_use.append((self.record(stream), borrowed))

    def rehearse(self, device, kernel, launch):
        """Launch a kernel into a graph that is thrown away: an error of the compiler or the loader comes before any write.

        Nothing runs. device: the current one. kernel: tells one that is compiled from others; the first launch of each is
        rehearsed. launch(stream): enqueues it. While Python has other threads the kernel is compiled when it is launched, because
        compiling amid a capture takes seconds in which they may not wait for the device. If the driver refuses the capture, or
        loads no module amid one, the kernel is loaded when it is launched.
        """
        key = device, kernel
        if key in self._rehearsed or key in self._launched or not gpu_launch.alone():
            return
        with self._if_it_can_be_captured():
            self._captured(device, launch)
            self._rehearsed.add(key)

    def launched(self, device, kernel):
        """Take note that a kernel was launched outside of a capture: a capture will not load it."""
        self._launched.add((device, kernel))

    def check_loaded(self, device, kernel):
        """Refuse a kernel that the capture of somebody else would have to load, which ends the capture, or is refused by it."""
        if (device, kernel) not in self._launched:
            raise RuntimeError(
                "a graph is being captured, and a kernel that it needs is not on the device yet: make the same call once before "
                "the capture, with the same options. It may be on another stream, and with other gradients of the same shapes"
            )

    def recorded(self, batch, form, scalars, rule, key):
        """Return what `run` launches as a `gpu_launch.Recorded`, or None if that is not as `changing` says.

        None, too, if the driver refuses the capture. scalars: of the host. The arrays of the batch have to stay where they are.
        """
        with self._if_it_can_be_captured():
            graph = self._captured(batch.device, lambda stream: self.run(batch, form, scalars, rule, stream, key))
            changing = self.changing(batch, form)
            return changing and gpu_launch.recorded(graph, changing, form.dtype, scalars, key)
        return None

    @contextlib.contextmanager
    def _if_it_can_be_captured(self):
        """Go on behind this context, without what it captures, if that failed because it was captured.

        Nothing of it has run: what a capture takes in is only enqueued in a graph, and what it refuses is not enqueued at all.
        """
        try:
            yield
        except Exception as error:  # CuPy's, Numba's, cuda.core's and ours
            if not gpu_driver.is_of_capture(error):
                raise
            self.capture_refused = str(error)

    def _captured(self, device, enqueue):
        """Return the `gpu_driver.Graph` of what enqueue(stream) puts on a stream of a device."""
        owner, stream = self.new_stream()
        try:
            with self.on(device, stream):
                return gpu_driver.Graph(stream, lambda: enqueue(stream))
        finally:
            del owner  # now, even if an error keeps this frame: a capture that could not be ended ends with its stream

    def to_host(self, array):
        view = self.view("", array)
        if not view.size:
            return np.empty(view.shape, view.dtype)
        start, end = bounds(view)
        memory = np.empty(end - start, np.uint8)
        self.copy_now(view.device, self.receive, memory, start, memory.nbytes)
        return np.ndarray(view.shape, view.dtype, memory, view.pointer - start, view.strides)

    def norm(self, views, out, device, stream):
        if device is None:
            device = self.current_device() if out is None or out.device is None else out.device
        norm = GpuNorm(self, views, device)
        result = self.take(norm, out, stream)
        norm.release()
        return result

    def norm_again(self, views, device):
        """Return a `GpuNorm` that is asked for again and again."""
        return GpuNorm(self, views, device, once=False)

    def take(self, norm, out, stream):
        """Return a norm, given as a `GpuNorm`, as `norm` does; None if that cannot go on here."""
        why = (
            "a new array for the norm would not outlive this call for it: give out=, an array of shape () and dtype float64 that "
            "you keep"
        )
        place = self.place_with_results(norm.device, stream, norm.streams, [] if out is None else [out], why)
        with self.on(norm.device, None):
            if not norm.goes_on(place):
                return None
            result, address = self.empty_number() if out is None else (out.array, out.pointer)
        norm.launch(place, address)
        return result

    def place_with_results(self, device, stream, named, out, why):
        """Return the Place of work that writes results to arrays `out`, or if there are none to new ones.

        named: the streams that other arrays name. why: no graph can capture the second.
        """
        # a new result is there for the current stream, and for the one that its library names, wherever the work goes
        of_results = [view.stream for view in out] or [None, self.default_named]
        place = self.place(device, stream, [*named, *of_results])
        if place.capturing and not out:
            raise RuntimeError(f"a graph is being captured, and {why}")
        place.check_capture()
        return place

    def step_norms(self, params, device, out):
        return GpuNormPasses(self, params, device, out)

    def chunk_sums(self, views):
        if not views:
            return np.empty(0)
        device = views[0].device
        with self.on(device, None):
            place = Place(self.current_stream() or LEGACY_DEFAULT, [], False)
        norm = GpuNorm(self, views, device)
        sums = norm.chunk_sums(place)
        norm.release()
        return sums

    def launch_passes(self, plan, table, workspace, norm_at, stream, text):
        """Launch the passes of a `norm_order.Plan` on a stream, which is the current one.

        table, workspace, norm_at: their addresses; without norm_at the sums of chunks are all. text(number): what an error calls
        the pass of a number.
        """
        passes = [one for one in plan.passes if norm_at or one.form.squares]
        for number, one in enumerate(passes, 1):
            last = bool(norm_at) and number == len(passes)
            out = norm_at if last else workspace + one.out
            arguments = table, one.first_row, one.n_rows, out, one.chunks, int(last)
            what = functools.partial(text, number)
            synchronous.launch(self, stream, what, self.launch_sums, one.form, one.chunks, arguments, stream)
