"""The forms of the step that are measured: by format, formula and algorithm, with arrays, launchers and calls of each.

Shared by `python -m gpuadam bench` and the scripts in benchmarks/.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

import gpuadam

from ... import hyperparameters
from ...kernels import adam, limit
from ...kernels.layout import Update
from ...kernels.operands import Arrays, bytes_per_element, operands_of
from ...kernels.view import BitsFormat
from . import measure

BF16: BitsFormat = "bfloat16"
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


class Case(NamedTuple):
    """A form of the step: the formats of its arrays, and the rest as in `adam_step`."""

    arrays: Arrays
    algorithm: str = "adam"
    formula: str = "torch"
    clip_value: float | None = None
    bounds: tuple | None = None

    def options(self):
        """Return what is beside the arrays, by its name in `adam_step`."""
        return {name: value for name, value in self._asdict().items() if name != "arrays"}


FORMS = {
    "float32": Case(Arrays()),
    "float64": Case(Arrays("float64", "float64", "float64")),
    "bfloat16 state": Case(Arrays(state=BF16)),
    "8-bit state": Case(Arrays(state="8bit")),
    "bfloat16 param and grad": Case(Arrays(BF16, BF16)),
    "all bfloat16": Case(Arrays(BF16, BF16, BF16, stochastic=True)),
    "float16 param and grad": Case(Arrays("float16", "float16")),
    "bfloat16 param and grad + 16 bits": Case(Arrays(BF16, BF16, remainder=True)),
    "float32 + bfloat16 copy and grad": Case(Arrays(grad=BF16, param_copy=BF16)),
    "AMSGrad": Case(Arrays(amsgrad=True)),
    "EMA": Case(Arrays(ema="float32")),
    "NAdam": Case(Arrays(), "nadam"),
    "RAdam": Case(Arrays(), "radam"),
    "AdaMax": Case(Arrays(), "adamax"),
    "optax's formula": Case(Arrays(), formula="optax"),
    "where": Case(Arrays(where="array")),
    "lr_scale": Case(Arrays(lr_scale="float32")),
    "change": Case(Arrays(change="float32")),
    "clip_value and bounds": Case(Arrays(), clip_value=1.0, bounds=(-1.0, 1.0)),
    "bounds of arrays": Case(Arrays(low="float32", high="float32")),
    "joint complex64": Case(Arrays(numbers=2)),
    "components=3": Case(Arrays(numbers=3)),
    "eps-hat": Case(Arrays(), formula="eps-hat"),  # the kernel of float32 with other scalars; so is apex
}


def form_and_scalars(case):
    """Return the Form and the Scalars of a step."""
    h = hyperparameters.checked(**HYPERPARAMETERS, weight_decay=0.0, **case.options())
    return hyperparameters.form_and_scalars(h, 10, case.arrays)


def bytes_moved(case):
    """Return the bytes that a step reads and writes of each element.

    >>> bytes_moved(FORMS["float32"]), bytes_moved(FORMS["8-bit state"])
    (28.0, 16.5)
    """
    return bytes_per_element(form_and_scalars(case)[0])


def bytes_held(case, n, memory):
    """Return about how many bytes of a kind of memory are held while `kernel_and_movers` is measured on arrays of n elements.

    >>> bytes_held(FORMS["float32"], 1000, "CUDA"), bytes_held(FORMS["float32"], 1000, "CPU")
    (16000, 24000)
    """
    arrays = sum(operand.nbytes(n) for operand in operands_of(case.arrays)) * (2 if case.arrays.grouped else 1)
    # the numbers are made on the host: those of one operand are there until the next one's are
    return arrays + 2 * n * case.arrays.numbers * np.dtype(case.arrays.compute).itemsize * (memory == "CPU")


def new_arrays(kernels, case, n):
    """Return {operand: array} of numbers that stay ordinary however many steps are done. bfloat16 is in uint16."""
    operands = operands_of(case.arrays)
    sizes = {operand.name: n * operand.numbers for operand in operands}
    values = measure.data(sizes, case.arrays.compute)
    return {
        operand.name: kernels.from_host(_stored(operand, array, n)) for operand, array in zip(operands, values, strict=True)
    }


def _stored(operand, values, n):
    """Return numbers in the format of an operand, those of an element in a last dimension.

    Codes, scales and remainders are zeros, as at the first step.
    """
    if operand.numbers > 1:
        values = values.reshape(n, operand.numbers)
    if operand.name in ("low", "high"):
        values = np.full_like(values, -1 if operand.name == "low" else 1)
    if operand.of_groups or operand.format in ("int16", "uint8"):
        return np.full(operand.nbytes(n) // operand.itemsize, operand.name == "where", operand.format)
    if operand.format == BF16:
        return (values.astype("float32", copy=False).view("uint32") >> 16).astype("uint16")
    return values.astype(operand.format, copy=False)


def kernel_and_movers(kernels, case, arrays):
    """Return {contender: function that launches it}: the step on these arrays, and the ways to move its bytes.

    All have the same arrays, because the pages of an array can matter. With 8-bit state the movers have their own: they would
    store v in the place of the root of v.
    """
    of_limit = new_arrays(kernels, case, arrays["param"].size) if case.arrays.grouped else arrays
    contenders = {measure.KERNEL: launcher(kernels, case, arrays.values(), adam)}
    for name, rule in limit.movers(kernels.memory).items():
        contenders[measure.OF_MOVER + name] = launcher(kernels, case, of_limit.values(), rule)
    return contenders


def launcher(kernels, case, arrays, rule):
    """Return a function that launches a rule's kernel, without the checks of a call. arrays: in the order of the operands."""
    return launcher_of_all(kernels, case, [list(arrays)], rule)


def launcher_of_all(kernels, case, updates, rule):
    """Likewise for several updates in one launch. updates: lists of arrays, of which one may come several times."""
    form, scalars = form_and_scalars(case)
    operands = operands_of(case.arrays)
    views = [
        Update([kernels.view("", array).in_vectors(o.numbers) for array, o in zip(arrays, operands, strict=True)])
        for arrays in updates
    ]
    (batch,) = kernels.batches(views, case.arrays)
    keys = itertools.count(1)  # one a step, for random rounding

    def launch(held=updates):  # a batch on a GPU does not keep its arrays alive
        batch.prepare(rule, form, scalars, batch.place(None), next(keys))
        batch.launch()

    return launch


def caller(kernels, case, arrays):
    """Return a function that calls adam_step, each time for the next step. arrays: {operand: array}."""
    narrow = [operand.name for operand in operands_of(case.arrays) if operand.format == BF16]
    operands = arrays | {name: gpuadam.Bits(arrays[name], BF16) for name in narrow}
    options = case.options() | {"stochastic_rounding": case.arrays.stochastic, "components": case.arrays.numbers}
    if case.arrays.bounded:
        options["bounds"] = operands.pop("low"), operands.pop("high")
    call = functools.partial(gpuadam.adam_step, **operands, **HYPERPARAMETERS, **options, backend=kernels.name)
    steps = itertools.count(1)
    return lambda: call(step=next(steps))
