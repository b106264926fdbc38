"""The repr of optimizers: short, true, without a wait for a GPU, and never an error."""

import copy
from pathlib import Path

import numpy as np
import pytest

import gpuadam


def arrays(dtype="f4"):
    return {"w": np.ones((3, 4), dtype), "b": np.ones(1, dtype)}


def grouped(n=2):
    return [{"params": {f"w{k}": np.ones(k + 1, "f4")}, "lr": 0.1 * (k + 1)} for k in range(n)]


def schedule(step):
    return 0.1


PLACE = Path("state folder")
TEXTS = {
    "Adam(2 parameters, 13 elements, steps=0, lr=0.001)": lambda: gpuadam.Adam(arrays()),
    "Adam(1 parameter, 1 element, steps=0, lr=0.25)": lambda: gpuadam.Adam(np.float32([1]), lr=np.float32(0.25)),
    "AdamW(2 parameters, 13 elements, steps=0, lr=0.001)": lambda: gpuadam.AdamW(arrays(), betas=[0.9, 0.999]),
    "AdamW(2 parameters, 13 elements, steps=0, lr=0.001, weight_decay=0)": lambda: gpuadam.AdamW(arrays(), weight_decay=0.0),
    "NAdam(2 parameters, 13 elements, steps=0, lr=0.002, formula='optax')": lambda: gpuadam.NAdam(arrays(), formula="optax"),
    "Adam(2 parameters, 13 elements, steps=0, lr=<schedule>, bounds=(-1, None), state_dtype='8bit', seed=7)": lambda: (
        gpuadam.Adam(arrays(), lr=schedule, bounds=(-1, None), state_dtype="8bit", seed=7)
    ),
    "Adam(2 parameters, 13 elements, steps=0, lr=<ndarray>, amsgrad=True, capturable=True, backend='numba-cpu')": lambda: (
        gpuadam.Adam(arrays(), lr=np.ones(1), amsgrad=True, capturable=True, backend="numba-cpu")
    ),
    "Adam(1 parameter, 3 elements, steps=0, lr=0.001, complex='joint')": lambda: gpuadam.Adam(
        np.ones(3, "c8"), complex="joint"
    ),
    "Adam(1 parameter, 3 elements, steps=0, lr=0.001, bounds=(<ndarray>, None))": lambda: gpuadam.Adam(
        np.ones(3, "f4"), bounds=(np.zeros(3, "f4"), None)
    ),
    "Adam(2 parameters, 3 elements, steps=0, eps=1e-06, groups=[(1 parameter, lr=0.1), (1 parameter, lr=0.2)])": lambda: (
        gpuadam.Adam(grouped(), eps=1e-6)
    ),
    "Adam(9 parameters, 45 elements, steps=0, groups=[(1 parameter, lr=0.1), (1 parameter, lr=0.2), (1 parameter, lr=0.3), "
    "(1 parameter, lr=0.4), and 5 more])": lambda: gpuadam.Adam(grouped(9)),
    "OffloadAdam(2 parameters, 13 elements, steps=0, lr=0.001)": lambda: gpuadam.OffloadAdam(arrays()),
    "OffloadAdam(2 parameters, 13 elements, steps=0, lr=0.001, decoupled=True, master='float32', state='state folder', "
    "budget=100000, update='host')": lambda: gpuadam.OffloadAdam(
        arrays("f2"), master="float32", decoupled=True, state=PLACE, budget=100_000, update="host"
    ),
    "ShardedAdam(2 parameters, 13 elements, steps=0, lr=0.001, rank='0 of 1')": lambda: gpuadam.ShardedAdam(
        arrays(), gpuadam.transports.Local()
    ),
    "ShardedAdamW(2 parameters, 13 elements, steps=0, lr=0.001, algorithm='radam', state_dtype='bfloat16', rank='0 of 1', "
    "reduction='sum', views=True)": lambda: gpuadam.ShardedAdamW(
        arrays(), gpuadam.transports.Local(), algorithm="radam", state_dtype="bfloat16", reduction="sum", views=True
    ),
    "Rule('float32', lr=0.001)": lambda: gpuadam.Rule(),
    "Rule('float64', lr=0.1, bounds=(0, None), algorithm='nadam', maximize=True, ema_decay=0.5)": lambda: gpuadam.Rule(
        "float64", lr=0.1, bounds=(0, None), algorithm="nadam", maximize=True, ema_decay=0.5
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_optimizer_says_what_it_is(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repr(TEXTS[text]()) == text


def test_it_says_what_is_so_now():
    params = arrays()
    opt = gpuadam.Adam(params)
    opt.step(arrays())
    opt.groups[0]["lr"], opt.groups[0]["maximize"] = 5, True
    opt.add("c", np.ones(7, "f4"))
    assert repr(opt) == "Adam(3 parameters, 20 elements, steps=1, lr=5, maximize=True)"
    opt.remove("w")
    assert repr(copy.deepcopy(opt)) == "Adam(2 parameters, 8 elements, steps=1, lr=5, maximize=True)"


def test_a_class_of_ones_own_has_its_own_name_and_defaults():
    class Mine(gpuadam.AdamW):
        def __init__(self, params, weight_decay=0.5):
            super().__init__(params, weight_decay=weight_decay, seed=3)

    assert repr(Mine(arrays())) == "Mine(2 parameters, 13 elements, steps=0, lr=0.001, seed=3)"


class Hostile:
    def __repr__(self):
        raise RuntimeError

    def __float__(self):
        raise RuntimeError

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None


class OnAGpu:
    """A number whose memory must not be read, because that would wait."""

    __cuda_array_interface__ = property(lambda self: pytest.fail("the array was looked at"))
    __float__ = __repr__ = __bool__ = lambda self: pytest.fail("the array was read")


def broken(change):
    opt = gpuadam.Adam(arrays())
    change(opt)
    return opt


BROKEN = {
    "a value whose repr fails": lambda opt: opt.groups[0].update(lr=Hostile(), betas=Hostile()),
    "an array on a GPU": lambda opt: opt.groups[0].update(lr=OnAGpu(), eps=OnAGpu()),
    "a list too long": lambda opt: opt.groups[0].update(lr="x" * 10_000),
    "no lr": lambda opt: opt.groups[0].pop("lr"),
    "no groups": lambda opt: opt.groups.clear(),
    "no state": lambda opt: dict.clear(opt.state),
    "other moments": lambda opt: opt.state["w"].update(m=None),
    "nothing": lambda opt: opt.__dict__.clear(),
}


@pytest.mark.parametrize("what", BROKEN)
def test_it_never_fails_and_stays_short(what):
    text = repr(broken(BROKEN[what]))
    assert len(text) < 300 and "Adam" in text
    if what.startswith(("a value", "an array", "a list")):
        assert text.startswith("Adam(2 parameters, 13 elements")


@pytest.mark.parametrize("cls", [gpuadam.Adam, gpuadam.OffloadAdam, gpuadam.ShardedAdamW, gpuadam.Rule])
def test_it_never_fails_amid_the_constructor(cls):
    assert cls.__name__ in repr(cls.__new__(cls))


def test_arrays_of_every_backend_are_counted(library):
    opt = gpuadam.Adam({"w": library.array(np.ones((3, 4), "f4")), "b": library.array(np.ones(1, "f4"))}, capturable=True)
    assert repr(opt) == "Adam(2 parameters, 13 elements, steps=0, lr=0.001, capturable=True)"
