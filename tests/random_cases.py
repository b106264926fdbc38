"""Random configurations of `Adam` and of `adam_step`, and how one is run and held against float64."""

import copy
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import narrow_model as model
import numpy as np
from float64_step import check_step
from hypothesis import strategies as st

import gpuadam
from gpuadam.groups import MAPPING, ONE, SEQUENCE, as_given
from gpuadam.state import OF_GROUPS

FLOATS = ("float32", "float64", "bfloat16", "float16")
CLASSES = {"nadam": gpuadam.NAdam, "radam": gpuadam.RAdam, "adamax": gpuadam.AdaMax}
FILL = 0xA5  # of the memory between and around elements


@dataclasses.dataclass(frozen=True)
class Record:
    def __repr__(self):
        """Write what differs from the defaults."""
        values = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        different = (f"{name}={value!r}" for name, value, default in values if value is not default and value != default)
        return f"{type(self).__name__}({', '.join(different)})"


record = functools.partial(dataclasses.dataclass, frozen=True, repr=False)


@record()
class Round(Record):
    """What the cases of a round share: nearly all that kernels are compiled for, which takes longer than a case."""

    formats: tuple = (("float32", "float32", None),)  # of param, gradient and copy: each parameter has one of these rows
    algorithm: str = "adam"
    formula: str = "torch"
    decoupled: bool = False
    decays: bool = False
    scaled: bool = False
    near: tuple = (True, True, True)  # whether beta1, beta2 and ema_decay are over 1/2
    state_dtype: str | None = None
    amsgrad: bool = False
    master: str | None = None
    ema: bool = False
    zero_grad: bool = False
    stochastic: bool = False
    capturable: bool = False
    clips: bool = False
    bounded: bool = False
    lr_scale: str | None = None  # its format
    where: str = ""  # or "array", "nonzero"
    norms: bool = False  # steps return their norms
    change: str | None = None  # its format
    complex: str | None = None  # or "joint", "parts"
    components: int = 1
    bound_arrays: tuple = (False, False)

    @property
    def numbers(self):
        """How many numbers share a v."""
        return 2 if self.complex == "joint" else self.components

    @classmethod
    def drawn(cls, rng):
        """Return a random one that no check refuses. rng: of `random`."""
        complex, components = rng.choice([*[(None, 1)] * 6, ("joint", 1), ("parts", 1), (None, 2), (None, 3), (None, 4)])
        shares = complex == "joint" or components > 1
        state_dtype = rng.choice([None, None, "float32", "float64", "bfloat16", *(["8bit"] if not shares else [])])
        floats = [x for x in FLOATS if state_dtype != "8bit" or x != "float64"]
        of_params = [x for x in floats if x in ("float32", "float64")] if complex else floats
        rows = [
            (rng.choice(of_params), rng.choice(of_params), rng.choice([None, *floats]))
            for _ in range(rng.choice([1, 1, 1, 2]))
        ]
        algorithm = rng.choice(["adam", "adam", "adam", "nadam", "radam", *(["adamax"] if state_dtype != "8bit" else [])])
        of_adam = algorithm == "adam"
        master = rng.choice([None, "remainder"])
        is_split = master and any(param == "bfloat16" for param, *_ in rows)
        capturable = len(rows) == 1 and algorithm != "nadam" and rng.random() < 0.3
        drawn = cls(
            tuple(rows),
            algorithm,
            rng.choice(
                {"adam": ["torch", "apex", "eps-hat", "optax"], "nadam": ["torch", "optax"]}.get(algorithm, ["torch"])
            ),
            *(rng.random() < 0.5 for _ in range(3)),
            tuple(rng.random() < 0.7 for _ in range(3)),
            state_dtype,
            of_adam and state_dtype != "8bit" and rng.random() < 0.6,
            master,
            rng.random() < 0.4,
            rng.random() < 0.4,
            not is_split and rng.random() < 0.4,
            capturable,
            complex != "joint" and rng.random() < 0.3,
            complex != "joint" and rng.random() < 0.3,
            # of the elements of complex ones, which are rows of the parts: not beside groups
            rng.choice([None, None, "float32", *(["float64"] if state_dtype != "8bit" else [])])
            if not (complex and state_dtype == "8bit")
            else None,
            rng.choice(["", "", "array", "nonzero"]) if state_dtype != "8bit" else "",
            norms=rng.random() < 0.3,
            complex=complex,
            components=components,
        )
        if drawn.bounded and rng.random() < 0.5:
            drawn = dataclasses.replace(drawn, bound_arrays=rng.choice([(True, False), (False, True), (True, True)]))
        if rng.random() < 0.75:
            return drawn
        rows = tuple((param, grad, None) for param, grad, _ in rows)  # the change goes with no copy
        return dataclasses.replace(drawn, formats=rows, master=None, ema=False, change=rng.choice(floats))

    def simpler(self):
        """Yield rounds in which one thing is as it is by default."""
        if len(self.formats) > 1:
            yield from (dataclasses.replace(self, formats=(row,)) for row in self.formats)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                yield dataclasses.replace(self, **{field.name: field.default})


@record()
class Layout(Record):
    order: tuple = ()  # of the dimensions in memory; () for C order
    steps: tuple = ()  # of each dimension in memory, in elements; () for 1
    offset: int = 0  # of the first element, in bytes
    bits: bool = False  # 16-bit floats are given as integers, in `Bits`


@record()
class Hyperparameters(Record):
    lr: float = 0.1
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    clip_value: float | None = None
    bounds: tuple | None = None


@record()
class Parameter(Record):
    formats: tuple
    shape: tuple = ()
    layout: Layout = Layout()
    copy: Layout = Layout()
    grads: tuple = (Layout(), Layout())  # of which each step takes one


@record()
class Group(Record):
    parameters: tuple
    kind: str = MAPPING
    hyperparameters: Hyperparameters = Hyperparameters()
    lr_is: str = "a number"


@record()
class Step(Record):
    skipped: frozenset = frozenset()  # numbers of parameters; of groups, if the round is capturable
    other_grads: bool = False  # whether gradients have the second layout
    size: float = 1.0  # of the gradients
    sparse: bool = False  # half of the gradients are zero
    grad_scale: float = 1.0
    max_norm: float | None = None
    norm: str = "computed"
    check_finite: bool = False
    found_inf: Any = None
    bad: float | None = None  # an element of a gradient
    slower: bool = False  # the learning rates are halved before the step
    then: str = "nothing"


@record()
class OptimizerCase(Record):
    groups: tuple
    steps: tuple
    in_groups: bool = True
    eps_root: float = 0.0
    ema_decay: float = 0.999
    seed: int = 0  # of the numbers, and of random rounding


@record()
class FunctionCase(Record):
    parameter: Parameter
    layouts: tuple  # of the other arrays
    steps: int = 1
    first: int = 1
    hyperparameters: Hyperparameters = Hyperparameters()
    grad_scale: float = 1.0
    eps_root: float = 0.0
    ema_decay: float = 0.999
    seed: int = 0


SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.one_of(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from([(33,), (7, 40), (1003,)]))


@st.composite
def layouts(draw, round, dimensions):
    is_8bit = round.state_dtype == "8bit"  # whose groups need C order, and elements at their alignment
    bits, offset = draw(st.booleans()), draw(st.sampled_from([0, 4, 8] if is_8bit else [0, 4, 8, 1]))
    if is_8bit or draw(st.booleans()):
        return Layout(offset=offset, bits=bits)
    last = (dimensions - 1,) if round.components > 1 else ()  # these numbers are neighbours
    order = draw(st.permutations(range(dimensions - len(last))))
    steps = tuple(draw(st.sampled_from([1, 2, -1, -2, 3])) for _ in order)
    return Layout((*order, *last), steps + (1,) * len(last), offset, bits)


@st.composite
def hyperparameters(draw, round):
    near1, near2, _ = round.near
    beta1 = draw(st.sampled_from([0.9, 0.6, 0.99, 0.999] if near1 else [0.0, 0.5, 0.3]))
    beta2 = draw(st.sampled_from([0.999, 0.95, 0.6, 0.9999] if near2 else [0.0, 0.5, 0.3]))
    return Hyperparameters(
        draw(st.sampled_from([0.1, 1e-3, 1.0, 0.0])),
        (beta1, beta2),
        draw(st.sampled_from([1e-8, 1e-3, 1e-12, 0.0])),
        draw(st.sampled_from([0.1, 0.01, 1.0])) if round.decays else 0.0,
        round.scaled and draw(st.booleans()),
        # numbers that every format has
        draw(st.sampled_from([0.5, 2.0, 2.0**-10])) if round.clips else None,
        draw(st.sampled_from([(-0.5, 0.25), (0.0, None), (None, 0.125)])) if round.bounded else None,
    )


def eps_roots(round):
    return st.sampled_from([0.0, 1e-6] if round.formula == "optax" and round.algorithm == "adam" else [0.0])


def ema_decays(round):
    return st.sampled_from([0.999, 0.9] if round.near[2] else [0.3, 0.5, 0.0])


def grad_scales(round):
    return st.sampled_from([1 / 3, -2.0, 1e-3] if round.scaled else [1.0])  # by 1 would be another kernel


@st.composite
def parameters(draw, round):
    formats, shape = draw(st.sampled_from(round.formats)), draw(SHAPES) + (round.components,) * (round.components > 1)
    layout, of_copy, *of_grads = (draw(layouts(round, len(shape))) for _ in range(4))
    return Parameter(formats, shape, layout, of_copy, tuple(of_grads))


@st.composite
def groups(draw, round):
    members = draw(st.lists(parameters(round), max_size=3))
    kind = draw(st.sampled_from([MAPPING, SEQUENCE, *([ONE] if len(members) == 1 else [])]))
    lr_is = draw(st.sampled_from(["a number", "a callable", *(["an array"] if round.capturable else [])]))
    return Group(tuple(members), kind, draw(hyperparameters(round)), lr_is)


@st.composite
def steps(draw, round):
    check_finite = draw(st.booleans())
    found_inf = draw(st.sampled_from([None, None, False, True, np.zeros(1, "f4"), np.ones(1, "f4")]))
    return Step(
        frozenset(draw(st.sets(st.integers(0, 8), max_size=4))),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 1e-3, 100.0, 1e-6])),
        draw(st.booleans()),
        draw(grad_scales(round)),
        draw(st.sampled_from([None, 0.1, 10.0])) if round.scaled else None,
        draw(st.sampled_from(["computed", "a number", "an array"])),
        check_finite,
        found_inf,
        draw(st.sampled_from([None, math.inf, math.nan])) if check_finite or found_inf else None,
        draw(st.booleans()),
        draw(st.sampled_from(["nothing", "again", "state_dict", "itself", "save"])),
    )


@st.composite
def optimizer_cases(draw, round):
    of_case = draw(st.lists(groups(round), min_size=1, max_size=3).filter(lambda x: any(group.parameters for group in x)))
    return OptimizerCase(
        tuple(of_case),
        tuple(draw(st.lists(steps(round), min_size=1, max_size=5))),
        len(of_case) > 1 or draw(st.booleans()),
        draw(eps_roots(round)),
        draw(ema_decays(round)),
        draw(SEEDS),
    )


@st.composite
def function_cases(draw, round):
    parameter = draw(parameters(round))
    return FunctionCase(
        parameter,
        tuple(draw(layouts(round, len(parameter.shape))) for _ in range(8)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 6, 1000])),
        draw(hyperparameters(round)),
        draw(grad_scales(round)),
        draw(eps_roots(round)),
        draw(ema_decays(round)),
        draw(SEEDS),
    )


class Placed:
    """Numbers in memory of a Layout."""

    def __init__(self, values, layout):
        order, steps = layout.order or range(values.ndim), layout.steps or (1,) * values.ndim
        whole = [values.shape[d] * abs(step) for d, step in zip(order, steps, strict=True)]
        nbytes = math.prod(whole) * values.itemsize

        def view(memory, dtype):
            in_memory = memory[layout.offset : layout.offset + nbytes].view(dtype).reshape(whole)
            return in_memory[(..., *(slice(None, None, step) for step in steps))].transpose(np.argsort(order).astype(int))

        self.memory, inside = np.full(nbytes + 32, FILL, "u1"), np.zeros(nbytes + 32, "u1")
        self.array = view(self.memory, values.dtype)  # of ml_dtypes where it is bfloat16, or complex
        self.array[...] = values
        view(inside, f"V{values.itemsize}")[...] = np.void(b"\1" * values.itemsize)
        self.outside = inside == 0
        name = values.dtype.name
        in_bits = layout.bits and name in ("bfloat16", "float16")
        self.given = gpuadam.Bits(self.array.view("u2"), name) if in_bits else self.array

    @property
    def real(self):
        """The numbers; of complex ones both parts, in a last dimension."""
        return in_parts(self.array)

    def check_outside(self, name):
        assert (self.memory[self.outside] == FILL).all(), f"memory between or around the elements of {name} was written"


def random_numbers(rng, shape, format, size=1.0, sparse=False, complex=False):
    values = size * rng.standard_normal((*shape, 2) if complex else shape)
    if sparse:
        of_elements = rng.random(shape) < 0.5
        values = values * (of_elements[..., None] if complex else of_elements)
    values = np.asarray(values).astype(model.DTYPES[format])
    return values.view({"float32": "c8", "float64": "c16"}[format])[..., 0] if complex and format in COMPLEX else values


COMPLEX = ("float32", "float64")  # the formats of both parts of complex arrays; others are arrays of the parts


def in_parts(array):
    """Return the real and imaginary parts of complex numbers in a last dimension, and other arrays as they are."""
    return array[..., None].view(f"f{array.itemsize // 2}") if array.dtype.kind == "c" else array


def typed(array):
    """Return an array of state with the dtype of its numbers."""
    return array.view(model.DTYPES["bfloat16"]) if array.dtype == "u2" else array


def same(arrays, others):
    """Whether two dicts of dicts of arrays have the same bytes."""
    return {name: in_bytes(own) for name, own in arrays.items()} == {name: in_bytes(own) for name, own in others.items()}


def in_bytes(arrays):
    return {key: (array.dtype.name, array.tobytes()) for key, array in arrays.items()}


def options_of(round, case, hyperparameters, **others):
    """Return the options of a step of `reference.adam_step`."""
    of_case = {"eps_root": case.eps_root, "ema_decay": case.ema_decay, "components": round.numbers}
    return {"algorithm": round.algorithm, "formula": round.formula} | of_case | vars(hyperparameters) | others


def further_arrays(rng, round, shape):
    """Return operand -> numbers, of the arrays that a step of a round has beside gradients and state."""
    arrays, of_elements = {}, shape[:-1] if round.components > 1 else shape
    if round.change:
        arrays["change"] = 0 * random_numbers(rng, shape, round.change, complex=bool(round.complex))
    if round.lr_scale:
        arrays["lr_scale"] = np.abs(random_numbers(rng, of_elements, round.lr_scale))
    if round.where == "array":
        arrays["where"] = np.asarray(rng.random(of_elements) < 0.5)
    return arrays


def bounds_of(rng, round, param):
    """Return arrays of bounds, for both ends or None. param: the numbers that they bound."""
    ends = (param.dtype.type(-0.5), param.dtype.type(0.25))
    return [
        np.asarray(end + np.abs(random_numbers(rng, param.shape, "float32", 0.1))).astype(param.dtype) if there else None
        for end, there in zip(ends, round.bound_arrays, strict=True)
    ]


def bounds_in_float64(ends, numbers):
    """Return bounds as `reference.adam_step` takes them. ends: arrays or None; numbers: bounds of numbers, or None."""
    given = numbers or (None, None)
    return tuple(x if end is None else in_parts(end).astype("f8") for end, x in zip(ends, given, strict=True))


def further_options(round, arrays):
    """Return what `reference.adam_step` is given of these arrays."""
    options = {name: arrays[name] for name in ("lr_scale", "where") if name in arrays}
    return options | ({"where": "nonzero"} if round.where == "nonzero" else {})


# adam_step


def check_function(round, case):
    rng = np.random.default_rng(case.seed)
    (param, grad, copy_format), shape = case.parameter.formats, case.parameter.shape
    arrays, is_complex = {}, bool(round.complex)
    value = random_numbers(rng, shape, param, complex=is_complex)
    if round.master and param == "bfloat16":
        value, arrays["remainder"] = model.parts(random_numbers(rng, shape, "float32"))
    arrays["param"] = value
    state = round.state_dtype or ("float64" if param == "float64" else "float32")
    of_m = (*shape, 2) if is_complex else shape
    of_v = of_m[:-1] if round.numbers > 1 else of_m
    m, v, max_v = rng.standard_normal(of_m), rng.standard_normal(of_v) ** 2, rng.standard_normal(of_v) ** 2
    if state == "8bit":
        flat = [np.asarray(x).astype("f4").reshape(-1) for x in (m, v)]
        codes = model.codes(*flat, rng.integers(0, 2**32, flat[0].size).astype("u4"))
        arrays |= dict(zip(("m", "v"), (x.reshape(of_m) for x in codes[:2]), strict=True))
        arrays |= dict(zip(("m_scale", "v_scale"), codes[2:], strict=True))
    else:
        arrays |= {name: np.asarray(x).astype(model.DTYPES[state]) for name, x in (("m", m), ("v", v))}
        arrays |= {"max_v": np.asarray(max_v).astype(model.DTYPES[state])} if round.amsgrad else {}
    if copy_format:
        arrays["param_copy"] = 0 * random_numbers(rng, shape, copy_format, complex=is_complex)
    if round.ema:
        arrays["ema"] = random_numbers(rng, shape, "float64" if param == "float64" else "float32", complex=is_complex)
    arrays |= further_arrays(rng, round, shape)
    others = iter(case.layouts)
    placed = {}
    for name, values in arrays.items():
        of_name = {"param": case.parameter.layout, "param_copy": case.parameter.copy} | dict.fromkeys(OF_GROUPS, Layout())
        layout = of_name.get(name) or next(others)
        placed[name] = Placed(values, layout if values.ndim == len(layout.order or values.shape) else Layout())
    options = options_of(round, case, case.hyperparameters, decoupled=round.decoupled, grad_scale=case.grad_scale)
    low, high = (end if end is None else Placed(end, Layout()) for end in bounds_of(rng, round, placed["param"].array))
    nonzero = {"where": "nonzero"} if round.where == "nonzero" else {}
    ends, of_vectors = (low and low.array, high and high.array), {"complex": round.complex, "components": round.components}
    given_bounds = tuple(x if end is None else end for x, end in zip(options["bounds"] or (None, None), ends, strict=True))
    for step in range(case.first, case.first + case.steps):
        values = random_numbers(rng, shape, grad, sparse=bool(nonzero), complex=is_complex)
        grads = Placed(values, case.parameter.grads[step % 2])
        before = {name: one.real.copy() for name, one in placed.items()} | {"grad": grads.real.copy()}
        given = {name: one.given for name, one in placed.items() | {"grad": grads}.items()}
        gpuadam.adam_step(
            step=step, zero_grad=round.zero_grad, stochastic_rounding=round.stochastic, seed=case.seed, **given, **nonzero,
            **options | of_vectors | {"bounds": given_bounds},
        )  # fmt: skip
        after = {name: one.real for name, one in placed.items()}
        in_float64 = {"bounds": bounds_in_float64(ends, options["bounds"])}
        check_step(before, after, step, options | further_options(round, before) | in_float64, round.stochastic)
        check_grad("grad", grads, before["grad"], round.zero_grad)
    for name, one in placed.items():
        one.check_outside(name)


def check_grad(name, placed, before, zero_grad):
    expected = np.zeros_like(before) if zero_grad else before
    assert placed.real.tobytes() == expected.tobytes(), f"{name} is not {'zero' if zero_grad else 'as it was'}"
    placed.check_outside(name)


# Adam


class Training:
    """An optimizer and its arrays, as a case describes them."""

    def __init__(self, round, case, folder):
        self.round, self.case, self.file = round, case, Path(folder) / "state.safetensors"
        self.rng = np.random.default_rng(case.seed)
        self.names, self.described = [], {}
        for k, group in enumerate(case.groups):
            first = len(self.described)
            names = [f"{k}-{n}" if group.kind == MAPPING else str(first + n) for n in range(len(group.parameters))]
            self.names.append(names)
            self.described |= dict(zip(names, group.parameters, strict=True))
        self.params, self.copies = {}, {}
        for name, parameter in self.described.items():
            of_param, _, of_copy = parameter.formats
            values = random_numbers(self.rng, parameter.shape, of_param, complex=bool(round.complex))
            self.params[name] = Placed(values, parameter.layout)
            if of_copy:
                zeros = 0 * random_numbers(self.rng, parameter.shape, of_copy, complex=bool(round.complex))
                self.copies[name] = Placed(zeros, parameter.copy if zeros.ndim == len(parameter.shape) else Layout())
        self.bounds = dict.fromkeys(self.described, (None, None))
        if case.in_groups:  # a checkpoint does not hold them: they are given again, in groups
            self.bounds = {name: bounds_of(self.rng, round, placed.array) for name, placed in self.params.items()}
        self.rates = [self.rate(group) for group in case.groups]
        self.counts, self.steps = dict.fromkeys(self.described, 0), 0
        self.opt = self.made(self.params, self.copies)

    def rate(self, group):
        lr = group.hyperparameters.lr
        return {"a number": lr, "a callable": lambda step: lr / step, "an array": np.array([lr])}[group.lr_is]

    def given(self, arrays, settings=None):
        """Return name -> array as params or gradients are given. settings: of each group."""
        in_groups = [
            as_given(group.kind, names, [arrays.get(name) for name in names])
            for group, names in zip(self.case.groups, self.names, strict=True)
        ]
        if not self.case.in_groups:
            return in_groups[0]
        return [{"params": x, **own} for x, own in zip(in_groups, settings, strict=True)] if settings else in_groups

    def given_copies(self, copies):
        return self.given({name: placed.given for name, placed in copies.items()}) if copies else None

    def made(self, params, copies):
        round, case = self.round, self.case
        settings = [
            vars(group.hyperparameters)
            | {"lr": rate, "amsgrad": round.amsgrad, "complex": round.complex, "components": round.components}
            | self.bounds_given(group, names)
            for group, rate, names in zip(case.groups, self.rates, self.names, strict=True)
        ]
        make = CLASSES.get(round.algorithm) or (gpuadam.AdamW if round.decoupled else gpuadam.Adam)
        return make(
            self.given({name: placed.given for name, placed in params.items()}, settings),
            **({} if case.in_groups else settings[0]),
            capturable=round.capturable,
            formula=round.formula,
            eps_root=case.eps_root,
            state_dtype=round.state_dtype,
            master=round.master,
            param_copies=self.given_copies(copies),
            ema_decay=case.ema_decay if round.ema else None,
            zero_grad=round.zero_grad,
            stochastic_rounding=round.stochastic,
            seed=case.seed,
        )

    def bounds_given(self, group, names):
        """Return the setting "bounds" of a group, if its bounds are arrays."""
        if not names or not any(end is not None for name in names for end in self.bounds[name]):
            return {}
        numbers = group.hyperparameters.bounds or (None, None)
        ends = zip(*(self.bounds[name] for name in names), strict=True)
        return {
            "bounds": tuple(
                x if all(end is None for end in of_params) else as_given(group.kind, names, list(of_params))
                for x, of_params in zip(numbers, ends, strict=True)
            )
        }

    def arrays(self):
        """Return name -> operand -> a copy of the array, of all that a step may change but the gradients."""
        found = {}
        for name, state in self.opt.state.items():
            found[name] = {"param": self.params[name].real.copy()}
            found[name] |= {key: typed(array).copy() for key, array in state.items() if key != "step"}
            if name in self.copies:
                found[name]["param_copy"] = self.copies[name].real.copy()
        return found

    def check_counts(self):
        found = {name: int(np.ravel(state["step"])[0]) for name, state in self.opt.state.items()}
        assert (found, self.opt.steps) == (self.counts, self.steps), (
            f"{found}, {self.opt.steps} steps; {self.counts}, {self.steps}"
        )

    def step(self, step):
        """Take a step and check all that it left."""
        if step.slower:
            for group, settings in zip(self.case.groups, self.opt.groups, strict=True):
                if group.lr_is != "a callable":
                    settings["lr"] *= 0.5
        grads = self.grads(step)
        norm = math.sqrt(sum(np.sum(placed.real.astype("f8") ** 2) for placed in grads.values()))
        scale = step.grad_scale
        left_out = bool(step.found_inf) or (step.check_finite and not math.isfinite(norm))
        if step.max_norm is not None:
            scale *= min(1.0, step.max_norm / (norm * abs(scale) + 1e-6))
        before, of_grads = self.arrays(), {name: placed.real.copy() for name, placed in grads.items()}
        saved = copy.deepcopy(self.opt.state_dict())
        rates = self.rates_now()
        self.further = {
            name: {
                key: Placed(x, parameter.copy if x.ndim == len(parameter.shape) else Layout())
                for key, x in further_arrays(self.rng, self.round, parameter.shape).items()
            }
            for name, parameter in self.described.items()
        }
        norms = self.call(step, grads)
        after = self.arrays()
        if self.round.norms:
            self.check_norms(norms, before, after, left_out, grads)
        if not left_out:
            self.steps += 1
        for k, name in ((k, name) for k, names in enumerate(self.names) for name in names):
            if left_out or name not in grads:
                assert in_bytes(after[name]) == in_bytes(before[name]), (
                    f"{name} has changed in a step that it takes no part in"
                )
                continue
            self.counts[name] += 1
            count = self.counts[name]
            now = {"lr": rates[k], "grad_scale": scale, "decoupled": self.opt.decoupled}
            now |= {"ema_decay": 0.0} if count == 1 else {}  # the first step sets ema
            further = {key: placed.real for key, placed in self.further[name].items()}
            now |= further_options(self.round, further)
            if any(end is not None for end in self.bounds[name]):
                now["bounds"] = bounds_in_float64(self.bounds[name], self.case.groups[k].hyperparameters.bounds)
            options = options_of(self.round, self.case, self.case.groups[k].hyperparameters, **now)
            left = after[name] | {key: array for key, array in further.items() if key == "change"}
            try:
                check_step(before[name] | further | {"grad": of_grads[name]}, left, count, options, self.round.stochastic)
            except AssertionError as error:
                raise AssertionError(f"params[{name!r}], its step {count}: {error}") from None
        for name, placed in grads.items():
            check_grad(f"the gradient of {name}", placed, of_grads[name], self.round.zero_grad)
        for name, placed in ((name, placed) for of_name in self.further.values() for name, placed in of_name.items()):
            placed.check_outside(name)
        self.check_counts()
        if step.then == "again":
            self.again(step, grads, of_grads, before, saved, after)

    def again(self, step, grads, of_grads, before, saved, after):
        """Go back, and take the same step: it gives the same bits."""
        for arrays, operand in ((self.params, "param"), (self.copies, "param_copy")):
            for name, placed in arrays.items():
                placed.real[...] = before[name][operand]
        self.opt.load_state_dict(saved)
        assert same(self.arrays(), before), "a state_dict that was loaded is not what it was"
        for name, placed in grads.items():
            placed.real[...] = of_grads[name]
        self.call(step, grads)
        assert same(self.arrays(), after), "the same step from the same state gave other bits"
        self.check_counts()

    def grads(self, step):
        """Return name -> Placed."""
        grads, number = {}, itertools.count()
        for k, names in enumerate(self.names):
            for name in names:
                parameter, of_group = self.described[name], next(number)
                if (k if self.round.capturable else of_group) not in step.skipped:
                    is_complex, format = bool(self.round.complex), parameter.formats[1]
                    values = random_numbers(self.rng, parameter.shape, format, step.size, step.sparse, is_complex)
                    grads[name] = Placed(values, parameter.grads[step.other_grads])
        if step.bad is not None:
            for placed in itertools.islice((placed for placed in grads.values() if placed.array.size), 1):
                placed.array[(0,) * placed.array.ndim] = step.bad
        return grads

    def call(self, step, grads):
        given = {name: placed.given for name, placed in grads.items()}
        norm = None
        if step.norm != "computed" and grads and (step.max_norm is not None or step.check_finite):
            norm = gpuadam.global_norm(given)
            norm = float(norm) if step.norm == "a number" else norm
        further = {
            key: self.given({name: of_name[key].given for name, of_name in self.further.items()})
            for key in next(iter(self.further.values()))
        } | ({"where": "nonzero"} if self.round.where == "nonzero" else {})
        return self.opt.step(
            self.given(given), grad_scale=step.grad_scale, max_norm=step.max_norm, norm=norm, check_finite=step.check_finite,
            found_inf=step.found_inf, norms=self.round.norms, **further,
        )  # fmt: skip

    def check_norms(self, norms, before, after, left_out, grads):
        """Compare the norms of a step with those of the arrays; of the change where all parameters have what is computed."""
        params = [own["param"] for own in after.values()]
        assert norms.param.tobytes() == gpuadam.global_norm(params).tobytes()
        if left_out:
            assert norms.change == 0
        elif not self.round.change and all(param.dtype.name in ("float32", "float64") for param in params):
            # to the others, which may be NaN, nothing is added
            updated = {name: own["param"] for name, own in after.items() if name in grads}
            changes = [np.asarray(param - before[name]["param"].astype("f8")) for name, param in updated.items()]
            expected, size = (float(gpuadam.global_norm(x)) if x else 0.0 for x in (changes, list(updated.values())))
            # a float32 parameter may be beside a float64 gradient
            np.testing.assert_allclose(norms.change, expected, rtol=1e-12, atol=1e-6 * size)

    def rates_now(self):
        """Return the learning rate of each group in the next step."""
        now = [settings["lr"] for settings in self.opt.groups]
        return [float(lr(self.opt.steps + 1) if callable(lr) else np.ravel(lr)[0]) for lr in now]

    def then(self, what):
        """Go on from what was saved in one way or another: nothing but the optimizer is another."""
        if what in ("nothing", "again"):
            return
        before, rates = self.arrays(), self.rates_now()
        if what == "itself":
            self.opt.load_state_dict(self.opt.state_dict())
        elif what == "state_dict":
            state_dict = copy.deepcopy(self.opt.state_dict())
            self.rates = [self.rate(group) for group in self.case.groups]
            self.opt = self.made(self.params, self.copies)
            self.opt.load_state_dict(state_dict)
        else:
            self.load()
        assert same(self.arrays(), before), f"after {what!r} the arrays differ"
        assert self.rates_now() == rates, f"after {what!r} the learning rates are {self.rates_now()}, and were {rates}"
        self.check_counts()

    def load(self):
        """Save, and load into other arrays, in C order."""
        self.opt.save(self.file, with_params=True)
        self.params = {
            name: Placed(np.zeros(placed.array.shape, placed.array.dtype), Layout()) for name, placed in self.params.items()
        }
        self.rates = [self.rate(group) for group in self.case.groups]
        own = [rate if group.lr_is != "a number" else None for group, rate in zip(self.case.groups, self.rates, strict=True)]
        settings = [self.bounds_given(*of_group) for of_group in zip(self.case.groups, self.names, strict=True)]
        params = self.given({name: placed.given for name, placed in self.params.items()}, settings)
        copies = self.given_copies(self.copies)
        self.opt = gpuadam.load(self.file, params, lr=own, param_copies=copies, with_params=True)

    def check_outside(self):
        for name, placed in (*self.params.items(), *self.copies.items()):
            placed.check_outside(name)


def check_optimizer(round, case, folder):
    training = Training(round, case, folder)
    for step in case.steps:
        training.step(step)
        training.then(step.then)
    training.check_outside()
