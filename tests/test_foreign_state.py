"""State from torch and optax and for them: the same bits, by name, or refused."""

import importlib
from typing import Any, NamedTuple

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import foreign_state

NAMES = ["layer.w", "layer.b", "s"]
SHAPES = {"layer.w": (3, 4), "layer.b": (5,), "s": ()}


def arrays(seed, dtype="f4"):
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


def content(opt):
    return {n: {k: x if type(x) is int else x.tobytes() for k, x in s.items()} for n, s in opt.state.items()}


def positive(seed, dtype="f4"):
    return {name: np.array(abs(a)) for name, a in arrays(seed, dtype).items()}


# torch


def torch_dict(amsgrad=False, **changes):
    """What torch.optim.Adam.state_dict() returns, of NumPy arrays."""
    m, v = arrays(1), positive(2)
    state = {
        k: {"step": np.float32(7 + k), "exp_avg": m[n], "exp_avg_sq": v[n]}
        | ({"max_exp_avg_sq": np.array(v[n] + 1)} if amsgrad else {})
        for k, n in enumerate(NAMES)
    }
    group = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0, "amsgrad": amsgrad, "maximize": True}
    return {"state": state, "param_groups": [group | {"foreach": None, "params": [0, 1, 2]} | changes]}


def test_state_of_torch_is_taken_by_name():
    opt = gpuadam.Adam(arrays(0), amsgrad=True)
    foreign_state.from_torch(opt, torch_dict(amsgrad=True), NAMES)
    for k, name in enumerate(NAMES):
        state = opt.state[name]
        assert state["step"] == 7 + k and type(state["step"]) is int
        assert state["m"].tobytes() == arrays(1)[name].tobytes() and (state["max_v"] == positive(2)[name] + 1).all()
    assert opt.steps == 9
    group = {key: value for key, value in opt.groups[0].items() if key not in ("params", "names")}
    of_torch = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0, "amsgrad": True, "maximize": True}
    assert group == of_torch | {
        "clip_value": None,
        "bounds": None,
        "complex": None,
        "components": 1,
    }  # which torch does not have


def test_names_of_torch_may_come_in_another_order():
    shuffled = {name: arrays(0)[name] for name in ("s", "layer.w", "layer.b")}
    opt = gpuadam.Adam(shuffled)
    foreign_state.from_torch(opt, torch_dict(param_names=NAMES))
    assert opt.state["layer.b"]["m"].tobytes() == arrays(1)["layer.b"].tobytes()


def test_groups_of_torch_may_come_in_another_order():
    given, d = arrays(0), torch_dict()
    d["param_groups"] = [d["param_groups"][0] | {"lr": float(k + 1), "params": [k]} for k in range(3)]
    schedule = lambda step: 0.25  # noqa: E731
    groups = [{"params": {name: given[name]}, "lr": schedule if name == "s" else 9.0} for name in reversed(NAMES)]
    opt = gpuadam.Adam(groups)
    foreign_state.from_torch(opt, d, NAMES)
    assert [group["lr"] for group in opt.groups] == [schedule, 2.0, 1.0]
    assert [opt.state[name]["step"] for name in NAMES] == [7, 8, 9]


def test_a_callable_learning_rate_stays():
    opt = gpuadam.Adam(arrays(0), lr=lambda step: 0.25)
    foreign_state.from_torch(opt, torch_dict(), NAMES)
    assert callable(opt.groups[0]["lr"])


WRONG = {
    "no names": (lambda d: d, None, ValueError, "numbers and no names: give names="),
    "too few names": (lambda d: d, NAMES[:2], ValueError, "names must be 3 different names"),
    "a name twice": (lambda d: d, ["s", "s", "layer.w"], ValueError, "names must be 3 different names"),
    "another name": (
        lambda d: d,
        ["layer.w", "layer.b", "t"],
        ValueError,
        r"it lacks \['s'\] and only it has \['t'\]",
    ),
    "permuted names": (lambda d: d, ["layer.b", "layer.w", "s"], ValueError, "shape"),
    "no state_dict": (lambda d: {}, NAMES, ValueError, "state_dict of torch"),
    "state of nobody": (lambda d: d | {"state": d["state"] | {9: {}}}, NAMES, ValueError, r"state of \[9\]"),
    "two groups": (
        lambda d: d | {"param_groups": d["param_groups"] + [{"params": []}]},
        NAMES,
        ValueError,
        r"groups of \[3, 0\]",
    ),
    "amsgrad": (lambda d: torch_dict(amsgrad=True), NAMES, ValueError, "amsgrad and the like must agree"),
    "another dtype": (
        lambda d: spoiled(d, exp_avg=arrays(1, "f8")["layer.b"]),
        NAMES,
        TypeError,
        "float64 there and float32",
    ),
    "half a step": (lambda d: spoiled(d, step=1.5), NAMES, TypeError, "must be an integer"),
    "a list": (lambda d: spoiled(d, exp_avg=[1.0] * 5), NAMES, TypeError, "list, not an array"),
    "adamw": (lambda d: torch_dict(decoupled_weight_decay=True), NAMES, ValueError, "load Adam's state into Adam"),
    "a bad rate": (lambda d: torch_dict(lr=-1.0), NAMES, ValueError, "lr=-1"),
}


def spoiled(d, **changes):
    return d | {"state": d["state"] | {1: d["state"][1] | changes}}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_changes_nothing(what):
    spoil, names, error, match = WRONG[what]
    opt = gpuadam.Adam(arrays(0))
    before = content(opt), dict(opt.groups[0])
    with pytest.raises(error, match=match):
        foreign_state.from_torch(opt, spoil(torch_dict()), names)
    assert (content(opt), opt.groups[0], opt.steps) == (*before, 0)


def test_only_the_state_of_adam_is_exchanged():
    for function in (foreign_state.from_torch, foreign_state.from_optax, foreign_state.to_optax):
        with pytest.raises(TypeError, match="RAdam's state is not exchanged"):
            function(gpuadam.RAdam(arrays(0)), {})


def trained(torch, dtype, make="Adam", **options):
    """A torch optimizer after three steps, one parameter of which took one."""
    params = [torch.nn.Parameter(torch.from_numpy(a).to(dtype)) for a in arrays(0).values()]
    opt = getattr(torch.optim, make)(params, lr=0.1, **options)
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = None if k == 2 and step else torch.from_numpy(arrays(10 + step)[NAMES[k]]).to(dtype)
        opt.step()
    return params, opt


def bits(torch, tensor):
    return tensor.contiguous().view(torch.int16 if tensor.dtype is torch.bfloat16 else tensor.dtype).numpy().tobytes()


FORMS = [("float32", "Adam", {}), ("float64", "AdamW", {}), ("bfloat16", "Adam", {}), ("float32", "Adam", {"amsgrad": True})]


@pytest.mark.parametrize("dtype, make, options", FORMS)
def test_state_goes_from_torch_and_back_bit_for_bit(torch, dtype, make, options):
    params, theirs = trained(torch, getattr(torch, dtype), make, **options)
    own = {name: p.detach().clone() for name, p in zip(NAMES, params, strict=True)}
    state_dtype = "bfloat16" if dtype == "bfloat16" else None
    opt = getattr(gpuadam, make)(own, state_dtype=state_dtype, **options)
    foreign_state.from_torch(opt, theirs.state_dict(), NAMES)
    assert (opt.steps, opt.state["s"]["step"]) == (3, 1)
    there = foreign_state.to_torch(opt, NAMES)
    again = getattr(torch.optim, make)(params, lr=9.0)
    again.load_state_dict(there)
    assert again.param_groups[0]["lr"] == 0.1
    for p in params:
        one, other = theirs.state[p], again.state[p]
        assert one.keys() == other.keys() and float(one["step"]) == float(other["step"])
        assert all(bits(torch, one[key]) == bits(torch, other[key]) for key in one if key != "step")
        assert all(one[key].dtype is other[key].dtype for key in one)


def test_training_goes_on_where_torch_stopped(torch):
    params, theirs = trained(torch, torch.float32)
    own = {name: p.detach().clone().numpy() for name, p in zip(NAMES, params, strict=True)}
    opt = gpuadam.Adam(own)
    foreign_state.from_torch(opt, theirs.state_dict(), NAMES)
    for step in range(3, 6):
        for name, p in zip(NAMES, params, strict=True):
            p.grad = torch.from_numpy(arrays(10 + step)[name])
        theirs.step()
        opt.step(arrays(10 + step))
    for name, p in zip(NAMES, params, strict=True):
        # torch rounds some operations that are fused here: a few units in the last place of steps of size 0.1
        np.testing.assert_allclose(own[name], p.detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_what_torch_never_stepped_has_no_moments_here(torch):
    params = [torch.nn.Parameter(torch.ones(SHAPES[name])) for name in NAMES]
    theirs = torch.optim.Adam(params)
    params[0].grad = torch.ones(3, 4)
    theirs.step()
    opt = gpuadam.Adam(arrays(0))
    opt.state["s"]["m"][...] = 5
    foreign_state.from_torch(opt, theirs.state_dict(), NAMES)
    assert opt.state["s"]["step"] == 0 and not opt.state["s"]["m"].any() and opt.state["layer.w"]["step"] == 1
    assert set(foreign_state.to_torch(opt)["state"]) == {0}


def test_a_remainder_of_gpuadams_own_optimizer_for_torch_is_taken_too(torch):
    ours = importlib.import_module("gpuadam.torch")
    param = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.bfloat16))
    theirs = ours.Adam([param], lr=1e-3, master="remainder")
    param.grad = torch.full_like(param, 0.5)
    theirs.step()
    opt = gpuadam.Adam({"w": param.detach().clone()}, master="remainder")
    foreign_state.from_torch(opt, theirs.state_dict(), ["w"])
    found = theirs.state[param]["remainder"].numpy()
    assert found.any() and (opt.state["w"]["remainder"] == found).all() and opt.steps == 1


def test_a_state_dict_of_another_optimizer_of_torchs_is_refused_by_what_it_lacks(torch):
    param = torch.nn.Parameter(torch.ones(3))
    opt = gpuadam.Adam({"w": np.ones(3, "f4")})
    with pytest.raises(ValueError, match=r"no \['betas', 'eps'\]: it is not one of torch.optim.Adam or AdamW"):
        foreign_state.from_torch(opt, torch.optim.SGD([param], lr=0.1).state_dict(), ["w"])


def test_what_torch_would_cast_is_refused(torch):
    opt = gpuadam.Adam({"w": torch.ones(3, dtype=torch.bfloat16)})
    opt.state["w"]["step"] = 1
    with pytest.raises(TypeError, match="m of 'w' is float32, and torch would cast it to the parameter's bfloat16"):
        foreign_state.to_torch(opt)
    opt = gpuadam.Adam(arrays(0), ema_decay=0.9)
    opt.state["s"]["step"] = 1
    with pytest.raises(ValueError, match=r"\['ema'\], for which torch's Adam has no place"):
        foreign_state.to_torch(opt)
    opt = gpuadam.Adam(arrays(0))
    opt.state["s"]["step"] = 2**24 + 1
    with pytest.raises(ValueError, match="float32 count"):
        foreign_state.to_torch(opt)


# optax


class ScaleByAdamState(NamedTuple):
    count: Any
    mu: Any
    nu: Any


class ScaleByScheduleState(NamedTuple):
    count: Any


def nested(named):
    return {"layer": {"w": named["layer.w"], "b": named["layer.b"]}, "s": named["s"]}


def test_state_of_optax_is_taken_by_name_and_given_back():
    opt = gpuadam.Adam(arrays(0))
    adam = ScaleByAdamState(np.int32(4), nested(arrays(1)), nested(positive(2)))
    state = (adam, (), ScaleByScheduleState(np.int32(4)))
    foreign_state.from_optax(opt, state)
    assert opt.steps == 4 and {s["step"] for s in opt.state.values()} == {4}
    assert all(opt.state[name]["m"].tobytes() == a.tobytes() for name, a in arrays(1).items())
    zeros = {name: np.zeros_like(a) for name, a in arrays(0).items()}
    like = (ScaleByAdamState(np.int32(0), nested(zeros), nested(zeros)), (), ScaleByScheduleState(np.int32(0)))
    back = foreign_state.to_optax(opt, like)
    assert back[0].count == 4 and back[2].count == 4 and type(back[0]) is ScaleByAdamState
    assert back[0].nu["layer"]["w"].tobytes() == positive(2)["layer.w"].tobytes()
    assert not np.shares_memory(back[0].mu["s"], opt.state["s"]["m"])


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda s: (), ValueError, "one ScaleByAdamState"),
        (lambda s: (s, s), ValueError, "one ScaleByAdamState"),
        (lambda s: s._replace(mu={"s": s.mu["s"]}), ValueError, r"it lacks \['layer.w', 'layer.b'\]"),
        (lambda s: s._replace(nu=s.nu | {"t": 1}), ValueError, r"only it has \['t'\]"),
        (lambda s: s._replace(nu=s.nu | {"layer.w": 1}), ValueError, "two parameters of the tree get the same name"),
        (lambda s: s._replace(mu=nested(arrays(1, "f8"))), TypeError, "float64 there and float32 here"),
        (lambda s: s._replace(mu=s.mu | {"s": np.ones(1, "f4")}), ValueError, "shape"),
        (lambda s: s._replace(mu=s.mu | {"s": 1.0}), TypeError, "float, not an array"),
        (lambda s: s._replace(count=-1), ValueError, "negative"),
    ],
)
def test_what_does_not_fit_from_optax_changes_nothing(change, error, match):
    opt = gpuadam.Adam(arrays(0))
    before = content(opt)
    with pytest.raises(error, match=match):
        foreign_state.from_optax(opt, change(ScaleByAdamState(3, nested(arrays(1)), nested(positive(2)))))
    assert content(opt) == before


def test_one_count_is_needed_for_optax():
    opt = gpuadam.Adam(arrays(0))
    opt.state["s"]["step"] = 2
    like = ScaleByAdamState(0, nested(arrays(1)), nested(arrays(1)))
    with pytest.raises(ValueError, match=r"one step count, .* here they are \[0, 2\]"):
        foreign_state.to_optax(opt, like)
    with pytest.raises(ValueError, match=r"has \['ema'\]"):
        foreign_state.to_optax(gpuadam.Adam(arrays(0), ema_decay=0.5), like)
    with pytest.raises(TypeError, match="is float64 of shape"):
        foreign_state.to_optax(gpuadam.Adam(arrays(0)), like._replace(nu=nested(arrays(1, "f8"))))


def narrow_of(library, array):
    """Return an array of a library in bfloat16, or float16 where the library has no other."""
    module = libraries.imported(library)
    return module.from_numpy(array).bfloat16() if library == "torch" else array.astype(getattr(module, "bfloat16", "f2"))


@pytest.mark.parametrize("library", ["torch", "ml_dtypes", "numpy"])
def test_a_narrower_m_is_widened_and_the_advice_of_an_error_leads_there(library):
    """As with optax's mu_dtype: m in bfloat16 beside v in float32."""
    mu = {name: narrow_of(library, a) for name, a in arrays(1).items()}
    state = ScaleByAdamState(4, nested(mu), nested(positive(2)))
    narrow, wide = (gpuadam.Adam(arrays(0), state_dtype=state_dtype) for state_dtype in ("bfloat16", "float32"))
    match = r"is float(32|16) there and bfloat16 here. Nothing is rounded: make the optimizer with state_dtype='float32'"
    before = content(narrow)
    with pytest.raises(TypeError, match=match):
        foreign_state.from_optax(narrow, state)
    assert content(narrow) == before
    foreign_state.from_optax(wide, state)
    for name, a in mu.items():
        exact = a.float().numpy() if library == "torch" else a.astype("f4")
        assert wide.state[name]["m"].tobytes() == exact.tobytes()
        assert wide.state[name]["v"].tobytes() == positive(2)[name].tobytes()
    if library == "numpy":
        with pytest.raises(TypeError, match=r"float16 of shape .* Nothing is rounded: give a `like` of the dtype here"):
            foreign_state.to_optax(wide, state)


def test_state_of_torch_in_bfloat16_is_widened_too(torch):
    params, theirs = trained(torch, torch.bfloat16)
    opt = gpuadam.Adam({name: p.detach().clone() for name, p in zip(NAMES, params, strict=True)})
    foreign_state.from_torch(opt, theirs.state_dict(), NAMES)
    for name, p in zip(NAMES, params, strict=True):
        assert opt.state[name]["v"].tobytes() == theirs.state[p]["exp_avg_sq"].float().numpy().tobytes()


def test_integers_are_no_moments_and_narrower_state_is_not_made():
    opt = gpuadam.Adam(arrays(0))
    with pytest.raises(TypeError, match=r"is int32 there and float32 here. Moments are floats"):
        foreign_state.from_torch(opt, spoiled(torch_dict(), exp_avg=np.ones(5, "i4")), NAMES)
    with pytest.raises(TypeError, match=r"float64 there and float32 here. Nothing is rounded.*state_dtype='float64'"):
        foreign_state.from_torch(opt, spoiled(torch_dict(), exp_avg=arrays(1, "f8")["layer.b"]), NAMES)


def test_a_group_without_bias_correction_is_refused_by_name():
    opt = gpuadam.Adam(arrays(0))
    foreign_state.from_torch(opt, torch_dict(bias_correction=True), NAMES)
    with pytest.raises(ValueError, match="bias_correction=False in a saved group"):
        foreign_state.from_torch(opt, torch_dict(bias_correction=False), NAMES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", ["adam", "adamw"])
def test_state_goes_from_optax_and_back_bit_for_bit(dtype, make):
    optax = libraries.imported("optax", reason="optax is not installed; its state is then imitated only")
    import jax
    import jax.numpy as jnp

    tx = getattr(optax, make)(optax.linear_schedule(0.1, 0.0, 10))
    params = nested({name: jnp.asarray(a, dtype) for name, a in arrays(0).items()})
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(nested({n: jnp.asarray(a, dtype) for n, a in arrays(5 + step).items()}), state, params)
        params = optax.apply_updates(params, updates)
    zeros = {name: np.zeros(shape, "u2" if dtype == "bfloat16" else "f4") for name, shape in SHAPES.items()}
    own = {name: gpuadam.Bits(a, "bfloat16") for name, a in zeros.items()} if dtype == "bfloat16" else zeros
    opt = gpuadam.Adam(own, state_dtype=dtype)
    foreign_state.from_optax(opt, state)
    assert opt.steps == 3
    back = foreign_state.to_optax(opt, tx.init(params))
    one, other = jax.tree.flatten(state), jax.tree.flatten(back)
    assert one[1] == other[1]
    for a, b in zip(one[0], other[0], strict=True):
        assert isinstance(b, jax.Array) and a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    tx.update(params, back, params)
