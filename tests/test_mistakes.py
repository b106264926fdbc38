"""Errors name the mistake that was made, and what mends it."""

import numpy as np
import pytest

import gpuadam
from gpuadam import transports


def ones(n=3, dtype="float32"):
    return np.ones(n, dtype)


def rebound(make):
    """Step an optimizer over a dict in which another array has taken a parameter's place."""
    params = {"a": ones()}
    opt = make(params)
    params["a"] = ones() * 2
    opt.step({"a": ones()})


def load_moments(dtype, convert=False, **options):
    """Load moments of a dtype."""
    opt = gpuadam.Adam({"a": ones()}, **options)
    state = {"step": 1, "m": ones(dtype=dtype), "v": ones(dtype=dtype)}
    opt.load_state_dict(opt.state_dict() | {"state": {"a": state}}, convert=convert)


def endless():
    grads = {"a": [ones()]}
    grads["a"].append(grads)
    return grads


TAKE_A_PATH = {
    "save": lambda path: gpuadam.Adam(ones()).save(path),
    "load": lambda path: gpuadam.load(path, ones()),
    "save on ranks": lambda path: gpuadam.ShardedAdam(ones(), transports.Local()).save(path),
    "load_sharded": lambda path: gpuadam.load_sharded(path, ones(), transports.Local()),
    "load_offload": lambda path: gpuadam.load_offload(path, ones()),
}
TIED = ones()
IN_PAIRS = r"params has pairs of a name and an array, the first of 'a': give a dict, dict\(params\)"
ONCE = r"params\['a'\] and params\['b'\] are one array: give it once, under one name, .*the sum of the gradients"

# call, error, what it says
MISTAKES = {
    # gradients that are no arrays
    "a list of numbers": (
        lambda: gpuadam.Adam({"w": ones()}).step({"w": [1.0, 1.0, 1.0]}),
        TypeError,
        r"^the gradient of params\['w'\] is a list, not an array: np.asarray\(x, 'float32'\) makes an array of numbers",
    ),
    "a list, of one array": (
        lambda: gpuadam.Adam(ones()).step([1.0, 1.0, 1.0]),
        TypeError,
        r"^the gradient of params is a list, not an array: np.asarray\(x",
    ),
    "a list, in adam_step": (
        lambda: gpuadam.adam_step(ones(), [1.0] * 3, ones(), ones(), 1),
        TypeError,
        r"^grad is a list, not an array: np.asarray\(x",
    ),
    "a number": (
        lambda: gpuadam.Adam(ones()).step(1.0),
        TypeError,
        r"^the gradient of params is a float, not an array: nothing is broadcast. np.full_like\(param, x\)",
    ),
    "one gradient in a list": (
        lambda: gpuadam.Adam(ones()).step([ones()]),
        TypeError,
        "^grads is a sequence of 1, and the parameter was given as one array: give grads so, too",
    ),
    "one gradient in a dict": (
        lambda: gpuadam.Adam(ones()).step({"w": ones()}),
        TypeError,
        r"^grads is a dict with the names \['w'\], and the parameter was given as one array",
    ),
    # what is no parameter, or not as it must be given
    "pairs": (lambda: gpuadam.Adam([("a", ones()), ("b", ones())]), TypeError, IN_PAIRS),
    "pairs of an iterator": (lambda: gpuadam.Adam(pair for pair in [("a", ones())]), TypeError, IN_PAIRS),
    "items of a dict": (lambda: gpuadam.Adam({"a": ones()}.items()), TypeError, IN_PAIRS),
    "pairs in a group": (lambda: gpuadam.Adam([{"params": [("a", ones())]}]), TypeError, IN_PAIRS),
    "pairs, on ranks": (lambda: gpuadam.ShardedAdam([("a", ones())], transports.Local()), TypeError, IN_PAIRS),
    "a set": (lambda: gpuadam.Adam({1, 2}), TypeError, "^params is a set, not an array: a set has no order; give a list"),
    "lists in a list": (
        lambda: gpuadam.Adam([[ones()], [ones()]]),
        TypeError,
        r"^params\['0'\] is a list, not an array: give the arrays in one list or dict",
    ),
    "an option of all groups": (
        lambda: gpuadam.Adam([{"params": ones(), "state_dtype": "8bit"}]),
        ValueError,
        r"unknown \['state_dtype'\]; its hyperparameters are lr, .* Of all groups are \['state_dtype'\]: give them to the",
    ),
    # tied weights
    "a parameter twice": (lambda: gpuadam.Adam({"a": TIED, "b": TIED}), ValueError, ONCE),
    "a view of it": (lambda: gpuadam.Adam({"a": TIED, "b": TIED[:]}), ValueError, ONCE),
    "in two groups": (lambda: gpuadam.Adam([{"params": {"a": TIED}}, {"params": {"b": TIED}}]), ValueError, ONCE),
    "on ranks": (lambda: gpuadam.ShardedAdam({"a": TIED, "b": TIED}, transports.Local()), ValueError, ONCE),
    "added": (lambda: gpuadam.Adam({"a": TIED}).add("b", TIED), ValueError, ONCE),
    "a part of it": (
        lambda: gpuadam.Adam({"a": TIED, "b": TIED[:2]}),
        ValueError,
        r"params\['a'\] and params\['b'\] share memory",
    ),
    # dtypes that no cast, or another one, makes right
    **{
        f"{dtype} parameters": (
            lambda dtype=dtype: gpuadam.Adam(np.zeros(3, dtype)),
            TypeError,
            "^params has dtype .*, in native byte order: give an array of numbers$",
        )
        for dtype in ("object", "U3", "M8[s]", "m8[s]", "f4,f4")
    },
    "an integer m": (
        lambda: gpuadam.adam_step(ones(), ones(), ones(dtype=int), ones(), 1),
        TypeError,
        r"^m has dtype int64; it must be float32 or float64 or bfloat16, in native byte order: x = x.astype\('float32'\)",
    ),
    "bits of half floats": (
        lambda: gpuadam.Adam(ones(dtype="u2")),
        TypeError,
        r"uint16.*: x = x.astype\('float32'\), or gpuadam.Bits\(x, 'bfloat16'\) if these are its bits$",
    ),
    "long doubles": (lambda: gpuadam.Adam(ones(dtype="g")), TypeError, r"order: x = x.astype\('float64'\)$"),
    "integers beside float64": (
        lambda: gpuadam.Adam(ones(dtype="f8")).step(ones(dtype=int)),
        TypeError,
        r"int64.*order: x = x.astype\('float64'\)$",
    ),
    "integers beside float64, in one step": (
        lambda: gpuadam.adam_step(ones(dtype="f8"), ones(dtype=int), ones(dtype="f8"), ones(dtype="f8"), 1),
        TypeError,
        r"int64.*order: x = x.astype\('float64'\)$",
    ),
    "loaded integers": (
        lambda: load_moments("i4"),
        ValueError,
        r"has dtype int32, the optimizer's float32: x = x.astype\('float32'\)$",
    ),
    "loaded integers to convert": (
        lambda: load_moments("i4", convert=True),
        TypeError,
        r"has dtype int32, and must be .*, in native byte order: x = x.astype\('float32'\)$",
    ),
    "loaded integers for bfloat16": (
        lambda: load_moments("i4", state_dtype="bfloat16"),
        ValueError,
        r"the optimizer's uint16: x = x.astype\('float32'\). Then: load_state_dict\(state_dict, convert=True\)",
    ),
    **{
        f"loaded in the other byte order, convert={convert}": (
            lambda convert=convert: load_moments(">f8", convert, state_dtype="float64"),
            ValueError,
            r"has dtype >f8, the optimizer's float64: x = x.astype\('float64'\)$",
        )
        for convert in (False, True)
    },
    "loaded in another format": (
        lambda: load_moments("f8"),
        ValueError,
        "float32: load_state_dict.state_dict, convert=True",
    ),
    "a masked gradient": (
        lambda: gpuadam.Adam(ones()).step(np.ma.masked_array(ones(), [0, 1, 0])),
        TypeError,
        r"^the gradient of params is a masked array, .*: pass x.data, or x.filled\(0\) where 0 is meant$",
    ),
    # another array in a parameter's place
    "rebound": (lambda: rebound(gpuadam.Adam), ValueError, r"another array: optimizer.replace\('a', params\['a'\], rows\)"),
    "rebound, offloaded": (lambda: rebound(gpuadam.OffloadAdam), ValueError, "with another array: make another optimizer"),
    "rebound, on ranks": (
        lambda: rebound(lambda params: gpuadam.ShardedAdam(params, transports.Local())),
        ValueError,
        "with another array: make another optimizer",
    ),
    # rates by element
    "an array for lr": (
        lambda: gpuadam.adam_step(ones(), ones(), ones(), ones(), 1, lr=ones()),
        TypeError,
        "^lr must be a real number, not .*: lr_scale= of a step takes an array",
    ),
    "an array for the optimizer's lr": (lambda: gpuadam.Adam(ones(), lr=ones()), TypeError, r"step\(lr_scale=...\) takes"),
    # what can be read once
    "betas of an iterator": (
        lambda: gpuadam.Adam(ones(), betas=iter((0.9, 0.99))),
        ValueError,
        "^betas must be two numbers",
    ),
    "bounds of an iterator": (lambda: gpuadam.Adam(ones(), bounds=iter((0, 1))), ValueError, "^bounds must be two numbers"),
    # what is in itself
    "endless gradients": (
        lambda: gpuadam.global_norm(endless()),
        ValueError,
        r"^grads\['a'\]\[1\] is a dict that is in itself",
    ),
    # what is no text
    "bytes for a pattern": (
        lambda: gpuadam.decay_groups({"a": ones()}, b"a"),
        TypeError,
        "patterns of no_decay must be strings, not b'a'",
    ),
    **{
        f"{call}, {path!r} for a path": (
            lambda call=call, path=path: TAKE_A_PATH[call](path),
            TypeError,
            f"path must be a string or an os.PathLike, such as pathlib.Path, not {path!r}",
        )
        for call in ("save", "load", "save on ranks", "load_sharded", "load_offload")
        for path in (None, 1)
    },
    # one array has no name
    "its dtype": (lambda: gpuadam.Adam(ones(dtype=int)), TypeError, "^params has dtype int64"),
    "no array at all": (lambda: gpuadam.Adam(None), TypeError, "^params is None, not an array"),
    "a gradient's shape": (
        lambda: gpuadam.Adam(ones()).step(ones(4)),
        ValueError,
        r"^the gradient of params has shape \(4,\), params has shape \(3,\)",
    ),
    "no .grad": (lambda: gpuadam.Adam(ones()).step(), TypeError, "^params is a numpy.ndarray, which has no .grad"),
    "on ranks, its dtype": (
        lambda: gpuadam.ShardedAdam(ones(dtype=int), transports.Local()),
        TypeError,
        "^params has dtype int64",
    ),
    "in files, its strides": (lambda: gpuadam.OffloadAdam(ones(6)[::2]), ValueError, "^params "),
    "a where": (lambda: gpuadam.Adam([ones()]).step([ones()], where=["w"]), ValueError, r"^where of params\['0'\] is 'w'"),
    # AMSGrad
    "RAdam": (lambda: gpuadam.RAdam(ones(), amsgrad=True), ValueError, "variant of Adam, and RAdam has none: leave amsgrad"),
    "NAdam's group": (
        lambda: gpuadam.NAdam([{"params": ones(), "amsgrad": True}]),
        ValueError,
        "and NAdam has none: leave amsgrad",
    ),
    "adam_step": (
        lambda: gpuadam.adam_step(ones(), ones(), ones(), ones(), 1, max_v=ones(), algorithm="adamax"),
        ValueError,
        "and AdaMax has none: leave amsgrad, or max_v in adam_step, out",
    ),
    "8 bits": (
        lambda: gpuadam.Adam(ones(), amsgrad=True, state_dtype="8bit"),
        ValueError,
        "has no max_v.*leave amsgrad out",
    ),
    # complex numbers: no cast that throws a part away
    "a complex parameter": (
        lambda: gpuadam.Adam(ones(dtype="c8")),
        TypeError,
        "two Adams.*complex='joint'.*complex='parts'",
    ),
    "a complex gradient": (
        lambda: gpuadam.Adam(ones()).step(ones(dtype="c8")),
        TypeError,
        "the gradient of a real parameter is real: give its real part, if that is what is meant",
    ),
    "a real gradient": (
        lambda: gpuadam.Adam(ones(dtype="c8"), complex="joint").step(ones()),
        TypeError,
        r"the gradient of a complex parameter is complex.*grad.astype\('complex64'\) if dL/dIm is 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_what_mends_it(mistake):
    call, error, said = MISTAKES[mistake]
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: gpuadam.Adam(x),
        lambda x: gpuadam.Adam({"w": x}, complex="joint"),
        lambda x: gpuadam.adam_step(x, x, x, x, 1),
        lambda x: gpuadam.global_norm([x]),
        lambda x: gpuadam.flatten({"w": x}),
        lambda x: gpuadam.OffloadAdam(x),
        lambda x: gpuadam.ShardedAdam(x, transports.Local()),
    ],
)
@pytest.mark.parametrize("dtype", ["complex64", "complex128", "clongdouble"])
def test_no_error_about_complex_numbers_tells_to_cast_them_to_real_ones(call, dtype):
    try:
        call(ones(dtype=dtype))
    except (TypeError, ValueError) as error:
        assert "astype('float" not in str(error), error
