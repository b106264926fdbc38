"""One update of one array: check, compute the scalars, choose the backend, launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import backends, checks, hyperparameters


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

    On a GPU the update is enqueued on the current stream, and the call returns before it is done.

    Raises ValueError (shapes, devices, read-only or overlapping arrays, hyperparameters out of range), TypeError (dtypes, not
    an array, arrays of different libraries) or BackendUnavailableError, each before anything is written.

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
    plan((param, grad, m, v, max_v), h, checks.step_number(step), backend).launch()


class Plan(NamedTuple):
    """An update that was checked and only has to be launched."""

    launch: Callable[[], None]
    views: Callable[[], list[Any]]  # of param, grad, m, v and max_v or None


def plan(given, h, step, backend, label=""):
    """Check an update and return its Plan. given: param, grad, m, v, max_v or None; label: what an error calls the param."""
    param, grad, m, v, max_v = given
    amsgrad = max_v is not None
    if checks.plain(given if amsgrad else given[:4]) and backends.takes_numpy(backend):
        # the short way for NumPy arrays: the same checks, the same kernel, and nothing in between
        kernels = backends.load("numba-cpu")
        form, scalars = hyperparameters.form_and_scalars(h, step, param.dtype, amsgrad)
        flat = (param, grad, m, v, max_v if amsgrad else v)
        if param.ndim != 1:
            flat = tuple(a.reshape(-1) for a in flat)
        return Plan(
            lambda: kernels.launch_flat(form, flat, scalars),
            lambda: [None if a is None else kernels.view(name, a) for name, a in _named(given, label)],
        )
    named = _named(given, label)
    for name, array in named[:4]:
        checks.given(name, array)
    kernels, views = backends.choose(named, backend)
    checks.update(views)
    checks.overlap(*written_and_read(views))
    form, scalars = hyperparameters.form_and_scalars(h, step, views[0].dtype, amsgrad)
    return Plan(lambda: kernels.launch(form, views, scalars), lambda: views)


def written_and_read(views):
    """Return the views of what an update writes, and of what it only reads."""
    return [view for view in (views[0], *views[2:]) if view is not None], [views[1]]


def _named(given, label):
    names = ("param", "grad", "m", "v", "max_v")
    if label:
        names = (label, f"the gradient of {label}", *(f"{moment} of {label}" for moment in names[2:]))
    return list(zip(names, given, strict=True))
