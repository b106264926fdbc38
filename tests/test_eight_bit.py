"""8-bit state: the same codes and scales as the model's on every backend, what they cost, and how well they train."""

import re
from typing import Any

import narrow_model as model
import numpy as np
import pytest
from cases import few, form_and_scalars
from launched import KEY, STEP_KEY, assert_same, assert_same_in_any_split, copies, launched, names_of, placed

import gpuadam
from gpuadam.kernels import adam, gpu_table
from gpuadam.kernels.cpu_backend import backend as numba_cpu
from gpuadam.kernels.layout import Update
from gpuadam.kernels.operands import GROUP, GROUP_LANES, Arrays, bytes_per_element, operands_of_form
from gpuadam.kernels.view import on_cpu

# name: (formats, options of the step)
FORMS: dict[str, tuple[Arrays, dict[str, Any]]] = {
    "float32": (Arrays(state="8bit"), {}),
    "bfloat16, rounded randomly": (Arrays("bfloat16", "bfloat16", "8bit", stochastic=True), {"zero_grad": True}),
    "bfloat16 with a remainder": (Arrays("bfloat16", "float32", "8bit", remainder=True), {"weight_decay": 0.1}),
    "float16, with a copy and a mean": (
        Arrays("float16", "bfloat16", "8bit", param_copy="bfloat16", ema="float32", stochastic=True),
        {"zero_grad": True, "weight_decay": 0.1, "decoupled": True, "grad_scale": 0.3},
    ),
    "nadam": (Arrays("float32", "float16", "8bit", param_copy="float16"), {"algorithm": "nadam", "betas": (0.3, 0.999)}),
}


@pytest.mark.parametrize("of", ["lr_scale", "grad"])
def test_an_array_that_repeats_elements_is_refused_and_one_that_has_all_is_taken(of):
    param, grad = np.zeros((4, GROUP), "f4"), np.ones((4, GROUP), "f4")
    opt = gpuadam.Adam({"w": param}, state_dtype="8bit")
    few = {"lr_scale": np.ones(4, "f4"), "grad": np.broadcast_to(np.float32(1), param.shape)}[of]

    def step(array):
        opt.step({"w": array if of == "grad" else grad}, lr_scale={"w": array} if of == "lr_scale" else None)

    with pytest.raises(ValueError, match=r"one number for several elements.*pass an array of shape \(4, 32\)"):
        step(few)
    assert not param.any()
    step(np.ascontiguousarray(np.broadcast_to(few[..., None] if few.ndim == 1 else few, param.shape)))
    assert param.all()


def form_of(name, **changes):
    arrays, options = FORMS[name]
    return form_and_scalars("adam", arrays, **(options | changes))


def given(form, n, seed=0, ordinary=False):
    """Return arrays in the order of the operands. ordinary: finite ones of usual size, as in training; else of any."""
    rng, found = np.random.default_rng(seed), []
    n_groups = -(-n // GROUP)
    for operand in operands_of_form(form):
        if operand.of_groups:
            smallest = {"m_scale": model.SMALLEST_M, "v_scale": model.SMALLEST_ROOT}[operand.name]
            scales = np.exp(rng.uniform(np.log(smallest), np.log(1e17), n_groups))
            if ordinary:
                scales = rng.uniform(0.1, 1.0, n_groups)
            else:
                scales = np.where(rng.random(n_groups) < 0.5, rng.uniform(0.1, 1.0, n_groups), scales)
                scales = np.where(rng.random(n_groups) < 0.1, rng.choice([0, np.nan, smallest], n_groups), scales)
            found.append(scales.astype("f4"))
        elif ordinary and model.DTYPES[operand.format].kind not in "iu":
            found.append(rng.standard_normal(n).astype(model.DTYPES[operand.format]))
        else:
            found.append(model.wide(operand.format, n, rng))
    by_name = dict(zip(names_of(form), found, strict=True))
    if not ordinary:
        # one special gradient spoils a group of 32, so that most groups have none, and some are zero throughout
        for start in range(0, n, GROUP):
            piece = by_name["grad"][start : start + GROUP]
            kind = rng.random()
            if kind < 0.7:
                with np.errstate(over="ignore", under="ignore"):
                    piece[...] = (rng.standard_normal(piece.size) * np.exp(rng.uniform(-60, 8))).astype(piece.dtype)
                if kind < 0.1:
                    piece[...] = 0
                if kind < 0.05:
                    by_name["m"][start : start + GROUP] = by_name["v"][start : start + GROUP] = 0
    return found


def modelled(form, arrays, scalars, start=0):
    """Return what the documentation says of an update: decoded, as float32 state is updated, and encoded."""
    old = dict(zip(names_of(form), arrays, strict=True))
    n = old["param"].size
    wide = Arrays(ema=form.arrays.ema)
    m, v = model.decoded_codes(*(old[name] for name in ("m", "v", "m_scale", "v_scale")))
    param = model.whole(old["param"], old["remainder"]) if form.arrays.remainder else model.decoded(old["param"])
    new = [param, model.decoded(old["grad"]), m, v, *([old["ema"].copy()] if form.arrays.ema else [])]
    launched(form._replace(arrays=wide, zero_grad=False), new, scalars)
    param, _, m, v, *ema = new
    h = model.random_bits(np.arange(start, start + n), KEY ^ STEP_KEY)
    result = dict(zip(("m", "v", "m_scale", "v_scale"), model.codes(m, v, h), strict=True))
    result["grad"] = np.zeros_like(old["grad"]) if form.zero_grad else old["grad"]
    if form.arrays.remainder:
        result["param"], result["remainder"] = model.parts(param)
    else:
        result["param"] = model.stored(param, form.arrays.param, "param", h if form.arrays.stochastic else None)
    if form.arrays.param_copy:
        result["param_copy"] = model.stored(param, form.arrays.param_copy)
    if form.arrays.ema:
        (result["ema"],) = ema
    return [result[name] for name in names_of(form)]


# The CPU backend and the model


@pytest.mark.parametrize("name", FORMS)
def test_codes_and_scales_are_the_models_over_several_steps(name):
    for ordinary in (False, True):
        form, scalars = form_of(name)
        arrays = given(form, 5003, seed=1, ordinary=ordinary)
        for step in range(4):
            expected = modelled(form, arrays, scalars)
            launched(form, arrays, scalars)
            assert_same(form, arrays, expected, f"step {step}")
            by_name = dict(zip(names_of(form), arrays, strict=True))
            by_name["grad"][...] = model.wide(form.arrays.grad, 5003, np.random.default_rng(step))
            if ordinary:
                by_name["grad"][...] = np.random.default_rng(step).standard_normal(5003)


@pytest.mark.parametrize("n", [*range(1, 34), 63, 64, 65, 95, 100, 1003])
def test_the_last_group_may_be_of_any_size(n):
    form, scalars = form_of("float32")
    arrays = given(form, n, seed=n)
    expected = modelled(form, arrays, scalars)
    assert_same(form, launched(form, arrays, scalars), expected)


def test_no_elements_are_no_groups():
    form, scalars = form_of("float32")
    arrays = given(form, 0)
    assert [a.size for a in launched(form, arrays, scalars)] == [0] * 6


def test_the_random_bits_go_on_beyond_an_index_of_2_32():
    form, scalars = form_of("bfloat16, rounded randomly")
    arrays = given(form, 331, ordinary=True)
    start = 2**32 - 5 * GROUP  # a parameter's groups begin at multiples of their size
    expected = modelled(form, arrays, scalars, start)
    without = launched(form, copies(arrays), scalars, start - 2**32)
    assert_same(form, launched(form, arrays, scalars, start), expected)
    assert (arrays[0] != without[0]).any()


def test_the_model_of_a_code_is_the_studys():
    """The values that the study of the format names: the largest numbers, and how the codes are spaced."""
    assert (model.M_NUMBERS[-1], model.V_NUMBERS[-1]) == (1.9296875, 1.9609375)
    assert model.M_NUMBERS[0] == model.V_NUMBERS[0] == 0
    for numbers, per_power in ((model.M_NUMBERS, 16), (model.V_NUMBERS, 32)):
        gaps = np.diff(np.append(numbers, 2 - 2.0**-7)).reshape(8, per_power)
        assert (gaps == gaps[:, :1]).all() and (gaps[1:, 0] == 2 * gaps[:-1, 0]).all()


# What is true of every state


def after_a_step(grads, m=0, v=0, **options):
    """Return a float32 parameter's state after one step from codes of zero."""
    form, scalars = form_of("float32", **options)
    grads = np.asarray(grads, "f4")
    n, n_groups = grads.size, -(-grads.size // GROUP)
    arrays = [np.ones(n, "f4"), grads, *(np.full(n, x, "u1") for x in (m, v)), *(np.ones(n_groups, "f4") for _ in "mv")]
    return dict(zip(names_of(form), launched(form, arrays, scalars), strict=True))


def test_v_above_zero_is_never_decoded_as_zero_and_m_is_zero_wherever_v_is():
    form, scalars = form_of("float32")
    arrays = given(form, 40_000, seed=2)
    for _ in range(3):
        old = dict(zip(names_of(form), copies(arrays), strict=True))
        exact = [old["param"], old["grad"], *model.decoded_codes(old["m"], old["v"], old["m_scale"], old["v_scale"])]
        launched(form._replace(arrays=Arrays()), exact, scalars)
        launched(form, arrays, scalars)
        new = dict(zip(names_of(form), arrays, strict=True))
        m, v = model.decoded_codes(new["m"], new["v"], new["m_scale"], new["v_scale"])
        kept = np.repeat(new["v_scale"] > 0, GROUP)[: v.size]
        assert (v[kept & (exact[3] > 0)] > 0).all()
        assert kept.sum() > 10_000
        assert (m[v == 0] == 0).all() and (v == 0).sum() > 1000
        assert (v[v > 0] >= np.finfo("f4").smallest_normal).all()
        assert (np.abs(m[np.abs(m) > 0]) >= np.finfo("f4").smallest_normal).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_group_with_a_nan_or_an_infinity_becomes_nan_and_stays_so(bad):
    grads = np.ones(3 * GROUP, "f4")
    grads[40] = bad
    state = after_a_step(grads)
    for scale in ("m_scale", "v_scale"):
        assert (np.isnan(state[scale]) == [False, True, False]).all()
    assert (state["m"][32:64] == 0).all() and (state["v"][32:64] == 0).all()
    form, scalars = form_of("float32")
    arrays = [state[name] for name in names_of(form)]
    arrays[1][:] = 1
    launched(form, arrays, scalars)
    assert (np.isnan(state["param"]) == np.repeat([False, True, False], GROUP)).all()
    assert (np.isnan(state["v_scale"]) == [False, True, False]).all()


def test_a_group_of_zeros_stays_zeros():
    state = after_a_step(np.zeros(40, "f4"))
    assert all((state[name] == 0).all() for name in ("m", "v"))
    assert all((state[name].view("u4") == 0).all() for name in ("m_scale", "v_scale"))
    assert (state["param"] == 1).all()
    after = after_a_step(np.full(40, -0.0, "f4"))  # codes of zero, scales of one
    assert (model.decoded_codes(*(after[name] for name in ("m", "v", "m_scale", "v_scale")))[0] == 0).all()


def test_what_is_too_small_becomes_zero_before_it_is_decoded_as_a_subnormal_number():
    root = 2.0**-50 / np.sqrt(1 - 0.999)  # gradients from which the root of v reaches the smallest
    for factor, kept in ((0.9, False), (1.1, True)):
        state = after_a_step(np.full(64, factor * root))
        assert ((state["v_scale"] > 0) == kept).all() and ((state["v"] > 0) == kept).all()
        assert ((state["m_scale"] > 0) == kept).all() and ((state["m"] > 0) == kept).all()
    # v has no root below 2**-63, so m alone is too small only when a root of other elements, or of steps before, is not
    form, scalars = form_of("float32")
    for m_scale, kept in ((2.0**-113, True), (2.0**-114, False)):
        arrays = [np.ones(64, "f4"), np.zeros(64, "f4"), np.full(64, 127, "u1"), np.full(64, 255, "u1")]
        arrays += [np.full(2, m_scale, "f4"), np.ones(2, "f4")]
        launched(form, arrays, scalars)
        assert ((arrays[4] > 0) == kept).all() and ((arrays[2] > 0) == kept).all()
        assert (arrays[5] > 0).all() and (arrays[3] > 0).all()


def test_signs_are_kept_and_the_largest_is_the_scale():
    rng = np.random.default_rng(0)
    grads = rng.standard_normal(320).astype("f4")
    state = after_a_step(grads)
    m, _ = model.decoded_codes(*(state[name] for name in ("m", "v", "m_scale", "v_scale")))
    assert (np.sign(m)[m != 0] == np.sign(grads)[m != 0]).all()
    largest = np.abs(grads).reshape(-1, GROUP).max(1)
    np.testing.assert_allclose(state["m_scale"], np.float32(0.1) * largest, rtol=1e-6)  # one rounding
    np.testing.assert_allclose(state["v_scale"], np.sqrt(np.float32(0.001)) * largest, rtol=1e-6)
    # one code of the largest is 1/16 of it, of the smallest 2**-7 of that
    assert (np.abs(m - 0.1 * grads) <= np.repeat(0.1 * largest, GROUP) / 16 / 1.9296875 * 1.0001).all()


def test_rounding_of_m_and_of_the_root_is_unbiased():
    """The mean over 4,096 keys is the number: within 5 standard errors of a mean, of which there are 64."""
    rng = np.random.default_rng(3)
    m, v = rng.standard_normal(GROUP).astype("f4"), (rng.standard_normal(GROUP) ** 2).astype("f4")
    n = 4096
    decoded = np.zeros((2, n, GROUP))
    for k in range(n):
        h = model.random_bits(np.arange(GROUP), 0x9E3779B97F4A7C15 * (k + 1))
        decoded[:, k] = model.decoded_codes(*model.codes(m, v, h))
    roots = np.sqrt(decoded[1])
    for found, wanted in ((decoded[0], m), (roots, np.sqrt(v))):
        error = np.abs(found.mean(0) - wanted)
        of_the_mean = found.std(0) / np.sqrt(n)
        above_code_1 = np.abs(wanted) > 0.01 * np.abs(wanted).max()  # v is raised to code 1
        assert (error <= 5 * of_the_mean + 2e-6 * np.abs(wanted).max())[above_code_1].all()


# The CPU backend's loops


@pytest.mark.parametrize("name", few(["float32", "float16, with a copy and a mean"], "float16, with a copy and a mean"))
def test_any_split_between_threads_gives_the_same_bits(name):
    form, scalars = form_of(name)
    arrays = given(form, 70_001, seed=5)
    assert_same_in_any_split(form, arrays, scalars, modelled(form, arrays, scalars))


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_the_random_bits_of_an_optimizer_are_of_its_seed_and_of_each_parameter(state_dtype):
    def state_after(seed):
        params = {"a": np.ones(64, "f4"), "b": np.ones(64, "f4")}
        opt = gpuadam.Adam(params, state_dtype=state_dtype, seed=seed)
        grad = np.random.default_rng(0).standard_normal(64).astype("f4")
        opt.step({"a": grad, "b": grad})
        return opt.state["a"]["m"], opt.state["b"]["m"]

    (a, b), (again, _), (other, _) = state_after(0), state_after(0), state_after(1)
    assert (a == again).all() and (a != b).any() and (a != other).any()


def test_a_table_of_many_arrays_gives_the_bits_of_each_alone():
    form, scalars = form_of("float32")
    updates = [given(form, n, seed=n) for n in (1, 31, 32, 33, 100, 0, 1003, 5)]
    expected = [launched(form, copies(arrays), scalars) for arrays in updates]
    views = [Update([on_cpu("", a) for a in arrays], KEY) for arrays in updates]
    (batch,) = numba_cpu.batches(views, form.arrays)
    batch.prepare(adam, form, scalars, None, STEP_KEY)
    batch.launch()
    for arrays, wanted in zip(updates, expected, strict=True):
        assert_same(form, arrays, wanted)


# Quality and cost


def test_state_after_200_steps_is_near_float32s():
    """Root mean squares of the differences, of those of the numbers; the tolerances are twice what was measured.

    A code is 3 to 6 % of a large number and more of one that is small beside its 31 neighbours, as some are here: they
    differ 400-fold. On average nothing is off.
    """
    rng = np.random.default_rng(0)
    n = 32_000
    size = np.exp(rng.uniform(-3, 3, n)).astype("f4")
    start = rng.standard_normal(n).astype("f4")
    params, opts = [], []
    for state in (None, "8bit"):
        params.append(start.copy())
        opts.append(gpuadam.Adam(params[-1], lr=1e-3, state_dtype=state))
    for _ in range(200):
        grad = (size * (0.3 + rng.standard_normal(n))).astype("f4")
        for opt in opts:
            opt.step(grad)
    exact, coded = (opt.state["0"] for opt in opts)
    m, v = model.decoded_codes(*(coded[name] for name in ("m", "v", "m_scale", "v_scale")))
    root, wanted_root = np.sqrt(v), np.sqrt(exact["v"])
    moved, wanted = params[1] - start, params[0] - start

    def off(a, b):
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))

    assert off(m, exact["m"]) < 0.06
    assert off(root, wanted_root) < 0.1
    assert off(moved, wanted) < 0.08
    assert abs(moved.mean() / wanted.mean() - 1) < 0.01


def test_state_takes_at_most_2_25_bytes_of_each_parameter():
    for n in (32, 3200):
        state = gpuadam.Adam(np.zeros(n, "f4"), state_dtype="8bit").state["0"]
        assert sum(a.nbytes for key, a in state.items() if key != "step") == 2.25 * n
    form, _ = form_of("float32")
    assert bytes_per_element(form) == 12 + 4 + 4 * 4 / GROUP


# What is refused


def one_step(param_dtype="f4", state="u1", n=64, scales=(2, 2), **changes):
    param = np.ones(n, param_dtype)
    arrays = {"param": param, "grad": param.copy(), "m": np.zeros(n, state), "v": np.zeros(n, state)}
    arrays |= {name: np.zeros(k, "f4") for name, k in zip(("m_scale", "v_scale"), scales, strict=True) if k is not None}
    options = {key: changes.pop(key) for key in list(changes) if key in ("algorithm",)}
    gpuadam.adam_step(**(arrays | changes), step=1, **options)


def unaligned(n):
    return np.zeros(4 * n + 1, "u1")[1:].view("f4")


def test_what_a_step_needs_it_takes():
    one_step()


REFUSED: dict[str, tuple] = {
    "float64": (ValueError, TypeError, {"param_dtype": "f8"}, "float64"),
    "float64 grad": (TypeError, TypeError, {"grad": np.ones(64)}, "float64"),
    "a mean in float64": (TypeError, TypeError, {"ema": np.ones(64)}, "float64"),
    "a copy in float64": (TypeError, TypeError, {"param_copy": np.ones(64)}, "float64"),
    "strided param": (ValueError, ValueError, {"param": np.ones(128, "f4")[::2]}, "C-contiguous"),
    "reversed codes": (ValueError, ValueError, {"m": np.zeros(64, "u1")[::-1]}, "C-contiguous"),
    "param off its alignment": (ValueError, ValueError, {"param": unaligned(64)}, "param is not aligned to its 4-byte"),
    "grad off its alignment": (ValueError, ValueError, {"grad": unaligned(64)}, "grad is not aligned to its 4-byte"),
    "scales off their alignment": (
        ValueError,
        ValueError,
        {"v_scale": unaligned(2)},
        "v_scale is not aligned to its 4-byte",
    ),
    "AMSGrad": (TypeError, ValueError, {"max_v": np.zeros(64, "u1")}, "max_v"),
    "AdaMax": (ValueError, ValueError, {"algorithm": "adamax"}, "AdaMax"),
    "too few scales": (ValueError, ValueError, {"n": 65, "scales": (2, 2)}, r"scales of shape \(3,\)"),
    "too many scales": (ValueError, ValueError, {"scales": (2, 64)}, r"scales of shape \(2,\)"),
    "float64 scales": (TypeError, TypeError, {"v_scale": np.zeros(2)}, "float32"),
    "no scales": (TypeError, TypeError, {"scales": (None, None)}, "needs m_scale and v_scale"),
    "one scale": (TypeError, TypeError, {"scales": (2, None)}, "needs m_scale and v_scale"),
    "scales of float32 state": (TypeError, TypeError, {"state": "f4"}, "it must be uint8"),
    "one of each": (TypeError, TypeError, {"v": np.zeros(64, "f4")}, "use one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_hold_is_refused(what):
    *errors, changes, match = REFUSED[what]
    with pytest.raises(tuple(errors), match=match):
        one_step(**changes)


@pytest.mark.parametrize(
    "make, options, error",
    [
        (lambda: np.ones(64), {}, TypeError),
        (lambda: np.ones((8, 8), "f4", order="F"), {}, ValueError),
        (lambda: np.ones(64, "f4")[::2], {}, ValueError),
        (lambda: unaligned(64), {}, ValueError),
        (lambda: np.ones(64, "f4"), {"amsgrad": True}, ValueError),
    ],
    ids=["float64", "F order", "strided", "unaligned", "amsgrad"],
)
def test_so_it_is_when_an_optimizer_is_made(make, options, error):
    with pytest.raises(error, match="8-bit state"):
        gpuadam.Adam(make(), state_dtype="8bit", **options)


def test_adamax_has_no_8_bit_state():
    with pytest.raises(ValueError, match="AdaMax"):
        gpuadam.AdaMax(np.ones(64, "f4"), state_dtype="8bit")


# The compiled code of the GPU backends

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)


OFFSETS = {"aligned": lambda k: 0, "off by one": lambda k: 1, "all different": lambda k: k}


def assert_gpu_code_gives_the_cpus_bits(compiler, arch, name, sizes, where="aligned", ordinary=False, on_device=False):
    form, scalars = form_of(name)
    updates = [given(form, n, seed=n, ordinary=ordinary) for n in sizes]
    expected = [launched(form, copies(arrays), scalars) for arrays in updates]
    there = [placed(form, arrays, OFFSETS[where]) for arrays in updates]
    memory = gpu_code.memory_of([arena for _, arena, _ in there])
    if len(memory) > 8:
        memory = [(min(start for start, _ in memory), max(end for _, end in memory))]
    own = [arrays for arrays, _, _ in there]
    gpu_code.run_table(compiler, form, arch, own, scalars, memory, on_device, STEP_KEY, [KEY] * len(sizes))
    for (arrays, arena, inside), wanted, n in zip(there, expected, sizes, strict=True):
        assert_same(form, arrays, wanted, f"n={n}, {where}")
        assert (arena[~inside] == 0xA5).all(), f"n={n}, {where}: bytes between the arrays were written"


GPU_COMPILERS = ["cupy", "numba-cuda"]


@pytest.mark.parametrize("compiler", GPU_COMPILERS)
@pytest.mark.parametrize("where", OFFSETS)
def test_gpu_code_gives_the_cpus_bits_at_every_size(compiler, where, examples):
    for n in (*range(1, 101, examples(11, 1)), 1003):
        assert_gpu_code_gives_the_cpus_bits(compiler, "sm_90", "float32", [n], where)


@pytest.mark.in_short()
@pytest.mark.parametrize("compiler", GPU_COMPILERS)
@pytest.mark.parametrize("name", few(FORMS, "bfloat16, rounded randomly", "nadam"))
def test_gpu_code_gives_the_cpus_bits_in_every_form(compiler, name):
    for where in OFFSETS:
        assert_gpu_code_gives_the_cpus_bits(compiler, "sm_90", name, [1003, 64, 37], where)


@pytest.mark.parametrize(
    "compiler, arch", [("cupy", "sm_75"), ("cupy", "sm_120"), ("cupy-cuda12", "sm_80"), ("numba-cuda", "sm_120")]
)
@pytest.mark.exhaustive
def test_gpu_code_gives_the_cpus_bits_on_other_architectures(compiler, arch):
    assert_gpu_code_gives_the_cpus_bits(compiler, arch, "float16, with a copy and a mean", [133, 640])


@pytest.mark.in_short()
@pytest.mark.parametrize("compiler", few(GPU_COMPILERS, "cupy"))
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "scalars in memory"])
def test_many_arrays_are_one_launch(compiler, on_device):
    chunk = gpu_table.CHUNK * GROUP_LANES
    sizes = [1, 33, chunk - 1, 7, chunk + 1, 100, 2 * chunk + 300]
    assert_gpu_code_gives_the_cpus_bits(
        compiler, "sm_90", "bfloat16, rounded randomly", sizes, ordinary=True, on_device=on_device
    )


@pytest.mark.parametrize("compiler", GPU_COMPILERS)
def test_several_steps_stay_together(compiler):
    form, scalars = form_of("float32")
    arrays = given(form, 2005, ordinary=True)
    own = copies(arrays)
    for step in range(5):
        launched(form, arrays, scalars)
        gpu_code.run_table(compiler, form, "sm_90", [own], scalars, gpu_code.memory_of(own), key=STEP_KEY, keys=[KEY])
        assert_same(form, own, arrays, f"step {step}")
        arrays[1][:] = own[1][:] = np.random.default_rng(step).standard_normal(2005)


@pytest.mark.parametrize("compiler", few(GPU_COMPILERS, "numba-cuda"))
def test_a_skipped_step_changes_nothing_but_the_gradient(compiler):
    form, scalars = form_of("bfloat16, rounded randomly")
    form = form._replace(skips=True)
    arrays = given(form, 1003)
    before = copies(arrays)
    for skip in (1, 0):
        gpu_code.run_table(
            compiler, form, "sm_90", [arrays], scalars, gpu_code.memory_of(arrays), True, STEP_KEY, [KEY], skip
        )
        if skip:
            before[1][:] = 0
            assert_same(form, arrays, before)
            arrays[1][:] = before[1][:] = 1
    assert (arrays[2] != before[2]).any() and not arrays[1].any()


@pytest.mark.in_short()
@pytest.mark.parametrize("compiler", GPU_COMPILERS)
@pytest.mark.parametrize(
    "name, arch",
    [
        *(("float32", arch) for arch in ("sm_80", "sm_90", "sm_120")),
        ("bfloat16, rounded randomly", "sm_90"),
        ("bfloat16 with a remainder", "sm_80"),
    ],
)
def test_codes_move_8_bytes_at_a_time_and_the_rest_16(compiler, arch, name):
    form, _ = form_of(name)
    sass = gpu_code.machine_code(compiler, form, arch, loop="table")
    found = gpu_code.memory_accesses(sass)
    lanes, each = GROUP_LANES, [o for o in operands_of_form(form) if not o.of_groups]
    for kind, moved in (("LDG", [o for o in each if o.loads]), ("STG", [o for o in each if o.stores])):
        of_8 = sum(n for op, n in found.items() if op.startswith(f"{kind}.E.64"))
        of_16 = sum(n for op, n in found.items() if op.startswith(f"{kind}.E.128"))
        wanted_8 = sum(o.itemsize * lanes == 8 for o in moved)
        assert of_16 == sum(o.itemsize * lanes // 16 for o in moved), found
        if kind == "STG":
            assert of_8 == wanted_8, found
        else:  # those beyond the codes are of the table's row
            assert wanted_8 <= of_8, found
    assert all(op.startswith(("LDG.E", "STG.E")) for op in found), found
    # two maxima among the four threads of a group; ptxas adds others for warps that have come apart
    assert len(re.findall(r"\bSHFL\.BFLY\b", sass)) >= 4
    resources = gpu_code.resources(compiler, form, arch, loop="table")
    assert resources.local_bytes == 0
    if compiler == "numba-cuda":
        assert resources.registers <= 72
    # NVRTC interleaves the lanes, which takes more registers; what counts is the bytes that are on their way at once
    blocks = min(65536 // (-(-resources.registers // 8) * 8 * gpu_table.BLOCK), 12)
    loaded = sum(o.itemsize * lanes for o in each if o.loads)
    assert blocks * gpu_table.BLOCK * loaded >= 24 * 1024


@pytest.mark.in_short()
@pytest.mark.parametrize("compiler", GPU_COMPILERS)
@pytest.mark.parametrize("name", ["float32", "float16, with a copy and a mean"])
def test_the_ptx_has_the_contracts_operations(compiler, name):
    form, _ = form_of(name)
    kernel = gpu_code.loaded(gpu_code.ptx(compiler, form, "sm_90", loop="table"))
    exact = {"cvt.f32.f16", "cvt.rn.f16.f32"} if "float16" in form.arrays else set()
    assert set(gpu_code.foreign_operations(kernel, form)) <= exact
    counts = gpu_code.rounded_operations(kernel)
    # one root and one quotient of each lane, and two quotients of each group
    assert counts["sqrt"] == GROUP_LANES and counts["div"] == GROUP_LANES + 2
    rule = 5 + form.l2 + form.decoupled + (form.arrays.ema != "") + (form.algorithm == "nadam")
    assert counts["fma"] >= GROUP_LANES * (rule + 4)  # two are decoded and two encoded
