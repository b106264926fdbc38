"""Messages of errors stay short, whatever users give: names, values and arrays of any size."""

import ast
import contextlib
import copy
import inspect
from pathlib import Path

import libraries
import numpy as np
import pytest
from cases import few

import gpuadam
import gpuadam.foreign_state
import gpuadam.planning
import gpuadam.testing
from gpuadam import transports
from gpuadam.groups import some
from gpuadam.kernels.messages import shortened, shown

LONGEST = 4000
ROOT = Path(gpuadam.__file__).parent


class Huge:
    """Any object whose text is long."""

    def __repr__(self):
        return "x" * 300_000


class Broken:
    def __repr__(self):
        raise RuntimeError("it has no text")


LONG = "n" * 300_000
NAMES = [f"layer.{k}.{'n' * 50}" for k in range(2000)]
VALUES = {
    "a long text": LONG,
    "a long list": list(range(20_000)),
    "a dict of long names": {LONG: 1, LONG + "b": 2},
    "a dict of many names": dict.fromkeys(NAMES, 1),
    "a dict of many arrays": {name: np.ones(1, "f4") for name in NAMES[:200]},
    "a set": {*range(20_000)},
    "a huge number": 10**4200,
    "a huge negative number": -(10**4200),
    "a number that has no text": 10**5000,
    "an object with a long text": Huge(),
    "an object without a text": Broken(),
    "an array of records": np.zeros(2, [(f"field {k} {'n' * 50}", "f4") for k in range(2000)]),
    "an array of objects": np.array([Huge(), Huge()], object),
    "a list of objects": [Huge()] * 100,
}


SOME = {what: VALUES[what] for what in ("a long text", "a dict of long names", "a huge number", "an array of records")}


class Messages:
    """Collects the errors of calls, and refuses a long one."""

    def __init__(self):
        self.count = 0

    @contextlib.contextmanager
    def of(self, what):
        try:
            yield
        except OSError:  # the system's own words: a name of a file that is too long, for one
            self.count += 1
        except Exception as error:  # noqa: BLE001 - of any kind: their texts are what is looked at
            text = str(error)
            assert len(text) <= LONGEST, f"{what}: {type(error).__name__} of {len(text):,} characters: {text[:300]}"
            self.count += 1


@pytest.fixture
def messages():
    return Messages()


def arrays(*names, n=1):
    return {name: np.ones(n, "f4") for name in names}


def adam(**options):
    return gpuadam.Adam(arrays("w"), **options)


def forced(name):
    with gpuadam.use_backend(name):
        pass


def planned(world=1, model_parallel=1, reserve=0, budget=1 << 28, bucket=1 << 25, collective="ring"):
    """Make a plan with Settings of these."""
    settings = gpuadam.planning.Settings(world, model_parallel, reserve, budget, bucket, collective)
    return gpuadam.planning.plan(gpuadam.planning.update([1000]), next(iter(gpuadam.planning.MACHINES.values())), settings)


def ones():
    return np.ones(1, "f4")


# what is called -> the arguments of a call that is right, by name
CALLS = {
    gpuadam.adam_step: lambda: {"param": ones(), "grad": ones(), "m": ones(), "v": ones(), "step": 1},
    gpuadam.Adam: lambda: {"params": arrays("w")},
    gpuadam.NAdam: lambda: {"params": arrays("w")},
    gpuadam.ShardedAdam: lambda: {"params": arrays("w"), "transport": transports.Local()},
    gpuadam.OffloadAdam: lambda: {"params": arrays("w")},
    gpuadam.decay_groups: lambda: {"params": arrays("w"), "no_decay": "w"},
    gpuadam.load: lambda: {"path": "nowhere", "params": arrays("w")},
    gpuadam.load_sharded: lambda: {"path": "nowhere", "params": arrays("w"), "transport": transports.Local()},
    gpuadam.global_norm: lambda: {"grads": arrays("w")},
    gpuadam.flatten: lambda: {"arrays": arrays("w")},
    forced: lambda: {"name": "numba-cpu"},
    gpuadam.testing.assert_same_bits: lambda: {"actual": arrays("w"), "expected": arrays("w")},
    gpuadam.testing.inject: lambda: {"grads": arrays("w"), "value": 1.0},
    gpuadam.testing.Faults: lambda: {},
    gpuadam.testing.Reference: lambda: {"params": arrays("w")},
    gpuadam.foreign_state.from_torch: lambda: {"opt": adam(), "state_dict": {}},
    gpuadam.foreign_state.to_torch: lambda: {"opt": adam()},
    gpuadam.foreign_state.from_optax: lambda: {"opt": adam(), "state": ()},
    gpuadam.foreign_state.to_optax: lambda: {"opt": adam(), "like": ()},
    adam().step: lambda: {"grads": arrays("w")},
    adam().load_state_dict: lambda: {"state_dict": adam().state_dict()},
    adam().save: lambda: {"path": "nowhere/at/all"},
    gpuadam.OffloadAdam(arrays("w")).step: lambda: {"grads": arrays("w")},
    gpuadam.ShardedAdam(arrays("w"), transports.Local()).step: lambda: {"grads": arrays("w")},
    planned: dict,
    gpuadam.planning.update: lambda: {"sizes": [1000]},
    gpuadam.Bits: lambda: {"array": np.zeros(1, "u2")},
}


@pytest.mark.parametrize("call", few(CALLS, *list(CALLS)[::9]), ids=lambda call: call.__qualname__)
def test_any_argument_may_be_huge(call, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(call).parameters.values()
    assert CALLS[call]().keys() <= {one.name for one in parameters}
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY]
    for parameter in parameters:
        for what, value in VALUES.items():
            arguments = CALLS[call]() | {parameter.name: value}
            given = [arguments.pop(name) for name in positional]
            with messages.of(f"{parameter.name}={what}"):
                call(*given, **arguments)
    assert messages.count > len(parameters)


def entries(value, path=()):
    """Yield the path of every entry of dicts and lists in one another."""
    if isinstance(value, (dict, list)):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from entries(member, (*path, key))


def changed(value, path, entry, what):
    """Return a copy with another entry, or with one more, whose key is long."""
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if what == "a key" and isinstance(place, dict):
        place[LONG] = place.pop(path[-1])
    else:
        place[path[-1]] = entry
    return value


@pytest.mark.parametrize(
    "options", few([{}, {"state_dtype": "8bit"}, {"capturable": True, "amsgrad": True}], {"state_dtype": "8bit"}), ids=str
)
def test_any_entry_of_a_state_dict_may_be_huge(messages, options):
    opt = adam(**options)
    opt.step(arrays("w"))
    for path in entries(opt.state_dict()):
        for what, value in {**SOME, "a key": None}.items():
            with messages.of(f"{path} = {what}"):
                opt.load_state_dict(changed(opt.state_dict(), path, value, what))
    assert messages.count > 30


def test_any_entry_of_a_group_may_be_huge(messages):
    for key in adam().groups[0]:
        for what, value in {**SOME, "a key": None}.items():
            opt = adam()
            opt.groups[0] = changed(opt.groups[0], (key,), value, what)
            for call in (lambda opt=opt: opt.step(arrays("w")), opt.state_dict):
                with messages.of(f"{key} = {what}"):
                    call()
    assert messages.count > 30


def test_any_entry_of_torchs_state_may_be_huge(messages):
    opt = adam()
    group = dict(adam().groups[0], params=[0], param_names=["w"])
    state = {"state": {0: {"step": 3.0, "exp_avg": ones(), "exp_avg_sq": ones()}}, "param_groups": [group]}
    gpuadam.foreign_state.from_torch(opt, state)
    for path in entries(state):
        for what, value in {**SOME, "a key": None}.items():
            with messages.of(f"{path} = {what}"):
                gpuadam.foreign_state.from_torch(opt, changed(state, path, value, what))
    assert messages.count > 30


def long_named(n, dtype="f4"):
    """Return arrays whose long names differ in the middle alone."""
    return {LONG[:1000] + str(k) + LONG[:1000]: np.ones(2, dtype) for k in range(n)}


NAMED = {"many names": lambda: {name: np.ones(2, "f4") for name in NAMES[:300]}, "long names": lambda: long_named(50)}


@pytest.mark.parametrize("case", NAMED)
def test_any_names_may_be_missing_or_wrong(case, messages, tmp_path):
    """Where an optimizer has them, its arrays, and its state, in memory or in files."""
    params = NAMED[case]
    opt, other = gpuadam.Adam(params()), gpuadam.Adam({"w": np.ones(2, "f4")})
    sharded = gpuadam.ShardedAdam(params(), transports.Local())
    for name, one in {"many": opt, "one": other}.items():
        one.save(tmp_path / name)
    sharded.save(tmp_path / "folder")
    wrong = {
        "no gradients": lambda: opt.step({}),
        "gradients of another": lambda: other.step(params()),
        "gradients of other shapes": lambda: opt.step({name: np.ones(3, "f4") for name in opt.state}),
        "gradients of other dtypes": lambda: opt.step({name: np.ones(2, "i4") for name in opt.state}),
        "gradients that are the parameters": lambda: opt.step(opt.groups[0]["params"]),
        "parameters of other dtypes": lambda: gpuadam.Adam({name: np.ones(2, "i4") for name in opt.state}),
        "parameters that share memory": lambda: gpuadam.Adam(dict.fromkeys(opt.state, ones())),
        "state of another": lambda: other.load_state_dict(opt.state_dict()),
        "another's state": lambda: opt.load_state_dict(other.state_dict()),
        "a file of another": lambda: gpuadam.load(tmp_path / "one", params()),
        "another's file": lambda: gpuadam.load(tmp_path / "many", arrays("w")),
        "a file in other groups": lambda: gpuadam.load(
            tmp_path / "many", [{"params": {name: array}} for name, array in params().items()]
        ),
        "a file of other shapes": lambda: gpuadam.load(tmp_path / "many", {name: np.ones(3, "f4") for name in opt.state}),
        "a file without parameters": lambda: gpuadam.load(tmp_path / "many", params(), with_params=True),
        "a folder of another": lambda: gpuadam.load_sharded(tmp_path / "folder", arrays("w"), transports.Local()),
        "a sharded step": lambda: sharded.step({}),
        "arrays of two dtypes": lambda: gpuadam.flatten(params() | {"w": np.ones(2, "f8")}),
        "patterns of no names": lambda: gpuadam.decay_groups(params(), ["nothing"]),
        "a norm of integers": lambda: gpuadam.global_norm({name: np.ones(2, "i4") for name in opt.state}),
        "names of torch": lambda: gpuadam.foreign_state.to_torch(opt, ["w"]),
        "other arrays": lambda: gpuadam.testing.assert_same_bits(params(), arrays("w")),
        "other bits": lambda: gpuadam.testing.assert_same_bits(params(), {name: np.zeros(2, "f4") for name in opt.state}),
        "a fault elsewhere": lambda: gpuadam.testing.inject(params(), 1.0, at={"w": 0}),
        "a reference of others": lambda: gpuadam.testing.Reference(params()).step(arrays("w")),
    }
    with gpuadam.OffloadAdam(params(), state=str(tmp_path / "state")) as offloaded, messages.of("offloaded gradients"):
        offloaded.step({})
    with messages.of("another's folder of state"):
        gpuadam.OffloadAdam(arrays("w"), state=str(tmp_path / "state"))
    for what, call in wrong.items():
        before = messages.count
        with messages.of(what):
            call()
        assert messages.count == before + 1, f"{what}: nothing was raised"


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("name", ["w", LONG], ids=["a name", "a long name"])
def test_any_entry_of_the_drop_in_may_be_huge(messages, name, options):
    torch = libraries.imported("torch")
    import gpuadam.torch

    def made():
        params = [(f"{name}{k}", torch.nn.Parameter(torch.ones(2))) for k in range(3)]
        for _, param in params:
            param.grad = torch.ones(2)
        opt = gpuadam.torch.Adam(params, **options)
        opt.step()
        return opt

    opt = made()
    for path in entries(opt.state_dict()):
        for what, value in {**SOME, "a key": None, "another shape": torch.ones(5)}.items():
            with messages.of(f"{path} = {what}"):
                opt.load_state_dict(changed(opt.state_dict(), path, value, what))
    for key in opt.param_groups[0]:
        for what, value in SOME.items():
            opt = made()
            opt.param_groups[0][key] = value
            with messages.of(f"{key} = {what}"):
                opt.step()
    opt = made()
    for state in opt.state.values():
        del state[max(state)]
    with messages.of("no step"):
        opt.step()
    assert messages.count > 30


def test_long_names_that_differ_in_the_middle_are_not_mixed_up():
    params = long_named(3)
    flat = gpuadam.flatten(params)
    assert flat.params.keys() == params.keys() and flat.param.size >= 6
    faults = gpuadam.testing.inject(params, 5.0, at=dict.fromkeys(params, 0))
    assert [array[0] for array in params.values()] == [5.0] * 3 and len({fault.name for fault in faults}) == 3
    gpuadam.testing.assert_same_bits(params, params)
    with pytest.raises(AssertionError):
        gpuadam.testing.assert_same_bits(params, long_named(3))


def test_a_long_text_is_shown_with_its_beginning_and_its_end():
    text = shortened("a" * 500 + "b" * 500, 100)
    assert text == "a" * 50 + "[900 characters left out]" + "b" * 50
    assert shortened("a" * 100, 100) == "a" * 100 and shown("a") == "'a'"
    assert shown(Broken()) == "<Broken, whose repr fails>"


def test_of_many_or_long_names_the_first_are_shown():
    assert some(["w", "b"]) == "['w', 'b']"
    assert some(map(str, range(14))) == "['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '10', '11'] and 2 more"
    assert len(some([LONG] * 100)) < 1200 and some([LONG] * 100).endswith("and 97 more")


# Expressions of which the repr stands in a message as it is, because it is no user's
BOUNDED = {
    "self.name", "other", "fixed.formula", "options.algorithm", "options.formula", "opt.options.formula", "wide", "chosen.name",
    "loop", "master", "self._update", "str(crc)[:80]", "error.object[error.start - 10:error.end + 10]", "strange[:1] or names",
    "text",
}  # fmt: skip
# Of texts that are keys, and shortened in messages
AS_KEYS = {("clipping", "key"), ("faults", "key"), ("folder", "name"), ("optimizer", "m.name")}


def test_values_of_users_are_put_into_messages_by_shown_alone():
    for path in ROOT.rglob("*.py"):
        if {"cli", "examples"} & set(path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                expression = ast.unparse(node.value)
                bounded = expression in BOUNDED or (path.stem, expression) in AS_KEYS
                assert bounded, f"{path}:{node.lineno}: {{{expression}!r}}: use shown({expression})"
