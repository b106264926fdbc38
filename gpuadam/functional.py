"""From call to launch: check, choose the backend, compute the scalars, launch."""

from typing import Any, NamedTuple

import numpy as np

from . import arrays, backends, checks, hyperparameters
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
    update([Updates(h, checks.step_number(step), given, [None], max_v is not None)], backend, stream)


class Updates(NamedTuple):
    """Arrays that take the same step."""

    h: hyperparameters.Hyperparameters
    step: int
    arrays: list[Any]  # param, grad, m, v and, with amsgrad, max_v of one update after the other
    names: list[str | None]  # of each param; None for the one that adam_step was given
    amsgrad: bool
    now: Any = None  # a capturable.Now, if the step count is on the device

    @property
    def width(self):
        return 5 if self.amsgrad else 4


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
    work, advanced = [], set()
    for k, kernels, dtype, batch in batches:
        h, step, _, _, amsgrad, now = groups[k]
        if kernels.NAME == "numba-cpu" and stream is not None:
            raise TypeError("stream is for arrays on a GPU; these are on the CPU, which has no streams")
        capturing = batch.check(stream, now is not None)
        if now is None:
            form, scalars = hyperparameters.form_and_scalars(h, step, dtype, amsgrad)
            work.append((batch, form, scalars, None))
        else:
            if capturing:
                now.check_capture(h)
            work.append((batch, *now.form_and_launch(h, dtype, amsgrad, k not in advanced)))
            advanced.add(k)
    for batch, form, scalars, launch_scalars in work:
        if launch_scalars is not None:
            target, _ = batch.streams(stream)
            launch_scalars(target)
        batch.launch(form, scalars, adam, stream)
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
    for h, step, given, _, amsgrad, _ in groups:
        found = struct.table(given, 5 if amsgrad else 4)
        if found is None:
            return False
        table, dtype = found
        for one, rows in struct.by_dtype(table) if dtype is None else [(dtype, table)]:
            work.append((*hyperparameters.form_and_scalars(h, step, one, amsgrad), rows))
    if len(groups) > 1 and not struct.disjoint(np.concatenate([rows for *_, rows in work])):
        return False
    for form, scalars, rows in work:
        kernels.launch_table(form, rows, scalars)
    return True


def _checked(groups, backend):
    """Return (number of the group, kernels, dtype, batch) of every launch, or raise what is wrong with an array."""
    batches, written, read = [], [], []
    for k, group in enumerate(groups):
        together: dict[tuple, list] = {}
        for n, name in enumerate(group.names):
            named = _named(group.arrays[n * group.width : (n + 1) * group.width], name)
            for label, array in named:
                checks.given(label, array)
            kernels, views = backends.choose(named, backend)
            checks.update(views)
            param, grad, *state = views
            written += [param, *state]
            read.append(grad)
            together.setdefault((kernels, param.device, param.dtype), []).append([*views, None][:5])
        for (kernels, _, dtype), updates in together.items():
            batches += [(k, kernels, dtype, batch) for batch in kernels.batches(updates)]
    checks.overlap(written, read)
    return batches


class Memo:
    """What the checks found out of a step's arrays on a GPU, for as long as they stay what and where they were.

    At each step the type, address, shape, strides and dtype of every array are read again and compared. No array is kept alive.
    """

    def __init__(self):
        self._key, self._batches = None, []

    def batches(self, groups, backend):
        """Return the batches of the last step if its arrays were the same in all that matters, or None."""
        return self._batches if self._key is not None and self._key == _description(groups, backend) else None

    def keep(self, groups, backend, batches):
        for *_, batch in self._batches:
            batch.release()
        lasts = batches and all(batch.lasts for *_, batch in batches)
        self._key = _description(groups, backend) if lasts else None
        self._batches = batches if self._key is not None else []
        if self._key is None:
            for *_, batch in batches:
                batch.release()

    def __reduce__(self):  # a copy of an optimizer finds out anew
        return (Memo, ())


def _description(groups, backend):
    described = []
    for group in groups:
        found = arrays.description(group.arrays)
        if found is None:
            return None
        described.append((group.amsgrad, found))
    return backends.forced(backend), described


def _named(given, name):
    """Return what errors call the arrays of an update, and the arrays."""
    labels: tuple[str, ...] = ("param", "grad", "m", "v", "max_v")
    if name is not None:
        param = f"params[{name!r}]"
        labels = (param, f"the gradient of {param}", *(f"{moment} of {param}" for moment in labels[2:]))
    return list(zip(labels, given, strict=False))
