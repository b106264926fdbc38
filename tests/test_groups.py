"""Which parameters decay, by patterns of their names; and gradients of such groups as one dict."""

import numpy as np
import pytest
from cases import different_bits

import gpuadam


def params():
    names = ("embed.weight", "dense.weight", "dense.bias", "norm1.scale", "norm1.bias", "head.Bias")
    return {name: np.full(3, k + 1, "f4") for k, name in enumerate(names)}


def exempt(*patterns):
    """The names that do not decay."""
    return list(gpuadam.decay_groups(params(), no_decay=patterns)[1]["params"])


def test_a_name_that_matches_a_pattern_does_not_decay():
    decays, does_not = gpuadam.decay_groups(params(), no_decay=("*.bias", "norm*"), weight_decay=0.2)
    assert list(decays["params"]) == ["embed.weight", "dense.weight", "head.Bias"] and decays["weight_decay"] == 0.2
    assert list(does_not["params"]) == ["dense.bias", "norm1.scale", "norm1.bias"] and does_not["weight_decay"] == 0.0


def test_patterns_are_those_of_a_shell_and_case_sensitive():
    assert exempt("*bias") == ["dense.bias", "norm1.bias"]
    assert exempt("*[bB]ias") == ["dense.bias", "norm1.bias", "head.Bias"]
    assert exempt("norm?.*") == ["norm1.scale", "norm1.bias"]
    assert exempt("dense.weight") == ["dense.weight"]
    assert exempt() == []


def test_one_string_is_one_pattern():
    _, does_not = gpuadam.decay_groups(params(), "*.bias")
    assert list(does_not["params"]) == ["dense.bias", "norm1.bias"]


def test_the_arrays_are_the_callers():
    given = params()
    for group in gpuadam.decay_groups(given, "*.bias"):
        assert all(group["params"][name] is given[name] for name in group["params"])


def test_only_what_decays_decays():
    given = params()
    opt = gpuadam.AdamW(gpuadam.decay_groups(given, ("*.bias", "norm*"), weight_decay=0.5), lr=0.1)
    assert [group["names"] for group in opt.groups] == [
        ["embed.weight", "dense.weight", "head.Bias"],
        ["dense.bias", "norm1.scale", "norm1.bias"],
    ]
    opt.step({name: np.zeros(3, "f4") for name in given})
    for name, start in params().items():
        decays = name in ("embed.weight", "dense.weight", "head.Bias")
        np.testing.assert_allclose(given[name], start * (0.95 if decays else 1), rtol=1e-6)


def test_all_or_none_may_be_exempt():
    for patterns in ("*", ()):
        given = params()
        opt = gpuadam.AdamW(gpuadam.decay_groups(given, patterns, weight_decay=0.5), lr=0.1)
        opt.step({name: np.zeros(3, "f4") for name in given})
        assert (given["dense.bias"] == params()["dense.bias"]).all() == (patterns == "*")
        opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((params(), ("*.bias", "nrom*")), ValueError, r"no parameter's name matches 'nrom\*'; there are \['embed.weight'"),
        ((params(), "*.BIAS"), ValueError, r"'\*.BIAS'"),
        (({f"w{k}": 0 for k in range(20)}, "b*"), ValueError, r"'w11'\] and 8 more"),
        (({}, "b*"), ValueError, "no parameter's name matches"),
        ((list(params().values()), "b*"), TypeError, "params is a list; patterns need names"),
        (({1: np.ones(3)}, "b*"), TypeError, "must be strings, not 1"),
        ((params(), ("*.bias", None)), TypeError, "must be strings, not None"),
        ((params(), None), TypeError, "no_decay must be patterns of names, not None"),
        ((params(), "*.bias", -0.1), ValueError, "weight_decay=-0.1"),
        ((params(), "*.bias", "0.1"), TypeError, "weight_decay"),
    ],
)
def test_what_is_wrong_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        gpuadam.decay_groups(*arguments)


# Gradients of groups with names, as one dict


def grads():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(3).astype("f4") for name in params()}


def test_one_dict_of_gradients_is_as_good_as_one_for_each_group():
    one, other = params(), params()
    groups = gpuadam.decay_groups(other, "*.bias")
    gpuadam.AdamW(gpuadam.decay_groups(one, "*.bias")).step(grads())
    gpuadam.AdamW(groups).step([{name: grads()[name] for name in group["params"]} for group in groups])
    assert all(different_bits(one[name], other[name]) == 0 for name in one)


def test_none_in_one_dict_skips_its_parameter():
    given = params()
    opt = gpuadam.Adam(gpuadam.decay_groups(given, "*.bias"))
    opt.step(grads() | {"dense.weight": None})
    assert (given["dense.weight"] == params()["dense.weight"]).all() and opt.state["dense.bias"]["step"] == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: {name: grad for name, grad in g.items() if name != "dense.bias"},
        lambda g: g | {"strange": np.ones(3, "f4")},
    ],
)
def test_one_dict_with_other_names_is_refused(spoil):
    given = params()
    opt = gpuadam.Adam(gpuadam.decay_groups(given, "*.bias"))
    with pytest.raises(ValueError, match="grads must be a dict with the names"):
        opt.step(spoil(grads()))
    assert all((given[name] == start).all() for name, start in params().items()) and opt.steps == 0


def test_of_many_names_the_message_says_which_differ():
    given = {f"layers.{k}.weight": np.ones(1, "f4") for k in range(500)}
    others = {name: np.ones(1, "f4") for name in given if name != "layers.7.weight"} | {"layer.7.weight": np.ones(1, "f4")}
    with pytest.raises(ValueError, match="and 488 more") as error:
        gpuadam.Adam(given).step(others)
    assert str(error.value).endswith("it lacks ['layers.7.weight'] and only it has ['layer.7.weight']")
    assert len(str(error.value)) < 500


def test_groups_without_names_take_no_dict():
    p = params()
    opt = gpuadam.Adam([{"params": {"w": p["dense.weight"]}}, {"params": [p["dense.bias"]]}])
    with pytest.raises(ValueError, match="grads must be a list of 2 entries"):
        opt.step({"w": np.ones(3, "f4"), "1": np.ones(3, "f4")})


def test_param_copies_of_such_groups_may_be_one_dict_too():
    copies = {name: np.zeros(3, "f2") for name in params()}
    gpuadam.Adam(gpuadam.decay_groups(params(), "*.bias"), param_copies=copies)
    with pytest.raises(ValueError, match="param_copies must be a dict with the names"):
        gpuadam.Adam(gpuadam.decay_groups(params(), "*.bias"), param_copies={"dense.bias": np.zeros(3, "f2")})
