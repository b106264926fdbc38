"""A step of an optimizer with all that belongs to one: clipping, leaving it out, zeroing, means, copies and narrow state."""

import copy
import itertools
import math
import re
from typing import Any

import libraries
import ml_dtypes
import narrow_model as model
import numpy as np
import pytest

import gpuadam
from gpuadam import testing
from gpuadam.device_step import FLAGS
from gpuadam.kernels.cpu_backend import backend as numba_cpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"w": (7, 11), "b": (5,)}


def random_arrays(seed=0, dtype="f4", size=1.0):
    rng = np.random.default_rng(seed)
    return {name: (size * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


def everything(opt, *others):
    """Return every byte that a step could change but the gradients'."""
    state = {
        name: {key: x.tobytes() if hasattr(x, "tobytes") else x for key, x in own.items()} for name, own in opt.state.items()
    }
    arrays = [a.tobytes() for group in opt.groups for a in group["params"]]
    return state, arrays, opt.steps, [[a.tobytes() for a in other.values()] for other in others]


def norm_of(grads):
    return float(gpuadam.global_norm(grads))


# Clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_max_norm_is_torchs_clip_grad_norm(max_norm):
    torch = libraries.imported("torch", reason="torch, which is compared with, is not installed")
    params = random_arrays()
    ours = {name: a.copy() for name, a in params.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in params.items()}
    opt = gpuadam.Adam(ours, lr=1e-2)
    reference = torch.optim.Adam(theirs.values(), lr=1e-2)
    for k in range(5):
        grads = random_arrays(seed=k + 1)
        opt.step(grads, max_norm=max_norm)
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        reference.step()
    for name, a in ours.items():  # five steps of lr 1e-2 in float32
        np.testing.assert_allclose(a, theirs[name].detach().numpy(), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("grad_scale", [1.0, 0.25, -3.0])
def test_a_clipped_step_is_one_on_gradients_scaled_by_hand(grad_scale):
    one, other = random_arrays(), random_arrays()
    opt, by_hand = gpuadam.Adam(one, lr=1e-2), gpuadam.Adam(other, lr=1e-2)
    for k in range(3):
        grads = random_arrays(seed=k + 1)
        opt.step(grads, max_norm=0.5, grad_scale=grad_scale)
        norm = norm_of(grads) * abs(grad_scale)
        assert norm > 0.5
        scale = np.float32(grad_scale * (0.5 / (norm + 1e-6)))
        by_hand.step({name: scale * a for name, a in grads.items()})
    assert everything(opt) == everything(by_hand)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_one_nan_in_a_clipped_step_becomes_one_everywhere_as_in_pytorch(given, capturable):
    """Else all other elements would take a gradient that was to be clipped, and their v would remember it."""
    params = random_arrays()
    opt = gpuadam.Adam(params, capturable=capturable)
    for k in range(4):  # the last ones are repeated steps
        opt.step(random_arrays(k), max_norm=0.5, check_finite=k == 3)
        assert opt.steps == k + 1
    grads = random_arrays(5)
    grads["w"][3, 4] = np.nan
    before = everything(opt)
    opt.step(grads, max_norm=0.5, check_finite=True)
    assert everything(opt) == before
    opt.step(grads, max_norm=0.5, **({"norm": math.nan} if given else {}))
    assert all(np.isnan(a).all() for a in (*params.values(), *(state[key] for state in opt.state.values() for key in "mv")))
    with pytest.raises(ValueError, match="grad_scale=nan must be finite"):
        opt.step(grads, max_norm=0.5, grad_scale=math.nan)


def test_gradients_within_max_norm_are_not_touched():
    one, other = random_arrays(), random_arrays()
    gpuadam.Adam(one).step(random_arrays(1), max_norm=1e3)
    gpuadam.Adam(other).step(random_arrays(1))
    assert all(model.different(one[name], other[name]) == 0 for name in one)


def test_a_norm_that_is_given_is_the_one_that_is_computed():
    results = []
    for given in (None, "number", "array"):
        params, grads = random_arrays(), random_arrays(1)
        norm = gpuadam.global_norm(grads)
        opt = gpuadam.Adam(params)
        opt.step(grads, max_norm=0.1, norm={None: None, "number": float(norm), "array": norm}[given], check_finite=True)
        results.append(everything(opt))
    assert results[0] == results[1] == results[2]


# Steps that are left out

BAD_GRADIENTS = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan, "too large": 2e19}


def optimizer_of_all(params, **options):
    copies = {name: np.zeros(a.shape, BFLOAT16) for name, a in params.items()}
    return gpuadam.Adam(params, lr=1e-2, amsgrad=True, ema_decay=0.9, param_copies=copies, **options), copies


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_check_finite_changes_nothing_but_zeroes_gradients(bad, zero_grad, capturable):
    params = random_arrays()
    opt, copies = optimizer_of_all(params, zero_grad=zero_grad, capturable=capturable)
    opt.step(random_arrays(1), check_finite=True)
    before = everything(opt, copies)
    grads = random_arrays(2)
    grads["w"][3, 4] = BAD_GRADIENTS[bad]
    given = copy.deepcopy(grads)
    opt.step(grads, check_finite=True)
    assert everything(opt, copies) == before
    for name, a in grads.items():
        wanted = np.zeros_like(a) if zero_grad else given[name]
        assert model.different(a, wanted) == 0
    opt.step(random_arrays(3), check_finite=True)
    straight_params = random_arrays()
    straight, straight_copies = optimizer_of_all(straight_params, zero_grad=zero_grad, capturable=capturable)
    for seed in (1, 3):
        straight.step(random_arrays(seed))
    assert everything(opt, copies) == everything(straight, straight_copies)


def test_check_finite_looks_at_the_scaled_gradients():
    opt = gpuadam.Adam(random_arrays())
    grads = random_arrays(1, size=1e19)
    opt.step(grads, check_finite=True)
    assert opt.steps == 0
    opt.step(grads, check_finite=True, grad_scale=1e-19)
    assert opt.steps == 1


TRUE_OR_FALSE: list[tuple[Any, bool]] = [
    (True, True), (False, False), (1, True), (0, False), (2.0, True), (0.0, False), (None, False),
    *((np.array([value]).astype(str(dtype)), bool(value)) for dtype in FLAGS for value in (0, 1)),
    *((np.array([value]), bool(value)) for value in (0.0, 3.0)),
]  # fmt: skip


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("found_inf, left_out", TRUE_OR_FALSE, ids=repr)
def test_found_inf_leaves_a_step_out(found_inf, left_out, capturable):
    opt, copies = optimizer_of_all(random_arrays(), capturable=capturable)
    opt.step(random_arrays(1))
    before = everything(opt, copies)
    opt.step(random_arrays(2), found_inf=found_inf)
    assert (everything(opt, copies) == before) == left_out
    assert opt.steps == (1 if left_out else 2)


# Gradients, means and copies


def test_zero_grad_zeroes_and_changes_nothing_else():
    for dtype in ("f4", "f8", BFLOAT16):
        one, other = random_arrays(dtype=dtype), random_arrays(dtype=dtype)
        zeroed, kept = random_arrays(1, dtype), random_arrays(1, dtype)
        gpuadam.Adam(one, zero_grad=True).step(zeroed)
        gpuadam.Adam(other).step(kept)
        assert all(model.different(one[name], other[name]) == 0 for name in one)
        for name, a in zeroed.items():
            assert model.different(a, np.zeros_like(a)) == 0 and kept[name].any()


@pytest.mark.parametrize("dtype, decay", [("f4", 0.9), ("f4", 0.3), ("f4", 0.0), ("f8", 0.9)])
def test_ema_is_the_running_mean_of_the_parameters(dtype, decay):
    params = random_arrays(dtype=dtype)
    opt = gpuadam.Adam(params, lr=0.1, ema_decay=decay)
    mean: dict[str, np.ndarray] = {}
    for k in range(6):
        opt.step(random_arrays(k + 1, dtype))
        for name, a in params.items():
            exact = a.astype("f8")
            mean[name] = exact if k == 0 else mean[name] + (1 - decay) * (exact - mean[name])
            if k == 0:
                assert model.different(opt.state[name]["ema"], a) == 0
            # a few roundings of each step
            np.testing.assert_allclose(opt.state[name]["ema"], mean[name], rtol=0, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("of", ["f4", BFLOAT16], ids=str)
def test_copies_are_the_new_parameters_rounded_each_to_its_own_dtype(of):
    params = random_arrays(dtype=of)
    copies = {"w": np.zeros(SHAPES["w"], "f2"), "b": np.zeros(SHAPES["b"], BFLOAT16)}
    opt = gpuadam.Adam(params, lr=0.1, param_copies=copies)
    exact = {name: a.astype("f4") for name, a in params.items()}
    for k in range(3):
        grads = random_arrays(k + 1)
        for name, a in params.items():  # of a bfloat16 parameter the copy has what was not rounded yet
            exact[name] = a.astype("f4")
        reference = gpuadam.Adam(exact, lr=0.1)
        saved = copy.deepcopy(opt.state_dict())
        reference.load_state_dict(saved)
        reference.step(grads)
        opt.step(grads)
        for name, kept in copies.items():
            assert model.different(kept, exact[name].astype(kept.dtype)) == 0


def test_a_copy_may_be_missing_for_some():
    params, kept = random_arrays(), np.zeros(5, "f2")
    gpuadam.Adam(params, param_copies={"w": None, "b": kept}).step(random_arrays(1))
    assert model.different(kept, params["b"].astype("f2")) == 0


def test_a_parameter_and_its_remainder_are_the_float32_trained_beside_them():
    exact = random_arrays()
    narrow = {name: model.parts(a)[0] for name, a in exact.items()}
    opt = gpuadam.AdamW(narrow, lr=1e-3, master="remainder")
    for name, a in exact.items():
        opt.state[name]["remainder"][...] = model.parts(a)[1]
    reference = gpuadam.AdamW(exact, lr=1e-3)
    for k in range(50):
        grads = random_arrays(k + 1)
        opt.step(grads)
        reference.step(grads)
        for name, a in exact.items():
            assert model.different(model.whole(narrow[name], opt.state[name]["remainder"]), a) == 0, k


def test_small_steps_of_a_bfloat16_parameter_are_lost_but_with_random_rounding():
    """1,000 steps of 1e-4 from 1, where the next bfloat16 is 1/256 below: the mean of 4,096 to 2 % of float32's way."""
    n, lost, random, exact = 4096, *(np.ones(4096, dtype) for dtype in (BFLOAT16, BFLOAT16, np.dtype("f4")))
    opts = [gpuadam.Adam(lost, lr=1e-4), gpuadam.Adam(random, lr=1e-4, stochastic_rounding=True, seed=3)]
    opts.append(gpuadam.Adam(exact, lr=1e-4))
    grad = np.ones(n, "f4")
    for _ in range(1000):
        for opt in opts:
            opt.step(grad)
    assert (lost == 1).all()
    way = 1 - exact.mean()
    assert 0.09 < way < 0.11
    assert abs((1 - random.astype("f8").mean()) / way - 1) < 0.02


def test_the_seed_and_nothing_else_decides_how_numbers_are_rounded():
    def trained(seed):
        params = random_arrays(dtype=BFLOAT16)
        opt = gpuadam.Adam(params, stochastic_rounding=True, state_dtype="bfloat16", seed=seed)
        for k in range(3):
            opt.step(random_arrays(k + 1))
        return everything(opt)

    assert trained(0) == trained(0) != trained(1)


# Every form of state

STATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "float64 state": ("f4", {"state_dtype": "float64"}),
    "bfloat16 state": ("f4", {"state_dtype": "bfloat16", "amsgrad": True}),
    "8 bits": ("f4", {"state_dtype": "8bit"}),
    "random rounding": (BFLOAT16, {"stochastic_rounding": True, "seed": 5}),
    "remainder": (BFLOAT16, {"master": "remainder", "state_dtype": "8bit"}),
    "ema": ("f2", {"ema_decay": 0.9}),
    "all": (BFLOAT16, {"master": "remainder", "state_dtype": "bfloat16", "ema_decay": 0.9, "zero_grad": True}),
}


def made(name, params, **more):
    return gpuadam.Adam(params, lr=1e-2, **STATES[name][1], **more)


@pytest.mark.in_short()
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_state_that_is_saved_and_loaded_goes_on_with_the_same_bits(name, capturable):
    dtype = STATES[name][0]
    straight_params, first_params = random_arrays(dtype=dtype), random_arrays(dtype=dtype)
    straight, first = made(name, straight_params), made(name, first_params, capturable=capturable)
    for k in range(6):
        straight.step(random_arrays(k, dtype))
        if k < 3:
            first.step(random_arrays(k, dtype))
    params = copy.deepcopy(first_params)
    resumed = made(name, params, capturable=capturable)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for k in range(3, 6):
        resumed.step(random_arrays(k, dtype))
    kept, wanted = resumed.state_dict(), straight.state_dict()
    assert kept["steps"] == wanted["steps"] == 6
    for label, a in straight_params.items():
        assert model.different(params[label], a) == 0
        assert kept["state"][label].keys() == wanted["state"][label].keys()
        for key, x in wanted["state"][label].items():
            assert np.array_equal(kept["state"][label][key], x), (label, key)


@pytest.mark.parametrize("missing", ["m_scale", "remainder"])
def test_state_of_another_form_is_refused(missing):
    params = random_arrays(dtype=BFLOAT16)
    opt = made("remainder", params)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"]["w"][missing]
    with pytest.raises(ValueError, match=missing):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="the state of 'w' has"):
        made("random rounding", random_arrays(dtype=BFLOAT16)).load_state_dict(opt.state_dict())


def test_a_parameter_of_a_group_with_other_state_takes_its_own_step():
    params = {"w": np.ones((7, 11), BFLOAT16), "b": np.ones(5, "f4")}
    opt = gpuadam.Adam(params, master="remainder", ema_decay=0.5)
    opt.step(random_arrays(1))
    assert "remainder" in opt.state["w"] and "remainder" not in opt.state["b"]
    alone = {"b": np.ones(5, "f4")}
    gpuadam.Adam(alone, ema_decay=0.5).step({"b": random_arrays(1)["b"]})
    assert model.different(params["b"], alone["b"]) == 0


# Option by option

OPTIONS: dict[str, list[Any]] = {
    "make": [gpuadam.Adam, gpuadam.AdamW, gpuadam.NAdam, gpuadam.RAdam, gpuadam.AdaMax],
    "dtype": ["float32", "float64", "bfloat16", "float16"],
    "amsgrad": [False, True],
    "state_dtype": [None, "float32", "float64", "bfloat16", "8bit"],
    "master": [None, "remainder"],
    "param_copies": [None, "float32", "float64", "bfloat16", "float16"],
    "ema_decay": [None, 0.9],
    "zero_grad": [False, True],
    "stochastic_rounding": [False, True],
    "capturable": [False, True],
    "formula": ["torch", "optax", "eps-hat"],
}
PAIRS = list(itertools.combinations(OPTIONS, 2))


def cells():
    """Give every combination of the values of two options, the others as usual; and of three of those that meet in state."""
    usual = {name: values[0] for name, values in OPTIONS.items()}
    of_three = [("make", "state_dtype", "amsgrad"), ("dtype", "state_dtype", "master")]
    of_three += [("dtype", "master", "stochastic_rounding")]
    for together in PAIRS + of_three:
        for values in itertools.product(*(OPTIONS[name] for name in together)):
            yield usual | dict(zip(together, values, strict=True))


def unique_cells():
    return list({tuple(cell.values()): cell for cell in cells()}.values())


def optimizer_of(cell, put=lambda a: a, backend=None):
    """Return (optimizer, params, copies) of a cell. put: takes a NumPy array to where the backend's are."""
    options = dict(cell)
    make, dtype, copies = options.pop("make"), model.DTYPES[options.pop("dtype")], options.pop("param_copies")
    host = random_arrays(dtype=dtype)
    params = {name: put(a) for name, a in host.items()}
    if copies:
        copies = {name: put(np.zeros(a.shape, model.DTYPES[copies])) for name, a in host.items()}
    return make(params, lr=1e-2, param_copies=copies or None, backend=backend, **options), params, copies or {}


def must_be_refused(cell):
    """Whether options contradict each other, counted from what the documentation says of them."""
    eight, algorithm = cell["state_dtype"] == "8bit", cell["make"].__name__
    return (
        (eight and (cell["amsgrad"] or algorithm == "AdaMax" or cell["dtype"] == "float64"))
        or (eight and cell["param_copies"] == "float64")
        or (cell["amsgrad"] and algorithm in ("NAdam", "RAdam", "AdaMax"))
        or (cell["capturable"] and algorithm == "NAdam")
        or (cell["formula"] != "torch" and algorithm in ("RAdam", "AdaMax"))
        or (cell["formula"] == "eps-hat" and algorithm == "NAdam")
        or (cell["master"] and cell["dtype"] == "bfloat16" and cell["stochastic_rounding"])
    )


@pytest.mark.filterwarnings("ignore:.* does nothing here")
def test_every_two_options_take_a_step_or_are_refused_with_what_to_do(monkeypatch):
    launched = []

    def no_kernel(rule, form, loop):
        return lambda *arguments: launched.append(form)

    monkeypatch.setattr(numba_cpu, "build", no_kernel)  # hundreds of kernels would have to be compiled
    refused, taken = [], 0
    for cell in unique_cells():
        shown = {name: value for name, value in cell.items() if value != OPTIONS[name][0]}
        launched.clear()
        try:
            opt, *_ = optimizer_of(cell)
            opt.step(random_arrays(1, model.DTYPES[cell["dtype"]]))
        except (TypeError, ValueError) as error:
            assert must_be_refused(cell), f"{shown}: {error}"
            assert re.search(r"\b(use|leave|pass|give|make|must|cannot|needs)\b", str(error)), f"{shown}: {error}"
            assert not launched
            refused.append(shown)
        else:
            assert not must_be_refused(cell), shown
            taken += 1
            (formats,) = {form.arrays for form in launched}
            assert (formats.param, formats.param_copy) == (cell["dtype"], cell["param_copies"] or "")
            assert formats.amsgrad == cell["amsgrad"] and bool(formats.ema) == (cell["ema_decay"] is not None)
            wide = "float64" if cell["dtype"] == "float64" else "float32"
            assert formats.state == (cell["state_dtype"] or wide)
            assert formats.remainder == (cell["master"] is not None and cell["dtype"] == "bfloat16")
            narrow = cell["dtype"] in ("bfloat16", "float16")
            assert formats.stochastic == (cell["stochastic_rounding"] and narrow)
            assert all(form.zero_grad == cell["zero_grad"] for form in launched)
            assert opt.steps == 1
    assert taken > 200 and len(refused) > 10


# On a GPU

ON_A_GPU: dict[str, dict[str, Any]] = {
    "everything": {
        "make": gpuadam.AdamW, "dtype": "bfloat16", "state_dtype": "bfloat16", "amsgrad": True, "master": "remainder",
        "param_copies": "float16", "ema_decay": 0.9, "zero_grad": True,
    },
    "8 bits": {"dtype": "float16", "state_dtype": "8bit", "stochastic_rounding": True, "param_copies": "bfloat16"},
    "random rounding in device mode": {
        "make": gpuadam.RAdam, "dtype": "bfloat16", "stochastic_rounding": True, "capturable": True, "ema_decay": 0.3,
    },
    "float64 in device mode": {"dtype": "float64", "param_copies": "float32", "ema_decay": 0.9, "capturable": True},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_gpu_backend_takes_the_cpus_steps(backend, name):
    there = testing.array_backend(backend)
    cell = {option: values[0] for option, values in OPTIONS.items()} | ON_A_GPU[name]
    opt, params, copies = optimizer_of(cell, there.array, backend)
    reference, own, own_copies = optimizer_of(cell)
    for k in range(3):
        grads = random_arrays(k + 1, model.DTYPES[cell["dtype"]])
        on_gpu = {label: there.array(a) for label, a in grads.items()}
        opt.step(on_gpu)
        reference.step(grads)
        testing.assert_same_bits(on_gpu, grads, "grads")
    testing.assert_same_bits(params, own, "params")
    testing.assert_same_bits(copies, own_copies, "copies")
    for label, wanted in reference.state.items():
        assert opt.state[label].keys() == wanted.keys()
        wanted = {key: x for key, x in wanted.items() if key != "step"}
        testing.assert_same_bits({key: opt.state[label][key] for key in wanted}, wanted, f"state[{label!r}]")
    assert opt.state_dict()["steps"] == 3


TRUE: dict[str, list[Any]] = {"f": [1.0, np.inf, np.nan], "b": [True], "u": [1, 255], "i": [1, -1]}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLAGS, ids=str)
def test_found_inf_on_the_device_leaves_a_step_out(backend, dtype):
    there = testing.array_backend(backend)
    own = random_arrays()
    params = {name: there.array(a) for name, a in own.items()}
    opt = gpuadam.Adam(params, lr=1e-2, capturable=True, backend=backend)
    reference = gpuadam.Adam(own, lr=1e-2)
    for k, value in enumerate([0, *TRUE[dtype.kind], 0]):
        grads = random_arrays(k, size=np.nan if value else 1.0)
        on_gpu = {name: there.array(a) for name, a in grads.items()}
        opt.step(on_gpu, found_inf=there.array(np.array([value], dtype)))
        if not value:
            reference.step(grads)
    # the second step that is taken is step 2, with its bias corrections
    assert opt.state_dict()["state"]["w"]["step"] == reference.steps == 2
    testing.assert_same_bits(params, own)
    for name, wanted in reference.state.items():
        for key in ("m", "v"):
            testing.assert_same_bits(opt.state[name][key], wanted[key], f"{key} of {name}")


# What is refused

WRONG = {
    "a negative norm": {"max_norm": 1.0, "norm": -1.0},
    "a norm for nothing": {"norm": 2.0},
    "a flag that is a string": {"found_inf": "no"},
    "two flags": {"found_inf": np.zeros(2)},
    "two scales": {"grad_scale": np.ones(2), "max_norm": 1.0},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_condition_of_a_step_is_refused_and_nothing_changes(what):
    param = np.ones(3, "f4")
    opt = gpuadam.Adam([param])
    with pytest.raises((TypeError, ValueError)):
        opt.step([np.ones(3, "f4")], **WRONG[what])
    assert (param == 1).all() and opt.steps == 0


def test_a_step_that_is_left_out_is_checked_like_any_other():
    opt = gpuadam.Adam([np.ones(3, "f4")], zero_grad=True)
    wrong = np.ones(4, "f4")
    with pytest.raises(ValueError, match="shape"):
        opt.step([wrong], found_inf=True)
    assert (wrong == 1).all()
