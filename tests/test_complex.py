"""Complex parameters, and `components`: numbers that share a v."""

import copy

import ml_dtypes
import numpy as np
import pytest
from cases import few
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import foreign_state, reference, transports
from gpuadam.kernels.adam import Form
from gpuadam.kernels.operands import Arrays, bytes_per_element
from gpuadam.testing import Reference, assert_same_bits, unchanged

COMPLEX = {"float32": "complex64", "float64": "complex128"}


def numbers(k, shape=(5, 7), dtype="complex64"):
    rng, dtype = np.random.default_rng(k), np.dtype(dtype)
    values = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype.kind == "c" else 0)
    return values.astype(dtype)


class Joint:
    """Adam as programs write it for complex arrays: v is a real mean of |g|**2."""

    def __init__(self, x, lr, betas=(0.9, 0.999), eps=1e-8):
        self.x, self.lr, (self.beta1, self.beta2), self.eps = x.astype("c16"), lr, betas, eps
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros(x.shape), 0

    def step(self, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * np.abs(g) ** 2
        m_hat, v_hat = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        self.x = self.x - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


@pytest.mark.in_short()
@pytest.mark.parametrize("layout", ["C", "F", "every other", "unaligned", "no dimensions", "empty"])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_joint_is_the_adam_of_programs_with_complex_arrays_in_any_layout(dtype, layout):
    shape = {"no dimensions": (), "empty": (0, 3)}.get(layout, (5, 7))

    def placed(values):
        if layout == "unaligned":
            memory = np.zeros(values.nbytes + 1, "u1")[1:].view(values.dtype).reshape(shape)
        elif layout == "every other":
            memory = np.zeros((10, 14), dtype)[::2, ::-2]
        else:
            memory = np.zeros(shape, dtype, "F" if layout == "F" else "C")
        memory[...] = values
        return memory

    x, program = placed(numbers(0, shape, dtype)), Joint(numbers(0, shape, dtype), lr=0.1)
    opt, y, m, v = gpuadam.Adam(x, lr=0.1, complex="joint"), placed(x), placed(0 * x), np.zeros(shape, x.real.dtype)
    for t in range(1, 8):
        grad = placed(numbers(t, shape, dtype))
        opt.step(grad)
        gpuadam.adam_step(y, grad, m, v, t, lr=0.1, complex="joint")
        program.step(grad)
    assert_same_bits(x, y)
    np.testing.assert_allclose(x, program.x, rtol=0, atol=3e-6 if dtype == "complex64" else 1e-14)


def test_parts_are_parameters_of_their_own():
    """The same bits as an array of the parts, in every option that such an array takes."""
    options = {"clip_value": 0.7, "bounds": (-1.0, 1.0), "weight_decay": 0.01, "amsgrad": True, "ema_decay": 0.9}
    for order in "CF":
        x = np.array(numbers(0), order=order)
        parts = x[..., None].view("f4").copy(order="K")
        ours, theirs = (gpuadam.Adam(p, lr=0.1, complex="parts", **options) for p in (x, parts))
        for k in range(5):
            grad = np.array(numbers(k + 1), order=order)
            ours.step(grad, max_norm=2.0)
            theirs.step(grad[..., None].view("f4"), max_norm=2.0)
        assert_same_bits(x, parts)
        assert_same_bits(ours.state, theirs.state)


def test_a_joint_step_turns_with_the_phase_and_that_of_parts_does_not():
    turn, found = np.exp(0.7j), {}
    for how in ("joint", "parts"):
        x, y = numbers(0, dtype="complex128"), turn * numbers(0, dtype="complex128")
        one, other = (gpuadam.Adam(p, lr=0.1, complex=how) for p in (x, y))
        for k in range(5):
            one.step(numbers(k + 1, dtype="complex128"))
            other.step(turn * numbers(k + 1, dtype="complex128"))
        found[how] = np.abs(turn * x - y).max()
    assert found["joint"] < 1e-13 and found["parts"] > 0.01


@pytest.mark.parametrize("components", few([2, 3, 4], 3))
def test_a_step_of_components_turns_with_the_vectors(components):
    """VectorAdam: the step of a rotated gradient is the rotated step."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((components, components)))
    x = np.zeros((6, 4, components))
    y = x.copy()
    one, other = (gpuadam.Adam(p, lr=0.1, components=components) for p in (x, y))
    for k in range(5):
        grad = numbers(k, x.shape, "float64")
        one.step(grad)
        other.step(grad @ turn)
    np.testing.assert_allclose(x @ turn, y, rtol=0, atol=1e-14)
    assert one.state["0"]["v"].shape == (6, 4)
    np.testing.assert_allclose(np.linalg.norm(np.diff([0 * x, x], axis=0), axis=-1).max(), 0.5, atol=0.3)


def test_two_components_are_the_joint_bits():
    x = numbers(0)
    pairs = x[..., None].view("f4").copy()
    ours, theirs = gpuadam.Adam(x, lr=0.1, complex="joint"), gpuadam.Adam(pairs, lr=0.1, components=2)
    for k in range(5):
        ours.step(numbers(k + 1))
        theirs.step(numbers(k + 1)[..., None].view("f4"))
    assert_same_bits(x, pairs)
    assert_same_bits(ours.state, theirs.state)


FAMILY = {
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "L2 and AMSGrad": ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "NAdam": ("NAdam", {}),
    "RAdam": ("RAdam", {"betas": (0.9, 0.9)}),
    "AdaMax": ("AdaMax", {}),
    "optax": ("Adam", {"formula": "optax", "eps_root": 1e-3, "amsgrad": True}),
    "eps-hat": ("Adam", {"formula": "eps-hat"}),
}


@pytest.mark.in_short()
@pytest.mark.parametrize("what", few(FAMILY, "L2 and AMSGrad", "AdaMax"))
@pytest.mark.parametrize("how", [{"complex": "joint"}, {"complex": "parts"}, {"components": 3}])
def test_the_family_is_that_of_the_reference(what, how):
    cls, options = FAMILY[what]
    dtype, shape = ("complex128", (4, 5)) if "complex" in how else ("float64", (4, 5, 3))
    x = numbers(0, shape, dtype)
    opt = getattr(gpuadam, cls)(x, lr=0.1, **how, **options)
    settings = {"algorithm": opt.algorithm, "decoupled": opt.decoupled} | {
        k: v for k, v in options.items() if k != "amsgrad"
    }
    exact, m, v, max_v = x.copy(), 0 * x, np.zeros(shape[: 2 if "components" in how else None]), None
    v = 0 * x if how == {"complex": "parts"} else v
    max_v = v if "amsgrad" in options else None
    for t in range(1, 9):
        opt.step(numbers(t, shape, dtype))
        grad = numbers(t, shape, dtype)
        exact, m, v, max_v = reference.adam_step(exact, grad, m, v, t, lr=0.1, max_v=max_v, **how, **settings)
    np.testing.assert_allclose(x, exact, rtol=1e-11, atol=1e-13)
    of_v = opt.state["0"]["v"]
    np.testing.assert_allclose(of_v.view("c16")[..., 0] if how == {"complex": "parts"} else of_v, v, rtol=1e-11, atol=1e-13)


def test_testing_has_complex_parameters_too():
    params = {"object": numbers(0), "positions": numbers(1, (4, 3), "float32")}
    groups = [
        {"params": {name: p}, **({"components": 3} if p.ndim and p.dtype == "f4" else {})} for name, p in params.items()
    ]
    opt = gpuadam.Adam(groups, lr=0.1, complex="joint")
    exact = Reference({"object": params["object"]}, lr=0.1, complex="joint")
    of_vectors = Reference({"positions": params["positions"]}, lr=0.1, components=3)
    for k in range(6):
        grads = {"object": numbers(k), "positions": numbers(k, (4, 3), "float32")}
        opt.step(grads)
        exact.step({"object": grads["object"]})
        of_vectors.step({"positions": grads["positions"]})
    exact.assert_close({"object": params["object"]})
    of_vectors.assert_close({"positions": params["positions"]})
    with pytest.raises(AssertionError, match="differ from float64"):
        exact.assert_close({"object": params["object"] + 1e-4j})
    with pytest.raises(TypeError, match="is complex: say which Adam"):
        Reference(params)
    other = numbers(0)
    other[2, 3] += 1j
    with pytest.raises(AssertionError, match=r"1 of 70 elements differ .*\n  at \[2, 3, 1\]"):
        assert_same_bits(other, numbers(0))


def test_where_rates_the_change_and_zeros_go_by_element():
    x = numbers(0)
    flags, rates = np.random.default_rng(1).random((5, 7)) < 0.5, np.random.default_rng(2).random((5, 7))
    opt, alone, change, grad = gpuadam.Adam(x, lr=0.1, complex="joint"), x.copy(), np.zeros_like(x), numbers(1)
    opt.step(grad, where=flags, lr_scale=rates)
    assert (x[~flags] == alone[~flags]).all() and (opt.state["0"]["v"][~flags] == 0).all()
    np.testing.assert_allclose(np.abs(x - alone)[flags], 0.1 * rates[flags], rtol=1e-4)
    before = x.copy()
    grad[0] = 0
    grad[1].real = 0  # of which the imaginary part is not
    opt.step(grad, where="nonzero", change=change)
    assert_same_bits(x, before)
    assert (change[0] == 0).all() and (change[1] != 0).all()
    rows = gpuadam.Adam(x, lr=0.1, complex="parts")  # elements are rows of the parts
    rows.step(numbers(3), where=flags, lr_scale=rates)
    assert (x[~flags] == before[~flags]).all() and (x[flags] != before[flags]).all()


def test_clipping_by_norm_is_by_the_absolute_values():
    grads = [numbers(0), numbers(1, dtype="complex128"), numbers(2, dtype="float32")]
    norm = float(gpuadam.global_norm(grads))
    assert norm == pytest.approx(np.sqrt(sum((np.abs(g).astype("f8") ** 2).sum() for g in grads)), rel=1e-6)
    x, y = numbers(3), numbers(3)
    gpuadam.Adam(x, complex="joint").step(grads[0], max_norm=1.0)
    own = float(gpuadam.global_norm(grads[:1]))
    gpuadam.Adam(y, complex="joint").step(grads[0], grad_scale=1 / (own + 1e-6))
    assert_same_bits(x, y)
    grads[0][2, 3] = np.nan + 1j
    with unchanged(x=x):
        gpuadam.Adam(x, complex="joint").step(grads[0], check_finite=True)


def test_the_norms_of_a_step_are_of_the_absolute_values():
    for order in "CF":
        x = np.array(numbers(0, (70, 101)), order=order)
        opt = gpuadam.Adam(x, lr=0.1, complex="joint")
        for k in range(2):
            before = x.astype("c16")
            change, param = opt.step(np.array(numbers(k + 1, (70, 101)), order=order), norms=True)
            assert change == gpuadam.global_norm(x - before) and param == gpuadam.global_norm(x)
    assert float(param) == pytest.approx(np.linalg.norm(x), rel=1e-6)


NARROW = {
    "joint, bfloat16 state": {"complex": "joint", "state_dtype": "bfloat16"},
    "parts, bfloat16 state": {"complex": "parts", "state_dtype": "bfloat16", "amsgrad": True},
    "parts, 8 bits": {"complex": "parts", "state_dtype": "8bit"},
    "joint, a mean and float64 state": {"complex": "joint", "state_dtype": "float64", "ema_decay": 0.9},
}


@pytest.mark.parametrize("what", few(NARROW, "joint, bfloat16 state", "parts, 8 bits"))
def test_state_is_saved_and_goes_on_with_the_same_bits(what, tmp_path):
    options = NARROW[what]
    x = numbers(0)
    opt = gpuadam.Adam({"w": x}, lr=0.1, **options)
    for k in range(3):
        opt.step({"w": numbers(k + 1)})
    opt.save(tmp_path / "a", with_params=True)
    y, z = np.zeros_like(x), x.copy()
    loaded = gpuadam.load(tmp_path / "a", {"w": y}, with_params=True)
    fresh = gpuadam.Adam({"w": z}, lr=0.1, **options)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one in (opt, loaded, fresh):
        one.step({"w": numbers(9)})
    for other, state in ((y, loaded.state), (z, fresh.state)):
        assert_same_bits(other, x)
        assert_same_bits(state, opt.state)
    exact = Reference({"w": numbers(0)}, lr=0.1, complex=options["complex"], amsgrad="amsgrad" in options)
    for k in (1, 2, 3, 9):
        exact.step({"w": numbers(k)})
    exact.assert_close({"w": x}, atol=0.05 if "bit" in what or "bfloat16" in what else 0.0)


def test_a_checkpoint_is_of_the_same_numbers_and_the_same_choice(tmp_path):
    opt = gpuadam.Adam({"w": numbers(0)}, complex="joint")
    opt.step({"w": numbers(1)})
    opt.save(tmp_path / "a")
    with pytest.raises(
        gpuadam.CheckpointError, match=r"was complex64 of shape \[5, 7\], and is float32 of shape \[5, 7, 2\]"
    ):
        gpuadam.load(tmp_path / "a", {"w": numbers(0)[..., None].view("f4")})
    for how in ({"complex": "parts"}, {"complex": "joint", "amsgrad": True}):
        with pytest.raises(ValueError):
            gpuadam.Adam({"w": numbers(0)}, **how).load_state_dict(copy.deepcopy(opt.state_dict()))


def test_arrays_grow_and_shrink():
    x = numbers(0, (3, 4))
    opt = gpuadam.Adam({"w": x}, complex="joint")
    opt.step({"w": numbers(1, (3, 4))})
    was = copy.deepcopy(opt.state["w"])
    opt.replace("w", np.concatenate([x, x[:1]]), [2, -1, 0, 0])
    for key in ("m", "v"):
        assert_same_bits(opt.state["w"][key], np.stack([was[key][2], np.zeros_like(was[key][0]), was[key][0], was[key][0]]))
    opt.add("positions", np.zeros(3, "c8"))
    opt.step({"w": numbers(2, (4, 4)), "positions": numbers(3, (3,))})
    with pytest.raises(TypeError, match=r"was complex64 on .*, and the new one is float32"):
        opt.replace("w", np.zeros((4, 4, 2), "f4"), np.arange(4))


@pytest.mark.parametrize(
    "options",
    [
        {"complex": "joint", "state_dtype": "bfloat16"},
        pytest.param({"complex": "joint"}, marks=pytest.mark.exhaustive),
        pytest.param({"complex": "parts"}, marks=pytest.mark.exhaustive),
    ],
)
def test_offloaded_steps_have_the_same_bits(options, tmp_path):
    x, y = numbers(0, (300, 200)), numbers(0, (300, 200))
    adam = gpuadam.Adam({"w": x}, lr=0.1, **options)
    with gpuadam.OffloadAdam({"w": y}, lr=0.1, state=tmp_path / "state", budget=1 << 18, **options) as offloaded:
        for k in range(3):
            adam.step({"w": numbers(k, (300, 200))})
            offloaded.step({"w": numbers(k, (300, 200))})
    assert_same_bits(x, y)
    other = {"joint": "parts", "parts": "joint"}[options["complex"]]
    with pytest.raises(ValueError, match="state"):
        gpuadam.OffloadAdam({"w": y}, state=tmp_path / "state", **options | {"complex": other})


def test_capturable_steps_have_the_same_bits():
    x, y = numbers(0), numbers(0)
    one, other = gpuadam.Adam(x, complex="joint"), gpuadam.Adam(y, complex="joint", capturable=True, lr=np.array([1e-3]))
    for k in range(3):
        one.step(numbers(k), max_norm=1.0)
        other.step(numbers(k), max_norm=1.0)
    assert_same_bits(x, y)


def test_bounds_of_arrays_go_with_components_and_parts():
    low = np.float32([[-0.01, -0.02, -0.03]] * 4)
    x = np.zeros((4, 3), "f4")
    gpuadam.Adam(x, lr=0.1, components=3, bounds=(low, 0.015)).step(numbers(0, (4, 3), "float32"))
    assert (x >= low).all() and x.max() == np.float32(0.015) and (x == low).any()
    y = np.zeros((5, 7), "c8")
    gpuadam.Adam(y, lr=0.1, complex="parts", bounds=(np.full((5, 7), -0.01 - 0.02j, "c8"), None)).step(numbers(0))
    assert y.real.min() == np.float32(-0.01) and y.imag.min() == np.float32(-0.02)


@pytest.mark.parametrize("one, other", [("joint", None), (None, "parts"), ("joint", "parts")])
def test_the_mode_of_real_parameters_is_not_compared(one, other):
    saved = gpuadam.Adam({"w": np.ones(3, "f4")}, complex=one)
    saved.step({"w": np.ones(3, "f4")})
    opt = gpuadam.Adam({"w": np.ones(3, "f4")}, complex=other)
    opt.load_state_dict(saved.state_dict())
    opt.step({"w": np.ones(3, "f4")})
    assert opt.groups[0]["complex"] == other and opt.steps == 2


def test_the_mode_of_complex_parameters_is_compared_and_the_group_is_named():
    def made(of_second):
        groups = [{"params": {"w": np.ones(3, "f4")}}, {"params": {"z": numbers(0)}, "complex": of_second}]
        return gpuadam.Adam(groups)

    opt = made("joint")
    match = "^group 1 of the optimizer has complex='joint', and that of the state_dict complex='parts'"
    with unchanged(opt=opt), pytest.raises(ValueError, match=match):
        opt.load_state_dict(made("parts").state_dict())
    bad = opt.state_dict()
    bad["groups"][0]["complex"] = "both"
    with unchanged(opt=opt), pytest.raises(ValueError, match="complex='both' must be one of"):
        opt.load_state_dict(bad)


REFUSED = {
    "no choice": ({}, TypeError, "complex='joint' has one v .* complex='parts'"),
    "bounds": ({"complex": "joint", "bounds": (0, 1)}, ValueError, "would need an order of complex numbers"),
    "clip_value": ({"complex": "joint", "clip_value": 1.0}, ValueError, "would need an order of complex numbers"),
    "8 bits": ({"complex": "joint", "state_dtype": "8bit"}, TypeError, "share a v use state of 16 bits or more"),
    "another word": ({"complex": "both"}, ValueError, "must be one of 'joint', 'parts'"),
    "five": ({"components": 5}, ValueError, "must be 1, 2, 3 or 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what):
    options, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        gpuadam.Adam(numbers(0), **options)


def test_gradients_and_state_of_other_kinds_are_refused():
    x = numbers(0)
    opt = gpuadam.Adam(x, complex="joint")
    cases = [
        (numbers(0, dtype="float32"), "the gradient of a complex parameter is complex"),
        (numbers(0, (5,)), "nothing is broadcast"),
        (numbers(0).astype("c16").astype(">c16"), "in the other byte order"),
        (numbers(0).astype(np.clongdouble), r"it must be float32.*x.astype\('complex128'\)"),
    ]
    for grad, message in cases:
        with unchanged(x=x, opt=opt), pytest.raises((TypeError, ValueError), match=message):
            opt.step(grad)
    real = np.zeros((5, 7), "f4")
    with pytest.raises(TypeError, match="the gradient of a real parameter is real"):
        gpuadam.Adam(real, complex="joint").step(x)
    with pytest.raises(ValueError, match=r"one v for all 2 numbers of an element, so its shape is \(5, 7\), and it is real"):
        gpuadam.adam_step(x, numbers(1), np.zeros_like(x), np.zeros_like(x), 1, complex="joint")
    with unchanged(x=x, opt=opt), pytest.raises(ValueError, match="would need an order of complex numbers"):
        opt.groups[0]["bounds"] = (numbers(2), None)
        opt.step(numbers(1))
    for how in ("joint", "parts"):
        for name in ("lr_scale", "where"):
            with unchanged(x=x), pytest.raises(TypeError, match=f"{name} .* has dtype complex64: it has real numbers"):
                gpuadam.Adam(x, complex=how).step(numbers(1), **{name: numbers(2)})
        for wrong in (np.ones(7, "?"), np.ones((7, 5), "?")):
            with unchanged(x=x), pytest.raises(ValueError, match=r"where .* has dtype bool .* leading dimensions"):
                gpuadam.Adam(x, complex=how).step(numbers(1), where=wrong)
    fixed = numbers(0)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="is read-only, and an update writes to it"):
        gpuadam.adam_step(fixed, numbers(1), numbers(2), np.zeros((5, 7), "f4"), 1, complex="joint")
    gpuadam.adam_step(numbers(1), fixed, 0 * fixed, np.zeros((5, 7), "f4"), 1, complex="joint")  # a gradient may be
    with pytest.raises(ValueError, match="complex cannot be changed after the optimizer is made"):
        opt.groups[0]["complex"] = "parts"
        opt.step(numbers(1))
    for wrong, message in (((4, 2), "its last dimension is of 3"), ((), "its last dimension is of 3")):
        with pytest.raises(ValueError, match=message):
            gpuadam.Adam(np.zeros(wrong, "f4"), components=3)
    with pytest.raises(ValueError, match="must be neighbours in memory"):
        gpuadam.Adam(np.zeros((3, 4), "f4").T, components=3)
    vectors = np.zeros((4, 3), "f4")
    for name in ("lr_scale", "where"):
        with pytest.raises(ValueError, match=rf"one {name} for all 3 numbers of an element, so its shape is \(4,\)"):
            gpuadam.Adam(vectors, components=3).step(
                vectors + 1, **{name: np.ones((4, 3), "f4" if name == "lr_scale" else "?")}
            )
    with pytest.raises(ValueError, match="must be neighbours in memory"):
        gpuadam.Adam(vectors, components=3).step(np.ones((3, 4), "f4").T)


SHARDED = {
    "joint": {"complex": "joint"},
    "parts, 8 bits": {"complex": "parts", "state_dtype": "8bit"},
    "joint, bfloat16 state": {"complex": "joint", "state_dtype": "bfloat16", "amsgrad": True, "ema_decay": 0.9},
    "two": {"components": 2},
    "four of bfloat16": {"components": 4, "state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("what", few(SHARDED, "joint"))
def test_ranks_have_the_bits_of_one(what, tmp_path):
    """Three ranks, two buckets and more: training, a checkpoint that all ways of loading take, the state in one piece."""
    options = SHARDED[what]
    last, dtype = (
        (options["components"],) if "components" in options else (),
        "float32" if "components" in options else "complex64",
    )
    shapes = {"a": (50, 70, *last), "b": (3, *last), "c": (5000, *last)}
    grads = [{name: numbers(k, shape, dtype) for name, shape in shapes.items()} for k in range(4)]

    def start():
        return {name: numbers(9, shape, dtype) for name, shape in shapes.items()}

    def train(transport):
        params = start()
        opt = gpuadam.ShardedAdam(params, transport, lr=0.1, bucket_bytes=1 << 14, reduction="sum", **options)
        for k in range(3):
            own = {name: g if transport.rank == 0 else 0 * g for name, g in grads[k].items()}
            opt.step(own, max_norm=3.0)
        opt.save(tmp_path / "saved", with_params=True)
        loaded = {name: np.zeros_like(p) for name, p in params.items()}
        again = gpuadam.load_sharded(tmp_path / "saved", loaded, transport, with_params=True)
        again.step({name: g if transport.rank == 0 else 0 * g for name, g in grads[3].items()})
        return params, {key: opt.gathered(key) for key in ("m", "v")}, loaded

    params = start()
    alone = gpuadam.Adam(params, lr=0.1, **options)
    for k in range(3):
        alone.step(grads[k], max_norm=3.0)
    found = all_well(on_ranks(3, train))
    for of_rank, state, _ in found:
        assert_same_bits(of_rank, params)
        for key, whole in state.items():
            assert_same_bits(whole, {name: alone.state[name][key] for name in params})
    other = {name: np.zeros_like(p) for name, p in params.items()}
    loaded = gpuadam.load(tmp_path / "saved", other, with_params=True)
    for opt in (alone, loaded):
        opt.step(grads[3])
    for *_, of_rank in found:
        assert_same_bits(of_rank, params)
    assert_same_bits(other, params)


def test_views_of_the_buffers_are_complex_too():
    opt = gpuadam.ShardedAdam({"w": numbers(0)}, transports.Local(), lr=0.1, complex="joint", views=True)
    opt.grads["w"][...] = numbers(1)
    opt.step(opt.grads)
    x = numbers(0)
    gpuadam.Adam(x, lr=0.1, complex="joint").step(numbers(1))
    assert_same_bits(opt.params["w"], x)
    assert opt.params["w"].dtype == opt.grads["w"].dtype == "complex64"


def test_who_takes_no_complex_numbers_says_so():
    for options, error, message in (
        ({}, TypeError, "complex='joint' has one v"),
        ({"complex": "joint", "bounds": (0, 1)}, ValueError, "would need an order of complex numbers"),
        ({"complex": "joint", "state_dtype": "8bit"}, TypeError, "share a v use state of 16 bits or more"),
    ):
        with pytest.raises(error, match=message):
            gpuadam.ShardedAdam(numbers(0), transports.Local(), **options)
    with pytest.raises(ValueError, match="has components=3: ranks own multiples of 4,096 numbers"):
        gpuadam.ShardedAdam(np.zeros((4, 3), "f4"), transports.Local(), components=3)
    opt = gpuadam.Adam({"w": numbers(0)}, complex="joint")
    with pytest.raises(TypeError, match="is not exchanged with other libraries"):
        foreign_state.from_torch(opt, {"state": {}, "param_groups": []}, [])


def test_bytes_of_an_element():
    """complex64: 48 of joint, 56 of parts, which are two elements."""
    assert bytes_per_element(Form(Arrays(numbers=2))) == 48
    assert 2 * bytes_per_element(Form(Arrays())) == 56
    assert bytes_per_element(Form(Arrays("float32", "float32", "bfloat16", numbers=2))) == 24 + 8 + 4
    assert bytes_per_element(Form(Arrays(numbers=3, low="float32"))) == 4 * (3 * 5 + 2 + 3)


def test_copies_and_narrow_components():
    x, copies = numbers(0), np.zeros((5, 7, 2), ml_dtypes.bfloat16)
    gpuadam.Adam({"w": x}, complex="joint", param_copies={"w": copies}).step({"w": numbers(1)})
    assert_same_bits(copies, x[..., None].view("f4").astype(ml_dtypes.bfloat16))
    narrow = numbers(2, (6, 3), "float32").astype(ml_dtypes.bfloat16)
    wide = narrow.astype("f4")
    one = gpuadam.Adam(narrow, lr=0.1, components=3, master="remainder")
    other = gpuadam.Adam(wide, lr=0.1, components=3)
    for k in range(4):
        one.step(numbers(k, (6, 3), "float32"))
        other.step(numbers(k, (6, 3), "float32"))
    assert_same_bits(one.state["0"]["v"], other.state["0"]["v"])


@pytest.mark.parametrize("library", ["cupy", "numba-cuda"], indirect=True)
@pytest.mark.parametrize("how", [{"complex": "joint"}, {"complex": "parts"}, {"components": 3}])
def test_a_gpu_gives_the_cpus_bits(library, how):
    is_complex = "complex" in how
    dtype, shape = ("complex64", (50, 7)) if is_complex else ("float32", (50, 7, 3))
    for layout in ("C", "F"):
        if layout == "F" and not is_complex:
            continue
        values = [np.array(numbers(k, shape, dtype), order=layout) for k in range(4)]
        others = [numbers(k, (9, *shape[1:]), dtype) for k in range(4)]  # a second array makes it a table
        there, here = ({"a": to(values[0]), "b": to(others[0])} for to in (library.array, np.array))
        opts = [gpuadam.Adam(params, lr=0.1, ema_decay=0.9, **how) for params in (there, here)]
        for k in range(1, 4):
            theirs = opts[0].step({"a": library.array(values[k]), "b": library.array(others[k])}, max_norm=3.0, norms=True)
            ours = opts[1].step({"a": values[k], "b": others[k]}, max_norm=3.0, norms=True)
            assert_same_bits(list(theirs), list(ours))
        assert_same_bits(there, here)
        assert_same_bits(opts[0].state, opts[1].state)
