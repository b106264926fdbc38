"""From call to launch: check, choose the backend, compute the scalars, launch."""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from . import backends, checks, hyperparameters, torch_tensors
from . import step_counts as capturable
from .kernels import adam, streams
from .kernels import view as arrays
from .kernels.layout import Update
from .kernels.operands import Arrays
from .kernels.scalars import step_key


def adam_step(
    param,
    grad,
    m,
    v,
    step,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    max_v=None,
    maximize=False,
    grad_scale=1.0,
    algorithm="adam",
    formula="torch",
    eps_root=0.0,
    remainder=None,
    param_copy=None,
    ema=None,
    ema_decay=0.999,
    m_scale=None,
    v_scale=None,
    zero_grad=False,
    stochastic_rounding=False,
    seed=0,
    backend=None,
    stream=None,
):
    """Apply one Adam update in place, in one pass over memory.   (Kingma & Ba 2015, Algorithm 1, arXiv:1412.6980)

    param, grad, m, v, max_v: arrays of one shape on one device: NumPy, CuPy, Numba device arrays, or anything with DLPack or
        `__cuda_array_interface__`. param, m, v and max_v are overwritten; grad is only read.
        m and v are the running means of the gradient and of its square (PyTorch's exp_avg and exp_avg_sq, optax's mu and nu);
        start both at zero. max_v, if given, makes it AMSGrad: the running maximum of v, from zero.
        Any strides do, but arrays that share one order of memory without gaps are the fast case.
        param and grad are float32, float64, bfloat16 or float16, each as it likes; m, v and max_v are of one dtype, float32,
        float64 or bfloat16. bfloat16 arrays are those of ml_dtypes, or integers in `Bits`. It is computed in float64 if one of
        the arrays is float64, else in float32. bfloat16 moments are rounded randomly, because else they would not move.
    step: number of this update, counted from 1.
    lr, betas, eps: as in the paper; eps is added to sqrt(v / (1 - beta2**step)).
    weight_decay: added to the gradient times param (L2), or, if decoupled, taken off param times lr (AdamW).
    maximize: go up the gradient. grad_scale: the gradient is multiplied by it first (1 / loss scale, or a clipping factor).
    algorithm: "adam"; or "nadam" (Dozat 2016), "radam" (Liu et al. 2020) or "adamax" (Kingma & Ba 2015, Algorithm 2: v is then
        the decayed maximum of |gradient|), each as in torch.
    formula: where Adam's eps goes. With m and v corrected for their bias, "torch" and "apex": m / (sqrt(v) + eps), which are
        one formula here; "optax": m / (sqrt(v + eps_root) + eps), with AMSGrad's maximum of the corrected v; "eps-hat", of
        TensorFlow, chainer and thinc: m / (sqrt(v) + eps / sqrt(1 - beta2**step)), so eps counts for more in the first steps.
    remainder: an int16 array: with it a bfloat16 param is an exact float32 in two parts. Start it at zero, or split a float32 x
        into param, the bits of x plus 0x8000 shifted right by 16, and remainder, the low 16 bits of x.
    param_copy: an array of any of the dtypes that is overwritten with the new param, rounded to nearest even.
    ema: a float32 or float64 array, the running mean of param: ema += (1 - ema_decay) * (param - ema).
    m_scale, v_scale: with these m and v are 8-bit state: uint8 arrays of param's shape, and float32 arrays of one element for
        each 32 neighbours of param in C order, all from zero. 2.25 bytes an element; rounded randomly.
    zero_grad: store zeros in grad in the same pass.
    stochastic_rounding: round a bfloat16 or float16 param up or down at random, right on average, so that small updates are not
        lost. The random bits are a function of seed, step and an element's place in its array, in C order, alone.
    backend: "cupy", "numba-cuda" or "numba-cpu"; by default the arrays decide.
    stream: on a GPU, where to enqueue the update: a CuPy, Numba or torch stream, or the handle of one. By default CuPy's current
        stream, or else the one that the arrays name. Work on arrays that name other streams is ordered with it.

    On a GPU the call returns before the update is done, and never waits for the device.

    Raises ValueError (shapes, devices, read-only or overlapping arrays, hyperparameters out of range), TypeError (dtypes, not
    an array, arrays of different libraries), BackendUnavailableError, or RuntimeError while a CUDA graph is captured, which would
    freeze this step's numbers (see `Adam`), each before anything is written.

    >>> import numpy as np, gpuadam
    >>> param, grad = np.array([0.5, 0.0], "float32"), np.array([-33.0, -9.0], "float32")
    >>> m, v = np.zeros_like(param), np.zeros_like(param)
    >>> gpuadam.adam_step(param, grad, m, v, step=1, lr=0.1)
    >>> print(param)
    [0.6 0.1]
    """
    options = further(algorithm, ema_decay, zero_grad, formula, eps_root)
    h = hyperparameters.checked(lr, betas, eps, weight_decay, decoupled, maximize, grad_scale, options)
    step = checks.step_number(step)
    if max_v is remainder is param_copy is ema is m_scale is v_scale is None and not stochastic_rounding and not seed:
        group = Updates(h, step, [[param], [grad], [m], [v]], None)
    else:
        optional = {"max_v": max_v, "remainder": remainder, "param_copy": param_copy, "ema": ema}
        optional |= {"m_scale": m_scale, "v_scale": v_scale}
        optional = {name: array for name, array in optional.items() if array is not None}
        columns = [[a] for a in (param, grad, m, v, *optional.values())]
        stochastic = checks.flag("stochastic_rounding", stochastic_rounding)
        checks.combination(algorithm, optional, stochastic)
        group = Updates(h, step, columns, None, None, tuple(optional), stochastic, checks.seed(seed))
    update([group], backend, stream)


def further(algorithm, ema_decay, zero_grad, formula, eps_root, ema_starts=False):
    """Return (name, value) of the hyperparameters that few use, or nothing if all are as usual."""
    usual = algorithm == "adam" and ema_decay == 0.999 and formula == "torch" and eps_root == 0.0
    if usual and zero_grad is False and not ema_starts:
        return ()
    all_of_them = {"algorithm": algorithm, "ema_decay": ema_decay, "zero_grad": zero_grad, "ema_starts": ema_starts}
    return tuple((all_of_them | {"formula": formula, "eps_root": eps_root}).items())


class Updates(NamedTuple):
    """Arrays that take the same step."""

    h: hyperparameters.Hyperparameters
    step: int
    columns: list[list[Any]]  # the params of all updates, their grads, m's, v's, and those of `further`
    names: list[str] | None  # of each param; None for the one that adam_step was given
    now: Any = None  # a capturable.Now, if scalars are computed on the device
    further: tuple[str, ...] = ()  # the operands after v that there are, in the order of `operands.operands_of`
    stochastic: bool = False  # narrow params are rounded randomly
    seed: int = 0
    keys: list[int] | None = None  # of each param, for random rounding
    starts: list[int] | None = None  # likewise the number of its first element, where a param is a part of one

    @property
    def operands(self):
        return ("param", "grad", "m", "v", *self.further)

    def written(self):
        """Return the arrays that are written."""
        param, grad, *state = self.columns
        return list(itertools.chain(param, grad if self.h.fixed.zero_grad else (), *state))


def update(groups, backend=None, stream=None, memo=None):
    """Check all Updates, then launch them: one launch for the dense arrays of each that share a device and a dtype.

    memo: a Memo, which keeps what was found out of the arrays for the next step.
    """
    numpy_first = stream is None and backends.takes_numpy(backend)
    if numpy_first and _numpy_way(groups):
        return
    if not any(torch_tensors.among(group.columns) for group in groups):
        _update(groups, backend, stream, memo)
        return
    in_numpy = _in_numpy(groups, memo) if backends.takes_numpy(backend) else groups
    if not (numpy_first and _numpy_way(in_numpy)):
        _update(in_numpy, backend, stream, memo)
    for group in groups:
        torch_tensors.wrote(group.written())


def _in_numpy(groups, memo):
    """Return Updates with NumPy arrays in the place of torch's tensors in CPU memory."""
    return [
        group._replace(columns=torch_tensors.in_numpy(group.columns, memo and functools.partial(memo.in_numpy, k)))
        for k, group in enumerate(groups)
    ]


def _update(groups, backend, stream, memo):
    stream = streams.handle(stream)
    batches = memo and memo.batches(groups, backend)
    fresh = not batches
    if fresh:
        batches = _checked(groups, backend)
    work: list[tuple] = []
    scalars_of: dict[int, capturable.Scalars] = {}
    for k, formats, batch in batches:
        group = groups[k]
        # the arrays of a group in device mode go where its scalars are computed
        place = _placed(group, batch, scalars_of[k].stream if k in scalars_of else stream)
        if group.now is None:
            key = step_key(group.seed, group.step) if formats.random else 0
            work.append((batch, place, *hyperparameters.form_and_scalars(group.h, group.step, formats), key))
        else:
            if k not in scalars_of:
                scalars_of[k] = capturable.Scalars(group, place.stream)
            work.append((batch, place, *scalars_of[k].of(formats), 0))
    if stream is not None:
        _check_devices([batch for _, _, batch in batches])
    for scalars in scalars_of.values():
        scalars.prepare()
    for batch, place, form, scalars, key in work:
        batch.prepare(form, scalars, adam, place, key)
    # from here on nothing is allocated, compiled or refused
    counted: list[capturable.Scalars] = []
    launched: list[Any] = []
    try:
        for scalars in scalars_of.values():
            scalars.launch(counted)
        for batch, place, form, scalars, key in work:
            batch.launch(form, scalars, adam, place, key, launched)
    except Exception as error:
        if counted or launched:
            raise _cut_short(error, counted, launched, [batch for batch, *_ in work]) from error
        raise
    if memo is not None and fresh:
        memo.keep(groups, backend, batches)
    elif fresh:
        for *_, batch in batches:
            batch.release()


def _check_devices(batches):
    """Refuse a stream for arrays on several devices: it is of one."""
    devices = sorted({batch.device for batch in batches})
    if len(devices) > 1:
        raise ValueError(
            f"stream is of one device, and the parameters are on devices {devices}: leave stream out, make a stream of each "
            "device the current one there, or take a step for the parameters of each device"
        )


def _cut_short(error, counted, launched, batches):
    """Return the error of a step of which a part is done."""
    missing = [batch for batch in batches if batch not in launched]
    done, not_done = (_names_of(some) for some in (launched, missing))
    count = "; the step count on the device has advanced" if counted else ""
    return RuntimeError(
        f"the step was cut short ({type(error).__name__}: {error}). Updated: {done}; not updated: {not_done}{count}. The step "
        "count on the host has not. Go on from a state that was saved before"
    )


def _names_of(batches):
    names = [name for batch in batches for name in batch.names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "") if names else "nothing"


def _placed(group, batch, stream):
    """Return the Place of a launch, or raise what a graph that is captured there would freeze or cannot hold."""
    place = batch.place(stream)
    if group.now is not None and place.capturing:
        group.now.check_capture(group.h)
    batch.check(place, group.now is not None and group.now.counts)
    return place


# by the bytes of an element and the number of columns
_PLAIN = {
    (n_bytes, n): Arrays(name, name, name, amsgrad=n == 5)
    for n_bytes, name in ((4, "float32"), (8, "float64"))
    for n in (4, 5)
}


def _numpy_way(groups):
    """Check and launch, if all arrays are plain NumPy arrays that pass every check; else return False, having done nothing."""
    kernels = backends.load("numba-cpu")
    struct = kernels.numpy_struct
    work = []
    for group in groups:
        if group.further and group.further != ("max_v",):
            return False
        columns, zero_grad = group.columns, group.h.fixed.zero_grad
        tables = struct.tables(columns, zero_grad)
        if tables is None:
            return False
        for itemsize, rows, n in tables:
            form, scalars = hyperparameters.form_and_scalars(group.h, group.step, _PLAIN[itemsize, len(columns)])
            work.append((form, rows, n, scalars))
    if len(groups) > 1 and not struct.disjoint(np.concatenate([rows for _, rows, *_ in work]), zero_grad):
        return False
    for one in work:
        kernels.launch_table(*one)
    return True


def _checked(groups, backend):
    """Return (number of the group, its `operands.Arrays`, batch) of every launch, or raise what is wrong with an array."""
    batches, written = [], []
    read: list[Any] = []
    for k, group in enumerate(groups):
        together: dict[tuple, list] = {}
        zero_grad = group.h.fixed.zero_grad
        for n, given in enumerate(zip(*group.columns, strict=True)):
            named = labelled(given, group.operands, None if group.names is None else group.names[n])
            for label, array in named:
                checks.given(label, array)
            kernels, views = backends.choose(named, backend)
            by_operand = dict(zip(group.operands, views, strict=True))
            checks.update(by_operand, zero_grad)
            param, grad, *others = views
            written += [param, *others]
            (written if zero_grad else read).append(grad)
            one = Update(views, group.keys[n] if group.keys else 0, group.starts[n] if group.starts else 0)
            together.setdefault((kernels, param.device, formats_of(by_operand, group)), []).append(one)
        for (kernels, _, formats), updates in together.items():
            batches += [(k, formats, batch) for batch in kernels.batches(updates, formats)]
    checks.overlap(written, read)
    return batches


def formats_of(views, group):
    param, grad, m = (views[name].format for name in ("param", "grad", "m"))
    param_copy, ema = (views[name].format if name in views else "" for name in ("param_copy", "ema"))
    stochastic = group.stochastic and param in ("bfloat16", "float16")
    m = "8bit" if m == "uint8" else m
    return Arrays(param, grad, m, "max_v" in views, "remainder" in views, param_copy, ema, stochastic)


def check(groups, backend=None, stream=None):
    """Raise what `update` would raise of the arrays and of a graph that is captured, and do nothing else."""
    stream = streams.handle(stream)
    for k, _, batch in _checked(groups, backend):
        _placed(groups[k], batch, stream)
        batch.release()


class Memo:
    """What the checks found out of a step's arrays, for as long as they stay what and where they were.

    At each step what can have changed is read again and compared. It keeps no gradient alive, only the parameters and moments,
    as their optimizer does.
    """

    def __init__(self):
        self._key, self._batches = None, []
        self._views = torch_tensors.NumpyViews()

    def in_numpy(self, group, column, tensors):
        """Return NumPy arrays over the memory of torch's tensors: the same ones while these stay what they were."""
        return self._views((group, column), tensors)

    def batches(self, groups, backend):
        """Return the batches of the last step if its arrays were the same in all that matters, or None."""
        if self._key is None:
            return None
        forced, known = self._key
        if type(known) is _NumpyArrays:
            return self._batches if forced == backends.forced(backend) and known.same(groups) else None
        found = _description(groups, backend)
        if found is None or forced != found[0] or len(known) != len(found[1]):
            return None
        return self._batches if all(map(arrays.Description.same, known, found[1])) else None

    def keep(self, groups, backend, batches):
        """Take over the batches of a step."""
        for *_, batch in self._batches:
            batch.release()
        self._key, self._batches = None, []
        if batches and all(batch.lasts for *_, batch in batches):
            self._key = _description(groups, backend)
        elif plain := _numpy_arrays(groups, batches):
            self._key = backends.forced(backend), plain
            batches = [(k, formats, batch.without_arrays()) for k, formats, batch in batches]
        if self._key is not None:
            self._batches = batches
        else:
            for *_, batch in batches:
                batch.release()

    def __reduce__(self):  # a copy of an optimizer finds out anew
        return (Memo, ())


class _NumpyArrays:
    """The NumPy arrays of a step, as they were found: one table of updates for each group. Gradients may be others each time."""

    def __init__(self, struct, groups, tables, described):
        self._struct, self._tables, self._described = struct, tables, described
        self._of_groups = [self._of_group(group) for group in groups]
        self._rows = [np.empty_like(rows) for rows in described]
        self._dtypes = [[arrays.bare(column)[0][0].dtype for column in group.columns] for group in groups]  # kept alive
        self._itemsizes = [np.array([dtype.itemsize for dtype in dtypes]) for dtypes in self._dtypes]
        ends = np.cumsum([0, *map(len, described)])
        self._parts = list(itertools.pairwise(ends.tolist()))
        self._starts, self._ends = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.int64)
        self._written = np.empty(ends[-1], np.bool_)

    @staticmethod
    def _of_group(group):
        """Return what the tables depend on beside the arrays."""
        formats = [arrays.bare(column)[1] for column in group.columns]
        return group.operands, group.stochastic, group.keys, group.starts, group.h.fixed.zero_grad, formats

    def same(self, groups):
        """Whether the arrays are what they were. Then the tables have the addresses of the gradients."""
        if len(groups) != len(self._of_groups) or self._of_groups != [self._of_group(group) for group in groups]:
            return False
        struct = self._struct
        for k, group in enumerate(groups):
            n, width = len(group.columns[0]), len(group.columns)
            if n != len(self._tables[k]):
                return False
            of_columns = itertools.chain.from_iterable(arrays.bare(column)[0] for column in group.columns)
            objects = np.fromiter(map(id, of_columns), np.int64, n * width)
            part = slice(*self._parts[k])
            extents = self._starts[part], self._ends[part], self._written[part]
            rows, zero_grad = self._rows[k], group.h.fixed.zero_grad
            known = (self._described[k], rows, self._tables[k], self._itemsizes[k], zero_grad)
            if not struct.again(objects, struct.IDENTITIES, *known, *extents):
                return False
        return struct.apart(self._starts, self._ends, self._written)


def _numpy_arrays(groups, batches):
    """Return _NumpyArrays if each group is one table of NumPy arrays of the same formats, else None."""
    if len(batches) != len(groups) or any(getattr(batch, "table", None) is None or batch.lasts for *_, batch in batches):
        return None
    if any(len(batch.table) != len(group.columns[0]) for group, (*_, batch) in zip(groups, batches, strict=True)):
        return None
    struct = backends.load("numba-cpu").numpy_struct
    described = [struct.described(arrays.bare(list(itertools.chain.from_iterable(g.columns)))[0]) for g in groups]
    if any(rows is None for rows in described):
        return None
    return _NumpyArrays(struct, groups, [batch.table for *_, batch in batches], described)


def _description(groups, backend):
    described = [arrays.description(group.columns) for group in groups]
    return None if any(one is None for one in described) else (backends.forced(backend), described)


def labelled(given, operands, name):
    """Return what errors call the arrays of an update, and the arrays."""
    labels = operands
    if name is not None:
        param = f"params[{name!r}]"
        labels = (param, f"the gradient of {param}", *(f"{operand} of {param}" for operand in operands[2:]))
    return list(zip(labels, given, strict=True))
