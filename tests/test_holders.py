"""A parameter that a program has put another array in the place of is noticed, because a step would update the old one."""

import copy
import pickle

import numpy as np
import pytest

import gpuadam


def ones(n=3):
    return np.ones(n, "float32")


def as_a_dict():
    params = {"a": ones(2), "w": ones()}
    return params, params, "w"


def as_a_list():
    params = [ones(2), ones()]
    return params, params, 1


def in_groups():
    params = {"w": ones()}
    return [{"params": [ones(2)]}, {"params": params, "lr": 0.1}], params, "w"


def as_a_list_in_groups():
    params = [ones()]
    return [{"params": {"a": ones(2)}}, {"params": params}], params, 0


def in_decay_groups():
    params = {"a": ones(2), "w": ones()}
    return gpuadam.decay_groups(params, "w"), params, "w"


GIVEN = [as_a_dict, as_a_list, in_groups, as_a_list_in_groups, in_decay_groups]


def gradients(opt):
    """Return gradients of ones in the structure of an optimizer's parameters."""
    of_groups = [
        [np.ones_like(p) for p in group["params"]]
        if structure.kind == "a sequence"
        else {name: np.ones_like(p) for name, p in zip(group["names"], group["params"], strict=True)}
        for group, structure in zip(opt.groups, opt.arrangement.structures, strict=True)
    ]
    return of_groups if opt.arrangement.in_groups else of_groups[0]


def adam(given, tmp_path):
    return gpuadam.Adam(given)


def offloaded(given, tmp_path):
    return gpuadam.OffloadAdam(given, state=tmp_path / "state")


def sharded(given, tmp_path):
    return gpuadam.ShardedAdam(given, gpuadam.transports.Local())


def loaded(given, tmp_path):
    gpuadam.Adam(given).save(tmp_path / "file")
    return gpuadam.load(tmp_path / "file", given)


@pytest.mark.parametrize("make", [adam, offloaded, sharded, loaded])
@pytest.mark.parametrize("given", GIVEN)
def test_another_array_in_its_place_stops_the_step(given, make, tmp_path):
    params, holder, key = given()
    opt = make(params, tmp_path)
    opt.step(gradients(opt))
    old, before, moments = holder[key], holder[key].copy(), copy.deepcopy(opt.state_dict()) if make is adam else None
    holder[key] = holder[key] * 2
    other = r"optimizer.replace\(" if make in (adam, loaded) else "make another optimizer"
    with pytest.raises(
        ValueError,
        match=rf"params\[{key!r}\] is no longer the array .* in place.*\[\.\.\.\] = x.*another array: {other}",
    ):
        opt.step(gradients(opt))
    assert (old == before).all() and opt.steps == 1
    if moments:
        assert all((opt.state[name]["m"] == state["m"]).all() for name, state in moments["state"].items())
    holder[key] = old
    opt.step(gradients(opt))
    assert opt.steps == 2 and (old < before).all()


def test_what_is_no_array_is_noticed_too():
    params = {"w": ones()}
    opt = gpuadam.Adam(params)
    params["w"] = 3.0
    with pytest.raises(ValueError, match="holds another object there, a float"):
        opt.step({"w": ones()})


def test_writing_in_place_goes_on():
    params = {"w": ones(), "s": np.ones((), "float32")}
    opt = gpuadam.Adam(params)
    params["w"] *= 2
    params["w"][...] = params["w"].clip(0, 1)
    params["s"] *= 2
    opt.step({"w": ones(), "s": np.ones((), "float32")})
    assert opt.steps == 1


def test_a_view_of_the_whole_array_is_the_array():
    params = {"w": ones(), "b": ones(2)}
    opt = gpuadam.Adam(params)
    params["w"] = params["w"][:]
    opt.step({"w": ones(), "b": ones(2)})
    assert (params["w"] < 1).all()
    params["w"] = params["w"][::-1]
    with pytest.raises(ValueError, match="no longer"):
        opt.step({"w": ones(), "b": ones(2)})


def test_a_dict_may_get_more_arrays_or_lose_one_or_have_another_order():
    params = {"w": ones(), "b": ones(2)}
    opt, grads = gpuadam.Adam(params), {"w": ones(), "b": ones(2)}
    params["fixed"] = ones(4)
    opt.step(grads)
    params["w"] = params.pop("w")
    opt.step(grads)
    del params["b"]
    opt.step(grads)
    params["w"] = ones()
    with pytest.raises(ValueError, match="no longer"):
        opt.step(grads)


def test_a_dict_of_its_own_is_not_the_programs():
    params = {"w": ones()}
    opt = gpuadam.Adam(dict(params))
    params["w"] = ones()
    opt.step({"w": ones()})
    assert opt.steps == 1


def test_a_replaced_parameter_is_looked_at_from_then_on():
    params = {"w": ones((3, 2)), "b": ones(2)}
    opt = gpuadam.Adam(params)
    params["w"] = ones((4, 2))
    opt.replace("w", params["w"], [0, 1, 2, -1])
    opt.step({"w": ones((4, 2)), "b": ones(2)})
    params["w"] = params["w"] * 2
    with pytest.raises(ValueError, match="no longer"):
        opt.step({"w": ones((4, 2)), "b": ones(2)})


def test_a_dict_that_does_not_follow_is_let_go():
    params = {"w": ones((3, 2)), "b": ones(2)}
    opt = gpuadam.Adam(params)
    opt.replace("w", ones((4, 2)), [0, 1, 2, -1])
    opt.step({"w": ones((4, 2)), "b": ones(2)})
    assert not opt.arrangement.places  # so that nothing of it stays in memory


def test_parameters_that_come_and_go_are_looked_at_while_they_are_there():
    params = {"w": ones()}
    opt = gpuadam.Adam(params)
    params["b"] = ones(2)
    opt.add("b", params["b"])
    opt.step({"w": ones(), "b": ones(2)})
    b, params["b"] = params["b"], ones(2)
    with pytest.raises(ValueError, match=r"params\['b'\] is no longer"):
        opt.step({"w": ones(), "b": ones(2)})
    params["b"] = b
    opt.remove("w")
    params["w"] = ones()
    opt.step({"b": ones(2)})


def test_a_parameter_that_comes_to_an_empty_group_is_looked_at():
    empty = {}
    opt = gpuadam.Adam([{"params": empty}, {"params": {"w": ones()}}])
    empty["b"] = ones(2)
    opt.add("b", empty["b"], 0)
    opt.step({"w": ones(), "b": ones(2)})
    empty["b"] = empty["b"] * 2
    with pytest.raises(ValueError, match=r"params\['b'\] is no longer"):
        opt.step({"w": ones(), "b": ones(2)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copied_optimizer_has_its_own_arrays(copied):
    params = {"w": ones()}
    twin = copied(gpuadam.Adam(params))
    params["w"] = ones()
    twin.step({"w": ones()})
    assert twin.steps == 1


def test_a_gpu_array_in_its_place_is_noticed(library):
    params = {"w": library.array(np.ones(3, "float32"))}
    opt = gpuadam.Adam(params)
    params["w"] = library.array(np.ones(3, "float32"))
    with pytest.raises(ValueError, match="no longer"):
        opt.step({"w": library.array(np.ones(3, "float32"))})
