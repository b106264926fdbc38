"""Narrow formats and whole steps on a GPU: the CPU's bits. `benchmarks/gpu.sh` runs these where there is one."""

import numpy as np
import pytest
from cases import assert_same_bits, wide_state

import gpuadam
from gpuadam.kernels.operands import GROUP

pytestmark = pytest.mark.gpu
N = 1_000_003  # the last group of 8-bit state is not whole

IN_MEMORY = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "u2", "int16": "i2", "uint8": "u1"}

# name: (param, grad, state, further options)
COMBINATIONS = {
    "bfloat16 gradients": ("float32", "bfloat16", "float32", {}),
    "bfloat16 state": ("float32", "float32", "bfloat16", {}),
    "all bfloat16": ("bfloat16", "bfloat16", "bfloat16", {"stochastic_rounding": True}),
    "float16": ("float16", "float16", "float32", {}),
    "float16, rounded randomly": ("float16", "float32", "float32", {"stochastic_rounding": True, "seed": 3}),
    "float64 gradients": ("float32", "float64", "float32", {}),
    "remainder": ("bfloat16", "bfloat16", "float32", {"remainder": "int16"}),
    "copy and mean": ("float32", "bfloat16", "float32", {"param_copy": "bfloat16", "ema": "float32", "zero_grad": True}),
    "AMSGrad in bfloat16": ("float32", "float32", "bfloat16", {"max_v": "bfloat16"}),
    "8 bits": ("float32", "float32", "8bit", {}),
    "8 bits and all else": ("bfloat16", "float16", "8bit", {"param_copy": "float16", "ema": "float32", "zero_grad": True}),
}


def made(name, n=N):
    """Return the arrays of a combination, by the names of `adam_step`'s arguments, and its other options."""
    param, grad, state, options = COMBINATIONS[name]
    formats = {"param": param, "grad": grad} | dict.fromkeys(("m", "v"), "uint8" if state == "8bit" else state)
    formats |= {key: value for key, value in options.items() if value in IN_MEMORY}
    values = dict(zip(("param", "grad", "m", "v", "max_v"), wide_state(n, "float32", True, seed=5), strict=True))
    rng = np.random.default_rng(7)
    arrays = {}
    for key, fmt in formats.items():
        x = values.get(key, values["param"])
        if fmt == "bfloat16":
            arrays[key] = (x.view("u4") >> 16).astype("u2")
        elif fmt in ("uint8", "int16"):
            info = np.iinfo(fmt)
            arrays[key] = rng.integers(info.min, info.max + 1, n).astype(fmt)
        else:
            with np.errstate(all="ignore"):
                arrays[key] = x.astype(IN_MEMORY[fmt])
    if state == "8bit":
        # the sums of what is not finite would be a group's NaN: finite gradients, so that codes are compared
        arrays["grad"] = rng.standard_normal(n).astype(arrays["grad"].dtype)
        for key in ("m_scale", "v_scale"):
            arrays[key] = np.exp(rng.uniform(-8, 3, -(-n // GROUP))).astype("f4")
    return arrays, formats, {key: value for key, value in options.items() if key not in arrays}


def as_given(arrays, formats):
    return {key: gpuadam.Bits(a, "bfloat16") if formats.get(key) == "bfloat16" else a for key, a in arrays.items()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_of_formats_gives_the_cpus_bits(cp, backend, name):
    arrays, formats, options = made(name)
    there = {key: cp.asarray(a) for key, a in arrays.items()}
    for step in (1, 2, 3):
        gpuadam.adam_step(**as_given(arrays, formats), step=step, **options)
        gpuadam.adam_step(**as_given(there, formats), step=step, backend=backend, **options)
    found = {key: a.get() for key, a in there.items()}
    for key, a in arrays.items():
        fmt = formats.get(key, "float32")
        if fmt == "bfloat16":  # as float32, in which a NaN is one
            pair = [(x.astype("u4") << 16).view("f4") for x in (found[key], a)]
            assert_same_bits(pair[:1], pair[1:], key)
        elif fmt in ("uint8", "int16"):
            assert (found[key] == a).all(), key
        else:
            assert_same_bits([found[key]], [a], key)


@pytest.mark.parametrize("name", ["bfloat16 gradients", "all bfloat16", "remainder"])
def test_strided_and_unaligned_arrays_give_the_cpus_bits(cp, backend, name):
    arrays, formats, options = made(name, 30_000)
    for how in ("transposed", "every other", "unaligned"):
        mine, theirs = ({key: placed(xp, a, how) for key, a in arrays.items()} for xp in (np, cp))
        gpuadam.adam_step(**as_given(mine, formats), step=1, **options)
        gpuadam.adam_step(**as_given(theirs, formats), step=1, backend=backend, **options)
        for key, a in mine.items():
            both = [np.ascontiguousarray(x) for x in (theirs[key].get(), a)]
            if formats[key] == "bfloat16":
                both = [(x.astype("u4") << 16).view("f4") for x in both]
            if formats[key] == "int16":
                assert (both[0] == both[1]).all(), (how, key)
            else:
                assert_same_bits(both[:1], both[1:], f"{how} {key}")


def placed(xp, a, how):
    """Return a copy of an array in another layout."""
    if how == "transposed":
        return xp.asarray(a.reshape(100, 300).T.copy()).T
    whole = xp.zeros(2 * a.size + 8, a.dtype)
    view = whole[: 2 * a.size : 2] if how == "every other" else whole[3 : 3 + a.size]
    view[...] = xp.asarray(a)
    return view


OPTIONS = {
    "8 bits": {"state_dtype": "8bit"},
    "bfloat16 state and a mean": {"state_dtype": "bfloat16", "ema_decay": 0.9},
    "RAdam": {"cls": gpuadam.RAdam},
    "AdaMax": {"cls": gpuadam.AdaMax},
    "zeroed gradients": {"zero_grad": True},
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_clipped_steps_give_the_cpus_bits(cp, backend, name, capturable):
    """The norm stays on the device, and so do the scalars that depend on it."""
    options = dict(OPTIONS[name])
    cls = options.pop("cls", gpuadam.Adam)
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 70), "b": (5,), "c": (0,), "d": (1003,)}
    given = {key: rng.standard_normal(shape).astype("f4") for key, shape in shapes.items()}
    here, there = {k: a.copy() for k, a in given.items()}, {k: cp.asarray(a) for k, a in given.items()}
    on_cpu = cls(here, lr=0.01, capturable=capturable, **options)
    on_gpu = cls(there, lr=0.01, capturable=capturable, backend=backend, **options)
    for step in range(5):
        grads = {k: (10.0 ** (step - 2) * rng.standard_normal(a.shape)).astype("f4") for k, a in given.items()}
        theirs = {k: cp.asarray(a) for k, a in grads.items()}
        if capturable and step == 3:
            grads["b"][0], theirs["b"] = np.inf, cp.asarray(np.float32([np.inf, *grads["b"][1:]]))
        wanted = {"grad_scale": 0.5, "max_norm": 1.0, "check_finite": capturable}
        on_cpu.step(grads, **wanted)
        on_gpu.step(theirs, **wanted)
        if "zero_grad" in options:
            assert all(not bool(g.any()) for g in theirs.values())
    for key, a in here.items():
        assert_same_bits([there[key].get()], [a], key)
        for kind, moment in on_cpu.state[key].items():
            if kind != "step":
                other = on_gpu.state[key][kind]
                other = other.get() if hasattr(other, "get") else other.copy_to_host()
                assert (other.view("u1") == np.ascontiguousarray(moment).view("u1")).all(), (key, kind)
    if capturable:
        assert on_gpu.state_dict()["state"]["a"]["step"] == on_cpu.state_dict()["state"]["a"]["step"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bool", "int32"])
def test_a_flag_on_the_device_leaves_the_step_out(cp, backend, dtype):
    given = {"w": np.random.default_rng(0).standard_normal(5000).astype("f4")}
    there = {k: cp.asarray(a) for k, a in given.items()}
    opt = gpuadam.Adam(there, lr=0.1, capturable=True, zero_grad=True, backend=backend)
    flag = cp.ones(1, dtype)
    grads = {"w": cp.ones(5000, "f4")}
    opt.step(grads, found_inf=flag)
    assert (there["w"].get() == given["w"]).all() and not bool(grads["w"].any())
    assert opt.state_dict()["state"]["w"]["step"] == 0
    flag.fill(0)
    opt.step({"w": cp.ones(5000, "f4")}, found_inf=flag)
    assert opt.state_dict()["state"]["w"]["step"] == 1
    assert np.allclose(there["w"].get(), given["w"] - 0.1, atol=1e-6)


def test_a_captured_whole_step_replays_with_its_norm_and_flag(cp, backend):
    rng = np.random.default_rng(1)
    given = {k: rng.standard_normal(n).astype("f4") for k, n in (("a", 4096), ("b", 77))}
    here, there = {k: a.copy() for k, a in given.items()}, {k: cp.asarray(a) for k, a in given.items()}
    grads = {k: cp.zeros_like(a) for k, a in there.items()}
    lr, options = cp.full(1, 0.01), {"capturable": True, "state_dtype": "8bit"}
    on_cpu = gpuadam.Adam(here, lr=0.01, **options)
    on_gpu = gpuadam.Adam(there, lr=lr, backend=backend, **options)
    wanted = {"max_norm": 1.0, "check_finite": True}
    with cp.cuda.Stream(non_blocking=True) as stream:
        on_gpu.step(grads, **wanted)  # compiles, and makes the places that the graph knows
        on_cpu.step({k: np.zeros_like(a) for k, a in given.items()}, **wanted)
        stream.begin_capture()
        on_gpu.step(grads, **wanted)
        graph = stream.end_capture()
        for step in range(6):
            new = {k: (3.0**step * rng.standard_normal(a.shape)).astype("f4") for k, a in given.items()}
            if step == 2:
                new["a"][7] = np.nan
            for k, g in grads.items():
                g.set(new[k])
            graph.launch(stream)
            on_cpu.step(new, **wanted)
        stream.synchronize()
    for k, a in here.items():
        assert_same_bits([there[k].get()], [a], k)
