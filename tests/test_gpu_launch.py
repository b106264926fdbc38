"""The launch code of both GPU backends, up to the driver: what it hands to a kernel, and that it hands over the right thing.

A stand-in takes the driver's place: kernels are the compiled ones, executed on the host, and memory is the host's. What this
cannot show is that CuPy and Numba take these arguments as we think; `tests/test_gpu.py` does, on a GPU.
"""

import contextlib
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from cases import DTYPES, KEY_FORMS, assert_same_bits, at_offset, form_and_scalars, wide_state

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpuadam.arrays import View, on_cpu  # noqa: E402
from gpuadam.kernels import adam, cupy_elementwise, limit, numba_cpu, numba_cuda  # noqa: E402

ARCH = "sm_90"


def cuda_view(name, a, stream=None):
    return View(name, a, a.ctypes.data, a.shape, a.strides, a.dtype, True, a.flags.c_contiguous, 0, stream)


def pack(value):
    """A kernel argument as the driver gets it: an integer as 8 bytes, a tuple one by one."""
    if isinstance(value, tuple):
        return b"".join(map(pack, value))
    return value.tobytes() if isinstance(value, np.generic) else gpu_code.int64s(value)


class NumbaStandIn:
    """Numba's driver: devices, streams and launches."""

    def __init__(self, monkeypatch):
        self.launches, self.waits = [], []
        monkeypatch.setattr(numba_cuda, "_configured", self.configured)
        monkeypatch.setattr(numba_cuda, "_order", lambda before, after: self.waits.append((before, after)))
        monkeypatch.setattr(numba_cuda.cuda, "gpus", {0: contextlib.nullcontext()})

    def launch(self, form, views, scalars):
        self.memory = gpu_code.memory_of([view.array for view in views if view is not None])
        numba_cuda.launch(form, views, scalars)

    def configured(self, rule, form, loop, blocks, stream):
        ndim = None if loop == "contiguous" else int(loop.split()[1])
        kernel = gpu_code.loaded(gpu_code.ptx("numba-cuda", form, ARCH, ndim, rule))

        def run(*arguments):
            self.launches.append((loop, blocks, stream))
            if ndim is not None and len(kernel.parameter_sizes) > len(arguments):  # a tuple is a parameter for each number
                arguments = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
            kernel.run(blocks, numba_cuda.BLOCK, [pack(a) for a in arguments], self.memory)

        return run


@functools.cache
def compiled(elementwise, ndim=1):
    return gpu_code.loaded(gpu_code.compile_cupy(elementwise, ARCH, ndim=ndim).rstrip(b"\0").decode())


class CupyStandIn:
    """CuPy's arrays, streams and ElementwiseKernel."""

    def __init__(self, monkeypatch):
        self.launches, self.waits = [], []
        build = cupy_elementwise.build
        monkeypatch.setattr(
            cupy_elementwise, "build", lambda rule, form, loop: self.kernel(build(rule, form, loop), form, loop)
        )
        monkeypatch.setattr(cupy_elementwise, "_native", lambda view: view.array)
        stand_in = SimpleNamespace(ndarray=self.flat, cuda=self, ElementwiseKernel=cupy_elementwise.cupy.ElementwiseKernel)
        monkeypatch.setattr(cupy_elementwise, "cupy", stand_in)

    Device = staticmethod(lambda device: contextlib.nullcontext())

    def get_current_stream(self):
        return self.stream(0)

    def stream(self, ptr):
        return SimpleNamespace(
            ptr=ptr, record=lambda: ptr or 1, wait_event=lambda event: self.waits.append((event, ptr or 1))
        )

    ExternalStream = stream

    @staticmethod
    def flat(shape, dtype, memory):
        return np.frombuffer(memory.obj.ravel(order="K").data, dtype).reshape(shape)

    def launch(self, form, views, scalars):
        self.memory = gpu_code.memory_of([view.array for view in views if view is not None])
        cupy_elementwise.launch(form, views, scalars)

    def kernel(self, elementwise, form, loop):
        """Check arguments as ElementwiseKernel does, then run: inputs, outputs, and the number of threads."""

        def run(*arguments, size=None):
            assert len(arguments) == len(elementwise.params) - 1  # the last is CuPy's indexer
            for p, a in zip(elementwise.params, arguments, strict=False):
                assert isinstance(a, np.ndarray) == (p.name in ("param", "grad", "m", "v", "max_v")), p.name
                assert (a.dtype if hasattr(a, "dtype") else np.dtype("int64")) == np.dtype(p.dtype), p.name
            arrays = [a for a in arguments if isinstance(a, np.ndarray)]
            if loop == "contiguous":
                assert size is not None and all(a.ndim == 1 for a in arrays)
                kernel, indexer = compiled(elementwise), (size, size, 0, 0)
            else:
                assert size is None
                size, ndim = arrays[0].size, arrays[0].ndim
                kernel, indexer = compiled(elementwise, ndim), (size, *arrays[0].shape, *[0] * 9)
            self.launches.append((loop, size))
            packed = [gpu_code.carray(a) if isinstance(a, np.ndarray) else pack(a) for a in arguments]
            packed.append(gpu_code.int64s(*indexer)[: kernel.parameter_sizes[-1]])
            kernel.run(math.ceil(size / 128), 128, packed, self.memory)

        return run


@pytest.fixture(params=[CupyStandIn, NumbaStandIn])
def driver(request, monkeypatch):
    return request.param(monkeypatch)


def assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays):
    expected = [None if a is None else a.copy(order="K") for a in arrays]
    numba_cpu.launch(form, [None if a is None else on_cpu("", a) for a in expected], scalars)
    driver.launch(form, [None if a is None else cuda_view("", a) for a in arrays], scalars)
    assert_same_bits(arrays, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KEY_FORMS)
def test_any_size_and_start(driver, name, dtype):
    form, scalars = form_and_scalars(name, dtype)
    for n in (0, 1, 5, 1003):
        for offsets in ((0,) * 5, (1,) * 5, (0, 1, 0, 1, 0)):
            placed = [at_offset(a, o)[0] for a, o in zip(wide_state(n, dtype, form.amsgrad), offsets, strict=True)]
            assert_launch_gives_the_cpus_bits(driver, form, scalars, placed)


@pytest.mark.parametrize("order", "CF")
def test_arrays_of_one_order_of_memory_are_one_dimension_to_the_kernel(driver, order):
    form, scalars = form_and_scalars("amsgrad", "float32")
    arrays = [np.array(a.reshape(9, 17), order=order) for a in wide_state(153, "float32", True)]
    if order == "F" and isinstance(driver, CupyStandIn):
        arrays = [a.T for a in arrays]  # the stand-in's memory is NumPy's, whose buffers are in C order
    assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays)
    assert driver.launches[0][0] == "contiguous"


LAYOUTS = {
    "every other": lambda a: np.repeat(a, 2)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "F order beside C": lambda a: np.asfortranarray(a.reshape(9, 17)),
    "a block": lambda a: np.pad(a.reshape(9, 17), 2)[2:-2, 2:-2],
    "3-D": lambda a: np.repeat(a.reshape(3, 3, 17), 2, axis=1)[:, ::2].transpose(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arrays(driver, layout):
    form, scalars = form_and_scalars("all with adamw", "float32")
    given = wide_state(153, "float32", True)
    arrays = [LAYOUTS[layout](a) for a in given]
    arrays[1] = np.ascontiguousarray(arrays[1])
    assert_launch_gives_the_cpus_bits(driver, form, scalars, arrays)
    assert driver.launches[0][0].startswith("strided")


def test_streams_are_ordered_before_and_after(driver):
    form, scalars = form_and_scalars("adam", "float32")
    arrays = wide_state(64)[:4]
    views = [cuda_view("", a, stream) for a, stream in zip(arrays, (1, 77, None, 77), strict=True)]
    driver.launch(form, [*views, None], scalars)
    assert driver.waits == [(77, 1), (1, 77)]  # the update after what was on 77, and what comes next on 77 after the update


def test_one_stream_needs_no_ordering(driver):
    form, scalars = form_and_scalars("adam", "float32")
    views = [cuda_view("", a, 1) for a in wide_state(64)[:4]]
    driver.launch(form, [*views, None], scalars)
    assert driver.waits == []


def test_nothing_is_launched_for_no_elements(driver):
    form, scalars = form_and_scalars("adam", "float32")
    views = [View("", np.zeros(0, "f4"), 0, (0,), (4,), np.dtype("f4"), True, True, None) for _ in range(4)]
    driver.launch(form, [*views, None], scalars)
    assert driver.launches == []


def test_numba_launches_on_the_stream_that_the_arrays_name(monkeypatch):
    driver = NumbaStandIn(monkeypatch)
    form, scalars = form_and_scalars("adam", "float32")
    driver.launch(form, [*(cuda_view("", a, 77) for a in wide_state(64)[:4]), None], scalars)
    assert driver.launches == [("contiguous", 1, 77)]


def test_the_kernels_are_named_for_what_is_in_them():
    form, _ = form_and_scalars("adam", "float32")
    assert cupy_elementwise.build(adam, form, "contiguous").name == "gpuadam_adam_float32_near1_near2_contiguous"
    assert cupy_elementwise.build(limit, form, "strided").name == "gpuadam_limit_float32_near1_near2_strided"
