"""OffloadAdam with a GPU: both ways of updating, over stand-ins for the driver, and on a GPU."""

import numpy as np
import pytest

import gpuadam
from gpuadam import testing
from gpuadam.offload import optimizer, stages

SHAPES = {"w": (61, 77), "b": (5,), "empty": (0, 3), "u": (1234,)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(optimizer, "SMALLEST_CHUNK", 1 << 14)
    monkeypatch.setattr(optimizer, "TRIAL", 1 << 10)


@pytest.fixture(params=["cupy", "numba-cuda"])
def driver(request, monkeypatch):
    pytest.importorskip("gpu_code", exc_type=ImportError)
    from gpu_drivers import DRIVERS

    return {one.backend: one for one in DRIVERS}[request.param](monkeypatch)


def arrays(seed=0, dtype="f4"):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def there(driver, given):
    return {name: driver.array(array) for name, array in given.items()}


def assert_same_bits(opt, adam, numpy, params, expected):
    for name, array in expected.items():
        assert numpy(params[name]).tobytes() == array.tobytes(), name
        for key, own in adam.state[name].items():
            found = opt.state[name][key]
            assert found == own if key == "step" else found.tobytes() == own.tobytes(), (name, key)


def both_take_steps(driver, opt, adam, n=3, **options):
    for step in range(n):
        grads = arrays(10 + step)
        adam.step(grads, **options)
        opt.step(there(driver, grads), **options)


@pytest.mark.parametrize("update", ["device", "host"])
@pytest.mark.parametrize("where", ["memory", "files"])
def test_parameters_on_a_gpu_have_the_bits_of_adam(driver, update, where, tmp_path):
    expected = arrays()
    params = there(driver, expected)
    adam = gpuadam.Adam(expected, lr=0.1)
    state = tmp_path if where == "files" else "memory"
    with gpuadam.OffloadAdam(params, lr=0.1, update=update, state=state, budget=50_000, backend=driver.backend) as opt:
        both_take_steps(driver, opt, adam, grad_scale=0.5)
        assert_same_bits(opt, adam, driver.numpy, params, expected)
        assert f"updated on the {update}: update='{update}' was asked for" in opt.describe()
    down, up = (sum(n for _, n, stream in log if stream > 1000) for log in (driver.received, driver.sent))
    n = sum(array.size for array in expected.values())
    assert down == 3 * 8 * n  # the new moments; or the parameters and gradients
    tables = sum(n_bytes for _, n_bytes, stream in driver.sent if stream > 1000) if update == "device" else 0
    assert up - tables == (0 if update == "device" else 3 * 4 * n)


def test_copies_wait_for_the_streams_that_gradients_are_made_on(driver):
    params, grads = (there(driver, arrays(seed)) for seed in (0, 1))
    driver.current = 77
    opt = gpuadam.OffloadAdam(params, update="device", budget=50_000, backend=driver.backend)
    opt.step(grads)
    own = {stream for *_, stream in driver.received}
    # how many of the three streams get a chunk is a race
    assert 1 <= len(own) <= 3 and {(77, stream) for stream in own} <= set(driver.waits)
    assert {stream for *_, stream in driver.launches} == own


def test_slots_wait_for_the_stream_that_their_memory_was_given_on(driver):
    """CuPy's pool gives out what was freed, though work on that stream still uses it."""
    driver.current = 77
    opt = gpuadam.OffloadAdam(arrays(), update="device", budget=50_000)
    opt.step(arrays(1))
    own = {stream for *_, stream in driver.received}
    assert own and {(77, stream) for stream in own} <= set(driver.waits)


@pytest.mark.parametrize("update", ["device", "host"])
def test_a_step_that_fails_ends_when_nothing_uses_its_memory_any_more(driver, update, monkeypatch):
    params, grads = (there(driver, arrays(seed)) for seed in (0, 1))
    opt = gpuadam.OffloadAdam(params, update=update, budget=50_000, backend=driver.backend)
    opt.step(grads)
    finished = []
    monkeypatch.setattr(driver.kernels, "finish", finished.append)

    def failing(*arguments, **options):
        raise MemoryError("of the launch")

    monkeypatch.setattr(stages, "_launch", failing)
    with pytest.raises(MemoryError, match="of the launch"):
        opt.step(grads)
    own = [handle for _, handle in opt._stages.streams]
    assert finished[-len(own) :] == own  # an event of the stand-in is its stream


def test_parameters_of_the_host_go_through_the_gpu(driver, tmp_path):
    expected, params = arrays(), arrays()
    params["w"] = np.memmap(tmp_path / "w", np.float32, "w+", shape=SHAPES["w"])
    params["w"][...] = expected["w"]
    adam = gpuadam.Adam(expected, lr=0.1)
    with gpuadam.OffloadAdam(params, lr=0.1, update="device", state=tmp_path / "state", budget=50_000) as opt:
        for step in range(2):
            adam.step(arrays(step))
            opt.step(arrays(step))
        assert_same_bits(opt, adam, np.asarray, params, expected)
    assert driver.launches


def test_the_faster_update_is_measured_and_named(driver):
    opt = gpuadam.OffloadAdam(there(driver, arrays()), backend=driver.backend)
    text = opt.describe()
    assert "measured with 1,024 elements" in text and "ms on the host" in text and "ms on the device" in text
    times = dict(part.split(" ms on the ")[::-1] for part in text.splitlines()[1].split(": ")[-1].split(", "))
    assert f"updated on the {min(times, key=lambda where: float(times[where]))}" in text


@pytest.mark.parametrize("driver", ["cupy"], indirect=True)
def test_eight_bits_are_cut_at_their_groups(driver):
    expected = arrays()
    params = there(driver, expected)
    adam = gpuadam.Adam(expected, lr=0.1, state_dtype="8bit", seed=5)
    opt = gpuadam.OffloadAdam(params, lr=0.1, state_dtype="8bit", seed=5, update="device", budget=15_000)
    both_take_steps(driver, opt, adam, 2)
    assert_same_bits(opt, adam, driver.numpy, params, expected)
    assert opt._last[0] > 1


@pytest.mark.parametrize("driver", ["cupy"], indirect=True)
def test_a_master_starts_from_parameters_on_the_gpu(driver):
    given = arrays()
    narrow = {name: array.astype(np.float16) for name, array in given.items()}
    opt = gpuadam.OffloadAdam(there(driver, narrow), master="float32", update="host")
    for name, array in narrow.items():
        assert opt.state[name]["master"].tobytes() == array.astype("f4").tobytes()


@pytest.mark.parametrize("driver", ["cupy"], indirect=True)
def test_parameters_of_two_places_are_refused(driver):
    with pytest.raises(ValueError, match="on one device"):
        gpuadam.OffloadAdam([driver.array(np.zeros(3, "f4")), np.zeros(3, "f4")])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
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
