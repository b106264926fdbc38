"""One route for every update, whichever class or function asks for it.

adam_step, Adam.step, gpuadam.torch.Adam.step, ...      make Updates: arrays that take the same step
  update                  what the arrays are, checked, in one of three ways; each returns Batches (`kernels/backend.py`):
    numpy_batches.batches   NumPy's arrays are read in their structs
    remembered.batches      other arrays are as they were in the last step
    _in_views               any arrays are viewed one by one, and what is wrong with them is raised
  prepared                for each batch its stream, its form and its scalars; all is compiled, uploaded and refused here
  launch                  nothing but launches: of a step's scalars, if they are computed on the device, then of the batches; a
                          step's norms are summed before and after these
"""

import dataclasses
import itertools
from typing import Any

from . import backends, checks, hyperparameters, numpy_batches, torch_tensors
from .device_step import ScalarsLaunch
from .kernels import adam, streams
from .kernels.backend import Batch
from .kernels.layout import Update
from .kernels.messages import label_of, shortened
from .kernels.operands import KINDS, Arrays, is_written
from .kernels.scalars import step_key
from .kernels.view import Bits
from .remembered import release

OPERANDS = ("param", "grad", "m", "v")  # that every update has


@dataclasses.dataclass(slots=True, eq=False)
class Updates:
    """Arrays that take the same step."""

    h: hyperparameters.Hyperparameters
    step: int
    columns: list[list[Any]]  # the arrays of each operand: the params of all updates, their grads, m's, v's, ...
    operands: tuple[str, ...] = OPERANDS  # in the order of `operands.operands_of`
    names: list[str] | None = None  # of each param; None for the one that adam_step was given
    now: Any = None  # a device_step.Now, if scalars are computed on the device
    complex: str | None = None  # what complex params are taken for: "joint" or "parts"
    components: int = 1  # how many numbers of a real param share a v
    bits: tuple[Any, ...] = ()  # of each operand: the format that its integers stand for, or ""
    stochastic: bool = False  # narrow params are rounded randomly
    seed: int = 0
    keys: list[int] | None = None  # of each param, for random rounding
    starts: list[int] | None = None  # likewise the number of its first element, where a param is a part of one
    nonzero: bool = False  # elements whose gradient is 0 stay
    alone: bool = False  # the param was given as one array, so that nobody knows its name
    called: tuple[str, ...] = ()  # the names of the operands in errors, if they are others
    like: Any = None  # what its arrays are like, a `numpy_batches.Like`, if they were found to be in one table

    def written(self):
        """Return the arrays that are written."""
        names, zero_grad = self.operands, self.h.fixed.zero_grad
        columns = [column for name, column in zip(names, self.columns, strict=True) if is_written(name, names, zero_grad)]
        return list(itertools.chain.from_iterable(columns))

    def rows(self):
        """Yield the arrays of each update, with what errors call them."""
        for n, arrays in enumerate(zip(*self.columns, strict=True)):
            bits = self.bits or [""] * len(arrays)
            in_bits = [Bits(array, format) if format else array for array, format in zip(arrays, bits, strict=True)]
            yield list(zip(self.labels(n), in_bits, strict=True))

    def labels(self, n):
        """Return what errors call the arrays of an update."""
        if self.names is None:
            return self.operands
        param = label_of(self.names[n], self.alone)
        return param, f"the gradient of {param}", *(f"{name} of {param}" for name in (self.called or self.operands)[2:])


def update(groups, backend=None, stream=None, remembered=None, under_way=None, norms=None):
    """Check all Updates, then launch them: one launch for the dense arrays of each that share a device and a dtype.

    remembered: a `remembered.Remembered`, which keeps what is known of the arrays for the next step. under_way: an
        `under_way.UnderWay`, which begins when all is checked and prepared. The caller ends it when the step is counted too.
    norms: `change_sums.NormPasses`, which the step makes.
    """
    if stream is not None:
        stream = streams.handle(stream)
    takes_numpy = backends.takes_numpy(backend)
    batches = numpy_batches.batches(groups) if takes_numpy else None
    has_tensors = not batches and any(torch_tensors.among(group.columns) for group in groups)
    if has_tensors and takes_numpy:
        in_numpy = _as_numpy(groups, remembered)
        batches = numpy_batches.batches(in_numpy)
        for group, own in zip(groups, in_numpy, strict=True):
            group.like = own.like
    if not batches and remembered:
        batches = remembered.batches(groups, backend)
    viewed = None if batches else _in_views(groups, backend)
    launch(prepared(groups, batches or viewed, stream, norms), under_way)
    if remembered and viewed is not None:
        remembered.keep(groups, backend, viewed)
    else:
        release(viewed or ())
    if has_tensors:
        for group in groups:
            torch_tensors.wrote(group.written())


def _as_numpy(groups, remembered):
    """Return Updates with NumPy arrays in the place of torch's tensors in CPU memory, as far as there can be such arrays.

    remembered: keeps the arrays for the next step, but for those of gradients.
    """
    result, all_in_numpy = [], torch_tensors.all_in_numpy
    for number, group in enumerate(groups):
        columns, grads, n = list(group.columns), group.columns[1], len(group.columns[1])
        kept = [k for k, column in enumerate(columns) if column is not grads and torch_tensors.is_tensor(column[0])]
        tensors = [tensor for k in kept for tensor in columns[k]]
        arrays = remembered.in_numpy(number, tensors) if remembered else all_in_numpy(tensors)
        for place, k in enumerate(kept):
            columns[k] = arrays[place * n : (place + 1) * n]
        columns[1] = all_in_numpy(grads, written=False)
        result.append(dataclasses.replace(group, columns=columns))
    return result


def check(groups, backend=None, stream=None):
    """Raise what `update` would raise of the arrays and of a graph that is captured, and do nothing else."""
    stream = streams.handle(stream)
    batches = _in_views(groups, backend)
    for batch in batches:
        _place(groups[batch.group], batch, stream)
    release(batches)


def _in_views(groups, backend):
    """Return the batches of Updates of any arrays, which are viewed one by one. Raise what is wrong with an array."""
    batches = []
    written: list[Any] = []
    read: list[Any] = []
    for k, group in enumerate(groups):
        together: dict[tuple, list] = {}
        zero_grad = group.h.fixed.zero_grad
        for kernels, by_operand, arrays, one in _viewed(group, backend):
            for operand, view in by_operand.items():
                (written if is_written(operand, by_operand, zero_grad) else read).append(view)
            together.setdefault((kernels, by_operand["param"].device, arrays), []).append(one)
        for (kernels, _, arrays), updates in together.items():
            for batch in kernels.batches(updates, arrays):
                batch.group = k
                batches.append(batch)
    checks.overlap(written, read)
    return batches


def in_elements(views, group):
    """Check the arrays of one update. Return its Views by operand, each with the elements of the update, and their numbers.

    views: operand -> View. group: the Updates.
    """
    param, h = views["param"], group.h.fixed
    numbers = checks.numbers(param, group.complex, group.components)
    checks.ordered(param, numbers, h, views)
    for operand in checks.OF_ROWS:
        if operand in views:
            views[operand] = views[operand].of_rows(param.shape[:-1] if numbers > 1 else param.shape)
    checks.update(views, h.zero_grad, group.nonzero, numbers)
    return {name: view if KINDS[name].shared else view.in_vectors(numbers) for name, view in views.items()}, numbers


def _viewed(group, backend):
    """Yield of each update of a group the backend, the Views by their operands, the `operands.Arrays` and the `layout.Update`.

    Raise what is wrong with the arrays of one update.
    """
    for n, row in enumerate(group.rows()):
        for label, array in row:
            checks.given(label, array)
        kernels, views = backends.choose(row, backend)
        by_operand, numbers = in_elements(dict(zip(group.operands, views, strict=True)), group)
        formats = {operand: view.format for operand, view in by_operand.items()}
        key, start = group.keys[n] if group.keys else 0, group.starts[n] if group.starts else 0
        arrays = Arrays.of(formats, group.stochastic, group.nonzero, numbers)
        yield kernels, by_operand, arrays, Update([*by_operand.values()], key, start)


def _of_change(groups, norms):
    """Return the batches that sum the changes that Updates, which were checked, will make."""
    batches = []
    for k, group in enumerate(groups):
        together: dict[Arrays, tuple] = {}
        for name, (_, _, arrays, one) in zip(group.names, _viewed(group, norms.backend.name), strict=True):
            names, updates = together.setdefault(arrays, ([], []))
            names.append(name)
            updates.append(one)
        batches += [norms.part(k, *members, arrays) for arrays, members in together.items()]
    return batches


def prepared(groups, batches, stream=None, norms=None):
    """Prepare all batches, which may fail. Return what to launch: nothing is allocated, compiled or refused any more."""
    scalars_of: dict[int, ScalarsLaunch] = {}
    if stream is not None:
        _check_devices(batches)
    of_change = _of_change(groups, norms) if norms else []
    for batch in [*of_change, *batches]:
        group, key = groups[batch.group], 0
        if group.now is None:
            place = None if stream is batch.device is None else _place(group, batch, stream)  # on the CPU there is none
            form, scalars = hyperparameters.form_and_scalars(group.h, group.step, batch.arrays)
            if batch.is_random:
                key = step_key(group.seed, group.step)
        else:  # the arrays of a group go where its scalars are computed
            computed = scalars_of.get(batch.group)
            place = _place(group, batch, computed.stream if computed else stream)
            computed = scalars_of.setdefault(batch.group, computed or ScalarsLaunch(group, place.stream))
            form, scalars = computed.of(batch.arrays)
        batch.prepare(adam, form, scalars, place, key)
    launches = batches
    if norms:
        norms.prepare(stream)
        launches = [*of_change, *batches, norms]
    if scalars_of:
        launches = [*scalars_of.values(), *launches]
        for scalars in scalars_of.values():
            scalars.prepare()
    return launches


def launch(launches, under_way=None):
    """Make launches that are prepared: batches, and what goes before and after them. An error says how far they came."""
    if under_way is not None:
        under_way.begin()
    try:
        for one in launches:
            one.launch()
    except Exception as error:
        if any(one.begun for one in launches):
            raise _cut_short(error, launches) from error
        if under_way is not None:
            under_way.end()
        raise


def _place(group, batch, stream):
    """Return the Place of a launch, or raise what a graph that is captured there would freeze or cannot hold."""
    place = batch.place(stream)
    if place is not None:  # on a GPU
        if group.now is not None and place.capturing:
            group.now.check_capture(group.h)
        batch.check(place, group.now is not None and group.now.counts)
    return place


def _check_devices(batches):
    """Refuse a stream for arrays on several devices: a stream is of one."""
    devices = sorted({batch.device for batch in batches})
    if len(devices) > 1:
        raise ValueError(
            f"stream is of one device, and the parameters are on devices {devices}: leave stream out, make a stream of each "
            "device the current one there, or take a step for the parameters of each device"
        )


def _cut_short(error, launches):
    """Return the error of a step of which a part is done."""
    batches = [one for one in launches if isinstance(one, Batch)]
    done, not_done = (_names_of(batch for batch in batches if batch.begun == begun) for begun in (True, False))
    counted = any(one.begun for one in launches if isinstance(one, ScalarsLaunch))
    count = "; the step count on the device has advanced" if counted else ""
    why = shortened(str(error), 1000)
    return RuntimeError(
        f"the step was cut short ({type(error).__name__}: {why}). Updated: {done}; not updated: {not_done}{count}. The step "
        "count on the host has not. Go on from a state that was saved before"
    )


def _names_of(batches):
    names = [name for batch in batches for name in batch.names]
    first = shortened(", ".join(names[:8]), 1000)
    return first + (f" and {len(names) - 8:,} more" if len(names) > 8 else "") if names else "nothing"
