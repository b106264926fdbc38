"""One update of one array: check, compute the scalars, choose the backend, launch."""

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
    step = checks.step_number(step)
    arrays = (param, grad, m, v) if max_v is None else (param, grad, m, v, max_v)
    if checks.plain(arrays) and backends.takes_numpy(backend):
        kernels = backends.load("numba-cpu")
        form, scalars = hyperparameters.form_and_scalars(h, step, param.dtype, max_v is not None)
        flat = arrays if param.ndim == 1 else [a.reshape(-1) for a in arrays]
        kernels.launch_flat(form, flat if max_v is not None else (*flat, flat[3]), scalars)
        return
    names = ("param", "grad", "m", "v", "max_v")
    for name, array in zip(names, arrays, strict=False):
        checks.given(name, array)
    kernels, views = backends.choose(list(zip(names, (param, grad, m, v, max_v), strict=True)), backend)
    checks.update(views)
    checks.overlap([view for view in (views[0], *views[2:]) if view is not None], [views[1]])
    form, scalars = hyperparameters.form_and_scalars(h, step, views[0].dtype, max_v is not None)
    kernels.launch(form, views, scalars)
