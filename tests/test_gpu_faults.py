"""Each call of the driver that a call of ours makes fails in turn: either nothing has changed, or the error says what has.

On the stand-in for the driver alone, which makes one call fail. Whatever failed, nothing is left behind: no capture, no event, no
memory. The next call works, and gives what it would have given.
"""

import gc
import itertools
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

import gpuadam
from gpuadam import remembered
from gpuadam.kernels import gpu_table
from gpuadam.offload import chunks

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SHAPES = {"w": (33, 7), "b": (5,), "u": (300,)}


def host(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


class Steps:
    """An optimizer and gradients. `act` takes a step; `everything` is what it may change."""

    maker: ClassVar[type] = gpuadam.Adam
    names: ClassVar[tuple] = tuple(SHAPES)
    options: ClassVar[dict] = {}
    step_options: ClassVar[dict] = {}
    cautious = False  # whether it may say that a step was cut short, which had not yet changed anything

    def __init__(self, cp, backend, folder):
        self.cp, self.backend, self.folder = cp, backend, folder
        self.params = {name: cp.asarray(a) for name, a in host(0).items() if name in self.names}
        self.grads = {name: cp.asarray(a) for name, a in host(1).items() if name in self.names}
        self.opt = self.maker(self.params, backend=backend, **self.made_with())
        self.more = self.at_the_step()

    def made_with(self):
        return self.options

    def at_the_step(self):
        return self.step_options

    def act(self):
        self.opt.step(self.grads, **self.more)

    def everything(self):
        self.cp.cuda.Device().synchronize()
        arrays = [*self.params.values(), *self.grads.values()]
        counts = []
        for state in self.opt.state.values():
            for value in state.values():
                (counts if isinstance(value, int) else arrays).append(value)
        found = [self.cp.asarray(a) if not isinstance(a, np.ndarray) else a for a in arrays]
        return [*(self.cp.asnumpy(a).tobytes() for a in found), *counts, self.opt.steps]


class OneArray(Steps):
    names = ("w",)


class Capturable(Steps):
    options: ClassVar[dict] = {"capturable": True}

    def at_the_step(self):
        return {"grad_scale": self.cp.full(1, 0.5)}


class Clipped(Steps):
    step_options: ClassVar[dict] = {"max_norm": 1.0}


class LeftOut(Steps):
    options: ClassVar[dict] = {"zero_grad": True}
    step_options: ClassVar[dict] = {"found_inf": 1}


class WholeStep(Steps):
    maker = gpuadam.AdamW
    options: ClassVar[dict] = {"capturable": True, "zero_grad": True, "state_dtype": "8bit", "ema_decay": 0.9}

    def at_the_step(self):
        return {"max_norm": 1.0, "check_finite": True, "found_inf": self.cp.zeros(1, "f4")}


class OnAnotherStream(Steps):
    """The arrays are used on one stream, the step is taken on another."""

    def at_the_step(self):
        self.cp.cuda.Device().synchronize()
        return {"stream": self.cp.cuda.Stream(non_blocking=True)}


class Strided(Steps):
    def __init__(self, cp, backend, folder):
        super().__init__(cp, backend, folder)
        self.params = {"s": cp.zeros((9, 10), "f4")[:, ::2]}
        self.grads = {"s": cp.ones((9, 10), "f4")[:, ::2]}
        self.opt = self.maker(self.params, backend=backend)


class Saving(Steps):
    def act(self):
        self.opt.save(self.folder / "state", with_params=True)


class Loading(Steps):
    def __init__(self, cp, backend, folder):
        super().__init__(cp, backend, folder)
        other = gpuadam.Adam(host(2))
        other.step(host(3))
        other.save(folder / "other")

    def act(self):
        self.loaded = gpuadam.load(self.folder / "other", self.params, self.backend)


class StateDict(Steps):
    """The state of another optimizer is loaded."""

    def at_the_step(self):
        self.opt.step(self.grads)
        params, grads = ({name: self.cp.asarray(a) for name, a in host(seed).items()} for seed in (2, 3))
        other = gpuadam.Adam(params, backend=self.backend)
        other.step(grads)
        return other.state_dict()

    def act(self):
        self.opt.load_state_dict(self.more)


class Making(Steps):
    def act(self):
        self.made = self.maker(self.params, backend=self.backend, amsgrad=True, capturable=True)


class Norm(Steps):
    def act(self):
        self.norm = gpuadam.global_norm(self.grads, backend=self.backend)


class Offloaded(Steps):
    maker = gpuadam.OffloadAdam
    options: ClassVar[dict] = {"update": "device", "budget": 50_000}
    cautious = True


CASES = [
    *(OneArray, Steps, Strided, Capturable, Clipped, LeftOut, WholeStep, OnAnotherStream),
    *(Saving, Loading, StateDict, Making, Norm, Offloaded),
]


@pytest.mark.parametrize("case", CASES)
def test_a_call_that_fails_changes_nothing_or_says_what(cp, driver, backend, case, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 1 << 14)
    for _ in range(remembered.MOST_NORMS):  # compiles, and has as many norms kept as can be
        subject = case(cp, backend, tmp_path)
        subject.act()
    held, outcomes = in_use(driver), Counter()
    for n in itertools.count():  # until the call is one that is not made
        subject = case(cp, backend, tmp_path)
        subject.act()
        before = subject.everything()
        driver.fail(n)
        driver.listen()
        try:
            subject.act()
            error = ""
        except Exception as raised:  # noqa: BLE001 - of CuPy, Numba, the driver and ours
            error = str(raised)
        driver.listening = False
        if driver.fail_no_more():
            break
        context = f"call {n}, {driver.calls[n]}: {error}"
        changed, told = subject.everything() != before, "cut short" in error
        assert not driver.captures, context
        if not error:
            outcomes["went on"] += 1
            continue
        assert told == changed or (told and case.cautious), context
        outcomes["told" if told else "nothing changed"] += 1
        try:
            subject.act()
        except ValueError as refused:
            assert told and "cut short" in str(refused), context
    assert n, "nothing could fail"
    assert not in_use(driver) - held - Counter(events=12, streams=3, graphs=3), "what is left of failures grows with them"
    print(f"{case.__name__} on {backend}: {n} calls, {dict(outcomes)}")


def in_use(driver):
    """Return how much there is of each thing that a failure could leave behind, without the buffers kept for reuse."""
    driver.finish_device(0)
    gpu_table.buffers[:] = [buffer for buffer in gpu_table.buffers if buffer.lent]
    gc.collect()
    return Counter(events=len(driver.events), streams=len(driver.work.streams), graphs=len(driver.graphs))


# Everything is prepared before the first launch


def test_a_stream_is_refused_for_parameters_on_two_devices_before_anything_is_written(cp, backend):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    params, grads = [], []
    for device in range(2):
        with cp.cuda.Device(device):
            params.append(cp.ones(100, "f4"))
            grads.append(cp.ones(100, "f4"))
            cp.cuda.Device().synchronize()
    opt = gpuadam.Adam(params, backend=backend)
    with pytest.raises(ValueError, match=r"the parameters are on devices \[0, 1\]: leave stream out"):
        opt.step(grads, stream=cp.cuda.Stream(non_blocking=True))
    for device, param in enumerate(params):
        with cp.cuda.Device(device):
            assert (param.get() == 1).all()
    assert opt.state["0"]["step"] == opt.state["1"]["step"] == 0
    opt.step(grads)
    for device, param in enumerate(params):
        with cp.cuda.Device(device):
            assert (param.get() < 1).all()


def test_a_kernel_that_cannot_be_loaded_leaves_the_devices_step_count(cp, driver, backend):
    """The kernel that counts the step is loaded first, and is not launched before that of the update is there, too."""
    param, grad = cp.ones(100), cp.ones(100)
    unusual = {"formula": "eps-hat", "amsgrad": True, "ema_decay": 0.75, "zero_grad": True}  # compiled by no other test
    opt = gpuadam.AdamW([param], capturable=True, backend=backend, **unusual)
    driver.fail(1, "OUT_OF_MEMORY", names=["cuModuleLoadData", "cuModuleLoadDataEx", "cuLibraryLoadData"])
    with pytest.raises(Exception, match="OUT_OF_MEMORY"):
        opt.step([grad])
    assert not driver.fail_no_more()
    assert int(opt.state["0"]["step"].get()[0] if backend == "cupy" else opt.state["0"]["step"].copy_to_host()[0]) == 0
    assert (param.get() == 1).all()
    opt.step([grad])
    assert (param.get() < 1).all()
