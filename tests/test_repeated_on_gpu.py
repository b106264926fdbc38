"""Steps on a GPU that are as the last one: the same bits as the long way, and nothing that differs goes unnoticed."""

import contextlib
import copy
import gc
import math
import re
import weakref

import numpy as np
import pytest

import gpuadam
from gpuadam import functional, remembered, repeated_on_gpu, testing, update
from gpuadam.repeated import RepeatedStep
from gpuadam.repeated_on_gpu import CallsOnGpu

pytestmark = pytest.mark.gpu

SHAPES = (5,), (3, 4), (1000,)


def arrays(library, seed):
    rng = np.random.default_rng(seed)
    return [library.array(rng.standard_normal(shape).astype("float32")) for shape in SHAPES]


def numbers(library, some):
    return [library.numpy(a).copy() for a in some]


def write(array, numbers):
    """Put numbers of float32 into an array, in place."""
    put = array.set if hasattr(array, "set") else array.copy_to_device  # of CuPy, or of Numba
    put(numbers.astype("float32"))


class Twins:
    """An optimizer, and another that takes the same steps the long way."""

    def __init__(self, backend, **options):
        self.library = testing.array_backend(backend)
        self.params, self.others, self.grads = (arrays(self.library, seed) for seed in (1, 1, 2))
        self.quick, self.slow = gpuadam.Adam(self.params, **options), gpuadam.Adam(self.others, **options)
        self.slow.repeats = False

    def step(self, *grads, times=1, **options):
        for _ in range(times):
            self.quick.step(*(grads or (self.grads,)), **options)
            self.slow.step(*(grads or (self.grads,)), **options)

    def assert_same(self):
        for one, other in zip(numbers(self.library, self.params), numbers(self.library, self.others), strict=True):
            assert (one.view("u4") == other.view("u4")).all()
        assert self.quick.steps == self.slow.steps
        one, other = (opt.state_dict()["state"].values() for opt in (self.quick, self.slow))
        assert [state["step"] for state in one] == [state["step"] for state in other]


@pytest.fixture
def took(monkeypatch):
    """A list of whether each step of an optimizer that could be quick was."""
    done, as_last = [], RepeatedStep.as_last

    def noted(self, *step):
        done.append(as_last(self, *step))
        return done[-1]

    monkeypatch.setattr(RepeatedStep, "as_last", noted)
    return done


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}]
)
def test_repeated_steps_have_the_bits_of_the_long_way(backend, took, options):
    twins = Twins(backend, **options)
    twins.step(times=6)
    assert took and all(took)
    twins.assert_same()


def test_other_rates_and_other_numbers_in_the_gradients_are_followed(backend, took):
    twins = Twins(backend)
    twins.step(times=4)
    for opt in (twins.quick, twins.slow):
        opt.groups[0]["lr"] = 0.5
    twins.step()
    assert all(took)
    twins.assert_same()


CLIPS = {
    "clipped": ({}, {"max_norm": 0.5}),
    "seldom clipped": ({"weight_decay": 0.1}, {"max_norm": 1e3}),
    "maximize": ({"maximize": True}, {"max_norm": 0.5, "grad_scale": 0.25}),
    "bfloat16 state": ({"state_dtype": "bfloat16"}, {"max_norm": 0.5}),
    "8-bit state": ({"state_dtype": "8bit"}, {"max_norm": 0.5}),
}


@pytest.mark.parametrize(("options", "of_step"), CLIPS.values(), ids=CLIPS)
def test_so_have_clipped_steps(backend, took, options, of_step):
    twins = Twins(backend, **options)
    for k in range(6):
        for seed, grad in enumerate(twins.grads):  # other numbers in the same memory
            numbers = twins.library.numpy(grad) * 1.25 + seed + k
            write(grad, numbers)
        twins.step(**of_step)
    assert took and all(took)
    twins.assert_same()


def written(library, number, dtype="float64"):
    """Return an array of one number."""
    return library.array(np.array([number], dtype))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}, {"state_dtype": "8bit"}])
def test_so_have_capturable_steps(backend, took, options):
    twins = Twins(backend, capturable=True, **options)
    twins.step(times=6)
    assert took and all(took)
    twins.assert_same()
    assert twins.library.numpy(twins.quick.state["0"]["step"]) == [6]


def test_numbers_on_the_device_are_followed_in_repeated_steps(backend, took):
    library = testing.array_backend(backend)
    lr, grad_scale, found_inf = written(library, 0.1), written(library, 0.5, "float32"), library.flag(0)
    twins = Twins(backend, capturable=True, lr=lr)
    of_step = {"grad_scale": grad_scale, "found_inf": found_inf, "max_norm": 2.0, "check_finite": True}
    for k in range(8):
        write(found_inf, np.array([k in (3, 6)], "float32"))
        for array, dtype in ((lr, "f8"), (grad_scale, "f4")):
            numbers = np.array([1 / (k + 2)], dtype)
            array.set(numbers) if hasattr(array, "set") else array.copy_to_device(numbers)
        grad = library.numpy(twins.grads[0]) + k
        write(twins.grads[0], np.where(k == 5, np.inf, grad) if k == 5 else np.nan_to_num(grad, posinf=0.0))
        twins.step(**of_step)
    assert took and all(took)
    twins.assert_same()
    assert library.numpy(twins.quick.state["0"]["step"]) == [5]  # two flags, and an infinite gradient


def in_other_memory(library, of_step, opt):
    """Give the array that has the learning rate other memory, where its library lets it have some."""
    lr, other = opt.groups[0]["lr"], written(library, 0.7)
    if hasattr(lr, "gpu_data"):
        lr.gpu_data = other.gpu_data
    else:
        lr.shape = (1, 1)


OTHER_NUMBERS = {
    "lr in other memory": in_other_memory,
    "lr another array": lambda library, of_step, opt: opt.groups[0].update(lr=written(library, 0.7)),
    "lr a number": lambda library, of_step, opt: opt.groups[0].update(lr=0.7),
    "grad_scale another array": lambda library, of_step, opt: of_step.update(grad_scale=written(library, 0.7)),
    "grad_scale a number": lambda library, of_step, opt: of_step.update(grad_scale=0.7),
    "grad_scale of two": lambda library, of_step, opt: of_step.update(grad_scale=library.array(np.ones(2))),
    "found_inf another array": lambda library, of_step, opt: of_step.update(found_inf=library.flag(1)),
    "found_inf a number": lambda library, of_step, opt: of_step.update(found_inf=1.0),
    "found_inf of the host": lambda library, of_step, opt: of_step.update(found_inf=np.ones(1)),
    "no found_inf": lambda library, of_step, opt: of_step.pop("found_inf"),
    "a norm": lambda library, of_step, opt: of_step.update(norm=written(library, 30.0)),
    "another max_norm": lambda library, of_step, opt: of_step.update(max_norm=0.01),
    "the count": lambda library, of_step, opt: opt.state["0"].update(step=written(library, 70, "int64")),
    "norms": lambda library, of_step, opt: of_step.update(norms=True),
}


@pytest.mark.parametrize("other", OTHER_NUMBERS)
def test_other_numbers_than_in_the_last_step_are_noticed(backend, took, other):
    outcomes = []
    for repeats in (True, False):
        library = testing.array_backend(backend)
        params, grads = arrays(library, 1), arrays(library, 2)
        opt = gpuadam.Adam(params, capturable=True, lr=written(library, 0.1))
        opt.repeats = repeats
        of_step = {"grad_scale": written(library, 0.5), "found_inf": library.flag(0), "max_norm": 2.0}
        for _ in range(4):
            opt.step(grads, **of_step)
        OTHER_NUMBERS[other](library, of_step, opt)
        told = []
        for _ in range(3):
            try:
                opt.step(grads, **of_step)
            except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
                told.append((type(error), str(error)))
        outcomes.append([*told, opt.steps, *(a.tobytes() for a in numbers(library, params))])
    assert took[:2] == [True, True] and outcomes[0] == outcomes[1]


def test_clipped_steps_may_take_turns_on_two_streams(cp, took):
    twins, streams = Twins("cupy"), [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    for k in range(8):
        with streams[k % 2]:
            twins.step(max_norm=0.5)
        streams[k % 2].synchronize()
    assert took[1:] and all(took[1:])
    twins.assert_same()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_flag_of_the_host_is_looked_at_each_time(backend, capturable):
    twins, flag = Twins(backend, capturable=capturable), np.zeros(1)
    for k in range(6):
        flag[0] = k == 4
        twins.step(found_inf=flag)
    twins.assert_same()
    assert twins.quick.steps == 5


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_that_are_given_their_norm_are_repeated_if_it_is_in_the_same_array(backend, took, capturable):
    twins = Twins(backend, capturable=capturable)
    out = twins.library.array(np.zeros(()))
    for _ in range(6):
        write(twins.grads[1], twins.library.numpy(twins.grads[1]) * 1.5)
        twins.step(norm=gpuadam.global_norm(twins.grads, out=out), max_norm=0.5)
    assert took and all(took)
    twins.step(norm=gpuadam.global_norm(twins.grads), max_norm=0.5)
    assert took[-1] is False
    twins.step(norm=3.0, max_norm=0.5)
    twins.assert_same()


def test_a_clipped_step_on_another_stream_or_of_another_grad_scale_has_the_same_bits(cp, took):
    twins = Twins("cupy")
    twins.step(times=4, max_norm=0.5)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()  # arrays of CuPy name no stream
    with stream:
        twins.step(times=3, max_norm=0.5)
    stream.synchronize()
    twins.step(times=3, max_norm=0.5)
    assert took[2:] and all(took)
    for grad_scale in (0.5, -2.0, 1e-3):
        twins.step(max_norm=0.5, grad_scale=grad_scale)
    twins.step(max_norm=0.25)
    twins.assert_same()


def test_a_norm_that_is_not_finite_is_as_ever_in_a_clipped_step(backend, took):
    twins = Twins(backend)
    twins.step(times=3, max_norm=0.5)
    write(twins.grads[1], np.full(SHAPES[1], np.inf, "float32"))
    twins.step(times=2, max_norm=0.5)
    assert all(took)
    for one, other in zip(numbers(twins.library, twins.params), numbers(twins.library, twins.others), strict=True):
        testing.assert_same_bits(one, other)


def test_gradients_in_new_arrays_are_taken(backend):
    twins = Twins(backend)
    for seed in range(6):
        twins.step(arrays(twins.library, seed))
    twins.assert_same()


# What may change between two steps: each is done to an optimizer whose steps repeat and to one that goes the long way. Both must
# do the same, or say the same.


class Pair:
    """What a change is done to: an optimizer of two arrays in a dict, its parameters, and its gradients.

    groups: 2 for an optimizer of a group more, with a third array of the dict.
    """

    def __init__(self, backend, groups=1, **options):
        self.library = testing.array_backend(backend)
        self.params = {"w0": self.array(6, 1), "w1": self.array(4, 2)}
        self.grads = {"w0": self.array(6, 3), "w1": self.array(4, 4)}
        if groups > 1:
            self.params["w2"], self.grads["w2"] = self.array(6, 2), self.array(6, 6)
        given = gpuadam.decay_groups(self.params, "w2") if groups > 1 else self.params
        self.opt = gpuadam.AdamW(given, lr=0.1, **options)
        self.state, self.group = self.opt.state, self.opt.groups[0]

    def array(self, shape, seed, dtype="float32"):
        numbers = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
        if seed < 3:  # a parameter, in which signs of zero can be told apart
            numbers.flat[0] = -0.0
        return self.library.array(numbers)

    def outcome(self, times=3, **options):
        """Return what steps raise, and all numbers after them."""
        told = []
        for _ in range(times):
            try:
                self.opt.step(self.grads, **options)
            except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
                told.append((type(error), re.sub("0x[0-9a-f]+", "an address", str(error))))
        grads = self.grads if isinstance(self.grads, (list, tuple)) else [self.grads]
        grads = [grad for own in grads for grad in (own.values() if isinstance(own, dict) else [own])]
        arrays = [*self.params.values(), *(g for g in grads if hasattr(g, "__cuda_array_interface__"))]
        for state in self.state.values():
            count = state.get("step")
            told += [] if hasattr(count, "__cuda_array_interface__") else [count]
            arrays += [x for key, x in state.items() if key != "step" or hasattr(x, "__cuda_array_interface__")]
        return [*told, self.opt.steps, *(self.library.numpy(x).tobytes() for x in arrays)]


def view_of(pair, array, **described):
    """Return another object over the memory of an array, described in another way."""
    interface = array.__cuda_array_interface__ | described

    class Described:
        __cuda_array_interface__ = interface
        owner = array

    if pair.library.name == "cupy":
        import cupy

        return cupy.asarray(Described())
    from numba import cuda

    return cuda.as_cuda_array(Described())


CHANGES = {
    "lr": lambda x: x.group.update(lr=0.5),
    "lr nan": lambda x: x.group.update(lr=math.nan),
    "lr below 0": lambda x: x.group.update(lr=-1.0),
    "lr -0.0": lambda x: x.group.update(lr=-0.0),
    "lr infinite": lambda x: x.group.update(lr=math.inf),
    "lr too large": lambda x: x.group.update(lr=1e39),
    "lr an int": lambda x: x.group.update(lr=1),
    "lr a callable": lambda x: x.group.update(lr=lambda step: 0.5 / step),
    "betas": lambda x: x.group.update(betas=(0.5, 0.9)),
    "betas wrong": lambda x: x.group.update(betas=(0.5, 1.0)),
    "weight_decay": lambda x: x.group.update(weight_decay=0.25),
    "eps": lambda x: x.group.update(eps=1e-3),
    "maximize": lambda x: x.group.update(maximize=True),
    "amsgrad": lambda x: x.group.update(amsgrad=True),
    "clip_value": lambda x: x.group.update(clip_value=1e-3),
    "bounds": lambda x: x.group.update(bounds=(-0.1, 0.1)),
    "a key too many": lambda x: x.group.update(momentum=0.9),
    "a key too few": lambda x: x.group.pop("eps"),
    "no lr": lambda x: x.group.pop("lr"),
    "no params": lambda x: x.group.pop("params"),
    "names": lambda x: x.group["names"].__setitem__(0, "other"),
    "one name fewer": lambda x: x.group["names"].pop(),
    "params": lambda x: x.group["params"].__setitem__(1, x.array(4, 77)),
    "one param fewer": lambda x: x.group["params"].pop(),
    "a group more": lambda x: x.opt.groups.append(dict(x.group)),
    "no group": lambda x: x.opt.groups.clear(),
    "rebound": lambda x: x.params.update(w1=x.array(4, 7)),
    "rebound to a view": lambda x: x.params.update(w1=view_of(x, x.params["w1"])),
    "taken away": lambda x: x.params.pop("w0"),
    "another name": lambda x: x.params.update(x=x.array(3, 5)),
    "grad shape": lambda x: x.grads.update(w1=x.array(5, 1)),
    "grad of the same memory, shape": lambda x: x.grads.update(w1=view_of(x, x.grads["w1"], shape=(2, 2))),
    "grad of the same memory, shorter": lambda x: x.grads.update(w1=view_of(x, x.grads["w1"], shape=(2,))),
    "grad of the same memory, strides": lambda x: x.grads.update(w1=view_of(x, x.grads["w1"], strides=(0,))),
    "grad of the same memory, int": lambda x: x.grads.update(w1=view_of(x, x.grads["w1"], typestr="<i4")),
    "grad of the same memory": lambda x: x.grads.update(w1=view_of(x, x.grads["w1"])),
    "grad dtype": lambda x: x.grads.update(w1=x.array(4, 1, "float64")),
    "grad of NumPy": lambda x: x.grads.update(w1=np.ones(4, "float32")),
    "grad a list": lambda x: x.grads.update(w1=[1.0, 2.0, 3.0, 4.0]),
    "grad None": lambda x: x.grads.update(w1=None),
    "grad missing": lambda x: x.grads.pop("w1"),
    "grad too many": lambda x: x.grads.update(w2=x.array(4, 1)),
    "grads in another order": lambda x: x.grads.update(w0=x.grads.pop("w0")),
    "grads in a list": lambda x: setattr(x, "grads", list(x.grads.values())),
    "grad is param": lambda x: x.grads.update(w1=x.params["w1"]),
    "grad is in m": lambda x: x.grads.update(w1=x.state["w1"]["m"]),
    "grad new": lambda x: x.grads.update(w1=x.array(4, 8)),
    "m other": lambda x: x.state["w0"].update(m=x.array(6, 3)),
    "m wrong": lambda x: x.state["w0"].update(m=x.array(5, 3)),
    "m missing": lambda x: x.state["w0"].pop("m"),
    "v other": lambda x: x.state["w1"].update(v=x.array(4, 3)),
    "m is v": lambda x: x.state["w0"].update(m=x.state["w0"]["v"]),
    "step": lambda x: x.state["w0"].update(step=41),
    "step of the second": lambda x: x.state["w1"].update(step=41),
    "step of no int": lambda x: x.state["w0"].update(step=3.5),
    "step below 0": lambda x: x.state["w0"].update(step=-2),
    "step missing": lambda x: x.state["w1"].pop("step"),
    "under way": lambda x: x.opt.under_way.begin(),
    "backend": lambda x: setattr(x.opt, "backend", "numba-cpu"),
    "loaded": lambda x: x.opt.load_state_dict(x.opt.state_dict() | {"steps": 30}),
    "replaced": lambda x: x.opt.replace("w0", x.array(6, 31), np.arange(6)),
}  # fmt: skip
CHANGES_OF_GROUPS = {
    "lr": lambda x: x.opt.groups[1].update(lr=0.5),
    "lr nan": lambda x: x.opt.groups[1].update(lr=math.nan),
    "weight_decay": lambda x: x.opt.groups[1].update(weight_decay=0.5),
    "a group fewer": lambda x: x.opt.groups.pop(),
    "the other order": lambda x: x.opt.groups.reverse(),
    "rebound": lambda x: x.params.update(w2=x.array(6, 7)),
    "grad shape": lambda x: x.grads.update(w2=x.array(5, 1)),
    "grad missing": lambda x: x.grads.pop("w2"),
    "grad None": lambda x: x.grads.update(w2=None),
    "grad is a param of the first": lambda x: x.grads.update(w2=x.params["w0"]),
    "grad of the first is its param": lambda x: x.grads.update(w0=x.params["w2"]),
    "m is the first's": lambda x: x.state["w2"].update(m=x.state["w0"]["m"]),
    "step": lambda x: x.state["w2"].update(step=41),
    "grads in dicts": lambda x: setattr(x, "grads", [{"w0": x.grads["w0"], "w1": x.grads["w1"]}, {"w2": x.grads["w2"]}]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "change"), [(k, name) for k in (1, 2) for name in CHANGES] + [(3, name) for name in CHANGES_OF_GROUPS]
)
@pytest.mark.parametrize("kind", ["plain", "clipped", "capturable"])
def test_a_change_between_steps_is_noticed(backend, took, groups, change, kind):
    outcomes, options = (
        [],
        {"clipped": {"max_norm": 0.5}, "capturable": {"max_norm": 0.5, "check_finite": True}}.get(kind, {}),
    )
    for repeats in (True, False):
        pair = Pair(backend, groups, capturable=kind == "capturable")
        pair.opt.repeats = repeats
        pair.outcome(4, **options)
        (CHANGES_OF_GROUPS if groups == 3 else CHANGES)[change](pair)
        outcomes.append(pair.outcome(**options))
    assert took[:2] == [True, True] and outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", [list, tuple])
def test_gradients_in_a_list_or_a_tuple_are_taken_and_a_dict_of_numbers_refused(backend, took, kind):
    twins = Twins(backend)
    twins.step(kind(twins.grads), times=6)
    assert took and all(took)
    twins.assert_same()
    with pytest.raises(ValueError, match="sequence"):
        twins.quick.step({str(k): grad for k, grad in enumerate(twins.grads)})
    twins.assert_same()


@pytest.mark.parametrize("what", ["shape", "strides", "gpu_data", "dtype", "stream"])
@pytest.mark.parametrize("which", ["param", "grad", "v"])
def test_an_attribute_that_is_set_on_an_array_of_numba_is_noticed(cp, took, what, which):
    stream = cp.cuda.Stream(non_blocking=True)
    pair = Pair("numba-cuda")
    pair.outcome(4)
    array = {"param": pair.params["w1"], "grad": pair.grads["w1"], "v": pair.state["w1"]["v"]}[which]
    pair.kept = array.gpu_data
    others = {"shape": (2, 2), "strides": (0,), "gpu_data": pair.array(4, 9).gpu_data, "dtype": np.dtype("i4")}
    setattr(array, what, (others | {"stream": stream.ptr})[what])
    with contextlib.suppress(TypeError, ValueError):  # the long way's
        pair.opt.step(pair.grads)
    assert took[-1] is False


def test_attributes_of_numba_arrays_are_compared_without_python(took, monkeypatch):
    twins = Twins("numba-cuda")
    twins.step(times=4)
    monkeypatch.setattr(repeated_on_gpu.ReadInPython, "same", None)
    twins.step(times=2)
    assert took[-2:] == [True, True]
    twins.assert_same()


def test_other_attributes_that_say_the_same_are_read_by_python(took, monkeypatch):
    twins, read = Twins("numba-cuda"), []
    twins.step(times=4)
    same = repeated_on_gpu.ReadInPython.same
    monkeypatch.setattr(repeated_on_gpu.ReadInPython, "same", lambda *given: read.append(same(*given)) or read[-1])
    memory = twins.grads[0].gpu_data
    twins.grads[0].gpu_data = memory.view(0, memory.size)
    twins.step()
    twins.params[1].shape = (*twins.params[1].shape,)
    twins.step()
    assert took[-2:] == read == [True, True]
    twins.assert_same()


def test_when_the_memory_of_a_gradient_goes_nothing_is_the_same():
    """What gets its address might be another's."""
    from gpuadam.kernels import numba_attributes

    columns = [arrays(testing.array_backend("numba-cuda"), seed) for seed in range(4)]
    words, kept = numba_attributes.told(columns)
    before = words.copy()
    del columns[1][1:]
    gc.collect()
    (changed,) = np.flatnonzero(words != before)
    assert changed == len(numba_attributes.NAMES) and words[changed] == 0 and kept


@pytest.mark.parametrize("which", ["param", "grad", "v"])
def test_an_array_of_cupy_that_takes_another_shape_in_place_is_noticed(cp, took, which):
    pair = Pair("cupy")
    pair.outcome(4)
    {"param": pair.params["w1"], "grad": pair.grads["w1"], "v": pair.state["w1"]["v"]}[which].shape = (2, 2)
    with pytest.raises(ValueError, match="shape"):
        pair.opt.step(pair.grads)
    assert took[-1] is False


def test_of_an_object_of_another_class_nothing_is_read(cp, took, called):
    class Other(cp.ndarray):
        """One that is laid out as CuPy's arrays are, so that to read it does no harm."""

    pair = Pair("cupy")
    pair.outcome(4)
    pair.grads["w1"] = pair.grads["w1"].view(Other)
    pair.opt.step(pair.grads)
    assert took[-2:] == [True, False]
    call = Call("cupy")
    for _ in range(4):
        call.make()
    call.make(grad=call.arrays[1].view(Other))
    assert called[-2:] == [True, False]


@pytest.mark.parametrize("of_memory", [False, True])
def test_objects_that_are_not_as_cupy_14_has_them_are_read_by_python(cp, took, monkeypatch, of_memory):
    if of_memory:
        monkeypatch.setattr(cupy_struct(), "POINTER", cupy_struct().DEVICE)
    else:
        monkeypatch.setattr(cupy_struct(), "DTYPE", cupy_struct().DATA)
    pair = Pair("cupy")
    assert cupy_struct().told(pair.params.values()) is None
    pair.outcome(6)
    assert took and all(took)
    pair.grads["w1"].shape = (2, 2)
    with pytest.raises(ValueError, match="shape"):
        pair.opt.step(pair.grads)


def cupy_struct():
    from gpuadam.kernels import cupy_struct

    return cupy_struct


def test_a_parameter_without_a_gradient_stays(backend, took):
    twins = Twins(backend)
    twins.step(times=4)
    before = numbers(twins.library, twins.params)[1]
    twins.step([twins.grads[0], None, twins.grads[2]])
    assert not took[-1]
    assert (numbers(twins.library, twins.params)[1] == before).all()
    twins.assert_same()


def test_a_gradient_of_another_shape_is_refused_and_nothing_changes(backend):
    twins = Twins(backend)
    twins.step(times=4)
    before = numbers(twins.library, twins.params)
    wrong = [twins.grads[0], twins.library.array(np.zeros((4, 3), "float32")), twins.grads[2]]
    with pytest.raises(ValueError, match="shape"):
        twins.quick.step(wrong)
    for one, other in zip(numbers(twins.library, twins.params), before, strict=True):
        assert (one == other).all()
    assert twins.quick.steps == 4


def test_a_cupy_array_that_takes_another_shape_in_place_is_noticed(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    twins.grads[1].shape = (4, 3)
    with pytest.raises(ValueError, match="shape"):
        twins.quick.step(twins.grads)


def test_no_gradient_is_kept_alive(backend):
    twins = Twins(backend)
    twins.step(times=4)
    held = weakref.ref(twins.grads[0] if backend == "cupy" else twins.grads[0].gpu_data)
    twins.grads = None
    gc.collect()
    assert held() is None


def test_a_copy_takes_steps_of_its_own(cp):
    twins = Twins("cupy")
    twins.step(times=4)
    other = copy.deepcopy(twins.quick)
    before = numbers(twins.library, twins.params)
    other.step(twins.grads)
    for one, same in zip(numbers(twins.library, twins.params), before, strict=True):
        assert (one == same).all()


def test_a_step_goes_to_the_stream_that_is_current_then(cp, driver):
    twins = Twins("cupy")
    twins.step(times=4)
    stream = cp.cuda.Stream(non_blocking=True)
    driver.listen()
    with stream:
        twins.quick.step(twins.grads)
    assert [handle for _, handle in driver.launches] == [stream.ptr]
    cp.cuda.Device().synchronize()


@pytest.mark.parametrize("of_step", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("in_groups", [False, True])
def test_a_step_that_a_graph_would_freeze_is_refused(cp, took, in_groups, of_step):
    library = testing.array_backend("cupy")
    params, grads = arrays(library, 1), arrays(library, 2)
    opt = gpuadam.Adam([{"params": [param]} for param in params] if in_groups else params)
    grads = [[grad] for grad in grads] if in_groups else grads
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(4):
            opt.step(grads, **of_step)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="a graph is being captured"):
                opt.step(grads, **of_step)
        finally:
            stream.end_capture()
    stream.synchronize()
    assert opt.steps == 4 and took[-2:] == [True, False]


@pytest.mark.parametrize("of_step", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
def test_a_graph_captures_a_step_that_is_as_the_last_ones(cp, took, of_step):
    library = testing.array_backend("cupy")
    twins, stream = Twins("cupy", capturable=True, lr=written(library, 0.1)), cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        twins.step(times=4, **of_step)
        stream.begin_capture()
        twins.quick.step(twins.grads, **of_step)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
            twins.slow.step(twins.grads, **of_step)
        twins.quick.steps += 2
    stream.synchronize()
    assert all(took[:-1])
    twins.assert_same()


def test_a_captured_step_with_a_number_that_changes_is_refused(cp, took):
    twins, stream = Twins("cupy", capturable=True, lr=0.1), cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        twins.step(times=4)
        assert took[-1]
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=r"would repeat this step with lr=0\.1 for ever"):
                twins.quick.step(twins.grads)
        finally:
            stream.end_capture()
    stream.synchronize()
    twins.assert_same()


def test_adam_step_views_the_same_arrays_once(backend, monkeypatch):
    library = testing.array_backend(backend)
    (param, *_), (grad, *_), (other, *_) = (arrays(library, seed) for seed in (1, 2, 1))
    m, v, other_m, other_v = (library.zeros(SHAPES[0]) for _ in range(4))
    viewed, in_views = [], update._in_views
    monkeypatch.setattr(update, "_in_views", lambda groups, backend: viewed.append(1) or in_views(groups, backend))
    for step in range(1, 5):
        gpuadam.adam_step(param, grad, m, v, step, lr=0.1 / step)
    assert len(viewed) == 1
    monkeypatch.setattr(remembered, "READ", {})
    for step in range(1, 5):
        gpuadam.adam_step(other, grad, other_m, other_v, step, lr=0.1 / step)
    assert len(viewed) == 5
    for one, same in ((param, other), (m, other_m), (v, other_v)):
        assert (library.numpy(one) == library.numpy(same)).all()


def test_adam_step_notices_other_arrays_and_settings(backend):
    library = testing.array_backend(backend)
    (param, *_), (grad, *_) = arrays(library, 1), arrays(library, 2)
    m, v = library.zeros(SHAPES[0]), library.zeros(SHAPES[0])
    gpuadam.adam_step(param, grad, m, v, 1)
    with pytest.raises(ValueError, match="shape"):
        gpuadam.adam_step(param, arrays(library, 2)[1], m, v, 2)
    with pytest.raises(ValueError, match="memory"):
        gpuadam.adam_step(param, grad, m, m, 2)
    gpuadam.adam_step(param, grad, m, v, 2, zero_grad=True)
    assert not library.numpy(grad).any()


CALLS = {
    "lr": lambda x: {"lr": 0.5},
    "lr nan": lambda x: {"lr": math.nan},
    "lr -0.0": lambda x: {"lr": -0.0},
    "lr infinite": lambda x: {"lr": math.inf},
    "lr too large": lambda x: {"lr": 1e39},
    "lr an int": lambda x: {"lr": 1},
    "betas": lambda x: {"betas": (0.5, 0.9)},
    "betas wrong": lambda x: {"betas": (0.5, 1.0)},
    "weight_decay": lambda x: {"weight_decay": 0.25},
    "grad_scale": lambda x: {"grad_scale": 0.5},
    "zero_grad": lambda x: {"zero_grad": True},
    "step of NumPy": lambda x: {"step": np.int64(7)},
    "step 0": lambda x: {"step": 0},
    "step True": lambda x: {"step": True},
    "step large": lambda x: {"step": 1 << 60},
    "max_v": lambda x: {"max_v": x.array(6, 5)},
    "backend": lambda x: {"backend": "numba-cpu"},
    "another param": lambda x: {"param": x.array(6, 7)},
    "another grad": lambda x: {"grad": x.array(6, 7)},
    "grad shape": lambda x: {"grad": x.array(5, 7)},
    "grad of the same memory, shape": lambda x: {"grad": view_of(x, x.arrays[1], shape=(2, 3))},
    "grad of the same memory, shorter": lambda x: {"grad": view_of(x, x.arrays[1], shape=(3,))},
    "grad of the same memory, strides": lambda x: {"grad": view_of(x, x.arrays[1], strides=(0,))},
    "grad of the same memory, int": lambda x: {"grad": view_of(x, x.arrays[1], typestr="<i4")},
    "grad of the same memory": lambda x: {"grad": view_of(x, x.arrays[1])},
    "grad dtype": lambda x: {"grad": x.array(6, 1, "float64")},
    "grad of NumPy": lambda x: {"grad": np.ones(6, "float32")},
    "grad None": lambda x: {"grad": None},
    "grad is param": lambda x: {"grad": x.arrays[0]},
    "m is v": lambda x: {"m": x.arrays[3]},
}  # fmt: skip


@pytest.fixture
def called(monkeypatch):
    """A list of whether each call of adam_step was quick."""
    done, does = [], CallsOnGpu.does

    def noted(self, *call):
        done.append(does(self, *call))
        return done[-1]

    monkeypatch.setattr(CallsOnGpu, "does", noted)
    return done


class Call(Pair):
    """What a change is done to: the four arrays of a call."""

    def __init__(self, backend):
        self.library = testing.array_backend(backend)
        self.arrays = [self.array(6, 1), self.array(6, 2), self.library.zeros(6), self.library.zeros(6)]

    def make(self, **other):
        gpuadam.adam_step(**dict(zip(("param", "grad", "m", "v"), self.arrays, strict=True)) | {"step": 5} | other)


@pytest.mark.parametrize("change", CALLS)
def test_a_change_between_calls_is_noticed(backend, called, change, monkeypatch):
    outcomes = []
    for repeats in (True, False):
        call = Call(backend)
        with monkeypatch.context() as patched:
            if not repeats:
                patched.setattr(remembered, "READ", {})
                patched.setattr(functional, "_ON_GPU", CallsOnGpu())
            for _ in range(4):
                call.make()
            told, other = [], CALLS[change](call)
            for _ in range(3):
                try:
                    call.make(**other)
                except Exception as error:  # noqa: BLE001 - whatever it is, both have to raise it
                    told.append((type(error), re.sub("0x[0-9a-f]+", "an address", str(error))))
            arrays = [*call.arrays, *(x for x in other.values() if hasattr(x, "__cuda_array_interface__"))]
            outcomes.append([*told, *(call.library.numpy(x).tobytes() for x in arrays)])
    assert called[3] and outcomes[0] == outcomes[1]


def test_a_call_goes_to_the_stream_that_is_current_then_or_that_it_is_given(cp, called, driver):
    call, stream = Call("cupy"), cp.cuda.Stream(non_blocking=True)
    for _ in range(4):
        call.make()
    cp.cuda.Device().synchronize()
    driver.listen()
    with stream:
        call.make()
    call.make(stream=stream)
    call.make(stream=stream.ptr)
    cp.cuda.Device().synchronize()
    assert [handle for _, handle in driver.launches] == [stream.ptr] * 3
    assert called[-3:] == [True, False, False]


def test_a_call_that_a_graph_would_freeze_is_refused(cp, called):
    call, stream = Call("cupy"), cp.cuda.Stream(non_blocking=True)
    for _ in range(4):
        call.make()
    cp.cuda.Device().synchronize()
    before = cp.asnumpy(call.arrays[0])
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capturable"):
                call.make()
        finally:
            stream.end_capture()
    assert called[-1] is False and (cp.asnumpy(call.arrays[0]) == before).all()


def test_a_backend_that_is_in_use_is_noticed(cp, called):
    call = Call("cupy")
    for _ in range(4):
        call.make()
    with gpuadam.use_backend("numba-cuda"):
        call.make()
    assert called[-2:] == [True, False]


def test_gradients_that_lie_in_turn_in_two_places_are_both_found_again(backend, called):
    call = Call(backend)
    others = call.array(6, 8), call.array(6, 9)
    for k in range(12):
        call.make(grad=others[k % 2])
    assert all(called[-6:])


def test_calls_of_arrays_without_elements_do_nothing(backend):
    library = testing.array_backend(backend)
    arrays = [library.zeros(0) for _ in range(4)]
    for step in range(1, 6):
        gpuadam.adam_step(*arrays, step)
