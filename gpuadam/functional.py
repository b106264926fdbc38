"""`adam_step`: one update of one parameter's arrays."""

from __future__ import annotations

import inspect
from typing import Literal

import numpy as np

from . import checks, hyperparameters
from .repeated_on_cpu import RepeatedCall
from .repeated_on_gpu import CallsOnGpu
from .step_arrays import bounds_apart
from .typing import Algorithm, Array, ArrayBounds, Betas, Complex, Components, Formula, Integer, Number, Stream
from .update import OPERANDS, Updates, update

_REPEATED, _ON_GPU = RepeatedCall(), CallsOnGpu()


def adam_step(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    step: Integer,
    *,
    lr: Number = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decoupled: bool = False,
    max_v: Array | None = None,
    maximize: bool = False,
    grad_scale: Number = 1.0,
    clip_value: Number | None = None,
    bounds: ArrayBounds | None = None,
    algorithm: Algorithm = "adam",
    formula: Formula = "torch",
    eps_root: Number = 0.0,
    remainder: Array | None = None,
    param_copy: Array | None = None,
    ema: Array | None = None,
    ema_decay: Number = 0.999,
    change: Array | None = None,
    lr_scale: Array | None = None,
    where: Array | Literal["nonzero"] | None = None,
    complex: Complex | None = None,
    components: Components = 1,
    m_scale: Array | None = None,
    v_scale: Array | None = None,
    zero_grad: bool = False,
    stochastic_rounding: bool = False,
    seed: Integer = 0,
    backend: str | None = None,
    stream: Stream | None = None,
) -> None:
    """Apply one Adam update in place, in one pass over memory.   (Kingma & Ba 2015, Algorithm 1, arXiv:1412.6980)

    param, grad, m, v, max_v: arrays of one shape on one device: NumPy, CuPy, Numba device arrays, or anything with DLPack or
        `__cuda_array_interface__`. param, m, v and max_v are overwritten; grad is only read.
        m and v are the running means of the gradient and of its square (PyTorch's exp_avg and exp_avg_sq, optax's mu and nu);
        start both at zero. max_v, if given, makes it AMSGrad: the running maximum of v, from zero.
        Any strides do, but arrays that share one order of memory without gaps are the fast case. A gradient may be broadcast.
        8-bit state needs all arrays C-contiguous.
        param and grad are float32, float64, bfloat16 or float16, each as it likes; m, v and max_v are of one dtype, float32,
        float64 or bfloat16. bfloat16 arrays are those of ml_dtypes, or integers in `Bits`. It is computed in float64 if one of
        the arrays is float64, else in float32. bfloat16 moments are rounded randomly: rounding to nearest would lose most of
        their changes.
    step: number of this update, counted from 1.
    lr, betas, eps: as in the paper; eps is added to sqrt(v / (1 - beta2**step)).
    weight_decay: weight_decay * param is added to the gradient (L2) or, if decoupled, lr * weight_decay * param subtracted from
        param (AdamW).
    maximize: go up the gradient. grad_scale: the gradient is multiplied by it first (1 / loss scale, or a clipping factor).
    clip_value: every element of the gradient is clipped to -clip_value ... clip_value, after grad_scale and before weight_decay.
    bounds: (low, high), between which the step leaves every element of param: the update is made, and then min(max(param, low),
        high). Either may be None, a number, which is rounded to param's dtype, or an array of param's shape and dtype, in which
        NaN is no bound. A param that is NaN stays.
    algorithm: "adam"; or "nadam" (Dozat 2016), "radam" (Liu et al. 2020) or "adamax" (Kingma & Ba 2015, Algorithm 2: v is then
        the decayed maximum of |gradient|), each as in torch.
    formula: where Adam's eps goes. With m and v corrected for their bias, "torch" and "apex": m / (sqrt(v) + eps), which are
        one formula here; "optax": m / (sqrt(v + eps_root) + eps), with AMSGrad's maximum of the corrected v; "eps-hat", of
        TensorFlow, chainer and thinc: m / (sqrt(v) + eps / sqrt(1 - beta2**step)), so eps counts for more in the first steps.
        Of NAdam "optax" is optax.nadam's: beta1 / (1 - beta1**(step + 1)) of the m before correction and (1 - beta1) /
        (1 - beta1**step) of the gradient are added, and there is no eps_root.
    remainder: an int16 array: with it a bfloat16 param is an exact float32 in two parts. Start it at zero, or split a float32 x
        into param, the bits of x plus 0x8000 shifted right by 16, and remainder, the low 16 bits of x.
    param_copy: an array of any of the dtypes that is overwritten with the new param, rounded to nearest even.
    ema: a float32 or float64 array, the running mean of param: ema += (1 - ema_decay) * (param - ema).
    change: an array of any of the dtypes that is overwritten with what the step would add to param, rounded to nearest even. m
        and v are updated, and param is only read. It goes with neither remainder, param_copy nor ema.
    lr_scale: a float32 or float64 array by which lr is multiplied, element by element, for decoupled decay too. It may have the
        leading dimensions of param alone, and so a number for each row, which takes some more time, but not with 8-bit state. Its
        numbers are not checked.
    where: a bool or uint8 array: elements of param and moments stay as they are where it is 0, or with "nonzero" where grad is 0.
        ema, a mean over steps, goes on there too. An array may be of rows, as lr_scale. It does not go with 8-bit state.
    complex: what complex64 and complex128 params are taken for. grad is dL/dRe + i dL/dIm, as in torch; conjugate that of JAX.
        "joint": v is the mean of |grad|**2, a real array of param's shape, so that the step turns with the phase. "parts": real
        and imaginary parts are parameters of their own, and m and v are complex likewise. A complex m, v, max_v or ema may be a
        real array with a last dimension of 2 as well, as narrow ones have to be.
    components: 2, 3 or 4: the numbers in the last dimension of a real param, such as positions or directions, share a v, the mean
        of the sum of their squares (Ling et al. 2022, VectorAdam); v and max_v have param's shape without it, and so have
        lr_scale and where. The numbers are neighbours in memory. There is no 8-bit state with components, nor with "joint".
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
    settings = (
        betas, eps, weight_decay, decoupled, max_v, maximize, clip_value, bounds, algorithm, formula, eps_root,
        remainder, param_copy, ema, ema_decay, change, lr_scale, where, complex, components, m_scale, v_scale, zero_grad,
        stochastic_rounding, seed, backend, stream,
    )  # fmt: skip
    if type(grad_scale) is not float:
        grad_scale = checks.as_float(grad_scale)
    calls = _REPEATED if type(param) is np.ndarray else _ON_GPU
    if calls.does((param, grad, m, v), settings, step, lr, grad_scale, backend):
        return
    usual = algorithm is _ALGORITHM and formula is _FORMULA and eps_root is _EPS_ROOT and ema_decay is _EMA_DECAY
    formulas = hyperparameters.ADAM  # which takes less time than to look it up
    if not usual or zero_grad is not False or decoupled is not False:
        formulas = hyperparameters.formulas(algorithm, formula, eps_root, ema_decay, False, zero_grad, decoupled)
    low = high = None
    if bounds is not None:
        bounds, low, high = bounds_apart(bounds)
    h = hyperparameters.with_formulas(lr, betas, eps, weight_decay, maximize, grad_scale, formulas, clip_value, bounds)
    group = Updates(h, checks.step_number(step), [[param], [grad], [m], [v]])
    plain = max_v is remainder is param_copy is ema is change is lr_scale is where is low is high is None
    plain = plain and m_scale is v_scale is complex is None
    if not plain or stochastic_rounding is not False or seed is not _SEED or components is not _COMPONENTS:
        if isinstance(where, str):
            checks.nonzero(where)
            group.nonzero, where = True, None
        optional = {"max_v": max_v, "remainder": remainder, "param_copy": param_copy, "ema": ema, "change": change}
        optional |= {"lr_scale": lr_scale, "where": where, "low": low, "high": high}
        optional |= {"m_scale": m_scale, "v_scale": v_scale}
        optional = {name: array for name, array in optional.items() if array is not None}
        group.operands = OPERANDS + tuple(optional)
        group.columns += [[array] for array in optional.values()]
        group.stochastic = checks.flag("stochastic_rounding", stochastic_rounding)
        group.seed = checks.seed(seed)
        group.complex, group.components = checks.complex_parts(complex), checks.components(components)
        checks.combination(algorithm, optional, group.stochastic)
    remembered = calls if calls is _ON_GPU and calls.takes(param) else None
    update([group], backend, stream, remembered)
    if stream is None and (remembered or calls is _REPEATED):
        calls.note(group, settings)


_PARAMETERS = inspect.signature(adam_step).parameters
# The defaults, known by identity: what is only equal to them, as False to 0 or 1.0 to 1, is checked like all else
_ALGORITHM, _FORMULA, _EPS_ROOT, _EMA_DECAY, _SEED, _COMPONENTS = (
    _PARAMETERS[name].default for name in ("algorithm", "formula", "eps_root", "ema_decay", "seed", "components")
)
