"""From call to launch: check, choose the backend, compute the scalars, launch."""

from typing import Any, NamedTuple

import numpy as np

from . import arrays, backends, capturable, checks, hyperparameters
from .kernels import adam, streams


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
    backend=None,
    stream=None,
):
    """Apply one Adam update in place, in one pass over memory.   (Kingma & Ba 2015, Algorithm 1, arXiv:1412.6980)

    param, grad, m, v, max_v: arrays of one shape and dtype, float32 or float64, on one device: NumPy, CuPy, Numba device
        arrays, or anything with DLPack or `__cuda_array_interface__`. param, m, v and max_v are overwritten; grad is only read.
        m and v are the running means of the gradient and of its square (PyTorch's exp_avg and exp_avg_sq, optax's mu and nu);
        start both at zero. max_v, if given, makes it AMSGrad: the running maximum of v, from zero.
        Any strides do, but arrays that share one order of memory without gaps are the fast case.
    step: number of this update, counted from 1.
    lr, betas, eps: as in the paper; eps is added to sqrt(v / (1 - beta2**step)).
    weight_decay: added to the gradient times param (L2), or, if decoupled, taken off param times lr (AdamW).
    maximize: go up the gradient. grad_scale: the gradient is multiplied by it first (1 / loss scale, or a clipping factor).
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
    h = hyperparameters.checked(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        grad_scale=grad_scale,
    )
    given = [param, grad, m, v] if max_v is None else [param, grad, m, v, max_v]
    update([Updates(h, checks.step_number(step), [[a] for a in given], None)], backend, stream)


class Updates(NamedTuple):
    """Arrays that take the same step."""

    h: hyperparameters.Hyperparameters
    step: int
    columns: list[list[Any]]  # the params of all updates, their grads, m's, v's and, with AMSGrad, max_v's
    names: list[str] | None  # of each param; None for the one that adam_step was given
    now: Any = None  # a capturable.Now, if the step count is on the device

    @property
    def amsgrad(self):
        return len(self.columns) == 5


def update(groups, backend=None, stream=None, memo=None):
    """Check all Updates, then launch them: one launch for the dense arrays of each that share a device and a dtype.

    memo: a Memo, which keeps what was found out of arrays on a GPU for the next step.
    """
    if stream is None and backends.takes_numpy(backend) and _numpy_way(groups):
        return
    stream = streams.handle(stream)
    batches = memo and memo.batches(groups, backend)
    fresh = not batches
    if fresh:
        batches = _checked(groups, backend)
    work: list[tuple] = []
    scalars_of: dict[int, capturable.Scalars] = {}
    for k, dtype, batch in batches:
        group = groups[k]
        # the arrays of a group in device mode go where its scalars are computed
        place = batch.place(scalars_of[k].stream if k in scalars_of else stream)
        batch.check(place, group.now is not None)
        if group.now is None:
            work.append((batch, place, *hyperparameters.form_and_scalars(group.h, group.step, dtype, group.amsgrad)))
        else:
            if place.capturing:
                group.now.check_capture(group.h)
            if k not in scalars_of:
                scalars_of[k] = capturable.Scalars(group.now, group.h, group.amsgrad, place.stream)
            work.append((batch, place, *scalars_of[k].of(dtype)))
    for scalars in scalars_of.values():
        scalars.launch()
    for batch, place, form, scalars in work:
        batch.launch(form, scalars, adam, place)
    if memo is not None and fresh:
        memo.keep(groups, backend, batches)
    elif fresh:
        for *_, batch in batches:
            batch.release()


def _numpy_way(groups):
    """Check and launch, if all arrays are plain NumPy arrays that pass every check; else return False, having done nothing."""
    kernels = backends.load("numba-cpu")
    struct = kernels.numpy_struct
    work = []
    for h, step, columns, _, _ in groups:
        found = struct.table(columns)
        if found is None:
            return False
        table, dtype = found
        for one, rows in struct.by_dtype(table) if dtype is None else [(dtype, table)]:
            work.append((*hyperparameters.form_and_scalars(h, step, one, len(columns) == 5), rows))
    if len(groups) > 1 and not struct.disjoint(np.concatenate([rows for *_, rows in work])):
        return False
    for form, scalars, rows in work:
        kernels.launch_table(form, rows, scalars)
    return True


def _checked(groups, backend):
    """Return (number of the group, dtype, batch) of every launch, or raise what is wrong with an array."""
    batches, written, read = [], [], []
    for k, group in enumerate(groups):
        together: dict[tuple, list] = {}
        for n, given in enumerate(zip(*group.columns, strict=True)):
            named = _named(given, None if group.names is None else group.names[n])
            for label, array in named:
                checks.given(label, array)
            kernels, views = backends.choose(named, backend)
            checks.update(views)
            param, grad, *state = views
            written += [param, *state]
            read.append(grad)
            together.setdefault((kernels, param.device, param.dtype), []).append([*views, None][:5])
        for (kernels, _, dtype), updates in together.items():
            batches += [(k, dtype, batch) for batch in kernels.batches(updates)]
    checks.overlap(written, read)
    return batches


class Memo:
    """What the checks found out of a step's arrays on a GPU, for as long as they stay what and where they were.

    At each step what can have changed is read again and compared. It keeps no gradient alive, only the parameters and moments,
    as their optimizer does.
    """

    def __init__(self):
        self._key, self._batches = None, []

    def batches(self, groups, backend):
        """Return the batches of the last step if its arrays were the same in all that matters, or None."""
        if self._key is None:
            return None
        forced, known = self._key
        found = _description(groups, backend)
        if found is None or forced != found[0] or len(known) != len(found[1]):
            return None
        return self._batches if all(map(arrays.Description.same, known, found[1])) else None

    def keep(self, groups, backend, batches):
        """Take over the batches of a step."""
        for *_, batch in self._batches:
            batch.release()
        self._key = _description(groups, backend) if batches and all(batch.lasts for *_, batch in batches) else None
        self._batches = batches if self._key is not None else []
        if self._key is None:
            for *_, batch in batches:
                batch.release()

    def __reduce__(self):  # a copy of an optimizer finds out anew
        return (Memo, ())


def _description(groups, backend):
    described = [arrays.description(group.columns) for group in groups]
    return None if any(one is None for one in described) else (backends.forced(backend), described)


def _named(given, name):
    """Return what errors call the arrays of an update, and the arrays."""
    labels: tuple[str, ...] = ("param", "grad", "m", "v", "max_v")
    if name is not None:
        param = f"params[{name!r}]"
        labels = (param, f"the gradient of {param}", *(f"{moment} of {param}" for moment in labels[2:]))
    return list(zip(labels, given, strict=False))
