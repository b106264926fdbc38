"""Arrays of other libraries: their memory is updated in place, and what must not be written is refused."""

import contextlib
import copy
import ctypes
import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
from gpu_work import Lent

import gpuadam
from gpuadam import update
from gpuadam.kernels import dlpack, gpu_backend
from gpuadam.kernels import view as arrays


class Producer:
    """An array that has DLPack and nothing else."""

    def __init__(self, array, old=False):
        self.array, self.old = array, old

    def __dlpack__(self, **options):
        if self.old and options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def four(n=6, dtype="f4"):
    return [np.linspace(0.1, 1, n).astype(dtype) for _ in range(4)]


# DLPack


@pytest.mark.parametrize(
    "a",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6, dtype="f4")[::2],
        np.asfortranarray(np.ones((2, 3), "f2")),
        np.zeros((0, 3), "f4"),
        np.full((), 3, "f8"),
    ],
    ids=["C", "every other", "F", "empty", "scalar"],
)
def test_a_dlpack_producer_is_seen_where_and_as_it_is(a):
    view = arrays.on_cpu("a", Producer(a))
    assert (view.shape, view.dtype, view.writeable, view.device) == (a.shape, a.dtype, True, None)
    assert not a.size or (view.pointer, view.strides) == (a.ctypes.data, a.strides)
    assert (view.array == a).all()


def test_a_dlpack_producer_is_updated_in_place():
    given, expected = four(), four()
    gpuadam.adam_step(*map(Producer, given), 1)
    gpuadam.adam_step(*expected, 1)
    assert all((a == b).all() for a, b in zip(given, expected, strict=True))


def test_the_memory_of_a_dlpack_producer_lives_as_long_as_its_view():
    class Array(np.ndarray):  # to which there can be weak references
        pass

    a = np.arange(1000.0).view(Array)
    alive, view = weakref.ref(a), arrays.on_cpu("a", Producer(a))
    del a
    gc.collect()
    assert alive() is not None and view.array[-1] == 999.0
    del view
    gc.collect()
    assert alive() is None


def test_an_array_of_before_dlpack_1_is_read_only():
    given = four()
    gpuadam.adam_step(given[0], Producer(given[1], old=True), *given[2:], 1)
    with pytest.raises(ValueError, match="param is read-only"):
        gpuadam.adam_step(Producer(given[0], old=True), *given[1:], 1)


# fields of DLManagedTensorVersioned, whose DLTensor begins at byte 32
FIELDS = {
    "major": (ctypes.c_uint32, 0),
    "flags": (ctypes.c_uint64, 24),
    "device": (ctypes.c_int32, 32 + 8),
    "code": (ctypes.c_uint8, 32 + 20),
    "bits": (ctypes.c_uint8, 32 + 21),
    "lanes": (ctypes.c_uint16, 32 + 22),
    "byte_offset": (ctypes.c_uint64, 32 + 40),
}


def described(a, **changes):
    """Return a producer whose capsule says something else than its array."""

    class Lying(Producer):
        def __dlpack__(self, **options):
            self.stream = options.pop("stream", None)
            capsule = super().__dlpack__(**options)
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
            for name, value in changes.items():
                kind, offset = FIELDS[name]
                kind.from_address(pointer(capsule, b"dltensor_versioned") + offset).value = value
            return capsule

        def __dlpack_device__(self):
            return changes.get("device", 1), 0

    return Lying(a)


BAD_CAPSULES = {
    "another major version": ({"major": 2}, "version 2; version 1 is needed"),
    "several lanes": ({"lanes": 4}, "DLPack type 2 with 32 bits are not known"),
    "elements of 4 bits": ({"bits": 4}, "DLPack type 2 with 4 bits are not known"),
    "an opaque type": ({"code": 3}, "DLPack type 3 with 32 bits are not known"),
}


@pytest.mark.parametrize("what", BAD_CAPSULES)
def test_a_capsule_that_is_not_known_is_refused(what):
    changes, match = BAD_CAPSULES[what]
    given = four()
    with pytest.raises(TypeError, match=f"grad, a .*cannot be shared by DLPack.*{match}"):
        gpuadam.adam_step(given[0], described(given[1], **changes), *given[2:], 1)


def test_bfloat16_of_any_library_is_known_by_its_capsule():
    given, expected = four(), four()
    bits = np.full(6, 0x3F80, "i2")  # ones
    gpuadam.adam_step(given[0], described(bits, code=dlpack.BFLOAT), *given[2:], 1)
    gpuadam.adam_step(expected[0], np.ones(6, "f4"), *expected[2:], 1)
    assert (given[0] == expected[0]).all()


def test_elements_begin_at_the_byte_offset_of_a_capsule():
    a = np.arange(8, dtype="f4")
    view = arrays.on_cpu("a", described(a, byte_offset=8))
    assert view.pointer == a.ctypes.data + 8


# DLPack on a GPU, without one: the capsule's memory is the host's, and no kernel runs

BACKEND = SimpleNamespace(on=lambda device, stream: contextlib.nullcontext(), current_stream=lambda: 77)


def on_gpu(array):
    return arrays.on_cuda("grad", arrays.on_device("grad", array, BACKEND), lambda pointer: 3)


def test_a_cuda_producer_waits_for_the_stream_that_the_step_goes_on_or_after():
    producer = described(np.ones(4, "f4"), device=dlpack.CUDA)
    view = on_gpu(producer)
    assert producer.stream == 77
    assert (view.device, view.writeable, view.stream, view.pointer) == (3, True, None, producer.array.ctypes.data)


def test_the_read_only_flag_of_a_cuda_producer_is_heeded():
    producer = described(np.ones(4, "f4"), device=dlpack.CUDA, flags=dlpack.READ_ONLY)
    assert not on_gpu(producer).writeable


def test_bfloat16_of_a_cuda_producer_is_known():
    producer = described(np.ones(4, "i2"), device=dlpack.CUDA, code=dlpack.BFLOAT)
    assert on_gpu(producer).format == "bfloat16"


def test_what_was_borrowed_is_kept_until_the_device_is_done_with_it(monkeypatch):
    monkeypatch.setattr(gpu_backend.gpu_driver, "allowed_while_capturing", contextlib.nullcontext)  # there is no driver
    events, finished = itertools.count(), set()
    without_memory = dict.fromkeys(gpu_backend.GpuBackend.__abstractmethods__)
    backend = type("WithoutMemory", (gpu_backend.GpuBackend,), without_memory)()
    backend.record, backend.done = lambda stream: next(events), finished.__contains__
    alive = []
    for _ in range(2):
        view = on_gpu(described(np.ones(4, "f4"), device=dlpack.CUDA))
        alive.append(weakref.ref(view.array))
        backend.keep_until_done(77, backend.borrowed([view]))
        del view
    gc.collect()
    assert [ref() is None for ref in alive] == [False, False]
    finished.add(0)
    backend.keep_until_done(77, [])
    assert [ref() is None for ref in alive] == [True, False]
    finished.add(1)
    backend.keep_until_done(77, [])
    assert [ref() is None for ref in alive] == [True, True]


# JAX


@pytest.fixture(scope="module")
def jnp():
    return libraries.imported("jax.numpy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_jax_array_is_a_gradient(jnp, dtype):
    given, expected = four(), four()
    gpuadam.adam_step(given[0], jnp.full(6, 0.5, dtype), *given[2:], 1)
    gpuadam.adam_step(expected[0], np.full(6, 0.5, "f4"), *expected[2:], 1)
    assert (given[0] == expected[0]).all()


@pytest.mark.parametrize("k, name", [(0, "param"), (2, "m"), (3, "v")])
def test_a_jax_array_is_never_written(jnp, k, name):
    given = four()
    given[k] = jnp.asarray(given[k])
    with pytest.raises(ValueError, match=rf"{name}, which an update writes to, is a jax.Array.*np.array\(x\)"):
        gpuadam.adam_step(*given, 1)
    if name == "param":
        with pytest.raises(ValueError, match=r"is a jax\.Array"):
            gpuadam.Adam([given[0]])


# PyTorch


def model(torch, dtype=None):
    rng = np.random.default_rng(0)
    shapes = (3, 5), (7,), (0,), ()
    return [torch.nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=dtype or torch.float32)) for shape in shapes]


def with_gradients(params, torch, seed=1):
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + k)).to(p.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_parameters_are_updated_where_they_are_with_the_bits_of_numpy_arrays(torch, dtype):
    import ml_dtypes

    params = model(torch, getattr(torch, dtype))
    own = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    as_numpy = lambda t: np.array(t.detach().double().numpy().astype(own))  # noqa: E731 - exact: it was of this dtype
    others = [as_numpy(p) for p in params]
    opt, reference, at = gpuadam.Adam(params, lr=0.1), gpuadam.Adam(others, lr=0.1), [p.data_ptr() for p in params]
    for step in range(3):
        with_gradients(params, torch, step)
        opt.step()
        reference.step([as_numpy(p.grad) for p in params])
    for p, other in zip(params, others, strict=True):
        assert (as_numpy(p) == other).all()
    assert [p.data_ptr() for p in params] == at


def offload(params, folder):
    return gpuadam.OffloadAdam(params, lr=0.1, state=folder, master="float32", zero_grad=True)


def sharded(params, folder):
    return gpuadam.ShardedAdam(params, gpuadam.transports.Local(), lr=0.1, zero_grad=True)


@pytest.mark.parametrize("make", [offload, sharded])
def test_autograd_is_told_by_every_optimizer(torch, make, tmp_path):
    updated, skipped = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(3))
    grad = torch.ones(3)
    opt = make({"updated": updated, "skipped": skipped}, tmp_path)
    versions = updated._version, skipped._version, grad._version
    loss = (updated**2).sum()
    opt.step({"updated": grad, "skipped": None})
    assert (updated._version > versions[0], skipped._version, grad._version > versions[2]) == (True, versions[1], True)
    assert (updated != 1).all() and (grad == 0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_steps_of_torch_tensors_in_every_structure(torch):
    params = model(torch)
    with_gradients(params, torch)
    before = [p.detach().clone() for p in params]
    opt = gpuadam.Adam([{"params": {"a": params[0]}}, {"params": params[1], "lr": 0.0}, {"params": params[2:]}])
    opt.step()
    assert (params[0] != before[0]).all() and (params[1] == before[1]).all() and params[3] != before[3]


def test_the_norms_of_a_step_of_torch_tensors_are_those_of_numpy_arrays(torch):
    grad, host = np.linspace(-1, 1, 200, dtype="f4"), np.linspace(0, 1, 200, dtype="f4")
    tensor = torch.tensor(host, requires_grad=True)
    norms = gpuadam.AdamW(tensor, lr=0.1).step(torch.tensor(grad), norms=True)
    assert norms == gpuadam.AdamW(host, lr=0.1).step(grad, norms=True)


def test_step_without_gradients_skips_parameters_that_have_none(torch):
    params = model(torch)
    with_gradients(params, torch)
    params[0].grad, before = None, params[0].detach().clone()
    opt = gpuadam.Adam(params)
    opt.step()
    assert (params[0] == before).all() and [state["step"] for state in opt.state.values()] == [0, 1, 1, 1]


def test_step_without_gradients_is_refused_where_arrays_have_none(torch):
    opt = gpuadam.Adam({"a": torch.nn.Parameter(torch.ones(3)), "b": np.ones(3)})
    with pytest.raises(TypeError, match=r"params\['b'\] is a numpy.ndarray, which has no .grad: give the gradients"):
        opt.step()


def test_autograd_is_told_of_what_was_written_and_of_nothing_else(torch):
    param, grad, m, v = (torch.ones(3) for _ in range(4))
    gpuadam.adam_step(param, grad, m, v, 1)
    assert [t._version for t in (param, grad, m, v)] == [1, 0, 1, 1]
    gpuadam.adam_step(param, grad, m, v, 2, zero_grad=True)
    assert [t._version for t in (param, grad, m, v)] == [2, 1, 2, 2]
    with pytest.raises(ValueError, match="shape"):
        gpuadam.adam_step(param, grad[:2], m, v, 3)
    assert [t._version for t in (param, grad, m, v)] == [2, 1, 2, 2]


def test_a_backward_pass_that_needs_what_a_parameter_was_raises(torch):
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    gpuadam.Adam([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_torch_are_zeroed_in_the_same_pass(torch):
    params = model(torch)
    with_gradients(params, torch)
    opt = gpuadam.Adam(params, zero_grad=True)
    opt.step()
    assert not any(p.grad.any() for p in params) and all(p.grad._version for p in params)
    opt.step(found_inf=True)
    assert opt.steps == 1 and params[0].grad._version == 2


def test_whole_steps_of_torch_tensors_have_the_bits_of_numpy_arrays(torch):
    params = model(torch)
    others = [p.detach().numpy().copy() for p in params]
    options = {"lr": 0.1, "state_dtype": "bfloat16", "ema_decay": 0.9}
    opt, reference = gpuadam.AdamW(params, **options), gpuadam.AdamW(others, **options)
    for step in range(3):
        with_gradients(params, torch, step)
        opt.step(max_norm=0.5, check_finite=True)
        reference.step([p.grad.numpy() for p in params], max_norm=0.5, check_finite=True)
    for p, other in zip(params, others, strict=True):
        assert (p.detach().numpy() == other).all()


CHANGED = {
    "other memory": lambda torch, p: setattr(p, "data", p.data.clone()),
    "another dtype": lambda torch, p: setattr(p, "data", p.data.to(torch.bfloat16)),
    "another order": lambda torch, p: setattr(p, "data", p.data.t().contiguous().t()),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_parameter_that_is_another_array_at_the_next_step_is_updated_as_that(torch, what):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5))
    p.grad = torch.ones(3, 5)
    opt = gpuadam.Adam([p], lr=0.125)
    opt.step()
    old = p.data
    p.grad = None
    CHANGED[what](torch, p)
    kept, before = old.clone(), p.detach().clone()
    p.grad = torch.ones(3, 5, dtype=p.dtype)
    opt.step()
    assert (old == kept).all()
    assert torch.allclose(before - p, torch.full_like(p, 0.125), atol=0.01)


def test_many_tensors_are_not_checked_one_by_one(torch, monkeypatch):
    params = model(torch, torch.bfloat16)
    opt = gpuadam.Adam(params, state_dtype="8bit")
    counts, check = [], update._in_views
    monkeypatch.setattr(update, "_in_views", lambda *a: counts.append(1) or check(*a))
    for step in range(4):
        with_gradients(params, torch, step)
        opt.step()
    assert not counts  # all are read in NumPy's structs


def test_no_gradient_of_torch_is_kept_alive(torch):
    params = model(torch)
    opt = gpuadam.Adam(params)
    for step in range(2):
        with_gradients(params, torch, step)
        opt.step()
    held = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert all(ref() is None for ref in held)


def test_an_optimizer_of_torch_tensors_is_copied_and_pickled(torch):
    params = model(torch)
    with_gradients(params, torch)
    opt = gpuadam.Adam(params)
    opt.step()
    others = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    opt.step([p.grad for p in params])
    for other in others:
        other.step([p.grad for p in params])
        for p, q in zip(params, other.groups[0]["params"], strict=True):
            assert p is not q and torch.equal(p, q)


def wrapper(torch):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3,))

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), options=None):
            return NotImplemented

    return Wrapper()


REFUSED = {
    "sparse": (lambda torch: torch.ones(3).to_sparse(), TypeError, r"layout torch.sparse_coo.*to_dense\(\)"),
    "mkldnn": (lambda torch: torch.ones(3).to_mkldnn(), TypeError, r"layout torch._mkldnn.*to_dense\(\)"),
    "complex": (lambda torch: torch.ones(3, dtype=torch.complex64), TypeError, "dtype complex64"),
    "conjugated": (lambda torch: torch.ones(3, dtype=torch.complex64).conj(), TypeError, "conjugated view.*resolve_conj"),
    "negated": (lambda torch: torch._neg_view(torch.ones(3)), TypeError, "negated.*resolve_neg"),
    "meta": (lambda torch: torch.ones(3, device="meta"), TypeError, "does not share its memory.*meta"),
    "integers": (lambda torch: torch.ones(3, dtype=torch.int32), TypeError, "dtype int32"),
    "float8": (lambda torch: torch.ones(3).to(torch.float8_e4m3fn), TypeError, "does not share its memory.*Float8"),
    "a wrapper": (wrapper, TypeError, "Wrapper, which has no memory of its own"),
    "expanded": (lambda torch: torch.ones(1).expand(3), ValueError, "share memory"),
}


@pytest.mark.parametrize(
    "what, name", [(w, n) for w in REFUSED for n in ("param", "grad", "m") if (w, n) != ("expanded", "grad")]
)
def test_a_tensor_whose_memory_is_not_what_it_says_is_refused(torch, what, name):
    make, error, match = REFUSED[what]
    given = {k: torch.ones(3) for k in ("param", "grad", "m", "v")}
    given[name] = make(torch)
    with pytest.raises(error, match=f"{name}.*{match}"):
        gpuadam.adam_step(*given.values(), 1)
    assert all((t == 1).all() and t._version == 0 for k, t in given.items() if k != name)


def test_what_autograd_computed_is_read_and_not_written(torch):
    param, m, v = (torch.zeros(3) for _ in range(3))
    computed = torch.ones(3, requires_grad=True) * 2
    gpuadam.adam_step(param, computed, m, v, 1)
    assert (param != 0).all()
    with pytest.raises(ValueError, match="param, which an update writes to, is not a leaf"):
        gpuadam.adam_step(computed, torch.ones(3), m, v, 2)


def test_torch_tensors_on_the_cpu_are_not_copied_to_a_cuda_backend(torch):
    with pytest.raises(TypeError, match=r"param is a torch\.Tensor in CPU memory"):
        gpuadam.adam_step(*(torch.ones(3) for _ in range(4)), 1, backend="cupy")


def test_torch_and_numpy_arrays_share_an_update(torch):
    given, expected = four(), four()
    mixed = [torch.from_numpy(given[0]), given[1], torch.from_numpy(given[2]), given[3]]
    gpuadam.adam_step(*mixed, 1)
    gpuadam.adam_step(*expected, 1)
    assert all((a == b).all() for a, b in zip(given, expected, strict=True))


# PyTorch on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_cuda_parameters_have_the_bits_of_cpu_parameters(cuda_torch, backend, dtype):
    torch = cuda_torch
    here = model(torch, getattr(torch, dtype))
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    opt, reference = gpuadam.Adam(there, lr=0.1, backend=backend), gpuadam.Adam(here, lr=0.1)
    for step in range(4):
        with_gradients(here, torch, step)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.cuda()
        opt.step()
        reference.step()
    for p, q in zip(here, there, strict=True):
        assert torch.equal(p, q.cpu()) and q._version == 4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_the_stream_of_torch_may_be_another_at_each_step(cuda_torch, backend):
    torch = cuda_torch
    n = 1 << 22
    params = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for _ in range(3)]
    opt = gpuadam.Adam(params, lr=0.5, betas=(0.0, 0.0), eps=0.0, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.current_stream()
    for step in range(1, 4):
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda.current_stream().wait_stream(before)
            torch.cuda._sleep(50_000_000)
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
            results = [p.detach() * 1 for p in params]
            before = torch.cuda.current_stream()
        before.synchronize()
        assert all(bool((r == -0.5 * step).all()) for r in results)


@pytest.mark.gpu
def test_a_cuda_producer_that_is_gone_after_the_call_was_read_in_time(cuda_torch):
    import cupy

    for backend in ("cupy", "numba-cuda"):
        param, m, v = (cupy.zeros(1 << 22, "f4") for _ in range(3))
        cuda_torch.cuda._sleep(100_000_000)
        gpuadam.adam_step(param, Lent(cupy.ones(1 << 22, "f4")), m, v, 1, lr=0.5, backend=backend)
        other = cupy.full(1 << 22, -1, "f4")  # would get the memory that was given back
        cupy.cuda.Device().synchronize()
        assert bool(cupy.allclose(param, -0.5)) and bool((other == -1).all())
