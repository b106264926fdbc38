"""Device mode: the step count and the scalars on the device, the same bits as the host's, and what a captured graph may hold."""

import copy

import numpy as np
import pytest
from cases import DEFAULTS, DTYPES, assert_same_bits, form_and_scalars, state

import gpuadam
from gpuadam import capturable, hyperparameters
from gpuadam.kernels import device_scalars


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


def from_the_device(compiler, arch, h, step, dtype, lr=None, grad_scale=None):
    """Return the Form and the scalars that the device computes. lr, grad_scale: arrays, or None for the numbers in h."""
    fixed = h.fixed
    form, constants = hyperparameters.form_and_scalars(h, 1, dtype, False)
    kinds = [None if x is None else x.dtype for x in (lr, grad_scale)]
    device_form = device_scalars.Form(dtype, *kinds, form.decoupled)
    settings = device_scalars.Settings(
        1, -1.0 if fixed.maximize else 1.0, fixed.beta1, fixed.beta2, fixed.weight_decay, *constants[2:4], constants.eps
    )
    count = np.array([step - 1])
    numbers = (h.lr if lr is None else lr, fixed.grad_scale if grad_scale is None else grad_scale)
    out = gpu_code.run_scalars(compiler, device_form, arch, settings, count, *numbers)
    assert count[0] == step
    return out


SCALARS = {
    # the options; the compute type; the dtypes of lr and grad_scale on the device, None for numbers
    "numbers": ({"weight_decay": 0.1}, "float32", None, None),
    "arrays": ({"weight_decay": 0.1, "decoupled": True, "grad_scale": 0.3}, "float32", "float64", "float32"),
    "arrays in float64": ({"maximize": True, "betas": (0.2, 0.3)}, "float64", "float32", "float64"),
    "AMSGrad": ({"betas": (0.0, 0.0), "eps": 1e-30}, "float32", "float64", None),
}


@pytest.mark.parametrize("name", SCALARS)
def test_the_device_computes_the_hosts_scalars(compiler, arch, name):
    options, dtype, lr_dtype, scale_dtype = SCALARS[name]
    h, dtype = hyperparameters.checked(**DEFAULTS | options), np.dtype(dtype)
    lr = lr_dtype and np.array([h.lr], lr_dtype)
    grad_scale = scale_dtype and np.array([h.fixed.grad_scale], scale_dtype)
    exact = h if lr is None else h._replace(lr=float(lr[0]))  # a float32 holds another number
    if grad_scale is not None:
        exact = exact._replace(fixed=exact.fixed._replace(grad_scale=float(grad_scale[0])))
    for step in (1, 2, 3, 1000, 2**40 + 1):
        _, expected = hyperparameters.form_and_scalars(exact, step, dtype, False)
        out = from_the_device(compiler, arch, h, step, dtype, lr, grad_scale)
        assert_same_bits([out], [np.array(expected, dtype)], f"step {step}")


def test_a_hundred_thousand_random_steps_give_the_hosts_bits(compiler):
    """betas, t, lr and decay over their ranges; a third of the cases for each compiler, in float32, which rounds."""
    rng = np.random.default_rng({"cupy": 0, "cupy-cuda12": 1, "numba-cuda": 2}[compiler])
    n, dtype = 34_000, np.dtype("float32")
    beta = 1 - 10 ** rng.uniform(-6, 0, (n, 2))
    steps = (10 ** rng.uniform(0, 9, n)).astype("i8")
    lr, decay = 10 ** rng.uniform(-9, 1, n), 10 ** rng.uniform(-6, 1, n)
    form = device_scalars.Form(dtype, np.dtype("float64"), None, True)
    step, rate = np.zeros(1, "i8"), np.zeros(1)
    for k in range(n):
        h = hyperparameters.Hyperparameters(
            float(lr[k]), hyperparameters.Fixed(*map(float, beta[k]), 1e-8, float(decay[k]), True, False, 1.0)
        )
        _, expected = hyperparameters.form_and_scalars(h, int(steps[k]), dtype, False)
        step[0], rate[0] = steps[k] - 1, h.lr
        settings = device_scalars.Settings(
            1, 1.0, *map(float, beta[k]), float(decay[k]), expected.w1, expected.w2, expected.eps
        )
        out = gpu_code.run_scalars(compiler, form, "sm_90", settings, step, rate, 1.0)
        assert out.tolist() == list(expected), (k, h, steps[k])


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
    scalars = capturable.Scalars(now, h, False, 7)
    scalars.of(np.dtype("f4"))
    scalars.launch()
    assert driver.waits == [(9, 7), (7, 9)]


def test_a_small_form_is_free_of_local_memory(compiler, arch):
    form, _ = form_and_scalars("all with adamw", "float32")
    for loop in ("contiguous", "table"):
        assert gpu_code.resources(compiler, form, arch, loop=loop, on_device=True).local_bytes == 0
