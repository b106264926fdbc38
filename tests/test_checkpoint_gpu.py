"""Checkpoints of state on a GPU, over stand-ins for its driver: the same files, by pieces, after waiting for the device."""

import numpy as np
import pytest

import gpuadam
from gpuadam import array_bytes

gpu_drivers = pytest.importorskip("gpu_drivers", exc_type=ImportError)

OPTIONS = {"state_dtype": "bfloat16", "ema_decay": 0.5, "capturable": True}
CHUNK = 24  # bytes


@pytest.fixture(params=gpu_drivers.DRIVERS)
def driver(request, monkeypatch):
    monkeypatch.setattr(array_bytes, "CHUNK", CHUNK)
    return request.param(monkeypatch)


def params():
    return {"w": np.arange(35, dtype="f4").reshape(5, 7), "s": np.float32([3]).reshape(()), "e": np.zeros((0, 2), "f4")}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of an optimizer on the CPU, and its bytes."""
    opt = gpuadam.Adam(params(), lr=0.5, **OPTIONS)
    for k, state in enumerate(opt.state.values()):
        state["m"][...], state["v"][...], state["ema"][...] = k + 1, k + 2, params()["w"].sum()
    opt.state["w"]["m"].flat[:] = np.arange(35)
    opt.state["w"]["step"][0] = 7
    opt.save(tmp_path / "cpu", with_params=True)
    return tmp_path / "cpu"


def test_state_goes_to_a_gpu_and_back(driver, saved, tmp_path):
    there = {name: driver.array(np.zeros_like(p)) for name, p in params().items()}
    opt = gpuadam.load(saved, there, backend=driver.backend, with_params=True)
    assert driver.numpy(there["w"]).tobytes() == params()["w"].tobytes()
    assert driver.numpy(opt.state["w"]["m"]).ravel().tolist() == list(range(35))
    assert driver.numpy(opt.state["w"]["step"]).tolist() == [7]
    opt.save(tmp_path / "gpu", with_params=True)
    assert (tmp_path / "gpu").read_bytes() == saved.read_bytes()


def test_it_goes_by_pieces_and_after_waiting(driver, saved, tmp_path, monkeypatch):
    events = []
    receive, send, wait = driver.receive, driver.send, driver.synchronize
    kernels = driver.kernels
    monkeypatch.setattr(kernels, "receive", lambda *given: events.append(given[2]) or receive(*given))
    monkeypatch.setattr(kernels, "send", lambda *given: events.append(given[2]) or send(*given))
    monkeypatch.setattr(kernels, "synchronize", lambda: events.append("wait") or wait())
    there = {name: driver.array(p) for name, p in params().items()}
    opt = gpuadam.load(saved, there, backend=driver.backend)
    assert events[0] == "wait" and events[-1] == "wait"
    events.clear()
    opt.save(tmp_path / "gpu")
    sizes = [event for event in events if event != "wait"]
    assert max(sizes) == CHUNK and sum(sizes) == 36 * (4 + 2 + 2)
    assert events[0] == "wait" and all(events[k + 1] == "wait" for k, event in enumerate(events) if event != "wait")


@pytest.mark.parametrize("order", ["F order", "backwards"])
def test_another_order_of_memory_comes_back(driver, order, tmp_path):
    memory = np.zeros((7, 5) if order == "F order" else (5, 7), "f4")
    there = driver.over(memory).T if order == "F order" else driver.over(memory)[::-1]
    on_host = memory.T if order == "F order" else memory[::-1]
    on_host[...] = params()["w"]
    assert not there.flags.c_contiguous
    gpuadam.Adam({"w": there}, backend=driver.backend).save(tmp_path / "a", with_params=True)
    plain = np.zeros((5, 7), "f4")
    gpuadam.load(tmp_path / "a", {"w": plain}, with_params=True)
    assert (plain == params()["w"]).all()
    memory[...] = 0
    gpuadam.load(tmp_path / "a", {"w": there}, driver.backend, with_params=True)
    assert (on_host == params()["w"]).all()


def test_neighbours_of_a_strided_parameter_are_never_written(driver, tmp_path):
    wide = np.arange(20, dtype="f4").reshape(5, 4)
    there = driver.over(wide)[:, ::2]
    gpuadam.Adam({"w": there}, backend=driver.backend).save(tmp_path / "a", with_params=True)
    plain = np.zeros((5, 2), "f4")
    gpuadam.load(tmp_path / "a", {"w": plain}, with_params=True)
    assert (plain == wide[:, ::2]).all()
    gpuadam.load(tmp_path / "a", {"w": there}, driver.backend)
    with pytest.raises(gpuadam.CheckpointError, match=r"params\['w'\] has gaps between its elements"):
        gpuadam.load(tmp_path / "a", {"w": there}, driver.backend, with_params=True)
