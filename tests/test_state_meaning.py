"""The numbers of a state mean the same to every optimizer that takes it: for all pairs of options, and with torch."""

import collections
import copy
import functools
import itertools
import json
import pickle

import libraries
import numpy as np
import pytest
from test_foreign_state import ScaleByAdamState

import gpuadam
from gpuadam import foreign_state, reference, testing
from gpuadam.family import AdaMax, NAdam, RAdam

CLASSES = {"adam": gpuadam.Adam, "nadam": NAdam, "radam": RAdam, "adamax": AdaMax}
DECOUPLED = {name: type(f"Decoupled{cls.__name__}", (cls,), {"decoupled": True}) for name, cls in CLASSES.items()}
SETTINGS = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
STEPS, MORE = 5, 2
# of the largest step, lr: bfloat16 numbers have 8 bits and are rounded in each step, 8-bit codes are 2 to 4 % apart
TOLERANCES = {None: 1e-4, "float64": 1e-4, "bfloat16": 0.1, "8bit": 0.4}


def kinds():
    """Return all that an optimizer is made with here: (algorithm, decoupled, dtype of params, other options)."""
    rules = [("adam", {"formula": f, "amsgrad": a}) for f in ("torch", "apex", "eps-hat", "optax") for a in (False, True)]
    rules += [(algorithm, {}) for algorithm in ("nadam", "radam", "adamax")]
    rest = [(False, "float32", {}), (True, "float32", {"ema_decay": 0.5, "zero_grad": True})]
    of_bfloat16 = (True, "bfloat16", {"master": "remainder"})
    listed = []
    for (algorithm, rule), state_dtype in itertools.product(rules, TOLERANCES):
        if state_dtype == "8bit" and (rule.get("amsgrad") or algorithm == "adamax"):
            continue  # there is no such state
        for decoupled, dtype, options in (*rest, of_bfloat16) if state_dtype is None else rest:
            listed.append((algorithm, decoupled, dtype, {**rule, "state_dtype": state_dtype, **options}))
    return listed


def made(kind):
    """Return an optimizer of a kind, and its parameter as the array under it."""
    algorithm, decoupled, dtype, options = kind
    param = np.linspace(-1, 1, 40, dtype="f4").reshape(8, 5)
    array = (param.view("u4") >> 16).astype("u2") if dtype == "bfloat16" else param
    given = gpuadam.Bits(array, "bfloat16") if dtype == "bfloat16" else array
    make = (DECOUPLED if decoupled else CLASSES)[algorithm]
    return make({"w": given}, **SETTINGS, **options), array


def gradient(step):
    return (np.random.default_rng(step).standard_normal((8, 5)) * 0.01).astype("f4")


def in_float64(array, state):
    """Return a parameter in float64. state: its own, with the remainder of a bfloat16 parameter."""
    if array.dtype == "u2":
        array = ((array.astype("i4") << 16) + state["remainder"]).view("f4")
    return array.astype("f8")


class Trained:
    """An optimizer after some steps: its state, its parameter, and the gradients with their decay, in float64."""

    def __init__(self, kind):
        opt, array = made(kind)
        self.seen = []
        for step in range(STEPS):
            g = gradient(step).astype("f8")
            self.seen.append(g if kind[1] else g + SETTINGS["weight_decay"] * in_float64(array, opt.state["w"]))
            opt.step({"w": gradient(step)})
        self.state_dict, self.param = copy.deepcopy(opt.state_dict()), array.copy()
        for step in range(STEPS, STEPS + MORE):
            opt.step({"w": gradient(step)})
        self.after = array.copy()


trained = functools.cache(lambda k: Trained(kinds()[k]))


def expected(kind, one):
    """Return the parameter after MORE steps, in float64, of an optimizer of a kind that would have seen all these gradients."""
    algorithm, decoupled, _, options = kind
    rule = {"algorithm": algorithm, "formula": options.get("formula", "torch")}
    m, v = np.zeros((2, 8, 5))
    max_v = np.zeros((8, 5)) if options.get("amsgrad") else None
    for step, g in enumerate(one.seen, 1):
        settings = SETTINGS | {"weight_decay": 0.0}
        _, m, v, max_v = reference.adam_step(np.zeros((8, 5)), g, m, v, step, max_v=max_v, **settings, **rule)
    param = in_float64(one.param, one.state_dict["state"]["w"])
    for step in range(STEPS, STEPS + MORE):
        settings = SETTINGS | rule | {"decoupled": decoupled, "max_v": max_v}
        param, m, v, max_v = reference.adam_step(param, gradient(step), m, v, step + 1, **settings)
    return param


def check_goes_on(opt, array, kind, one):
    """Check that a loaded optimizer of a kind takes the steps of one that would have been trained itself."""
    array[...] = one.param
    for step in range(STEPS, STEPS + MORE):
        opt.step({"w": gradient(step)})
    tolerance = TOLERANCES[kind[3]["state_dtype"]] * SETTINGS["lr"]
    after = in_float64(array, opt.state["w"])
    np.testing.assert_allclose(after, expected(kind, one), rtol=1e-6, atol=tolerance, err_msg=f"{kind}")


def same_numbers(one, other):
    """Whether two kinds have the same arrays, of the same meaning."""
    arrays, meanings = [], []
    for algorithm, _, _, options in (one, other):
        amsgrad = options.get("amsgrad", False)
        arrays.append((amsgrad, *map(options.get, ("state_dtype", "master", "ema_decay"))))
        meanings.append((algorithm == "adamax", amsgrad and options["formula"] == "optax"))
    return arrays[0] == arrays[1] and meanings[0] == meanings[1]


def test_a_state_dict_is_taken_by_all_to_whom_it_means_the_same_and_by_no_other(examples):
    few = [kind for kind in kinds() if kind[3]["state_dtype"] is None and not kind[1]]  # every algorithm and formula
    listed, counts = examples(few, kinds()), collections.Counter()
    for loader in listed:
        opt, array = made(loader)
        for saver in listed:
            one = trained(kinds().index(saver))
            try:
                opt.load_state_dict(one.state_dict)
            except ValueError as error:
                meaning = "neither can become the other" in str(error)
                counts["refused, of another meaning" if meaning else "refused, of other arrays"] += 1
                assert not same_numbers(saver, loader), (saver, loader, str(error))
                continue
            counts["accepted"] += 1
            assert same_numbers(saver, loader), (saver, loader)
            check_goes_on(opt, array, loader, one)
            if saver is loader:
                testing.assert_same_bits(array, one.after)
    print(f"{len(listed) ** 2:,} pairs of options: {dict(counts)}; accepted and wrong: 0")
    assert counts["refused, of another meaning"] > len(listed)


def test_a_state_dict_that_does_not_say_what_it_means_is_refused_with_what_to_add():
    opt, _ = made(("adamax", False, "float32", {}))
    older = {key: value for key, value in opt.state_dict().items() if key not in ("algorithm", "formula")}
    with pytest.raises(ValueError, match=r"no \['algorithm', 'formula'\], and does not say what its moments mean.*add"):
        opt.load_state_dict(older)
    opt.load_state_dict(older | {"algorithm": "adamax", "formula": "torch"})
    with pytest.raises(ValueError, match="the state_dict's algorithm='lion' must be one of"):
        opt.load_state_dict(opt.state_dict() | {"algorithm": "lion"})


def test_a_copied_and_a_pickled_optimizer_keep_what_their_state_means():
    for opt in (made(("adamax", False, "float32", {}))[0], made(("adam", False, "float32", {"formula": "optax"}))[0]):
        for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert again.options == opt.options
            again.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))


# Other libraries


def foreign(amsgrad, state_dtype):
    """Return what torch and optax may hold after the same steps: a Trained, and its arrays."""
    options = {"formula": "torch", "amsgrad": amsgrad, "state_dtype": state_dtype}
    k = kinds().index(("adam", False, "float32", options))
    return trained(k), trained(k).state_dict["state"]["w"]


def torch_dict(state, amsgrad):
    """Return the state_dict of torch.optim.Adam with the arrays of a state."""
    moments = {theirs: state[ours] for ours, theirs in foreign_state.TORCH.items() if ours in state}
    group = SETTINGS | {"amsgrad": amsgrad, "maximize": False, "params": [0]}
    return {"state": {0: {"step": float(state["step"])} | moments}, "param_groups": [group]}


def loaders(counts, load):
    """Yield (kind, optimizer, parameter, Trained, its arrays) of the pairs of an optimizer of Adam's and state that it takes."""
    of_adam = [kind for kind in kinds() if kind[0] == "adam"]
    for kind, amsgrad, state_dtype in itertools.product(of_adam, (False, True), (None, "float64")):
        opt, array = made(kind)
        one, state = foreign(amsgrad, state_dtype)
        try:
            load(opt, state, amsgrad)
        except (TypeError, ValueError) as error:
            counts["refused"] += 1
            assert str(error)
            continue
        counts["accepted"] += 1
        yield kind, opt, array, one


@pytest.mark.parametrize("library", ["torch", "optax"])
def test_foreign_state_goes_on_as_it_would_have_there_or_is_refused(library):
    def from_torch(opt, state, amsgrad):
        foreign_state.from_torch(opt, torch_dict(state, amsgrad), ["w"])

    def from_optax(opt, state, amsgrad):
        names = {"mu": {"w": state["m"]}, "nu": {"w": state["v"]}}
        foreign_state.from_optax(opt, ScaleByAdamState(state["step"], **names))

    counts = collections.Counter()
    formulas = set()
    for kind, opt, array, one in loaders(counts, from_torch if library == "torch" else from_optax):
        check_goes_on(opt, array, kind, one)
        formulas.add((kind[3]["formula"], kind[3]["amsgrad"]))
    print(f"{library}: {dict(counts)}; accepted and wrong: 0")
    narrow = {(formula, False) for formula in ("torch", "apex", "optax")}
    wide = {("torch", True), ("apex", True)} if library == "torch" else {("eps-hat", False)}
    assert formulas == narrow | wide


def test_what_torch_is_given_goes_on_there_or_is_refused():
    torch = libraries.imported("torch")
    counts = collections.Counter()
    for k, kind in enumerate(kinds()):
        opt, _ = made(kind)
        opt.load_state_dict(trained(k).state_dict)
        try:
            there = foreign_state.to_torch(opt)
        except (TypeError, ValueError):
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        param = torch.nn.Parameter(torch.from_numpy(trained(k).param.copy()))
        theirs = (torch.optim.AdamW if kind[1] else torch.optim.Adam)([param])
        theirs.load_state_dict(there)
        for step in range(STEPS, STEPS + MORE):
            param.grad = torch.from_numpy(gradient(step))
            theirs.step()
        np.testing.assert_allclose(param.detach(), expected(kind, trained(k)), rtol=1e-6, atol=1e-5, err_msg=f"{kind}")
    print(f"to torch: {dict(counts)}; accepted and wrong: 0")
    assert counts["accepted"] == 5  # torch, apex, each with amsgrad, and optax


def test_the_maximum_of_optax_and_an_eps_of_another_place_are_named():
    opt, _ = made(("adam", False, "float32", {"formula": "optax", "amsgrad": True}))
    with pytest.raises(ValueError, match=r"max_v of .* with formula='torch' is the maximum of v, .*formula='optax'"):
        foreign_state.from_torch(opt, torch_dict(opt.state["w"] | {"step": 1}, True), ["w"])
    for options in ({"formula": "eps-hat"}, {"formula": "optax", "eps_root": 1e-9}):
        opt, _ = made(("adam", False, "float32", options))
        with pytest.raises(ValueError, match="in which eps is not what it is in torch"):
            foreign_state.from_torch(opt, torch_dict(opt.state["w"], False), ["w"])


@pytest.mark.parametrize("name", ["ScaleByBeliefState", "ScaleByNovogradState"])
def test_states_of_optax_with_the_same_fields_and_another_nu_are_refused(name):
    state = collections.namedtuple(name, ["count", "mu", "nu"])(
        1, {"w": np.zeros((8, 5), "f4")}, {"w": np.zeros((8, 5), "f4")}
    )
    with pytest.raises(ValueError, match=f"must have one ScaleByAdamState.*{name}"):
        foreign_state.from_optax(made(kinds()[0])[0], state)


def test_a_folder_of_state_belongs_to_an_algorithm(tmp_path):
    class OffloadAdaMax(gpuadam.OffloadAdam):
        algorithm = "adamax"

    with gpuadam.OffloadAdam({"w": np.ones(3, "f4")}, state=tmp_path) as opt:
        opt.step({"w": np.ones(3, "f4")})
    with pytest.raises(ValueError, match="made with algorithm='adam', this optimizer with algorithm='adamax'"):
        OffloadAdaMax({"w": np.ones(3, "f4")}, state=tmp_path)
    # folders of older versions do not name the algorithm, they had Adam's alone, and have no checksum
    content = json.loads((tmp_path / "state.json").read_text())
    del content["options"]["algorithm"], content["crc32"]
    (tmp_path / "state.json").write_text(json.dumps(content))
    with gpuadam.OffloadAdam({"w": np.ones(3, "f4")}, state=tmp_path) as opt:
        assert opt.steps == 1
    with pytest.raises(ValueError, match="made with algorithm='adam'"):
        OffloadAdaMax({"w": np.ones(3, "f4")}, state=tmp_path)
