"""Checkpoints of state on a GPU: the same files as of the CPU, by pieces, after the work of every stream."""

import numpy as np
import pytest
from gpu_work import any_order, busy_stream, there

import gpuadam
from gpuadam.kernels import array_bytes

pytestmark = pytest.mark.gpu

OPTIONS = {"state_dtype": "bfloat16", "ema_decay": 0.5, "capturable": True}
CHUNK = 24  # bytes


@pytest.fixture(autouse=True)
def by_small_pieces(monkeypatch):
    monkeypatch.setattr(array_bytes, "CHUNK", CHUNK)


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


def test_state_in_any_format_goes_to_a_gpu_and_back(cp, backend, saved, tmp_path):
    on_gpu = there(cp, {name: np.zeros_like(p) for name, p in params().items()})
    opt = gpuadam.load(saved, on_gpu, backend=backend, with_params=True)
    assert on_gpu["w"].get().tobytes() == params()["w"].tobytes()
    assert cp.asarray(opt.state["w"]["m"]).get().ravel().tolist() == list(range(35))
    assert cp.asarray(opt.state["w"]["step"]).get().tolist() == [7]
    opt.save(tmp_path / "gpu", with_params=True)
    assert (tmp_path / "gpu").read_bytes() == saved.read_bytes()


def test_state_is_copied_by_small_pieces(cp, backend, driver, saved, tmp_path):
    opt = gpuadam.load(saved, there(cp, params()), backend=backend, with_params=False)
    driver.listen()
    opt.save(tmp_path / "gpu")
    pieces = [n_bytes for source, _, n_bytes in driver.copies if source == "device"]
    state, count = 36 * (4 + 2 + 2), 8
    # the count before, in the state_dict, and after: a graph may have counted on
    assert max(pieces) == CHUNK and sum(pieces) == state + 3 * count


def test_what_a_stream_still_writes_is_saved_as_it_will_be(cp, backend, tmp_path):
    on_gpu = there(cp, {name: np.zeros_like(p) for name, p in params().items()})
    made = there(cp, params())
    opt = gpuadam.Adam(on_gpu, backend=backend)
    with busy_stream(cp):
        for name, param in on_gpu.items():
            param[...] = made[name]
    opt.save(tmp_path / "gpu", with_params=True)
    gpuadam.Adam(params()).save(tmp_path / "cpu", with_params=True)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "cpu").read_bytes()


def test_what_is_loaded_comes_after_what_a_stream_still_writes(cp, backend, saved, monkeypatch):
    any_order(monkeypatch)
    for _ in range(5):
        on_gpu = there(cp, params())
        with busy_stream(cp):
            for param in on_gpu.values():
                param[...] = -1
        gpuadam.load(saved, on_gpu, backend=backend, with_params=True)
        with cp.cuda.Stream(non_blocking=True):
            assert all(on_gpu[name].get().tobytes() == p.tobytes() for name, p in params().items())


@pytest.mark.parametrize("order", ["F order", "backwards"])
def test_another_order_of_memory_comes_back(cp, backend, order, tmp_path):
    memory = cp.zeros((7, 5) if order == "F order" else (5, 7), "f4")
    param = memory.T if order == "F order" else memory[::-1]
    param[...] = cp.asarray(params()["w"])
    assert not param.flags.c_contiguous
    gpuadam.Adam({"w": param}, backend=backend).save(tmp_path / "a", with_params=True)
    plain = np.zeros((5, 7), "f4")
    gpuadam.load(tmp_path / "a", {"w": plain}, with_params=True)
    assert (plain == params()["w"]).all()
    memory[...] = 0
    gpuadam.load(tmp_path / "a", {"w": param}, backend, with_params=True)
    assert (param.get() == params()["w"]).all()


def test_neighbours_of_a_strided_parameter_are_never_written(cp, backend, tmp_path):
    given = np.arange(20, dtype="f4").reshape(5, 4)
    wide = cp.asarray(given)
    param = wide[:, ::2]
    gpuadam.Adam({"w": param}, backend=backend).save(tmp_path / "a", with_params=True)
    plain = np.zeros((5, 2), "f4")
    gpuadam.load(tmp_path / "a", {"w": plain}, with_params=True)
    assert (plain == given[:, ::2]).all()
    gpuadam.load(tmp_path / "a", {"w": param}, backend, with_params=False)
    with pytest.raises(gpuadam.CheckpointError, match=r"params\['w'\] has gaps between its elements"):
        gpuadam.load(tmp_path / "a", {"w": param}, backend, with_params=True)
    assert (wide.get() == given).all()
