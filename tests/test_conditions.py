"""Every way to give a step its conditions: each is followed, or refused before anything is written; none is ignored."""

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import gpuadam
from gpuadam import clipping, transports
from gpuadam.testing import unchanged

MAX_NORM, NORM, SCALE = 1.0, 3.0, 0.5


class OfDlpack:
    """An array on the CPU of a library that gpuadam does not know."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


FORMS = {
    "float": float,
    "int": lambda x: int(x) if np.isfinite(x) and x == int(x) else x,
    "float64": np.float64,
    "float32": np.float32,
    "array": lambda x: np.array(x),
    "float32 array": lambda x: np.array(x, "f4"),
    "array of one": lambda x: np.array([x], "f4"),
    "DLPack": lambda x: OfDlpack(np.array(x)),
    "float32 DLPack": lambda x: OfDlpack(np.array(x, "f4")),
}
NO_NUMBERS = {
    "text": str,
    "two": lambda x: np.array([x, x]),
    "none at all": lambda x: np.array([], "f4"),
    "complex": complex,
    "object": lambda x: np.array(None),
    "decimal": Decimal,
    "NaN": lambda x: float("nan"),
    "list": lambda x: [x],
}
try:
    import torch
except ImportError:
    pass
else:
    FORMS |= {
        "torch": lambda x: torch.tensor(x, dtype=torch.float64),
        "float32 torch": lambda x: torch.tensor(x, dtype=torch.float32),
        "torch of one": lambda x: torch.tensor([x], dtype=torch.float32),
        "torch parameter": lambda x: torch.nn.Parameter(torch.tensor(float(x))),
    }
    NO_NUMBERS |= {"torch of two": lambda x: torch.tensor([x, x]), "torch meta": lambda x: torch.tensor(x, device="meta")}
try:
    import jax.numpy as jnp
except ImportError:
    pass
else:
    FORMS |= {"jax": lambda x: jnp.float32(x), "jax of one": lambda x: jnp.array([x], "float32")}

OPTIMIZERS = {
    "Adam": lambda params: gpuadam.Adam(params),
    "capturable": lambda params: gpuadam.Adam(params, capturable=True),
    "OffloadAdam": lambda params: gpuadam.OffloadAdam(params, budget=100_000),
    "groups": lambda params: gpuadam.Adam([{"params": [p]} for p in params.values()]),
}


def grads_for(opt, value=1.0):
    grads = [{name: np.full(3, value, "f4") for name in group["names"]} for group in opt.groups]
    return [list(of_group.values()) for of_group in grads] if len(grads) > 1 else grads[0]


def stepped(make, **conditions):
    """Return the bits of all state after a step, and the count."""
    opt = make({"a": np.ones(3, "f4"), "b": np.ones(3, "f4")})
    opt.step(grads_for(opt), **conditions)
    return [np.array(state[key]).tobytes() for state in opt.state.values() for key in ("m", "v")], opt.steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_form_of_a_condition_is_followed(name):
    make, n = OPTIMIZERS[name], 0
    clip = {"max_norm": MAX_NORM}
    ways = (clip, clip | {"check_finite": True}, {"check_finite": True})
    some, others = list(FORMS.values())[::3], list(FORMS.values())[1::3]
    for norm, scale, found, way, inf in itertools.product(FORMS.values(), some, others, ways, (0, 1)):
        given = {"norm": norm(NORM), "grad_scale": scale(SCALE), "found_inf": found(inf)}
        plain = {"norm": NORM, "grad_scale": SCALE, "found_inf": bool(inf)}
        assert stepped(make, **way, **given) == stepped(make, **way, **plain), (given, way)
        n += 1
    unclipped, clipped = (stepped(make, grad_scale=SCALE, **options) for options in ({}, clip | {"norm": NORM}))
    assert clipped != unclipped and stepped(make, found_inf=True)[1] == 0
    print(f"\n{name}: {n} ways, 0 ignored")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_that_is_not_finite_leaves_the_step_out_in_each_form(name, form):
    for bad in (np.inf, np.nan):
        moments, count = stepped(OPTIMIZERS[name], norm=FORMS[form](bad), check_finite=True)
        assert count == 0 and not any(map(any, moments))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ShardedAdam"])
def test_one_nan_in_a_clipped_step_becomes_one_everywhere(name):
    make = OPTIMIZERS.get(name, lambda params: gpuadam.ShardedAdam(params, transports.Local()))
    params = {"a": np.ones(3, "f4"), "b": np.ones(3, "f4")}
    opt = make(params)
    for k in range(4):
        grads = grads_for(opt)
        _, first = next(clipping.named_arrays("grads", grads))
        first[0] = np.nan if k == 3 else 1.0
        opt.step(grads, max_norm=1.0)
    assert np.isnan([*params["a"], *params["b"]]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", NO_NUMBERS)
@pytest.mark.parametrize("condition", ["norm", "grad_scale", "found_inf", "max_norm"])
def test_what_is_no_number_is_refused_by_name(name, form, condition):
    opt = OPTIMIZERS[name]({"a": np.ones(3, "f4"), "b": np.ones(3, "f4")})
    given = {"max_norm": MAX_NORM} if condition == "norm" else {}
    if form == "NaN" and condition in ("norm", "found_inf"):
        pytest.skip("this may be NaN")
    with unchanged(opt=opt), pytest.raises((ValueError, TypeError), match=condition):
        opt.step(grads_for(opt), **given | {condition: NO_NUMBERS[form](2)})


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ShardedAdam"])
def test_a_max_norm_of_infinity_clips_nothing(name):
    def trained(**conditions):
        make = OPTIMIZERS.get(name, lambda params: gpuadam.ShardedAdam(params, transports.Local()))
        params = {"a": np.ones(3, "f4"), "b": np.ones(3, "f4")}
        opt = make(params)
        for k in range(6):  # of which the last ones are repeated
            opt.step(grads_for(opt, 2.0**k), **conditions)
        return opt.steps, [param.tobytes() for param in params.values()]

    for of_step in ({}, {"grad_scale": 0.5}, {"check_finite": True}):
        assert trained(max_norm=np.inf, **of_step) == trained(**of_step) != trained(max_norm=1.0, **of_step)


def test_a_fraction_is_a_number():
    assert stepped(OPTIMIZERS["Adam"], grad_scale=Fraction(1, 2)) == stepped(OPTIMIZERS["Adam"], grad_scale=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_numbers_of_the_host_are_followed_beside_parameters_on_a_gpu(cp, backend, capturable):
    def moments(**conditions):
        params = {name: cp.ones(3, "f4") for name in "ab"}
        opt = gpuadam.Adam(params, capturable=capturable, backend=backend)
        opt.step({name: cp.ones(3, "f4") for name in params}, **conditions)
        steps = {state["step"] for state in opt.state_dict()["state"].values()}
        return [cp.asnumpy(state[key]).tobytes() for state in opt.state.values() for key in ("m", "v")], steps

    for form, found in itertools.product(FORMS, (0, 1)):
        given = {"norm": FORMS[form](NORM), "grad_scale": FORMS[form](SCALE), "found_inf": FORMS[form](found)}
        plain = {"norm": NORM, "grad_scale": SCALE, "found_inf": bool(found)}
        assert moments(max_norm=MAX_NORM, **given) == moments(max_norm=MAX_NORM, **plain), form


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_a_max_norm_of_infinity_clips_nothing_on_a_gpu(cp, backend, capturable):
    def moments(**conditions):
        params = {name: cp.ones(3, "f4") for name in "ab"}
        opt = gpuadam.Adam(params, capturable=capturable, backend=backend)
        for k in range(4):
            opt.step({name: cp.full(3, 2.0**k, "f4") for name in params}, **conditions)
        return [cp.asnumpy(state[key]).tobytes() for state in opt.state.values() for key in ("m", "v")]

    assert moments(max_norm=np.inf) == moments() != moments(max_norm=1.0)
    assert moments(max_norm=np.inf, norm=3.0, grad_scale=0.5) == moments(grad_scale=0.5)
