"""Device mode: the step count and the scalars on the device, the same bits as the host's, and what a captured graph may hold."""

import contextlib
import copy
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
from cases import ARCHITECTURES, DEFAULTS, DTYPES, assert_same_bits, few, form_and_scalars, state
from gpu_work import arrived
from test_gpu import spin

import gpuadam
from gpuadam import clipping, device_step, hyperparameters, testing
from gpuadam import update as functional
from gpuadam.hyperparameters import NO_SCALE
from gpuadam.kernels.operands import Arrays
from gpuadam.kernels.scalars import KEY_AT, SKIP_AT, ScalarsForm, Settings, step_key


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

SAME = {name: Arrays(name, name, name) for name in DTYPES}


def from_the_device(compiler, arch, h, step, arrays, seed=0, counts=True, **given):
    """Return the `scalars.ScalarsForm` and the memory of a step, and the count after it, as an optimizer would ask for them.

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
        h = h._replace(grad_scale=1.0)
    scalars = device_step.ScalarsLaunch(functional.Updates(h, step, [], now=now, seed=seed), None)
    scalars.of(arrays)
    ((form, settings, _),) = scalars._launches.values()
    count = np.array([step - 1])
    numbers = (h.lr if now.lr is None else now.lr, h.grad_scale if now.grad_scale is None else now.grad_scale)
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


@pytest.mark.in_short()
@pytest.mark.parametrize("name", few(SCALARS, *ON_ALL, "AMSGrad"))
def test_the_device_computes_the_hosts_scalars(compiler, name, examples):
    for arch in ARCHITECTURES if name in ON_ALL and examples(False, True) else ("sm_90",):
        check_scalars(compiler, arch, name)


def check_scalars(compiler, arch, name):
    options, dtype, lr_dtype, scale_dtype = SCALARS[name]
    h, dtype = hyperparameters.checked(**DEFAULTS | options), np.dtype(dtype)
    arrays = SAME[dtype.name]._replace(ema="float32" if "ema_decay" in options else "")
    lr = lr_dtype and np.array([h.lr], lr_dtype)
    grad_scale = scale_dtype and np.array([h.grad_scale], scale_dtype)
    exact = h if lr is None else h._replace(lr=float(lr[0]))  # a float32 holds another number
    if grad_scale is not None:
        exact = exact._replace(grad_scale=float(grad_scale[0]))
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
        assert out[KEY_AT // 8] == step_key(seed, step)


FLAGS = {
    "float32": ([0.0, -0.0], [1.0, -1.0, np.inf, np.nan, 1e-45]),
    "float64": ([0.0, -0.0], [1.0, -1.0, np.inf, np.nan, 5e-324]),
    "bool": ([False], [True]),
    "uint8": ([0], [1, 128, 255]),
    "int32": ([0], [1, -1, -(2**31)]),
    "int64": ([0], [1, -1, 2**32, -(2**63)]),
}


@pytest.mark.parametrize("dtype", few(FLAGS, "float32", "bool"))
def test_a_flag_that_is_not_zero_leaves_the_step_out(compiler, dtype):
    assert set(map(np.dtype, FLAGS)) == set(device_step.FLAGS)
    h = hyperparameters.checked(**DEFAULTS)
    for skips, values in enumerate(FLAGS[dtype]):
        for value in values:
            flag = np.array([value], dtype)
            form, out, count = from_the_device(compiler, "sm_90", h, 5, SAME["float32"], found_inf=flag)
            assert (count, out[SKIP_AT // 8]) == ((4, 1) if skips else (5, 0)), value
            if not skips:
                _, expected = hyperparameters.form_and_scalars(h, 5, SAME["float32"])
                assert_same_bits([gpu_code.reals_of(out, form)], [np.array(expected, "f4")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5, 3e-3])
def test_the_device_clips_by_the_norm_as_the_host_does(compiler, dtype, maximize, scale):
    given = np.array([scale])
    for norm in (0.0, 1e-300, 0.5, 1.0, 1.0 + 1e-6, 7.3, 1e10, 1e30, np.inf, np.nan):
        for max_norm in (1.0, 0.1, 1e20):
            clipped = clipping.clipped(scale, norm, max_norm)
            options = DEFAULTS | {"maximize": maximize}
            try:
                h = hyperparameters.checked(**options, grad_scale=NO_SCALE if np.isnan(norm) else clipped)
                _, expected = hyperparameters.form_and_scalars(h, 3, SAME[dtype])
            except ValueError:  # it rounds to 0, which only the host refuses
                continue
            h = hyperparameters.checked(**options)
            form, out, _ = from_the_device(
                compiler, "sm_90", h, 3, SAME[dtype], grad_scale=given, norm=np.array([norm]), max_norm=max_norm
            )
            found = gpu_code.reals_of(out, form)
            assert_same_bits([found], [np.array(expected, dtype)], f"norm {norm}, max_norm {max_norm}")
            assert np.isnan(found[0]) == np.isnan(norm) and not np.isnan(found[1:]).any()
    assert abs(clipping.clipped(scale, 1e10, 1.0)) < abs(scale) == abs(clipping.clipped(scale, 0.0, 1.0))


@pytest.mark.parametrize("clips", [False, True])
def test_a_norm_that_is_not_finite_or_too_large_leaves_the_step_out(compiler, clips):
    h, largest = hyperparameters.checked(**DEFAULTS), clipping.LARGEST_NORM[np.dtype("float32")]
    skipped = {}
    for norm in (0.0, 1.0, largest, np.nextafter(largest, np.inf), 1e300, np.inf, np.nan):
        max_norm = {"max_norm": 1.0} if clips else {}
        given = {"norm": np.array([norm]), "largest_norm": largest} | max_norm
        _, out, count = from_the_device(compiler, "sm_90", h, 5, SAME["float32"], **given)
        skipped[norm] = bool(out[SKIP_AT // 8])
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
    assert out[SKIP_AT // 8] == 1


@pytest.mark.in_short()
@pytest.mark.parametrize("algorithm, n", [("adam", 26_000), ("radam", 6_000), ("adamax", 2_000)])
def test_a_hundred_thousand_random_steps_give_the_hosts_bits(compiler, algorithm, n, examples):
    """betas, t, lr and decay over their ranges; a third of the 102,000 for each compiler, in float32, which rounds.

    In the short run it is one step of fifty.
    """
    rng = np.random.default_rng({"cupy": 0, "cupy-cuda12": 1, "numba-cuda": 2}[compiler])
    dtype = np.dtype("float32")
    beta = np.repeat(1 - 10 ** rng.uniform(-6, 0, (n // 4, 2)), 4, axis=0)  # the host's powers of a new beta take longest
    steps = (10 ** rng.uniform(0, 9, n)).astype("i8")
    lr, decay = 10 ** rng.uniform(-9, 1, n), 10 ** rng.uniform(-6, 1, n)
    form = ScalarsForm(dtype, np.dtype("float64"), None, True, algorithm)
    step, rate = np.zeros(1, "i8"), np.zeros(1)
    for k in range(0, n, examples(50, 1)):
        h = hyperparameters.Hyperparameters(
            float(lr[k]),
            hyperparameters.checked(1.0, tuple(map(float, beta[k])), 1e-8, float(decay[k]), True, algorithm=algorithm).fixed,
        )
        _, expected = hyperparameters.form_and_scalars(h, int(steps[k]), SAME["float32"])
        step[0], rate[0] = steps[k] - 1, h.lr
        eps = 1e-8 if algorithm == "radam" else expected.eps
        settings = Settings(1, 0, 1.0, *map(float, beta[k]), float(decay[k]), expected.w1, expected.w2, eps)
        out = gpu_code.run_scalars(compiler, form, "sm_90", settings, step, rate, 1.0)
        assert gpu_code.reals_of(out, form).tolist() == list(expected), (k, h, steps[k])


def test_a_small_form_is_free_of_local_memory(compiler, arch):
    form, _ = form_and_scalars("all with adamw", "float32")
    for loop in ("contiguous", "table"):
        assert gpu_code.resources(compiler, form, arch, loop=loop, on_device=True).local_bytes == 0


# On a GPU


def both(cp, backend, cls=gpuadam.Adam, on_host=None, **options):
    """Return an optimizer and its parameters on the GPU, and likewise on the CPU. on_host: the options there, if others."""
    on_gpu, here = arrived(cp, params()), params()
    host = cls(here, **(options if on_host is None else on_host))
    return cls(on_gpu, backend=backend, **options), on_gpu, host, here


def assert_state(opt, on_gpu, host, here):
    testing.assert_same_bits(on_gpu, here, "params")
    for name, expected in host.state.items():
        moments = {key: array for key, array in expected.items() if key != "step"}
        testing.assert_same_bits({key: opt.state[name][key] for key in moments}, moments, f"state[{name!r}]")
        assert opt.state_dict()["state"][name]["step"] == host.state_dict()["state"][name]["step"]


@pytest.mark.gpu
def test_a_learning_rate_and_a_scale_on_a_gpu_give_the_bits_of_the_cpus_numbers(cp, backend):
    lr, scale = cp.zeros(1), cp.full(1, 2.0, "f4")
    further = {"amsgrad": True, "maximize": True}
    opt, on_gpu, host, here = both(cp, backend, gpuadam.AdamW, further, lr=lr, capturable=True, **further)
    for k in range(4):
        host.groups[0]["lr"] = 0.1 / (k + 1)
        lr.fill(0.1 / (k + 1))
        opt.step(arrived(cp, grads(k)), grad_scale=scale)
        host.step(grads(k), grad_scale=2.0)
    assert_state(opt, on_gpu, host, here)


@pytest.mark.gpu
def test_two_dtypes_in_a_group_advance_the_count_once(cp, backend):
    given, new = ({"w": a["w"], "d": b["b"]} for a, b in ((params(), params("float64")), (grads(0), grads(0, "float64"))))
    on_gpu = arrived(cp, given)
    opt, host = gpuadam.Adam(on_gpu, capturable=True, backend=backend), gpuadam.Adam(given)
    for _ in range(2):
        opt.step(arrived(cp, new))
        host.step(new)
    assert_state(opt, on_gpu, host, given)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [gpuadam.RAdam, gpuadam.AdaMax], ids=["RAdam", "AdaMax"])
def test_another_algorithm_in_device_mode_gives_the_cpus_bits(cp, backend, cls):
    opt, on_gpu, host, here = both(cp, backend, cls, {"lr": 0.01}, lr=0.01, capturable=True)
    for k in range(8):  # RAdam rectifies from the sixth on
        opt.step(arrived(cp, grads(k)))
        host.step(grads(k))
    assert_state(opt, on_gpu, host, here)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_are_clipped_by_a_norm_on_the_device(cp, backend, capturable):
    opt, on_gpu, host, here = both(cp, backend, gpuadam.AdamW, {"maximize": True}, maximize=True, capturable=capturable)
    norm = cp.zeros(1)
    for k, value in enumerate([0.5, 7.0, 1e10]):
        norm.fill(value)
        opt.step(arrived(cp, grads(k)), norm=norm, max_norm=2.0, grad_scale=0.7)
        host.step(grads(k), norm=value, max_norm=2.0, grad_scale=0.7)
    assert_state(opt, on_gpu, host, here)


@pytest.mark.gpu
def test_a_norm_on_the_device_is_checked_there(cp, backend):
    """A step that is left out changes neither parameters nor state nor the count, and zeroes its gradients."""
    opt, on_gpu, host, here = both(cp, backend, on_host={}, capturable=True, zero_grad=True)
    norm = cp.zeros(1)
    for k, value in enumerate([1.0, np.inf, 2.0, 1e20, np.nan, 3.0]):  # squares of 1e20 overflow float32
        norm.fill(value)
        given = arrived(cp, grads(k))
        opt.step(given, norm=norm, check_finite=True)
        host.step(grads(k), norm=value, check_finite=True)
        assert not any(a.any() for a in given.values())
    assert_state(opt, on_gpu, host, here)
    assert host.steps == 3


@pytest.mark.gpu
def test_what_a_step_would_have_to_wait_for_is_refused(cp, backend):
    on_gpu = arrived(cp, params())
    opt = gpuadam.Adam(on_gpu, backend=backend)
    flag, norm = cp.zeros(1, "f4"), cp.ones(1)
    with testing.unchanged(params=on_gpu, opt=opt):
        with pytest.raises(ValueError, match=r"found_inf is an array on a GPU.*capturable=True"):
            opt.step(arrived(cp, grads(0)), found_inf=flag)
        with pytest.raises(ValueError, match="check_finite on a GPU needs an optimizer with capturable=True"):
            opt.step(arrived(cp, grads(0)), norm=norm, check_finite=True)
    assert opt.steps == 0


# What a graph holds


@contextlib.contextmanager
def capture(stream):
    """Capture what a stream is given. The list that this yields has the graph and the number of its nodes afterwards."""
    found = []
    stream.begin_capture()
    try:
        yield found
    finally:
        graph = stream.end_capture()
        status, _, n = libraries.imported("cuda.bindings.driver").cuGraphGetNodes(graph.graph)
        assert not int(status)
        found += [graph, n]


@pytest.mark.gpu
def test_a_captured_step_is_two_kernels_and_nothing_else(cp, backend):
    """One computes the scalars, the other updates all arrays; no copy and no memset is repeated with them."""
    lr = cp.full(1, 0.1)
    opt, on_gpu, host, here = both(cp, backend, on_host={"lr": 0.1}, lr=lr, capturable=True)
    given = arrived(cp, grads(0))
    with cp.cuda.Stream(non_blocking=True) as stream:
        opt.step(given)
        with capture(stream) as found:
            opt.step(given)
        graph, n = found
        assert n == 2
        graph.launch(stream)
        stream.synchronize()
    for _ in range(2):
        host.step(grads(0))
    assert_state(opt, on_gpu, host, here)


FROZEN = {
    "a learning rate": ({"lr": 0.1}, {}, "with lr=0.1 for ever: give lr as an array"),
    "a gradient scale": ({}, {"grad_scale": 2.0}, "with grad_scale=2.0 for ever"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("what", FROZEN)
def test_a_number_that_a_graph_would_freeze_is_refused_with_the_way_to_do_it(cp, backend, what):
    options, in_step, said = FROZEN[what]
    assert_refused(cp, backend, said, {"lr": cp.full(1, 0.1)} | options, in_step)


def assert_refused(cp, backend, said, options, in_step):
    """Look whether a step that is captured is refused, and leaves the graph and all numbers as they were."""
    on_gpu, given = arrived(cp, params()), arrived(cp, grads(0))
    opt = gpuadam.Adam(on_gpu, backend=backend, capturable=True, **options)
    with cp.cuda.Stream(non_blocking=True) as stream:
        opt.step(given)
        with testing.unchanged(params=on_gpu, opt=opt):
            with capture(stream) as found, pytest.raises(RuntimeError, match=said):
                opt.step(given, **in_step)
            graph, n = found
            assert n == 0
            graph.launch(stream)
            stream.synchronize()


@pytest.mark.gpu
def test_adam_step_cannot_be_captured(cp, backend):
    arrays = [cp.asarray(a) for a in state(8)[:4]]
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        with capture(stream) as found, pytest.raises(RuntimeError, match="capturable=True"):
            gpuadam.adam_step(*arrays, 1, backend=backend)
        assert found[1] == 0


# A learning rate on another stream


class OnStream:
    """An array of another library than CuPy, which names the stream that it was last used on."""

    def __init__(self, array, stream):
        self.array, self.stream = array, stream

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__ | {"stream": self.stream.ptr}


@pytest.mark.gpu
@pytest.mark.parametrize("last", ["the step's", "the learning rate's"])
def test_a_step_reads_the_learning_rate_between_the_writes_of_its_stream(cp, backend, last):
    """The write before is late, and the one after it is asked for at once; whichever stream is waited for."""
    lr, stream, other = cp.zeros(1), cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    opt, on_gpu, host, here = both(cp, backend, on_host={"lr": 0.1}, lr=OnStream(lr, other), capturable=True)
    given = arrived(cp, grads(0))
    with other:
        spin(cp, 20_000_000)
        lr.fill(0.1)
    opt.step(given, stream=stream)
    with other:
        lr.fill(7.0)
    (stream if last == "the step's" else other).synchronize()
    cp.cuda.Device().synchronize()
    host.step(grads(0))
    assert_state(opt, on_gpu, host, here)
