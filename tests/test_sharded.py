"""`ShardedAdam` over one rank: what it takes, what it refuses, and what it leaves alone."""

import copy
import gc
import pickle
import weakref

import libraries
import numpy as np
import pytest
from cases import different_bits

import gpuadam
from gpuadam import transports


def sharded(params, **options):
    return gpuadam.ShardedAdam(params, transports.Local(), **options)


w = np.ones((2, 3), "f4")


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"params": []}, ValueError, "no parameters"),
        ({"params": [w, w]}, ValueError, "are one array"),
        ({"params": [w, None]}, TypeError, "None"),
        ({"params": [w.astype("i4")]}, TypeError, "int32"),
        ({"params": [{"params": {"a": w}}, {"params": {"a": w.copy()}}]}, ValueError, "two parameters are named 'a'"),
        ({"transport": None}, TypeError, "transport is a NoneType, which has no rank"),
        ({"transport": transports.Local}, TypeError, "the class Local"),
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"reduction": "max"}, ValueError, "reduction='max' must be one of 'mean', 'sum'"),
        ({"bucket_bytes": -1}, ValueError, "bucket_bytes must not be negative, and is -1"),
        ({"bucket_bytes": 1e6}, TypeError, "bucket_bytes must be an integer"),
        ({"capturable": True}, TypeError, "unexpected keyword argument 'capturable'"),
        ({"algorithm": "sgd"}, ValueError, "algorithm='sgd'"),
        ({"state_dtype": "int4"}, ValueError, "state_dtype='int4'"),
        ({"algorithm": "adamax", "state_dtype": "8bit"}, ValueError, "AdaMax's v is a maximum"),
        ({"eps": 1e-60}, ValueError, "rounds to 0"),
        ({"params": [w[:0]], "state_dtype": "int4"}, ValueError, "state_dtype='int4'"),  # of which no rank has state
        ({"params": [w[:0]], "master": "float32"}, ValueError, "master='float32'"),
        ({"params": [w[:0]], "stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
        ({"params": [w[:0]], "state_dtype": "8bit", "amsgrad": True}, ValueError, "8-bit state has no max_v"),
    ],
)
def test_what_is_wrong_at_construction_is_said(arguments, error, match):
    arguments = {"params": [w.copy()], "transport": transports.Local()} | arguments
    with pytest.raises(error, match=match):
        gpuadam.ShardedAdam(**arguments)


class Fixed:
    """A transport that takes no attributes."""

    __slots__ = ()
    rank, size, memory = 0, 1, "any"
    reduce_scatter = all_gather = broadcast = exchange = None


def test_a_transport_that_cannot_be_given_its_calls_is_refused():
    with pytest.raises(TypeError, match=r"Fixed without calls: give it an attribute, calls = transports\.Calls\(\)"):
        gpuadam.ShardedAdam(w.copy(), Fixed())


class OnGPUs(transports.Local):
    memory = "CUDA"


def test_arrays_of_another_memory_than_the_transports_are_refused():
    with pytest.raises(TypeError, match=r"CPU memory, and transports\.OnGPUs takes arrays in CUDA memory"):
        gpuadam.ShardedAdam(w.copy(), OnGPUs())


@pytest.mark.parametrize(
    "grad, options, error, match",
    [
        (np.ones(6, "f4"), {}, ValueError, r"has shape \(6,\)"),
        (w.astype("c8"), {}, TypeError, "the gradient of a real parameter is real: give its real part"),
        (w.astype("c16"), {}, TypeError, "the gradient of a real parameter is real: give its real part"),
        (np.ones((2, 3)), {}, TypeError, "float64; it must be float32 or bfloat16 or float16"),
        ([w], {}, TypeError, "the parameter was given as one array"),
        (w, {"max_norm": -1.0}, ValueError, "max_norm"),
        (w, {"grad_scale": np.nan}, ValueError, "grad_scale"),
        (w, {"check_finite": 1}, TypeError, "check_finite"),
    ],
)
def test_a_bad_step_changes_nothing(grad, options, error, match):
    param = w.copy()
    opt = sharded(param)
    with pytest.raises(error, match=match):
        opt.step(grad, **options)
    assert (param == 1).all() and opt.steps == 0 and opt.shards[0].state["step"] == 0


# in the same buffer, and in one of its own
@pytest.mark.parametrize(
    "dtype, said", [("f8", "the buffer of gradients and the gradient of params"), ("f4", "has dtype float64")]
)
def test_a_gradient_in_the_place_of_another_is_refused(dtype, said):
    params = [w.astype("f8"), w.astype(dtype)]
    opt = sharded(params)
    with pytest.raises((TypeError, ValueError), match=said):
        opt.step(opt.grads[::-1])
    assert all((param == 1).all() for param in params) and opt.steps == 0


def test_the_place_of_a_gradient_is_known_whatever_the_strides_of_dimensions_of_one():
    params = np.ones((1, 3), "f4"), np.ones((1, 3), "f4")
    opt, expected = map(sharded, params)
    opt.grads[...] = expected.grads[...] = 2.0
    opt.step(np.lib.stride_tricks.as_strided(opt.grads, (1, 3), (4, 4)))
    expected.step(expected.grads)
    assert different_bits(*params) == 0


@pytest.mark.parametrize("views", [False, True])
def test_a_gradient_that_is_a_parameter_is_refused_if_it_is_to_be_zeroed(views):
    opt = sharded({"w": w.copy(), "b": w.copy()}, views=views, zero_grad=True)
    with pytest.raises(ValueError, match=r"the gradient of params\['b'\] share memory"):
        opt.step({"w": w.copy(), "b": opt.params["w"]})
    with pytest.raises(ValueError, match=r"m of params\['w'\] and the gradient of params\['w'\] share memory"):
        opt.step({"w": opt.shards[0].state["m"].reshape(w.shape), "b": None})
    assert (opt.params["w"] == 1).all() and opt.steps == 0


def test_a_gradient_that_is_a_parameter_is_fine_if_it_is_only_read():
    params = w.copy(), w.copy()
    sharded(params[0]).step(params[0])
    sharded(params[1]).step(w)
    assert different_bits(*params) == 0 and (params[0] < 1).all()


def test_gradients_in_their_places_are_not_copied(monkeypatch):
    param = {"w": w.copy()}
    opt = sharded(param, views=True)
    opt.grads["w"][...] = 5.0
    monkeypatch.setattr(opt._kernels, "copy", None)
    opt.step(opt.grads)
    assert (opt.params["w"] < 1).all() and (param["w"] == 1).all()


def test_parameters_that_are_taken_over_are_not_kept():
    given = [np.ones(5, "f4"), np.ones(3, "f8")]
    alive = [weakref.ref(array) for array in given]
    opt = sharded([{"params": given[:1]}, {"params": given[1:]}], views=True)
    del given
    gc.collect()
    assert [array() for array in alive] == [None, None]
    opt.step(opt.grads)
    assert [group["params"][0] is own for group, (own,) in zip(opt.groups, opt.params, strict=True)] == [True, True]


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_a_narrow_gradient_is_summed_in_float32(format):
    given = np.arange(9, dtype="f4").reshape(3, 3) - 4  # which both formats hold
    narrow = given.astype("f2") if format == "float16" else gpuadam.Bits((given.view("u4") >> 16).astype("u2"), "bfloat16")
    params = [np.ones((3, 3), "f4") for _ in range(2)]
    sharded(params[0]).step(narrow)
    sharded(params[1]).step(given)
    assert different_bits(*params) == 0 and (params[0] != 1).any()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_elements_of_a_gradient_may_share_memory_unless_it_is_zeroed(dtype):
    grad, params = np.broadcast_to(np.array([3.0, 0.1, -2.0], dtype), (2, 3)), [np.ones((2, 3), "f4") for _ in range(3)]
    opts = [sharded(param, zero_grad=param is params[2]) for param in params]
    opts[0].step(grad, max_norm=1.0)
    opts[1].step(grad.copy(), max_norm=1.0)
    assert different_bits(*params[:2]) == 0 and (params[0] != 1).all()
    with pytest.raises(ValueError, match="elements share memory"):
        opts[2].step(grad)
    assert (params[2] == 1).all()


def test_a_schedule_is_called_with_the_number_of_the_step():
    params = [w.copy(), w.copy()]
    opt, expected = sharded(params[0], lr=lambda step: 0.1 / step), gpuadam.Adam(params[1], lr=lambda step: 0.1 / step)
    for _ in range(3):
        opt.step(w)
        expected.step(w)
    assert different_bits(*params) == 0


def test_only_empty_parameters_are_fine():
    opt = sharded([np.zeros((0, 3), "f4")])
    opt.step([np.zeros((0, 3), "f4")], max_norm=1.0)
    assert opt.steps == 1 and opt.shards == [] and opt.gathered("m") == {}


def test_a_schedule_is_called_once_in_a_step():
    """Also where the step is clipped, and its scale checked again."""
    called = []
    opt = sharded(w.copy(), lr=lambda step: called.append(step) or 0.1)
    called.clear()
    for _ in range(2):
        opt.step(w, max_norm=0.1)
    assert called == [1, 2]


def test_a_parameter_in_another_order_is_read_once_in_a_step(monkeypatch):
    opt = sharded(np.ones((100, 300), "f4", order="F"), bucket_bytes=0)
    copied = []
    monkeypatch.setattr(opt._kernels, "copy", lambda to, source: copied.append(to.size))
    opt.step(opt.grads)
    assert copied == [30_000, 30_000]  # there, and back


def test_bucket_bytes_may_be_any_integer():
    opt = sharded(w.copy(), bucket_bytes=np.uint8(200))
    opt.step(w)
    assert opt.steps == 1


def test_an_optimizer_over_ranks_is_not_copied():
    opt = sharded(w.copy())
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a ShardedAdam is not copied or pickled.*save\(folder\)"):
            function(opt)


def test_parameters_may_come_from_an_iterator():
    given = [w.copy(), w.copy()]
    opt = sharded(iter(given))
    assert all(own is param for own, param in zip(opt.params, given, strict=True))


def test_parameters_of_a_group_cannot_be_changed():
    opt = sharded([w.copy()])
    opt.groups[0]["params"][0] = w.copy()
    for call in (lambda: opt.step([w]), lambda: opt.save("not made")):
        with pytest.raises(ValueError, match="cannot be changed after the optimizer is made"):
            call()


@pytest.mark.parametrize("change", [lambda p: p.data.clone(), lambda p: p.data.T, lambda p: p.data.double()])
def test_a_tensor_that_has_got_other_memory_is_refused(change):
    torch = libraries.imported("torch", reason="torch is not installed")
    param = torch.ones((3, 3), requires_grad=True)
    opt = sharded([param])
    param.data = change(param)
    for call in (lambda: opt.step([torch.ones(3, 3)]), lambda: opt.save("not made")):
        with pytest.raises(ValueError, match=r"nor the memory, shape or dtype of a tensor.*tensor\.data\.copy_\(x\)"):
            call()
    assert (param == 1).all()


def test_autograd_is_told_that_parameters_become_those_of_rank_0():
    torch = libraries.imported("torch", reason="torch is not installed")
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    sharded([param])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_gather"])
def test_nothing_follows_a_step_that_was_cut_short(collective, tmp_path, monkeypatch):
    opt = sharded(np.ones(9000, "f4"), bucket_bytes=0)
    original, calls = getattr(opt.transport, collective), iter(range(10))

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(opt.transport, collective, interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(np.ones(9000, "f4"))
    for call in (lambda: opt.step(opt.grads), lambda: opt.save(tmp_path / "a"), lambda: opt.gathered("m")):
        with pytest.raises(ValueError, match="a step was cut short"):
            call()
    assert list(tmp_path.iterdir()) == []
