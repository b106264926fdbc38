"""State on a GPU that the host reads and writes: after every stream, on the state's own device; and what a graph would freeze."""

import itertools
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
from cases import assert_same_bits, state
from gpu_work import arrived

import gpuadam
from gpuadam import backends, foreign_state
from gpuadam.kernels import array_bytes

pytestmark = pytest.mark.gpu

N = 1003


def host_params():
    return {"w": state(N)[0], "b": state(5, seed=1)[0]}


def host_grads():
    return {"w": state(N, seed=2)[1], "b": state(5, seed=3)[1]}


def on_cpu(steps):
    """The optimizer after so many steps on the CPU, and its parameters."""
    params = host_params()
    opt = gpuadam.AdamW(params, lr=0.1)
    for _ in range(steps):
        opt.step(host_grads())
    return opt, params


class Captured:
    """An optimizer on a GPU that took a step on a stream of its own, and a graph that takes others there."""

    def __init__(self, cp, backend):
        self.params, self.grads, self.lr = arrived(cp, host_params()), arrived(cp, host_grads()), cp.full(1, 0.1)
        cp.cuda.Device().synchronize()
        self.opt = gpuadam.AdamW(self.params, lr=self.lr, capturable=True, backend=backend)
        self.stream = cp.cuda.Stream(non_blocking=True)
        with self.stream:
            self.opt.step(self.grads)
            self.stream.begin_capture()
            self.opt.step(self.grads)
            self.graph = self.stream.end_capture()
        self.stream.synchronize()

    def replay(self, times):
        for _ in range(times):
            self.graph.launch(self.stream)


def to_numpy(array):
    """Copy what is in memory when all streams are done: of CuPy or of Numba."""
    return array.get() if hasattr(array, "get") else array.copy_to_host()


def assert_state(opt, expected, numpy=to_numpy):
    """opt: an optimizer. expected: one on the CPU."""
    for name, wanted in expected.state.items():
        assert_same_bits([numpy(opt.state[name][key]) for key in ("m", "v")], [wanted["m"], wanted["v"]], name)


# What the host reads waits for all streams


def test_a_checkpoint_has_the_count_of_its_moments_while_graphs_run(cp, backend, tmp_path):
    captured = Captured(cp, backend)
    captured.replay(3)
    captured.opt.save(tmp_path / "a", with_params=True)
    params = {name: np.zeros_like(a) for name, a in host_params().items()}
    loaded = gpuadam.load(tmp_path / "a", params, with_params=True)
    expected, expected_params = on_cpu(4)
    assert [loaded.state_dict()["state"][name]["step"] for name in params] == [4, 4]
    assert_state(loaded, expected, np.asarray)
    assert_same_bits(list(params.values()), list(expected_params.values()))


def test_a_state_dict_has_the_numbers_after_the_graphs_that_run(cp, backend):
    captured = Captured(cp, backend)
    with captured.stream:
        captured.replay(3)
        captured.lr.fill(0.5)
    found = captured.opt.state_dict()
    assert [own["step"] for own in found["state"].values()] == [4, 4] and found["groups"][0]["lr"] == 0.5
    assert_state(captured.opt, on_cpu(4)[0])


def test_state_is_loaded_after_the_graphs_that_run_and_before_those_that_come(cp, backend):
    captured = Captured(cp, backend)
    saved = arrived(
        cp, {f"{name}.{key}": a for name, own in on_cpu(7)[0].state.items() for key, a in own.items() if key != "step"}
    )
    state_dict = captured.opt.state_dict()
    state_dict["state"] = {name: {"step": 7, "m": saved[f"{name}.m"], "v": saved[f"{name}.v"]} for name in captured.params}
    state_dict["groups"][0]["lr"] = 0.25
    captured.replay(3)
    captured.opt.load_state_dict(state_dict)
    captured.replay(1)
    captured.stream.synchronize()
    expected, _ = on_cpu(8)
    assert_state(captured.opt, expected)
    assert captured.opt.state_dict()["state"]["w"]["step"] == 8 and captured.lr.get().tolist() == [0.25]


def test_an_offloaded_step_waits_for_the_stream_of_its_flag(cp, backend):
    params, grads, flag, expected = arrived(cp, host_params()), arrived(cp, host_grads()), cp.ones(1, "f4"), host_params()
    opt = gpuadam.OffloadAdam(params, update="host", backend=backend)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        flag.fill(0)
    opt.step(grads, found_inf=flag, stream=stream)
    gpuadam.Adam(expected).step(host_grads())
    assert_same_bits([a.get() for a in params.values()], list(expected.values()))


# What a graph would freeze


@pytest.mark.parametrize(
    "conditions, name",
    [
        ({"max_norm": 0.5, "norm": 3.0}, "norm=3.0"),
        ({"max_norm": 5.0, "norm": 3.0}, "norm=3.0"),
        ({"max_norm": 0.5, "norm": np.array(3.0)}, "norm=3.0"),
        ({"check_finite": True, "norm": np.inf}, "norm=inf"),
        ({"found_inf": False}, "found_inf=False"),
        ({"found_inf": 1.0}, "found_inf=1.0"),
        ({"found_inf": np.zeros(1)}, "found_inf=0.0"),
        ({"grad_scale": 0.5}, "grad_scale=0.5"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("many", [False, True], ids=["one array", "many arrays"])
def test_a_condition_on_the_host_is_not_captured(cp, backend, conditions, name, many):
    params, grads = (
        {key: a for key, a in arrived(cp, given).items() if many or key == "w"} for given in (host_params(), host_grads())
    )
    lr = cp.full(1, 0.1)
    cp.cuda.Device().synchronize()
    opt = gpuadam.AdamW(params, lr=lr, capturable=True, backend=backend)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        opt.step(grads)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=f"with {name} for ever"):
                opt.step(grads, **conditions)
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert opt.steps == 1 and opt.state_dict()["state"]["w"]["step"] == 1
    assert_same_bits([params["w"].get()], [on_cpu(1)[1]["w"]])


def test_a_step_that_the_host_leaves_out_is_not_captured_without_capturable(cp, backend):
    params, grads = arrived(cp, host_params()), arrived(cp, host_grads())
    opt = gpuadam.AdamW(params, backend=backend)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        opt.step(grads)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capturable=True"):
                opt.step(grads, found_inf=True)
        finally:
            stream.end_capture()
        stream.synchronize()


@pytest.mark.parametrize("update", ["host", "device"])
def test_an_offloaded_step_is_not_captured_and_the_next_one_goes_on(cp, backend, update):
    params, grads = arrived(cp, host_params()), arrived(cp, host_grads())
    opt = gpuadam.OffloadAdam(params, lr=0.1, weight_decay=0.01, decoupled=True, update=update, backend=backend)
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="no graph can hold a step of OffloadAdam"):
                opt.step(grads)
        finally:
            stream.end_capture()
    opt.step(grads)
    assert_same_bits([a.get() for a in params.values()], list(on_cpu(1)[1].values()))


# Two devices


@pytest.fixture
def second(cp):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    return cp.cuda.Device(1)


def current(cp):
    return cp.cuda.runtime.getDevice()


@pytest.mark.parametrize("order", ["C order", "backwards"])
@pytest.mark.parametrize("direction", [array_bytes.chunks, array_bytes.buffers])
def test_pieces_of_an_array_leave_the_current_device_alone(cp, second, backend, monkeypatch, direction, order):
    monkeypatch.setattr(array_bytes, "CHUNK", 1 << 10)
    with second:
        array = cp.arange(N, dtype="f4")[:: 1 if order == "C order" else -1]
        second.synchronize()
    kernels, (view,) = backends.choose([("x", array)], backend)
    assert [current(cp) for _ in direction(kernels, view)] == [0] * 4
    assert current(cp) == 0
    pieces = direction(kernels, view)
    next(pieces)
    assert current(cp) == 0
    pieces.close()
    assert current(cp) == 0
    pieces = direction(kernels, view)
    next(pieces)
    with second:
        del pieces  # ends it here
        assert current(cp) == 1
    assert current(cp) == 0


def test_a_checkpoint_of_the_second_device_comes_back(cp, second, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(array_bytes, "CHUNK", 1 << 10)
    with second:
        params, grads = arrived(cp, host_params()), arrived(cp, host_grads())
        lr = cp.full(1, 0.1)
        opt = gpuadam.AdamW(params, lr=lr, capturable=True, backend=backend)
        second.synchronize()
    opt.step(grads)
    opt.save(tmp_path / "a", with_params=True)
    for a in params.values():
        with second:
            a.fill(0)
    again = gpuadam.load(tmp_path / "a", params, backend, lr=lr, with_params=True)
    again.step(grads)
    _, expected_params = on_cpu(2)
    assert again.state_dict()["state"]["w"]["step"] == 2 and current(cp) == 0
    assert_same_bits([a.get() for a in params.values()], list(expected_params.values()))


def clipped_in_turn(params, grads, **options):
    """Take clipped steps in which one of two groups has a gradient. Return the norms of the steps."""
    opt, norms = gpuadam.Adam([{"params": [param]} for param in params], **options), []
    for of_step in 2 * [(grads[0], None), (None, grads[1])]:
        opt.step([[grad] for grad in of_step], max_norm=1.0)
        norms.append(opt.norm_at)
    return norms


@pytest.mark.parametrize("capturable", [False, True])
def test_clipped_steps_on_two_devices_in_turn_keep_a_norm_and_a_count_on_each(cp, second, backend, capturable):
    expected = [host_params()["w"] for _ in range(2)]
    grads = [k * host_grads()["w"] for k in (1, 2)]
    clipped_in_turn(expected, grads)
    params = []
    for device in range(2):
        with cp.cuda.Device(device):
            there_now = arrived(cp, {"param": host_params()["w"], "grad": grads[device]})
            params.append(there_now["param"])
            grads[device] = there_now["grad"]
    norms = clipped_in_turn(params, grads, backend=backend, capturable=capturable)
    assert norms[0] is norms[2] is not norms[1] is norms[3]
    assert_same_bits([param.get() for param in params], expected)


def test_a_group_whose_parameter_is_on_another_device_now_counts_there(cp, second, backend):
    here = arrived(cp, host_params())
    opt = gpuadam.Adam([{"params": {name: param}} for name, param in here.items()], backend=backend, capturable=True)
    with second:
        param, grad = cp.ones(N, "f4"), cp.ones(N, "f4")
        second.synchronize()
    opt.remove("w")
    opt.add("w", param)
    opt.step({"w": grad, "b": None})
    _, (count,) = backends.choose([("step", opt.state["w"]["step"])], backend)
    assert count.device == 1 and (param.get() < 1).all()


def test_clipped_steps_on_a_gpu_and_on_the_cpu_in_turn(cp):
    expected = [host_params()["w"] for _ in range(2)]
    grads = [k * host_grads()["w"] for k in (1, 2)]
    clipped_in_turn(expected, grads)
    params = [cp.asarray(host_params()["w"]), host_params()["w"]]
    clipped_in_turn(params, [cp.asarray(grads[0]), grads[1]])
    assert_same_bits([params[0].get(), params[1]], expected)


class Tensor:
    """What `to_torch` needs of a tensor, over another library's array."""

    def __init__(self, array, device):
        self.array, self.device = array, device

    def clone(self):
        return self

    def view(self, dtype):
        return self


def test_state_goes_to_torch_on_its_own_device(cp, second, backend, monkeypatch):
    torch = types.ModuleType("torch")
    torch.Tensor, torch.float32, torch.bfloat16 = Tensor, "float32", "bfloat16"
    torch.tensor = lambda value, dtype: value
    torch.as_tensor = lambda array, device: Tensor(array, device)
    torch.from_numpy = lambda array: Tensor(array, "cpu")
    with second:
        params = arrived(cp, host_params())
        opts = [gpuadam.Adam(params, backend=backend)]
    opts += [gpuadam.Adam(arrived(cp, host_params()), backend=backend), gpuadam.Adam(host_params())]
    for opt, grads in zip(opts, ({n: cp.asarray(g) for n, g in host_grads().items()},) * 2 + (host_grads(),), strict=True):
        if opt is opts[0]:
            with second:
                grads = arrived(cp, host_grads())
        opt.step(grads)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for opt, device in zip(opts, ("cuda:1", "cuda:0", "cpu"), strict=True):
        found = foreign_state.to_torch(opt)["state"].values()
        assert {own[key].device for own in found for key in ("exp_avg", "exp_avg_sq")} == {device}


class ScaleByAdamState(NamedTuple):
    count: int
    mu: dict
    nu: dict


def test_state_goes_to_optax_on_its_own_device(cp, second):
    with second:
        params = arrived(cp, host_params())
    opt = gpuadam.Adam(params)
    there_is = foreign_state.to_optax(opt, ScaleByAdamState(0, host_params(), host_params()))
    assert {a.device.id for tree in (there_is.mu, there_is.nu) for a in tree.values()} == {1}


# Where state lies


def extent(array):
    """Return the addresses of the first byte of an array and of the one after the last."""
    start = array.__cuda_array_interface__["data"][0]
    return start, start + array.size * array.dtype.itemsize


def test_small_arrays_of_state_share_an_allocation_and_large_ones_have_their_own(cp, backend):
    params = {f"p{k}": cp.zeros(n, "f4") for k, n in enumerate((5, 1003, 600_000, 7, 0))}
    opt = gpuadam.Adam(params, backend=backend)
    places = {(key, name): extent(moments[key]) for key in ("m", "v") for name, moments in opt.state.items()}
    small = [places[key, name] for key in ("m", "v") for name in ("p0", "p1", "p3")]
    for (_, end), (start, _) in itertools.pairwise(small):
        assert start % 512 == small[0][0] % 512 and end <= start < end + 512
    assert all(opt.state[name][key].shape == param.shape for name, param in params.items() for key in ("m", "v"))
    everything = sorted(extent for key_and_name, extent in places.items() if key_and_name[1] != "p4")
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(everything))
    for moments in opt.state.values():
        assert not to_numpy(moments["m"]).any() and not to_numpy(moments["v"]).any()


def test_an_array_of_state_stays_when_the_optimizer_has_gone(cp, backend):
    params, grads = arrived(cp, host_params()), arrived(cp, host_grads())
    opt = gpuadam.AdamW(params, lr=0.1, backend=backend)
    opt.step(grads)
    m = opt.state["b"]["m"]
    del opt
    used = cp.full(2 * N, 7.0, "f4")  # which could take memory that was given back
    expected, _ = on_cpu(1)
    assert_same_bits([to_numpy(m)], [expected.state["b"]["m"]], "m")
    del used
