"""Device mode: the step count and the scalars on the device, the same bits as the host's, and what a captured graph may hold."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from cases import ARCHITECTURES, DEFAULTS, DTYPES, assert_same_bits, form_and_scalars, state

import gpuadam
from gpuadam import capturable, functional, hyperparameters
from gpuadam.kernels import device_scalars
from gpuadam.kernels.storage import Arrays


def params(dtype="float32"):
    return {"w": state(33, dtype)[0].reshape(3, 11), "b": state(5, dtype, seed=1)[0]}


def grads(k, dtype="float32"):
    return {"w": state(33, dtype, seed=10 + k)[1].reshape(3, 11), "b": state(5, dtype, seed=20 + k)[1]}


# On the CPU, where everyone can test it


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learning_rate_in_an_array_gives_the_bits_of_the_number(dtype):
    one, other = params(dtype), params(dtype)
    lr, scale = np.zeros(1), np.array(2.0, "float32")
    on_device = gpuadam.AdamW(one, lr=lr, amsgrad=True, capturable=True)
    on_host = gpuadam.AdamW(other, amsgrad=True)
    for k in range(5):
        lr[0] = on_host.groups[0]["lr"] = 0.1 / (k + 1)
        on_device.step(grads(k, dtype), grad_scale=scale)
        on_host.step(grads(k, dtype), grad_scale=2.0)
    assert_same_bits(list(one.values()), list(other.values()))


def test_the_step_count_is_an_array_that_all_parameters_of_a_group_share():
    opt = gpuadam.Adam(params(), capturable=True)
    count = opt.state["w"]["step"]
    opt.step(grads(0))
    opt.step(grads(1))
    assert count is opt.state["b"]["step"] and count.dtype == np.int64 and count.tolist() == [2]


def test_a_state_dict_holds_numbers_and_is_loaded_in_place():
    lr = np.array([0.1])
    opt = gpuadam.Adam(params(), lr=lr, capturable=True)
    opt.step(grads(0))
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"]["w"]["step"] == 1 and saved["groups"][0]["lr"] == 0.1

    other_lr = np.array([7.0])
    other = gpuadam.Adam(opt.groups[0]["params"][0].copy(), lr=other_lr, capturable=True)
    assert other.groups[0]["lr"] is other_lr
    resumed = gpuadam.Adam({"w": params()["w"], "b": params()["b"]}, lr=other_lr, capturable=True)
    count = resumed.state["w"]["step"]
    resumed.load_state_dict(saved)
    assert resumed.state["w"]["step"] is count and count[0] == 1
    assert resumed.groups[0]["lr"] is other_lr and other_lr[0] == 0.1


def test_state_goes_from_device_mode_to_the_host_and_back():
    first = gpuadam.Adam(params(), lr=0.1, capturable=True)
    first.step(grads(0))
    second = gpuadam.Adam(params(), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state["w"]["step"] == 1
    third = gpuadam.Adam(params(), lr=0.5, capturable=True)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    assert third.state["w"]["step"].tolist() == [1]


def test_a_callable_learning_rate_is_not_saved_in_device_mode_either():
    opt = gpuadam.Adam(params(), lr=lambda step: 0.1 / step, capturable=True)
    opt.step(grads(0))
    assert opt.state_dict()["groups"][0]["lr"] is None


def test_a_copy_of_an_optimizer_goes_on_by_itself():
    opt = gpuadam.Adam(params(), lr=np.array([0.1]), capturable=True)
    opt.step(grads(0))
    other = copy.deepcopy(opt)
    other.step(grads(1))
    assert other.state["w"]["step"].tolist() == [2] and opt.state["w"]["step"].tolist() == [1]
    opt.step(grads(1))
    assert_same_bits(opt.groups[0]["params"], other.groups[0]["params"])


def test_a_whole_group_can_be_skipped_and_its_count_stays():
    given = params()
    opt = gpuadam.Adam([{"params": [given["w"]]}, {"params": [given["b"]]}], capturable=True)
    opt.step([[grads(0)["w"]], [None]])
    assert opt.state["0"]["step"].tolist() == [1] and opt.state["1"]["step"].tolist() == [0]


def one_of_them_skipped():
    gpuadam.Adam(params(), capturable=True).step(grads(0) | {"b": None})


BAD = {
    "an array for lr without capturable": (lambda: gpuadam.Adam(params(), lr=np.ones(1)), TypeError, "capturable=True"),
    "two learning rates": (
        lambda: gpuadam.Adam(params(), lr=np.ones(2), capturable=True),
        ValueError,
        "one float32 or float64",
    ),
    "an integer": (lambda: gpuadam.Adam(params(), lr=np.ones(1, "i8"), capturable=True), ValueError, "dtype int64"),
    "a negative one": (
        lambda: gpuadam.Adam(params(), lr=np.array([-1.0]), capturable=True).step(grads(0)),
        ValueError,
        "lr=-1.0",
    ),
    "one array skipped": (one_of_them_skipped, ValueError, r"\['b'\] have no gradient"),
    "a number": (lambda: gpuadam.Adam(params(), capturable=1), TypeError, "capturable must be True or False"),
    "a stream on the CPU": (lambda: gpuadam.Adam(params()).step(grads(0), stream=5), TypeError, "which has no streams"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said(what):
    call, error, said = BAD[what]
    with pytest.raises(error, match=said):
        call()


def test_counts_that_differ_cannot_be_loaded_into_a_group_that_shares_one():
    host = gpuadam.Adam(params())
    host.step(grads(0) | {"b": None})
    with pytest.raises(ValueError, match="share a step count"):
        gpuadam.Adam(params(), capturable=True).load_state_dict(host.state_dict())


# The kernels, executed on the host

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpu_drivers import DRIVERS  # noqa: E402

SAME = {name: Arrays(name, name, name) for name in DTYPES}


def from_the_device(compiler, arch, h, step, arrays, seed=0, counts=True, **given):
    """Return the `device_scalars.Form` and the memory of a step, and the count after it, as an optimizer would ask for them.

    given: arrays of one number for lr, grad_scale, found_inf and norm, whose numbers in h are then not looked at; and the
    numbers max_norm and largest_norm.
    """
    names = ("lr", "grad_scale", "found_inf", "norm", "max_norm", "largest_norm")
    now = SimpleNamespace(clock=SimpleNamespace(memory={arrays.compute: None}), counts=counts)
    for name in names:
        setattr(now, name, given.get(name))
    if now.lr is not None:
        h = h._replace(lr=0.0)
    if now.grad_scale is not None:
        h = h._replace(fixed=dataclasses.replace(h.fixed, grad_scale=1.0))
    scalars = capturable.Scalars(functional.Updates(h, step, [], None, now, seed=seed), None)
    scalars.of(arrays)
    ((form, settings, _),) = scalars._launches.values()
    count = np.array([step - 1])
    numbers = (h.lr if now.lr is None else now.lr, h.fixed.grad_scale if now.grad_scale is None else now.grad_scale)
    out = gpu_code.run_scalars(compiler, form, arch, settings, count, *numbers, now.found_inf, now.norm)
    return form, out, count[0]


SCALARS = {
    # the options; the compute type; the dtypes of lr and grad_scale on the device, None for numbers
    "numbers": ({"weight_decay": 0.1}, "float32", None, None),
    "arrays": ({"weight_decay": 0.1, "decoupled": True, "grad_scale": 0.3}, "float32", "float64", "float32"),
    "arrays in float64": ({"maximize": True, "betas": (0.2, 0.3)}, "float64", "float32", "float64"),
    "AMSGrad": ({"betas": (0.0, 0.0), "eps": 1e-30}, "float32", "float64", None),
    "RAdam": ({"algorithm": "radam", "weight_decay": 0.1}, "float32", "float64", None),
    "RAdam in float64": ({"algorithm": "radam", "betas": (0.5, 0.9999), "maximize": True}, "float64", None, "float64"),
    "RAdam that never rectifies": ({"algorithm": "radam", "betas": (0.9, 0.5)}, "float32", "float64", None),
    "AdaMax": ({"algorithm": "adamax", "weight_decay": 0.1, "decoupled": True}, "float32", "float32", None),
    "AdaMax in float64": ({"algorithm": "adamax", "grad_scale": 0.3}, "float64", "float64", "float32"),
    "optax": ({"formula": "optax", "eps_root": 1e-12}, "float32", "float64", None),
    "optax in float64, a running mean": ({"formula": "optax", "ema_decay": 0.9}, "float64", "float64", None),
    "eps-hat": ({"formula": "eps-hat", "weight_decay": 0.1}, "float32", "float64", None),
    "a running mean": ({"ema_decay": 0.9}, "float32", None, None),
    "a running mean that starts at the parameter": ({"ema_decay": 0.3, "ema_starts": True}, "float64", "float64", None),
}


# every case for one architecture, and between them every option of the kernel for all
ON_ALL = ("arrays", "arrays in float64", "RAdam", "AdaMax", "optax in float64, a running mean", "eps-hat")


@pytest.mark.parametrize("name", SCALARS)
def test_the_device_computes_the_hosts_scalars(compiler, name):
    for arch in ARCHITECTURES if name in ON_ALL else ("sm_90",):
        check_scalars(compiler, arch, name)


def check_scalars(compiler, arch, name):
    options, dtype, lr_dtype, scale_dtype = SCALARS[name]
    h, dtype = hyperparameters.checked(**DEFAULTS | options), np.dtype(dtype)
    arrays = SAME[dtype.name]._replace(ema="float32" if "ema_decay" in options else "")
    lr = lr_dtype and np.array([h.lr], lr_dtype)
    grad_scale = scale_dtype and np.array([h.fixed.grad_scale], scale_dtype)
    exact = h if lr is None else h._replace(lr=float(lr[0]))  # a float32 holds another number
    if grad_scale is not None:
        exact = exact._replace(fixed=dataclasses.replace(exact.fixed, grad_scale=float(grad_scale[0])))
    for step in (1, 2, 3, 5, 6, 7, 1000, 2**40 + 1):  # RAdam rectifies from 6 on
        _, expected = hyperparameters.form_and_scalars(exact, step, arrays)
        form, out, count = from_the_device(compiler, arch, h, step, arrays, lr=lr, grad_scale=grad_scale)
        assert count == step
        assert_same_bits([gpu_code.reals_of(out, form)], [np.array(expected, dtype)], f"step {step}")


def test_a_step_that_the_host_counts_has_the_same_scalars(compiler, arch):
    h = hyperparameters.checked(**DEFAULTS)
    for step in (1, 2, 1000):
        _, expected = hyperparameters.form_and_scalars(h, step, SAME["float32"])
        form, out, count = from_the_device(compiler, arch, h, step, SAME["float32"], counts=False)
        assert count == step - 1  # nothing is counted there
        assert_same_bits([gpu_code.reals_of(out, form)], [np.array(expected, "f4")], f"step {step}")


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63 + 5, 2**64 - 1])
def test_the_device_makes_the_hosts_key_of_a_step(compiler, arch, seed):
    h, arrays = hyperparameters.checked(**DEFAULTS), Arrays(state="bfloat16")
    for step in (1, 2, 3, 2**33 + 1, 2**62):
        _, out, _ = from_the_device(compiler, arch, h, step, arrays, seed)
        assert out[device_scalars.KEY_AT // 8] == device_scalars.step_key(seed, step)


FLAGS = {
    "float32": ([0.0, -0.0], [1.0, -1.0, np.inf, np.nan, 1e-45]),
    "float64": ([0.0, -0.0], [1.0, -1.0, np.inf, np.nan, 5e-324]),
    "bool": ([False], [True]),
    "uint8": ([0], [1, 128, 255]),
    "int32": ([0], [1, -1, -(2**31)]),
    "int64": ([0], [1, -1, 2**32, -(2**63)]),
}


@pytest.mark.parametrize("dtype", FLAGS)
def test_a_flag_that_is_not_zero_leaves_the_step_out(compiler, dtype):
    assert set(map(np.dtype, FLAGS)) == set(capturable.FLAGS)
    h = hyperparameters.checked(**DEFAULTS)
    for skips, values in enumerate(FLAGS[dtype]):
        for value in values:
            flag = np.array([value], dtype)
            form, out, count = from_the_device(compiler, "sm_90", h, 5, SAME["float32"], found_inf=flag)
            assert (count, out[device_scalars.SKIP_AT // 8]) == ((4, 1) if skips else (5, 0)), value
            if not skips:
                _, expected = hyperparameters.form_and_scalars(h, 5, SAME["float32"])
                assert_same_bits([gpu_code.reals_of(out, form)], [np.array(expected, "f4")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5, 3e-3])
def test_the_device_clips_by_the_norm_as_the_host_does(compiler, dtype, maximize, scale):
    given = np.array([scale])
    for norm in (0.0, 1e-300, 0.5, 1.0, 1.0 + 1e-6, 7.3, 1e10, 1e30):
        for max_norm in (1.0, 0.1, 1e20):
            clipped = capturable.clipped(scale, norm, max_norm)
            options = DEFAULTS | {"maximize": maximize}
            try:
                h = hyperparameters.checked(**options, grad_scale=clipped)
                _, expected = hyperparameters.form_and_scalars(h, 3, SAME[dtype])
            except ValueError:  # it rounds to 0, which only the host refuses
                continue
            h = hyperparameters.checked(**options)
            form, out, _ = from_the_device(
                compiler, "sm_90", h, 3, SAME[dtype], grad_scale=given, norm=np.array([norm]), max_norm=max_norm
            )
            found = gpu_code.reals_of(out, form)
            assert_same_bits([found], [np.array(expected, dtype)], f"norm {norm}, max_norm {max_norm}")
    assert abs(capturable.clipped(scale, 1e10, 1.0)) < abs(scale) == abs(capturable.clipped(scale, 0.0, 1.0))


@pytest.mark.parametrize("clips", [False, True])
def test_a_norm_that_is_not_finite_or_too_large_leaves_the_step_out(compiler, clips):
    h, largest = hyperparameters.checked(**DEFAULTS), capturable.LARGEST_NORM[np.dtype("float32")]
    skipped = {}
    for norm in (0.0, 1.0, largest, np.nextafter(largest, np.inf), 1e300, np.inf, np.nan):
        max_norm = {"max_norm": 1.0} if clips else {}
        given = {"norm": np.array([norm]), "largest_norm": largest} | max_norm
        _, out, count = from_the_device(compiler, "sm_90", h, 5, SAME["float32"], **given)
        skipped[norm] = bool(out[device_scalars.SKIP_AT // 8])
        assert count == (4 if skipped[norm] else 5)
    assert list(skipped.values()) == [False] * 3 + [True] * 4
    # the norm of scaled gradients is what counts
    _, out, _ = from_the_device(
        compiler,
        "sm_90",
        h,
        5,
        SAME["float32"],
        norm=np.array([largest]),
        largest_norm=largest,
        grad_scale=np.array([-2.0]),
    )
    assert out[device_scalars.SKIP_AT // 8] == 1


@pytest.mark.parametrize("algorithm, n", [("adam", 26_000), ("radam", 6_000), ("adamax", 2_000)])
def test_a_hundred_thousand_random_steps_give_the_hosts_bits(compiler, algorithm, n):
    """betas, t, lr and decay over their ranges; a third of the 102,000 for each compiler, in float32, which rounds."""
    rng = np.random.default_rng({"cupy": 0, "cupy-cuda12": 1, "numba-cuda": 2}[compiler])
    dtype = np.dtype("float32")
    beta = np.repeat(1 - 10 ** rng.uniform(-6, 0, (n // 4, 2)), 4, axis=0)  # the host's powers of a new beta take longest
    steps = (10 ** rng.uniform(0, 9, n)).astype("i8")
    lr, decay = 10 ** rng.uniform(-9, 1, n), 10 ** rng.uniform(-6, 1, n)
    form = device_scalars.Form(dtype, np.dtype("float64"), None, True, algorithm)
    step, rate = np.zeros(1, "i8"), np.zeros(1)
    for k in range(n):
        h = hyperparameters.Hyperparameters(
            float(lr[k]), hyperparameters.Fixed(*map(float, beta[k]), 1e-8, float(decay[k]), True, False, 1.0, algorithm)
        )
        _, expected = hyperparameters.form_and_scalars(h, int(steps[k]), SAME["float32"])
        step[0], rate[0] = steps[k] - 1, h.lr
        eps = 1e-8 if algorithm == "radam" else expected.eps
        settings = device_scalars.Settings(1, 0, 1.0, *map(float, beta[k]), float(decay[k]), expected.w1, expected.w2, eps)
        out = gpu_code.run_scalars(compiler, form, "sm_90", settings, step, rate, 1.0)
        assert gpu_code.reals_of(out, form).tolist() == list(expected), (k, h, steps[k])


# The optimizer on a stand-in for the driver


@pytest.fixture(params=DRIVERS)
def driver(request, monkeypatch):
    return request.param(monkeypatch)


def on_gpu(driver, arrays):
    return {name: driver.array(a) for name, a in arrays.items()}


def optimizer(driver, given, cls=gpuadam.Adam, **options):
    return cls(given, backend=driver.backend, **options)


def test_the_step_on_a_gpu_gives_the_cpus_bits(driver):
    there, here = on_gpu(driver, params()), params()
    lr, scale = driver.array(np.zeros(1)), driver.array(np.array([2.0], "f4"))
    on_device = optimizer(driver, there, gpuadam.AdamW, lr=lr, amsgrad=True, maximize=True, capturable=True)
    on_host = gpuadam.AdamW(here, amsgrad=True, maximize=True)
    for k in range(4):
        driver.numpy(lr)[0] = on_host.groups[0]["lr"] = 0.1 / (k + 1)
        given = on_gpu(driver, grads(k))
        on_device.step(given, grad_scale=scale)
        on_host.step(grads(k), grad_scale=2.0)
    assert [loop for loop, *_ in driver.launches] == ["scalars", "table"] * 4
    assert_same_bits([driver.numpy(a) for a in there.values()], list(here.values()))
    assert driver.numpy(on_device.state["w"]["step"]).tolist() == [4]


def test_two_dtypes_in_a_group_advance_the_count_once(driver):
    there = {"w": driver.array(params()["w"]), "d": driver.array(params("float64")["b"])}
    opt = optimizer(driver, there, capturable=True)
    opt.step({"w": driver.array(grads(0)["w"]), "d": driver.array(grads(0, "float64")["b"])})
    assert driver.numpy(opt.state["w"]["step"]).tolist() == [1]
    assert sorted(loop for loop, *_ in driver.launches) == ["contiguous", "contiguous", "scalars", "scalars"]


def test_a_captured_step_is_the_kernels_and_nothing_else(driver):
    there = on_gpu(driver, params())
    opt = optimizer(driver, there, lr=driver.array(np.array([0.1])), capturable=True)
    given = on_gpu(driver, grads(0))
    opt.step(given, stream=7)
    driver.capturing.add(7)
    driver.launches.clear(), driver.sent.clear(), driver.waits.clear()
    opt.step(given, stream=7)
    assert [(loop, stream) for loop, _, stream in driver.launches] == [("scalars", 7), ("table", 7)]
    assert driver.sent == [] and driver.waits == []


def both(driver, cls=gpuadam.Adam, on_host=None, **options):
    """Return an optimizer and its arrays on the device, and likewise on the host."""
    there, here = on_gpu(driver, params()), params()
    return optimizer(driver, there, cls, **options), there, cls(here, **(options if on_host is None else on_host)), here


def assert_state(driver, opt, there, host, here):
    assert_same_bits([driver.numpy(a) for a in there.values()], list(here.values()))
    for name, expected in host.state.items():
        for moment in ("m", "v"):
            assert_same_bits([driver.numpy(opt.state[name][moment])], [expected[moment]], f"{moment} of {name}")


@pytest.mark.parametrize("cls", [gpuadam.RAdam, gpuadam.AdaMax], ids=["RAdam", "AdaMax"])
def test_another_algorithm_in_device_mode_gives_the_hosts_bits(driver, cls):
    opt, there, host, here = both(driver, cls, {"lr": 0.01}, lr=0.01, capturable=True)
    for k in range(8):
        opt.step(on_gpu(driver, grads(k)))
        host.step(grads(k))
    assert_state(driver, opt, there, host, here)


def test_a_flag_on_the_device_leaves_the_step_out(driver):
    """Parameters, moments and the count stay; the host does not know of it."""
    opt, there, host, here = both(driver, on_host={}, capturable=True)
    flag = driver.array(np.zeros(1, "f4"))
    for k, found in enumerate([0.0, 1.0, 0.0, np.inf, np.nan, 0.0]):
        driver.numpy(flag)[0] = found
        opt.step(on_gpu(driver, grads(k)), found_inf=flag)
        host.step(grads(k), found_inf=found)
    assert_state(driver, opt, there, host, here)
    assert driver.numpy(opt.state["w"]["step"]).tolist() == [3] == [host.state["w"]["step"]]


def test_a_step_that_is_left_out_still_zeroes_the_gradients(driver):
    opt, there, *_ = both(driver, on_host={}, capturable=True, zero_grad=True)
    given = on_gpu(driver, grads(0))
    opt.step(given, found_inf=driver.array(np.ones(1, "u1")))
    assert not any(driver.numpy(a).any() for a in given.values())
    assert_same_bits([driver.numpy(a) for a in there.values()], list(params().values()))


@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_are_clipped_by_a_norm_on_the_device(driver, capturable):
    opt, there, host, here = both(driver, gpuadam.AdamW, {"maximize": True}, maximize=True, capturable=capturable)
    norm = driver.array(np.zeros(1))
    for k, value in enumerate([0.5, 7.0, 1e10]):
        driver.numpy(norm)[0] = value
        opt.step(on_gpu(driver, grads(k)), norm=norm, max_norm=2.0, grad_scale=0.7)
        host.step(grads(k), norm=value, max_norm=2.0, grad_scale=0.7)
    assert_state(driver, opt, there, host, here)
    assert [loop for loop, *_ in driver.launches] == ["scalars", "table"] * 3


def test_a_norm_on_the_device_is_checked_there(driver):
    opt, there, host, here = both(driver, on_host={}, capturable=True)
    norm = driver.array(np.zeros(1))
    for k, value in enumerate([1.0, np.inf, 2.0, 1e20, np.nan, 3.0]):  # squares of 1e20 overflow float32
        driver.numpy(norm)[0] = value
        opt.step(on_gpu(driver, grads(k)), norm=norm, check_finite=True)
        host.step(grads(k), norm=value, check_finite=True)
    assert_state(driver, opt, there, host, here)
    assert driver.numpy(opt.state["w"]["step"]).tolist() == [3] == [host.state["w"]["step"]]


def test_what_a_step_would_have_to_wait_for_is_refused(driver):
    opt = optimizer(driver, on_gpu(driver, params()))
    flag, norm = driver.array(np.zeros(1, "f4")), driver.array(np.ones(1))
    with pytest.raises(ValueError, match=r"found_inf is an array on a GPU.*capturable=True"):
        opt.step(on_gpu(driver, grads(0)), found_inf=flag)
    with pytest.raises(ValueError, match="check_finite on a GPU needs an optimizer with capturable=True"):
        opt.step(on_gpu(driver, grads(0)), norm=norm, check_finite=True)
    assert driver.launches == [] and opt.steps == 0


def capture(driver, opt, given, warm=True, **options):
    if warm:
        opt.step(given, stream=7)
    driver.capturing.add(7)
    before = [driver.numpy(p).copy() for p in opt.groups[0]["params"]]
    driver.launches.clear()
    try:
        opt.step(given, stream=7, **options)
    finally:
        assert driver.launches == []
        assert_same_bits([driver.numpy(p) for p in opt.groups[0]["params"]], before)


FROZEN = {
    "a step count of the host": ({}, {}, "capturable=True"),
    "a learning rate of the host": ({"capturable": True}, {}, "with lr=0.1 for ever: give lr as an array"),
    "a gradient scale of the host": ({"capturable": True, "lr": None}, {"grad_scale": 2.0}, "with grad_scale=2.0 for ever"),
}


@pytest.mark.parametrize("what", FROZEN)
def test_what_a_graph_would_freeze_is_refused_with_the_way_to_do_it(driver, what):
    options, in_step, said = FROZEN[what]
    options = {"lr": 0.1} | options
    if options["lr"] is None:
        options["lr"] = driver.array(np.array([0.1]))
    opt = optimizer(driver, on_gpu(driver, params()), **options)
    with pytest.raises(RuntimeError, match=said):
        capture(driver, opt, on_gpu(driver, grads(0)), **in_step)


def test_arrays_whose_table_is_not_on_the_device_cannot_be_captured(driver):
    opt = optimizer(driver, on_gpu(driver, params()), lr=driver.array(np.array([0.1])), capturable=True)
    with pytest.raises(RuntimeError, match="take a step with the same arrays"):
        capture(driver, opt, on_gpu(driver, grads(0)), warm=False)


def test_adam_step_cannot_be_captured(driver):
    arrays = [driver.array(a) for a in state(8)[:4]]
    driver.capturing.add(7)
    with pytest.raises(RuntimeError, match="capturable=True"):
        gpuadam.adam_step(*arrays, 1, stream=7, backend=driver.backend)


def test_a_learning_rate_on_another_stream_is_waited_for(driver):
    opt = optimizer(driver, on_gpu(driver, params()), lr=driver.array(np.array([0.1])), capturable=True)
    now = capturable.Now(opt._clocks[0], opt.groups[0]["lr"], 1.0)
    now.lr = now.lr._replace(stream=9)
    h = hyperparameters.checked(lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False, maximize=False)
    scalars = capturable.Scalars(functional.Updates(h, 1, [], None, now), 7)
    scalars.of(Arrays())
    scalars.launch()
    assert driver.waits == [(9, 7), (7, 9)]


def test_a_small_form_is_free_of_local_memory(compiler, arch):
    form, _ = form_and_scalars("all with adamw", "float32")
    for loop in ("contiguous", "table"):
        assert gpu_code.resources(compiler, form, arch, loop=loop, on_device=True).local_bytes == 0
