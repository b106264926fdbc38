"""Bad input: the named exception, with the array's or hyperparameter's name in it, before a byte is written."""

from decimal import Decimal

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import checks, foreign_state
from gpuadam.kernels import view as arrays

inf, nan = float("inf"), float("nan")


def good(n=6, dtype="f4"):
    return {name: np.linspace(0.1, 1, n).astype(dtype) for name in ("param", "grad", "m", "v", "max_v")}


def contents(arrays):
    """The bytes of all memory behind the arrays."""
    seen = []
    for a in arrays.values():
        whole = a.array if isinstance(a, gpuadam.Bits) else a
        if isinstance(whole, np.ndarray):
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            seen.append(bytes(np.ascontiguousarray(whole).data.cast("B")) if whole.size else b"")
    return seen


def assert_refused(error, match, arrays, step=1, **options):
    before = contents(arrays)
    with pytest.raises(error, match=match):
        gpuadam.adam_step(
            arrays["param"], arrays["grad"], arrays["m"], arrays["v"], step, max_v=arrays.get("max_v"), **options
        )
    assert contents(arrays) == before, "something was written"


BAD_HYPERPARAMETERS = [
    ({"lr": -1e-3}, ValueError, "lr"),
    ({"lr": nan}, ValueError, "lr"),
    ({"lr": inf}, ValueError, "lr"),
    ({"lr": "0.1"}, TypeError, "lr"),
    ({"lr": None}, TypeError, "lr"),
    ({"lr": True}, TypeError, "lr"),
    ({"lr": 1j}, TypeError, "lr"),
    ({"lr": 1e39}, ValueError, "lr.*overflows float32"),
    ({"lr": 3e38, "betas": (0.9, 0.999)}, ValueError, r"lr / \(1 - beta1\*\*step\).*overflows"),
    ({"eps": -1e-8}, ValueError, "eps"),
    ({"eps": nan}, ValueError, "eps"),
    ({"eps": inf}, ValueError, "eps"),
    ({"eps": 1e-50}, ValueError, "eps=1e-50 rounds to 0"),
    ({"eps": 1e39}, ValueError, "eps.*overflows"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ({"weight_decay": nan}, ValueError, "weight_decay"),
    ({"weight_decay": inf}, ValueError, "weight_decay"),
    ({"betas": ()}, ValueError, "betas must be two numbers"),
    ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be two numbers"),
    ({"betas": {0.9, 0.99}}, ValueError, "betas must be two numbers"),
    ({"betas": {0.9: 1, 0.99: 2}}, ValueError, "betas must be two numbers"),
    ({"betas": 0.9}, ValueError, "betas must be two numbers"),
    ({"betas": None}, ValueError, "betas must be two numbers"),
    ({"betas": (1.0, 0.999)}, ValueError, "beta1=1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, "beta2=1.0"),
    ({"betas": (-0.1, 0.999)}, ValueError, "beta1=-0.1"),
    ({"betas": (nan, 0.999)}, ValueError, "beta1=nan"),
    ({"betas": (0.9, inf)}, ValueError, "beta2=inf"),
    ({"betas": ("a", 0.9)}, TypeError, "beta1"),
    ({"grad_scale": nan}, ValueError, "grad_scale"),
    ({"grad_scale": inf}, ValueError, "grad_scale"),
    ({"grad_scale": 1e-60}, ValueError, "grad_scale=1e-60 rounds to 0"),
    ({"maximize": 1}, TypeError, "maximize"),
    ({"decoupled": "yes"}, TypeError, "decoupled"),
    ({"lr": 10**400}, ValueError, "lr is too large"),
    ({"eps": Decimal("1e-8")}, TypeError, "eps"),
    ({"backend": ["cupy"]}, ValueError, "no backend"),
    ({"step": -(10**5000)}, ValueError, "step"),
    ({"step": 0}, ValueError, "step=0"),
    ({"step": -3}, ValueError, "step=-3"),
    ({"step": 1.0}, TypeError, "step"),
    ({"step": nan}, TypeError, "step"),
    ({"step": None}, TypeError, "step"),
    ({"step": True}, TypeError, "step"),
    ({"backend": "cuppy"}, ValueError, "no backend 'cuppy', only cupy, numba-cuda, numba-cpu"),
]


@pytest.mark.parametrize("options, error, match", BAD_HYPERPARAMETERS)
def test_a_bad_hyperparameter_is_named(options, error, match):
    assert_refused(error, match, good(), **({"step": 1} | options))


A_DURATION = [np.timedelta64(1, "ns"), np.timedelta64(1, "s")]  # which NumPy registers as integers
NUMBERS = {
    **{
        name: lambda x, name=name: gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), **{"step": 1, name: x})
        for name in ("step", "lr", "eps", "weight_decay", "grad_scale", "ema_decay", "eps_root", "seed", "components")
    },
    "beta1": lambda x: gpuadam.Adam(np.ones(3), betas=(x, 0.9)),
    "bounds": lambda x: gpuadam.Adam(np.ones(3), bounds=(x, None)),
    "lr of a schedule": lambda x: gpuadam.Adam(np.ones(3), lr=lambda step: x),
    "found_inf": lambda x: gpuadam.Adam(np.ones(3)).step(np.ones(3), found_inf=x),
    "max_norm": lambda x: gpuadam.Adam(np.ones(3)).step(np.ones(3), max_norm=x),
    "norm": lambda x: gpuadam.Adam(np.ones(3)).step(np.ones(3), norm=x, max_norm=1.0),
    "budget": lambda x: gpuadam.OffloadAdam(np.ones(3), budget=x),
    "group": lambda x: gpuadam.Adam({"a": np.ones(3)}).add("b", np.ones(3), x),
}


@pytest.mark.parametrize("value", A_DURATION, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_duration_is_no_number(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"{name.split()[0]}.*timedelta"):
        NUMBERS[name](value)


@pytest.mark.parametrize(
    "n, said",
    [(-3, "must not be negative, and is -3"), (10**5000, "must be less than 2..63, .* of 16,610 bits")],
    ids=["negative", "huge"],
)
def test_a_count_that_no_file_can_hold_is_named(n, said, tmp_path):
    opt = gpuadam.Adam({"w": np.ones(3)})
    state_dict = opt.state_dict()
    opt.steps = n
    with pytest.raises(ValueError, match=f"^steps {said}"):
        opt.save(tmp_path / "a")
    assert repr(opt).startswith("Adam(1 parameter, 3 elements, steps=")
    with pytest.raises(ValueError, match=f"^step of 'w' {said}"):
        opt.load_state_dict(state_dict | {"state": {"w": state_dict["state"]["w"] | {"step": n}}})
    assert list(tmp_path.iterdir()) == []


# Wrong values that are false, or equal to the default
NEARLY_DEFAULT = [
    *({"seed": value} for value in (None, "", 0.0, [], False)),
    *({"stochastic_rounding": value} for value in (0, None, "")),
    *({"components": value} for value in (1.0, True, 1 + 0j)),
    *({"eps_root": value} for value in (False, 0j)),
    {"ema_decay": 0.999 + 0j},
    *({name: np.array(["adam" if name == "algorithm" else "torch"])} for name in ("algorithm", "formula")),
]


@pytest.mark.parametrize("options", NEARLY_DEFAULT, ids=str)
def test_what_is_only_equal_to_a_default_is_refused(options):
    arrays = good()
    del arrays["max_v"]
    assert_refused((TypeError, ValueError), next(iter(options)), arrays, **options)


def test_a_default_may_be_another_object_of_its_type():
    one, other = good(), good()
    defaults = {"seed": np.int64(0), "components": np.int8(1), "eps_root": float("0.0"), "ema_decay": float("0.999")}
    defaults |= {"algorithm": "".join(["ad", "am"]), "formula": np.str_("torch"), "stochastic_rounding": np.False_}
    for step in (1, 2, 3):
        for given, options in ((one, {}), (other, defaults)):
            gpuadam.adam_step(given["param"], given["grad"], given["m"], given["v"], step, **options)
    assert contents(one) == contents(other)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


# What replaces an array -> the error. `a` is a good array of 6.
BAD_ARRAYS = {
    "another shape": (lambda a: a[:5].copy(), ValueError, "shape"),
    "shape (1,)": (lambda a: a[:1].copy(), ValueError, "shape"),
    "shape ()": (lambda a: a[0:1].reshape(()), ValueError, "shape"),
    "one dimension more": (lambda a: a.reshape(2, 3), ValueError, "shape"),
    "longer": (lambda a: np.concatenate([a, a]), ValueError, "shape"),
    "float64": (lambda a: a.astype("f8"), TypeError, "has dtype float"),
    "float16": (lambda a: a.astype("f2"), TypeError, "dtype float16"),
    "long double": (lambda a: a.astype(np.longdouble), TypeError, "dtype (float|longdouble)"),
    "16-bit integers": (lambda a: a.astype("u2"), TypeError, "dtype uint16"),
    "big-endian": (lambda a: a.astype(">f4"), TypeError, "byte order"),
    "integers": (lambda a: a.astype("i4"), TypeError, "dtype int32"),
    "complex": (lambda a: a.astype("c8"), TypeError, "dtype complex64"),
    "booleans": (lambda a: a.astype(bool), TypeError, "dtype bool"),
    "objects": (lambda a: a.astype(object), TypeError, "dtype object"),
    "strings": (lambda a: a.astype("U8"), TypeError, "dtype str"),
    "broadcast": (lambda a: np.lib.stride_tricks.as_strided(a, (6,), (0,)), ValueError, "share memory"),
    "sliding": (lambda a: np.lib.stride_tricks.as_strided(a, (6,), (2,)), ValueError, "share memory"),
    "a list": (lambda a: a.tolist(), TypeError, "list"),
    "a number": (lambda a: 1.0, TypeError, "float"),
    "a NumPy scalar": (lambda a: a[0], TypeError, r"numpy.float32, a number .* pass np.asarray\(x\)"),
    "None": (lambda a: None, TypeError, "None"),
    "a masked array": (lambda a: np.ma.masked_array(a, a > 0.5), TypeError, "masked"),
    "a type": (lambda a: np.ndarray, TypeError, "not an array"),
    "a string": (lambda a: "grad", TypeError, "str"),
    "Bits of float32": (
        lambda a: gpuadam.Bits(a, "bfloat16"),
        TypeError,
        "dtype float32; Bits are of a uint16 or int16 array",
    ),
    "Bits of 32 bits": (lambda a: gpuadam.Bits(a.view("i4"), "bfloat16"), TypeError, "dtype int32; Bits are of"),
    "Bits of an unknown format": (
        lambda a: gpuadam.Bits(a.astype("u2"), "float8"),
        ValueError,
        "is Bits of 'float8': they can be 'bfloat16' or 'float16'",
    ),
    "Bits of None": (lambda a: gpuadam.Bits(None, "bfloat16"), TypeError, "None"),
    "Bits of a list": (lambda a: gpuadam.Bits(a.tolist(), "bfloat16"), TypeError, "list"),
}
# What is right: a parameter and a gradient are each of the format that they like, elements of a gradient may share memory, and
# max_v=None is no AMSGrad.
FINE = [
    *((what, name) for what in ("float64", "float16") for name in ("param", "grad")),
    *((what, "grad") for what in ("broadcast", "sliding")),
    ("None", "max_v"),
]


@pytest.mark.parametrize(
    "what, name",
    [(w, n) for w in BAD_ARRAYS for n in ("param", "grad", "m", "v", "max_v") if (w, n) not in FINE],
)
def test_a_bad_array_is_named(what, name):
    replace, error, match = BAD_ARRAYS[what]
    arrays = good()
    arrays[name] = replace(arrays[name])
    named = match if name == "param" else f"{name}.*{match}|{match}.*{name}"
    assert_refused(error, named, arrays)


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name in ("param", "grad") for dtype in ("f8", "f2")])
def test_a_parameter_or_gradient_of_another_format_is_computed_in_the_wider(name, dtype):
    """float64 if one of the arrays is; a float16 is exact in float32. What is stored is rounded once."""
    given = {k: a for k, a in good().items() if k != "max_v"}
    given[name] = given[name].astype(dtype)
    wider = {k: a.astype("f8" if dtype == "f8" else "f4") for k, a in given.items()}
    gpuadam.adam_step(*given.values(), 1)
    gpuadam.adam_step(*wider.values(), 1)
    for k, a in given.items():
        assert (a == wider[k].astype(a.dtype)).all() and a.dtype == (dtype if k == name else "f4")


@pytest.mark.parametrize("what", ["v", "max_v"])
def test_moments_of_two_dtypes_are_refused_by_both_names(what):
    arrays = good()
    arrays[what] = arrays[what].astype("f8")
    assert_refused(TypeError, f"{what} has dtype float64, m has float32: use one", arrays)


# options beside good arrays -> the error
BAD_OPTIONS = {
    "an unknown algorithm": ({"algorithm": "lion"}, ValueError, "algorithm='lion' must be one of 'adam', 'nadam'"),
    "an unknown formula": (
        {"formula": "keras"},
        ValueError,
        "formula='keras' must be one of 'torch', 'apex', 'eps-hat', 'optax'",
    ),
    "a formula of another algorithm": (
        {"formula": "optax", "algorithm": "radam"},
        ValueError,
        "RAdam has its own: leave it out",
    ),
    "an eps_root without its formula": ({"eps_root": 1e-8}, ValueError, "belongs to formula='optax', not to 'torch'"),
    "a negative eps_root": ({"formula": "optax", "eps_root": -1e-8}, ValueError, "eps_root=-1e-08 must be finite"),
    "an eps_root that rounds to 0": (
        {"formula": "optax", "eps_root": 1e-60},
        ValueError,
        "eps_root=1e-60 rounds to 0 in float32",
    ),
    "an algorithm that is no string": ({"algorithm": None}, ValueError, "algorithm=None"),
    **{
        f"AMSGrad with {name}": ({"algorithm": name}, ValueError, "has none: leave amsgrad, or max_v in adam_step, out")
        for name in ("nadam", "radam", "adamax")
    },
    "a remainder of a float32 parameter": (
        {"remainder": np.zeros(6, "i2")},
        TypeError,
        "param has dtype float32: only a bfloat16 parameter has a remainder",
    ),
    "a remainder of floats": ({"remainder": np.zeros(6, "f4")}, TypeError, "remainder has dtype float32; it must be int16"),
    "a remainder that is rounded randomly": (
        {"remainder": np.zeros(6, "i2"), "stochastic_rounding": True},
        ValueError,
        "leave stochastic_rounding out",
    ),
    "a list of flags": ({"where": [True] * 6}, TypeError, r"where is a list, not an array: np.asarray\(x, bool\)"),
    "a copy of integers": ({"param_copy": np.zeros(6, "i4")}, TypeError, "param_copy has dtype int32"),
    "a copy of another shape": ({"param_copy": np.zeros(5, "f4")}, ValueError, "param_copy has shape"),
    "a copy that is read-only": ({"param_copy": read_only(np.zeros(6, "f4"))}, ValueError, "param_copy is read-only"),
    "a mean of float16": ({"ema": np.zeros(6, "f2")}, TypeError, "ema has dtype float16; it must be float32 or float64"),
    "a mean of bfloat16": (
        {"ema": gpuadam.Bits(np.zeros(6, "u2"), "bfloat16")},
        TypeError,
        "ema has dtype bfloat16; it must be float32 or float64",
    ),
    "a mean that is read-only": ({"ema": read_only(np.zeros(6, "f4"))}, ValueError, "ema is read-only"),
    "a decay of the mean of 1": ({"ema_decay": 1.0}, ValueError, "ema_decay=1.0"),
    "a decay of the mean that is no number": ({"ema_decay": "0.9"}, TypeError, "ema_decay"),
    "a seed that is no integer": ({"seed": 0.5}, TypeError, "seed"),
    "a seed that is a flag": ({"seed": True}, TypeError, "seed"),
    "a number for zero_grad": ({"zero_grad": 1}, TypeError, "zero_grad must be True or False"),
    "a number for stochastic_rounding": ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_a_bad_option_is_named(what):
    options, error, match = BAD_OPTIONS[what]
    before = [a.array.copy() if isinstance(a, gpuadam.Bits) else np.copy(a) for a in options.values()]
    assert_refused(error, match, good(), **options)
    for a, b in zip(options.values(), before, strict=True):
        assert (np.asarray(a.array if isinstance(a, gpuadam.Bits) else a) == b).all()


@pytest.mark.parametrize("name", ["remainder", "param_copy", "ema"])
def test_a_further_array_that_is_another_is_refused(name):
    arrays = good()
    arrays["param"] = gpuadam.Bits(np.full(6, 0x3F80, "u2"), "bfloat16") if name == "remainder" else arrays["param"]
    other = arrays["param"].array.view("i2") if name == "remainder" else arrays["param"]
    assert_refused(ValueError, f"param and {name} share memory", arrays, **{name: other})


def test_a_gradient_that_is_zeroed_must_be_writeable():
    arrays = good()
    arrays["grad"] = read_only(arrays["grad"])
    assert_refused(ValueError, "grad is read-only", arrays, zero_grad=True)


def test_a_gradient_that_is_zeroed_serves_one_update():
    params, grad = [np.ones(6, "f4") for _ in range(2)], np.ones(6, "f4")
    with pytest.raises(ValueError, match="share memory"):
        gpuadam.Adam(params, zero_grad=True).step([grad, grad])
    assert all((a == 1).all() for a in (*params, grad))


@pytest.mark.parametrize("name", ["param", "m", "v", "max_v"])
def test_a_read_only_array_that_is_written_is_refused(name):
    arrays = good()
    arrays[name] = read_only(arrays[name])
    assert_refused(ValueError, f"{name} is read-only", arrays)


def test_a_read_only_gradient_is_fine():
    arrays = good()
    arrays["grad"] = read_only(arrays["grad"])
    gpuadam.adam_step(*list(arrays.values())[:4], 1)


@pytest.mark.parametrize(
    "one, other",
    [("param", "grad"), ("param", "m"), ("m", "v"), ("grad", "v"), ("v", "max_v"), ("grad", "max_v"), ("param", "max_v")],
)
def test_one_array_in_two_places_is_refused(one, other):
    arrays = good()
    arrays[other] = arrays[one]
    assert_refused(ValueError, f"{one} and {other} share memory|{other} and {one} share memory", arrays)


def test_shifted_views_of_one_buffer_are_refused():
    arrays, buffer = good(), np.linspace(0, 1, 7).astype("f4")
    arrays["param"], arrays["grad"] = buffer[:6], buffer[1:]
    assert_refused(ValueError, "share memory", arrays)


def test_interleaved_views_of_one_buffer_do_not_overlap_and_are_fine():
    buffer = np.linspace(0.1, 1, 24).astype("f4").reshape(6, 4)
    separate = [np.ascontiguousarray(buffer[:, k]) for k in range(4)]
    gpuadam.adam_step(*(buffer[:, k] for k in range(4)), 1)
    gpuadam.adam_step(*separate, 1)
    assert (buffer == np.stack(separate, axis=1)).all()


def test_two_rows_that_cross_are_refused():
    buffer = np.linspace(0.1, 1, 40).astype("f4")
    arrays = good(4)
    arrays["param"], arrays["m"] = buffer[0:8:2], buffer[4:16:3]  # elements 0 2 4 6 and 4 7 10 13
    assert_refused(ValueError, "share memory", arrays)


@pytest.mark.parametrize("name", ["param", "grad", "m", "v"])
@pytest.mark.parametrize("subclass", [np.matrix, np.recarray, np.memmap])
def test_a_subclass_of_ndarray_is_updated_like_an_array(tmp_path, subclass, name):
    """A matrix stays 2-D whatever is asked of it: the update of one must not run on past its end."""
    plain = {k: a.reshape(2, 3) for k, a in good().items()}
    whole = np.full((64, 3), 7, "f4")
    given = plain | {
        name: whole[20:22].view(subclass)
        if subclass is not np.memmap
        else np.memmap(tmp_path / "array", "f4", "w+", shape=(2, 3))
    }
    given[name][...] = plain[name]
    plain = {k: a.copy() for k, a in plain.items()}
    gpuadam.adam_step(*[given[k] for k in ("param", "grad", "m", "v")], 1)
    gpuadam.adam_step(*[plain[k] for k in ("param", "grad", "m", "v")], 1)
    for k in ("param", "grad", "m", "v"):
        assert (np.asarray(given[k]) == plain[k]).all()
    whole[20:22] = 7
    assert (whole == 7).all()


class Own(np.ndarray):
    """An array with its own idea of everything."""

    def refuse(self, *args, **options):
        raise AssertionError("a method of the subclass was called")

    view = reshape = ravel = astype = copy = fill = item = __array__ = refuse
    __getitem__ = __setitem__ = __array_ufunc__ = __array_function__ = refuse
    shape = dtype = strides = size = flags = __array_interface__ = property(refuse)

    def __array_finalize__(self, array):
        if array is not None:
            self.refuse()

    @staticmethod
    def of(array):
        """Return one over the memory of an array."""
        return np.ndarray.__new__(Own, array.shape, array.dtype, array)


def loaded_state(own):
    opt = gpuadam.Adam(np.ones((2, 3), "f4"))
    opt.load_state_dict(opt.state_dict() | {"state": {"0": {"step": 1, "m": own, "v": own}}})


def widened_state(own):
    group = {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "params": [0]}
    state = {0: {"step": 1, "exp_avg": own, "exp_avg_sq": own}}
    foreign_state.from_torch(gpuadam.Adam({"w": np.ones((2, 3))}), {"state": state, "param_groups": [group]}, ["w"])


TAKERS = {
    "norm": gpuadam.global_norm,
    "flatten": gpuadam.flatten,
    "a step": lambda own: gpuadam.Adam(np.ones((2, 3), "f4")).step(own, max_norm=1.0),
    "a parameter": lambda own: gpuadam.Adam(own, ema_decay=0.5).step(np.ones((2, 3), "f4"), check_finite=True),
    "a copy": lambda own: gpuadam.Adam(np.ones((2, 3), "f4"), param_copies=own).step(np.ones((2, 3), "f4")),
    "zeros": lambda own: gpuadam.Adam(np.ones((2, 3), "f4"), zero_grad=True).step(own, found_inf=True),
    "state": loaded_state,
    "state of torch": widened_state,
    "OffloadAdam": lambda own: gpuadam.OffloadAdam(np.ones((2, 3), "f4")).step(own, max_norm=1.0),
    "ShardedAdam": lambda own: gpuadam.ShardedAdam(np.ones((2, 3), "f4"), gpuadam.transports.Local()).step(own),
}


@pytest.mark.parametrize("what", TAKERS)
def test_no_method_of_a_subclass_of_ndarray_is_called(what):
    TAKERS[what](Own.of(np.full((2, 3), 0.5, "f4")))


@pytest.mark.parametrize("name", ["param", "grad", "m", "v"])
def test_an_array_with_its_own_idea_of_everything_is_updated_by_its_memory(name):
    plain, given = good(), good()
    memory = given[name]
    given[name] = Own.of(memory)
    for one in (plain, given):
        gpuadam.adam_step(*list(one.values())[:4], 1)
    assert (memory == plain[name]).all()


def test_memory_that_is_the_hosts_and_a_gpus_is_of_no_backend():
    shared = type("ManagedNDArray", (np.ndarray,), {"__cuda_array_interface__": {}})
    assert_refused(
        TypeError, "grad is a .*ManagedNDArray, whose memory .* a GPU's too", good() | {"grad": good()["grad"].view(shared)}
    )


def test_minus_zero_is_zero_whatever_came_before():
    bits = []
    for lr in (0.0, -0.0, 0.0):
        arrays = good()
        arrays["param"][:] = -0.0
        gpuadam.adam_step(*list(arrays.values())[:4], 1, lr=lr)
        bits.append(arrays["param"].tobytes())
    assert len(set(bits)) == 1


def test_eps_zero_raises_nothing_half_way():
    arrays = good(1000)
    arrays["v"][500], arrays["grad"][500], arrays["m"][500] = 0, 0, 0
    gpuadam.adam_step(*list(arrays.values())[:4], 1, eps=0.0)
    assert np.isnan(arrays["param"][500]) and np.isfinite(np.delete(arrays["param"], 500)).all()


def test_a_gradient_that_is_zero_leaves_the_parameter_alone():
    """0 / (0 + eps): eps must not be lost on its way to the kernel."""
    arrays = good()
    arrays["grad"][:] = arrays["m"][:] = arrays["v"][:] = 0
    before = arrays["param"].copy()
    gpuadam.adam_step(*list(arrays.values())[:4], 1)
    assert (arrays["param"] == before).all()


class CudaArray:
    """Says that it lies in CUDA memory."""

    def __init__(self, a):
        self.__cuda_array_interface__ = {
            "data": (a.ctypes.data, False),
            "shape": a.shape,
            "typestr": a.dtype.str,
            "version": 3,
        }


def test_numpy_and_cuda_arrays_are_not_mixed():
    arrays = good()
    arrays["grad"] = CudaArray(arrays["grad"])
    assert_refused(TypeError, "grad is a test_bad_input.CudaArray in CUDA memory", arrays)


@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_numpy_arrays_are_not_copied_to_a_cuda_backend(backend):
    assert_refused(TypeError, f"'{backend}' holds arrays in CUDA memory, and nothing is copied", good(), backend=backend)


def test_cuda_arrays_are_not_copied_to_the_cpu():
    arrays = {name: CudaArray(a) for name, a in good().items()}
    assert_refused(TypeError, "'numba-cpu' holds arrays in CPU memory", arrays, backend="numba-cpu")


def test_a_read_only_dlpack_producer_is_refused():
    arrays = good()
    frozen = read_only(arrays["param"])

    class Producer:
        def __dlpack__(self, **options):
            return frozen.__dlpack__(**options)

        def __dlpack_device__(self):
            return frozen.__dlpack_device__()

    arrays["param"] = Producer()
    assert_refused(ValueError, "param is read-only", arrays)


def test_torch_tensors_that_cannot_be_shared_say_why():
    torch = libraries.imported("torch")
    arrays = good()
    arrays["param"] = torch.ones(6, requires_grad=True) * 1
    assert_refused(ValueError, "param.* is not a leaf.*detach", arrays)
    arrays["param"] = torch.ones(1).expand(6)
    assert_refused(ValueError, "param.*share memory", arrays)
    for negated in (torch._neg_view(torch.ones(6)), torch.complex(torch.zeros(6), torch.ones(6)).conj().imag):
        assert_refused(TypeError, "grad.*resolve_neg", good() | {"grad": negated})
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        arrays["param"] = torch.ones(6)
    assert_refused(TypeError, "param is a .*FakeTensor, which has no memory of its own", arrays)
    arrays["param"] = torch.ones(6, device="meta")
    assert_refused(TypeError, "param", arrays)


# What says that it lies in CUDA memory, checked without a driver: the checks read addresses, never memory


def cuda_views(**changes):
    """Views of param, grad, m and v, by name; changes: name -> entries of its interface."""
    views = {}
    for k, name in enumerate(("param", "grad", "m", "v")):
        described = {"data": (0x1000 * (k + 1), False), "shape": (8,), "typestr": "<f4", "version": 3} | changes.get(
            name, {}
        )
        array = type("Array", (), {"__cuda_array_interface__": described})()
        views[name] = arrays.on_cuda(name, array, device_of=lambda pointer: pointer >> 32)
    return views


def check(views):
    checks.update(views)
    checks.overlap([views[name] for name in ("param", "m", "v")], [views["grad"]])


def test_good_cuda_arrays_pass():
    check(cuda_views())
    check(cuda_views(grad={"data": (0x2000, True)}))
    check(cuda_views(param={"strides": (8,)}))
    check(cuda_views(grad={"strides": (0,)}))
    check(cuda_views(**{name: {"shape": (0,), "data": (None, False)} for name in ("param", "grad", "m", "v")}))


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"param": {"data": (0x1000, True)}}, ValueError, "param is read-only"),
        ({"v": {"data": (0x1000, True)}}, ValueError, "v is read-only"),
        ({"grad": {"data": (0x1010, False)}}, ValueError, "share memory"),
        ({"grad": {"data": (1 << 32, False)}}, ValueError, "grad is on device 1, param on 0"),
        ({"m": {"data": (0x3002, False)}}, ValueError, "m is not aligned"),
        ({"m": {"strides": (6,)}}, ValueError, "m is not aligned"),
        ({"m": {"strides": (0,)}}, ValueError, "m has shape .* share memory"),
        ({"grad": {"strides": (2,)}}, ValueError, "grad is not aligned"),
        ({"m": {"mask": object()}}, TypeError, "m has a mask"),
        ({"m": {"data": 5}}, TypeError, "m, a .*does not describe"),
        ({"m": {"typestr": "?!"}}, TypeError, "m, a .*does not describe"),
        ({"m": {"typestr": "<f8"}}, TypeError, "v has dtype float32, m has float64"),
        ({"m": {"typestr": "<f2"}}, TypeError, "m has dtype float16"),
        ({"param": {"typestr": "<u2"}}, TypeError, "param has dtype uint16"),
        ({"m": {"shape": (7,)}}, ValueError, "m has shape"),
    ],
)
def test_bad_cuda_arrays_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        check(cuda_views(**changes))
