"""OffloadAdam with a GPU: both ways of updating, the streams that their copies wait for, and steps that fail."""

import numpy as np
import pytest
from gpu_work import LAUNCHES, any_order, busy_stream, there

import gpuadam
from gpuadam import backends, testing
from gpuadam.offload import chunks, optimizer

pytestmark = pytest.mark.gpu

SHAPES = {"w": (61, 77), "b": (5,), "empty": (0, 3), "u": (1234,)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1 << 14)
    monkeypatch.setattr(optimizer, "TRIAL", 1 << 10)


def arrays(seed=0, dtype="f4"):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def assert_same_bits(opt, adam, numpy, params, expected):
    for name, array in expected.items():
        assert numpy(params[name]).tobytes() == array.tobytes(), name
        for key, own in adam.state[name].items():
            found = opt.state[name][key]
            assert found == own if key == "step" else found.tobytes() == own.tobytes(), (name, key)


@pytest.mark.parametrize("update", ["device", "host", "auto"])
@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}], ids=str)
def test_a_gpu_has_the_bits_of_adam(backend, update, where, options, tmp_path):
    library = testing.array_backend(backend)
    expected = arrays()
    params = {name: library.array(array) for name, array in expected.items()}
    adam = gpuadam.Adam(expected, lr=0.1, **options)
    state = tmp_path if where == "files" else "memory"
    with gpuadam.OffloadAdam(params, lr=0.1, update=update, state=state, budget=50_000, **options) as opt:
        for step in range(4):
            grads = arrays(10 + step)
            adam.step(grads, max_norm=10.0)
            opt.step({name: library.array(array) for name, array in grads.items()}, max_norm=10.0)
        assert_same_bits(opt, adam, library.numpy, params, expected)


@pytest.mark.parametrize("update", ["device", "host"])
@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_step_copies_the_moments_or_else_the_parameters_and_gradients(cp, backend, driver, update, where, tmp_path):
    params, grads = there(cp, arrays()), there(cp, arrays(1))
    state = tmp_path if where == "files" else "memory"
    with gpuadam.OffloadAdam(params, lr=0.1, update=update, state=state, budget=50_000, backend=backend) as opt:
        opt.step(grads)
        driver.listen()
        opt.step(grads)
        assert f"updated on the {update}: update='{update}' was asked for" in opt.describe()
    n = sum(array.size for array in params.values())
    down, up = (sum(n_bytes for *_, to, n_bytes in driver.copies if to == place) for place in ("host", "device"))
    assert down == 2 * 4 * n
    if update == "device":
        assert 0 <= up - 2 * 4 * n < 1000  # the table of a chunk with several arrays
    else:
        assert up == 4 * n


@pytest.mark.parametrize("update", ["device", "host"])
def test_workers_sleep_while_they_wait_for_the_gpu(cp, backend, driver, update, tmp_path, monkeypatch):
    """By default a wait for an event asks again and again, on a processor that others need to copy files."""
    kernels, flags = backends.load(backend), []
    finish = kernels.finish

    def noted(event):
        flags.append(driver.events[event.handle].flags)
        finish(event)

    monkeypatch.setattr(kernels, "finish", noted)
    params, grads = there(cp, arrays()), there(cp, arrays(1))
    with gpuadam.OffloadAdam(params, update=update, state=tmp_path, budget=50_000, backend=backend) as opt:
        driver.listen()
        opt.step(grads)
    BLOCKING_SYNC, DISABLE_TIMING = 1, 2
    assert len(flags) > 2 and {*flags} == {BLOCKING_SYNC | DISABLE_TIMING}
    assert driver.calls.count("cuEventSynchronize") == len(flags)


@pytest.mark.parametrize("stream", ["current", "given"])
@pytest.mark.parametrize("update", ["device", "host"])
def test_a_step_waits_for_the_stream_that_gradients_are_made_on(cp, backend, update, stream):
    expected = arrays()
    params, made = there(cp, expected), there(cp, arrays(1))
    grads = {name: cp.zeros_like(grad) for name, grad in made.items()}
    opt = gpuadam.OffloadAdam(params, lr=0.1, update=update, budget=50_000, backend=backend)
    adam = gpuadam.Adam(expected, lr=0.1)
    busy = busy_stream(cp)
    with busy:
        for name, grad in grads.items():
            grad[...] = made[name]
        if stream == "current":
            opt.step(grads)
    if stream == "given":
        opt.step(grads, stream=busy)
    adam.step(arrays(1))
    with cp.cuda.Stream(non_blocking=True):  # a step that has returned is done
        assert_same_bits(opt, adam, cp.asnumpy, params, expected)


def test_memory_that_cupys_pool_gives_out_is_used_when_it_is_free(cp, driver, monkeypatch):
    """A pool gives out what was freed, though work that was enqueued before on the same stream may still use it."""
    monkeypatch.setattr(driver.work, "seed", 1)  # then the memory of arrays that were freed is given out again
    budget = 49_152
    expected, params = arrays(), arrays()
    opt, adam = gpuadam.OffloadAdam(params, update="device", budget=budget), gpuadam.Adam(expected)
    stream = busy_stream(cp)
    with stream:
        for n_bytes in range(budget // 3 - 4096, budget // 3 + 4096, 512):
            for _ in range(4):
                cp.zeros(n_bytes, "u1")
        opt.step(arrays(1))
    adam.step(arrays(1))
    assert_same_bits(opt, adam, np.asarray, params, expected)


COPIES = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "runtime_cudaMemcpyAsync")


@pytest.mark.parametrize("update, of", [("device", "host"), ("device", "GPU"), ("host", "GPU")])
def test_a_step_that_fails_ends_when_nothing_uses_its_memory_any_more(cp, backend, driver, update, of, monkeypatch):
    """Whichever copy or launch fails: nothing arrives in parameters or state after the error."""
    any_order(monkeypatch)
    monkeypatch.setattr(chunks, "SLOTS_ON_GPU", 2)
    monkeypatch.setattr(backends, "available_backends", lambda: [backend, "numba-cpu"])
    given, grads = (arrays(seed) if of == "host" else there(cp, arrays(seed)) for seed in (0, 1))
    failures = 0
    for n in range(200):
        opt = gpuadam.OffloadAdam(given, update=update, budget=50_000, backend=backend if of == "GPU" else None)
        opt.step(grads)
        driver.fail(n, "UNKNOWN", names=(*COPIES, *LAUNCHES))
        try:
            opt.step(grads)
        except Exception as error:  # noqa: BLE001 - of CuPy, of Numba, or of gpuadam
            assert "UNKNOWN" in str(error).upper()
        if driver.fail_no_more():
            break
        failures += 1
        written = [own[key] for own in opt.state.values() for key in ("m", "v")]
        for array in (*written, *given.values()):
            array[...] = 7
        cp.cuda.Device().synchronize()
        assert all((array == 7).all() for array in (*written, *given.values()))
    assert failures > 10


def test_parameters_of_the_host_go_through_the_gpu(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "available_backends", lambda: [backend, "numba-cpu"])
    expected, params = arrays(), arrays()
    params["w"] = np.memmap(tmp_path / "w", np.float32, "w+", shape=SHAPES["w"])
    params["w"][...] = expected["w"]
    adam = gpuadam.Adam(expected, lr=0.1)
    with gpuadam.OffloadAdam(params, lr=0.1, update="device", state=tmp_path / "state", budget=50_000) as opt:
        for step in range(2):
            adam.step(arrays(step))
            opt.step(arrays(step))
        assert_same_bits(opt, adam, np.asarray, params, expected)
        assert "updated on the device" in opt.describe()


def test_the_faster_update_is_measured_and_named(cp, backend):
    opt = gpuadam.OffloadAdam(there(cp, arrays()), backend=backend)
    text = opt.describe()
    assert "measured with 1,024 elements" in text and "ms on the host" in text and "ms on the device" in text
    times = dict(part.split(" ms on the ")[::-1] for part in text.splitlines()[1].split(": ")[-1].split(", "))
    assert f"updated on the {min(times, key=lambda where: float(times[where]))}" in text


@pytest.mark.parametrize("options", [{"components": 3}, {"complex": "joint"}, {"bounds": (-1, 1)}], ids=str)
def test_the_faster_update_is_measured_whatever_shares_a_v(cp, backend, options):
    dtype = "c8" if "complex" in options else "f4"
    expected, grads = ({"w": np.full((50, 3), 0.5, dtype)} for _ in range(2))
    params = there(cp, expected)
    adam = gpuadam.Adam(expected, lr=0.1, **options)
    opt = gpuadam.OffloadAdam(params, lr=0.1, backend=backend, **options)
    assert "measured with 1,024 elements" in opt.describe()
    adam.step(grads)
    opt.step(there(cp, grads))
    assert_same_bits(opt, adam, cp.asnumpy, params, expected)


def test_eight_bits_are_cut_at_their_groups(cp, backend):
    expected = arrays()
    params = there(cp, expected)
    options = {"lr": 0.1, "state_dtype": "8bit", "seed": 5}
    adam = gpuadam.Adam(expected, **options)
    opt = gpuadam.OffloadAdam(params, **options, update="device", budget=15_000, backend=backend)
    for step in range(2):
        grads = arrays(10 + step)
        adam.step(grads, grad_scale=0.5)
        opt.step(there(cp, grads), grad_scale=0.5)
    assert_same_bits(opt, adam, cp.asnumpy, params, expected)
    assert "the last step in 3 chunks" in opt.describe()


def test_a_master_starts_from_parameters_on_the_gpu(cp, backend):
    narrow = {name: array.astype(np.float16) for name, array in arrays().items()}
    opt = gpuadam.OffloadAdam(there(cp, narrow), master="float32", update="host", backend=backend)
    for name, array in narrow.items():
        assert opt.state[name]["master"].tobytes() == array.astype("f4").tobytes()


def test_parameters_of_two_places_are_refused(cp):
    with pytest.raises(ValueError, match="on one device"):
        gpuadam.OffloadAdam([cp.zeros(3, "f4"), np.zeros(3, "f4")])
