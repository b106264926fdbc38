"""A backend that is not gpuadam's: plain NumPy, by the public interface alone. The page in kernels/__init__.py says how."""

import copy
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
from cases import FORMS, state

import gpuadam
from gpuadam import backends
from gpuadam.cli import contract
from gpuadam.kernels import norm_order
from gpuadam.kernels.backend import Backend, Batch, refuse_stream
from gpuadam.kernels.operands import RESULTS, VALUES, Arrays, operands_of_form
from gpuadam.kernels.view import on_cpu


def fma(x, y, z):
    """x * y + z, rounded once, of float32: in float64 the product is exact; the sum is rounded to odd, so float32 is right."""
    product, z = np.float64(x) * np.float64(y), np.float64(z)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    odd = np.isfinite(total) & (error != 0) & (total.view("i8") & 1 == 0)
    return np.where(odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total).astype("f4")


def larger(x, y):
    """The larger of two numbers that are not negative, as unsigned integers: NaN wins."""
    return np.maximum((x + np.float32(0)).view("u4"), (y + np.float32(0)).view("u4")).view("f4")


def zero_below(x, y):
    return np.where(y < np.finfo("f4").tiny, np.float32(0), x)


OPERATIONS = SimpleNamespace(
    fma=fma, add=np.add, sub=np.subtract, mul=np.multiply, div=np.divide, sqrt=np.sqrt, neg=np.negative, abs=np.abs,
    larger=larger, zero_below=zero_below,
    at_least=lambda x, low: np.where(x < low, low, x), at_most=lambda x, high: np.where(x > high, high, x),
    choose=lambda c, x, y: np.where(c != 0, x, y),
    squares=np.square, plus_squares=lambda x, g: fma(g, g, x), length=np.abs, nonzero=lambda g: g,
)  # fmt: skip


class NumpyBatch(Batch):
    def launch(self):
        (rule, form, scalars, *_), self.begun = self.prepared, True
        update, names = rule.in_python(form, OPERATIONS), [operand.name for operand in operands_of_form(form)]
        for one in self.updates:
            arrays = dict(zip(names, (view.array for view in one.views), strict=True))
            values = [arrays.get(name, arrays["param"]) for name in VALUES]
            with np.errstate(all="ignore"):
                new = update(*values, tuple(map(np.float32, scalars)))
            for name, value in zip(RESULTS, new, strict=True):
                if name in arrays:
                    arrays[name][...] = value


class PlainNumpy(Backend):
    name, memory, boundary = "numpy", "CPU", 64

    def status(self):
        return True, f"NumPy {np.__version__}"

    def view(self, name, array):
        return on_cpu(name, array)

    def batches(self, updates, arrays):
        if arrays._replace(amsgrad=False, ema="") != Arrays() or arrays.ema not in ("", "float32"):
            raise TypeError(f"backend 'numpy' updates float32 arrays, not {arrays}")
        return [NumpyBatch(updates, arrays)]

    def chunk_sums(self, views):
        return np.concatenate([np.empty(0), *(self._sums(np.float64(view.array).ravel(), squares=True) for view in views)])

    def norm(self, views, out, device, stream):
        refuse_stream(stream)
        sums = self.chunk_sums(views)
        while sums.size != 1:
            sums = self._sums(sums, squares=False) if sums.size else np.zeros(1)
        result = np.empty(()) if out is None else out.array
        result[...] = np.sqrt(sums[0])
        return result

    def _sums(self, x, squares):
        """The sums of the chunks of x, float64, in the order of norm_order.py. Squares of float32 are exact."""
        chunks = np.zeros((-(-x.size // norm_order.CHUNK), 4, 16, norm_order.WIDTH))
        chunks.reshape(-1)[: x.size] = x * x if squares else x
        lanes = np.zeros((len(chunks), 4, norm_order.WIDTH))
        for row in range(16):
            lanes += chunks[:, :, row]
        lanes = lanes.reshape(-1, norm_order.LANES)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        return lanes[:, 0]

    def zeros(self, n, dtype, device):
        return np.zeros(n, dtype)

    def shaped(self, memory, shape, strides):
        return np.ndarray(shape, memory.dtype, memory, strides=strides)

    def fill_zero(self, view, stream=None):
        view.array[...] = 0

    def copy(self, to, source):
        to.array[...] = source.array

    def copy_rows(self, to, source, rows):
        there = rows >= 0
        to.array[there] = source.array[rows[there]]

    def from_host(self, array):
        return np.array(array)

    to_host = from_host

    def native(self, view):
        return view.array

    def now(self):
        return time.perf_counter()

    def seconds_between(self, start, end):
        return end - start


backend = PlainNumpy()


@pytest.fixture(autouse=True)
def registered():
    backends.register(backend)
    yield
    backends.unregister("numpy")


# The same tests as of every backend


def test_it_gives_the_bits_of_the_arithmetic_contract():
    assert contract.digest_on("numpy", contract.CONTRACTS["float32"]) == contract.CONTRACTS["float32"].bits


@pytest.mark.parametrize("name", FORMS)
def test_it_takes_the_steps_of_the_cpu(name):
    options = dict(FORMS[name])
    amsgrad, step = options.pop("amsgrad", False), options.pop("step", 3)
    results = []
    for backend_name in ("numpy", "numba-cpu"):
        param, grad, m, v, *max_v = (a for a in state(1000, "float32", amsgrad) if a is not None)
        optional = {"max_v": max_v[0]} if amsgrad else {}
        gpuadam.adam_step(param, grad, m, v, step, backend=backend_name, **optional, **options)
        results.append([a.tobytes() for a in (param, grad, m, v, *max_v)])
    assert results[0] == results[1]


def test_an_optimizer_uses_it_when_it_is_asked_for(monkeypatch):
    launch, launched, results = NumpyBatch.launch, [], []
    monkeypatch.setattr(NumpyBatch, "launch", lambda *arguments: launched.append("numpy") or launch(*arguments))
    for name in ("numpy", "numba-cpu"):
        params = {"w": np.linspace(-1, 1, 5000, dtype="f4").reshape(50, 100), "strided": np.ones((9, 10), "f4")[:, ::2]}
        opt = gpuadam.AdamW(params, lr=0.1, amsgrad=True)
        with gpuadam.use_backend(name):
            for k in range(3):
                opt.step({key: p - np.float32(k) for key, p in params.items()})
        copy.deepcopy(opt)
        results.append([np.array(p).tobytes() for p in params.values()])
    assert launched == 3 * ["numpy"] and results[0] == results[1]


@pytest.mark.parametrize("shapes", [[(3,)], [(4096,), (5000, 2), ()], [(0,)], [(300, 700)]], ids=str)
def test_its_norm_has_the_bits_of_the_cpus(shapes):
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape).astype("f4") if shape else np.array(2.5, "f4") for shape in shapes]
    found, expected = (gpuadam.global_norm(grads, backend=name) for name in ("numpy", "numba-cpu"))
    assert found.tobytes() == expected.tobytes()


def test_it_is_shown_and_never_taken_unasked():
    assert list(gpuadam.backend_status()) == ["cupy", "numba-cuda", "numba-cpu", "numpy"]
    assert gpuadam.backend_status()["numpy"] == (True, f"NumPy {np.__version__}", "")
    assert backends.home("param", np.ones(3, "f4")) == "numba-cpu"


def test_formats_that_it_does_not_take_are_refused_before_a_write():
    arrays = [np.ones(3, "f8") for _ in range(4)]
    with pytest.raises(TypeError, match="backend 'numpy' updates float32 arrays"):
        gpuadam.adam_step(*arrays, 1, backend="numpy")
    assert all((a == 1).all() for a in arrays)


def test_norms_that_it_does_not_take_are_refused_before_a_write():
    params = {"w": np.ones(3, "f4")}
    opt = gpuadam.Adam(params, lr=0.1, backend="numpy")
    with pytest.raises(NotImplementedError, match="the backend numpy takes no norms of a step: leave norms out"):
        opt.step({"w": np.ones(3, "f4")}, norms=True)
    assert opt.state_dict()["state"]["w"]["step"] == 0 and (params["w"] == 1).all()
    opt.step({"w": np.ones(3, "f4")})
    assert opt.state_dict()["state"]["w"]["step"] == 1


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="there is a backend 'numpy' already"):
        backends.register(backend)


@pytest.mark.parametrize("name", ["numpy", "numba-cpu"])
def test_copies_of_a_backend_are_the_backend(name):
    loaded = backends.load(name)
    assert copy.deepcopy(loaded) is copy.copy(loaded) is loaded
    assert pickle.loads(pickle.dumps(loaded)) is loaded
