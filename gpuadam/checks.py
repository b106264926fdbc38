"""Every error about an array or a hyperparameter, raised before a byte is written."""

import math
import operator
import os
from collections.abc import Iterator, Mapping, Set
from numbers import Integral, Real

import numpy as np

from .kernels.layout import bounds, in_rows_apart
from .kernels.messages import shortened, shown, warn
from .kernels.operands import GROUP, KINDS, STATE, is_written, sharing
from .kernels.view import View


def is_number(value, kind=Real):
    """Whether a value is a real number, or of a kind of them. NumPy registers its durations as integers, and they are none.

    >>> is_number(np.float32(1)), is_number(2, Integral), is_number(True), is_number(np.timedelta64(1, "s"))
    (True, True, False, False)
    """
    return isinstance(value, kind) and not isinstance(value, (bool, np.timedelta64))


def real(name, value):
    """Return a hyperparameter as a Python float."""
    if type(value) is float:
        return value
    if not is_number(value):
        is_array = name == "lr" and getattr(value, "shape", ())
        rates = ": lr_scale= of a step takes an array, by which lr is multiplied" if is_array else ""
        raise TypeError(f"{name} must be a real number, not {shown(value)} ({type(value).__name__}){rates}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def as_float(value):
    """Return a number that a float holds exactly as one, and anything else as it is.

    >>> as_float(2), as_float(np.float64(0.5)), as_float("2")
    (2.0, 0.5, '2')
    """
    if type(value) is np.float64 or (type(value) is int and abs(value) < 1 << 53):
        return float(value)
    return value


def scheduled(schedule, step):
    """Return the learning rate of a step: the number that a schedule returns, or that in an array of no dimensions, as JAX's."""
    value = schedule(step)
    if getattr(value, "shape", None) == () and hasattr(value, "item") and not isinstance(value, np.timedelta64):
        value = value.item()
    try:
        return real("lr", value)
    except TypeError as error:
        raise TypeError(f"{error}: the function that was given as lr returned it for step {step}") from None


def non_negative(name, value):
    if type(value) is not float:
        value = real(name, value)
    if not (0.0 <= value < math.inf):
        raise ValueError(f"{name}={value} must be finite and not negative")
    return value + 0.0  # -0.0 becomes 0.0: they are equal, and must not give different bits


def clip_value(value):
    """Return the size to which elements of gradients are clipped: infinity for None."""
    if value is None:
        return math.inf
    if not finite("clip_value", value) > 0.0:
        raise ValueError(f"clip_value={shown(value)} must be positive, or None for no clipping")
    return float(value)


def bounds_of_param(value):
    """Return (low, high): of bounds, None or a pair of numbers, either of which may be None."""
    if value is None:
        return -math.inf, math.inf
    if isinstance(value, Mapping):  # which would be unpacked into its names
        raise ValueError(
            f"bounds must be a pair, (low, high), not {shown(value)}. Bounds of arrays by name are a dict each, or None: "
            "({'x': low_of_x}, {'x': high_of_x})"
        )
    try:
        low, high = pair(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"bounds must be two numbers, (low, high), either of which may be None, not {shown(value)}"
        ) from None
    ends = [real("a number of bounds", x) + 0.0 for x in (low, high) if x is not None]
    low, high = -math.inf if low is None else ends[0], math.inf if high is None else ends[-1]
    if not low <= high or not all(map(math.isfinite, ends)):
        raise ValueError(f"bounds={shown(value)} must be two numbers, the first not above the second; None is for no bound")
    return low, high


def max_norm(value):
    """Return the norm to which gradients are clipped as a float; it may be infinite, which clips nothing. None stays."""
    if value is None:
        return None
    value = real("max_norm", value)
    if not value >= 0.0:
        raise ValueError(f"max_norm={value} must not be negative; infinity, or None, is for no clipping")
    return value + 0.0


def finite(name, value):
    value = real(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value + 0.0


def norm(value):
    """Return the norm of gradients as a float; it may be infinite or NaN."""
    value = real("norm", value)
    if value < 0.0:
        raise ValueError(f"norm={value} must not be negative")
    return value


def found_inf(value):
    """Return whether a flag of the host, None, a number or an array of one, says that a gradient is not finite."""
    if value is None:
        return False
    if not isinstance(value, (bool, np.bool_)) and not is_number(value):
        raise TypeError(f"found_inf must be True, False, a number or an array of one, not {shown(value)}")
    return bool(value)


def betas(value):
    """Return (beta1, beta2), each in [0, 1)."""
    try:
        beta1, beta2 = pair(value)
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers, (beta1, beta2), not {shown(value)}") from None
    return beta("beta1", beta1), beta("beta2", beta2)


def pair(value):
    """Return a pair of numbers that can be read again and again, in an order. Raises TypeError for what cannot."""
    if isinstance(value, (Set, Mapping, Iterator)):  # of a dict only the keys would be taken
        raise TypeError
    return value


def beta(name, value):
    value = real(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value} must be in [0, 1)")
    return value


def integer(name, value):
    """Return an integer as a Python int, which never wraps. name: what errors call it, and what it is."""
    if type(value) is int:
        return value
    if not is_number(value, Integral):
        raise TypeError(f"{name} must be an integer, not {shown(value)} ({type(value).__name__})")
    return int(value)


def step_number(step):
    step = integer("step, counted from 1,", step)
    if step < 1:
        raise ValueError(f"step={shown(step)} must be at least 1: the first update is step 1")
    return step


def count(name, value):
    """Return a number of steps taken as a Python int."""
    value = integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, and is {shown(value)}")
    if value >= 1 << 63:  # one of thousands of digits could be written into no file
        raise ValueError(f"{name} must be less than 2**63, as an int64 is, and is a number of {value.bit_length():,} bits")
    return value


def one_of(choices, name, value):
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}")
    return value


def nonzero(where):
    """Refuse a string for `where` that is not the one it may be."""
    if where != "nonzero":
        raise ValueError(f"where={shown(where)} must be an array of flags, or 'nonzero': elements whose gradient is not 0")


def flag(name, value):
    if type(value) is not bool and not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def path(name, value):
    """Return the path of a file or a folder as a string."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{name} must be a string or an os.PathLike, such as pathlib.Path, not {shown(value)}")
    return os.fsdecode(value)


def seed(value):
    """Return a seed for random rounding as an int of 64 bits."""
    return integer("seed", value) % 2**64


NAMES = {"adam": "Adam", "nadam": "NAdam", "radam": "RAdam", "adamax": "AdaMax"}  # of algorithms, for messages


def combination(algorithm, operands, stochastic):
    """Refuse options that contradict each other. operands: the names of those that are given."""
    if "m_scale" in operands and algorithm == "adamax":
        raise ValueError(
            "8-bit state stores the root of v, a mean of squares, and AdaMax's v is a maximum: use float32 or bfloat16 state"
        )
    if "m_scale" in operands and "max_v" in operands:
        raise ValueError(
            "8-bit state has no max_v, which AMSGrad keeps: leave amsgrad out, or use float32 or bfloat16 state"
        )
    if "max_v" in operands and algorithm != "adam":
        raise ValueError(
            f"AMSGrad is a variant of Adam, and {NAMES[algorithm]} has none: leave amsgrad, or max_v in adam_step, out"
        )
    if "remainder" in operands and stochastic:
        raise ValueError("with a remainder nothing of param is rounded away: leave stochastic_rounding out")


def without_effect(formats, master=None, stochastic_rounding=False):
    """Return which options do nothing for parameters of some formats, and what they need, in words."""
    for_narrow = {
        "master='remainder'": (master == "remainder", {"bfloat16"}),
        "master='float32'": (master == "float32", {"bfloat16", "float16"}),
        "stochastic_rounding=True": (stochastic_rounding is True, {"bfloat16", "float16"}),
    }
    return {
        option: " or ".join(sorted(needed))
        for option, (on, needed) in for_narrow.items()
        if on and not needed & set(formats)
    }


def warn_of_no_effect(formats, **options):
    """Warn of options that do nothing. The rest: as in `without_effect`."""
    for option, needed in without_effect(formats, **options).items():
        warn(
            f"{option} does nothing here: no parameter is {needed}; they are {', '.join(sorted(set(formats)))}. Leave it out"
        )


def formula(fixed):
    """Refuse a formula that an algorithm does not have, and an eps_root without its formula. fixed: hyperparameters."""
    name = NAMES[fixed.algorithm]
    if fixed.algorithm == "nadam" and fixed.formula not in ("torch", "optax"):
        raise ValueError(f"formula={fixed.formula!r} is one of Adam's; {name} has 'torch' and 'optax': use one of these")
    if fixed.algorithm not in ("adam", "nadam") and fixed.formula != "torch":
        raise ValueError(f"formula={fixed.formula!r} is one of Adam's; {name} has its own: leave it out")
    if fixed.eps_root and fixed.algorithm == "nadam":
        raise ValueError(f"eps_root={fixed.eps_root} belongs to Adam's formula='optax'; {name} has none: leave it out")
    if fixed.eps_root and fixed.formula != "optax":
        raise ValueError(f"eps_root={fixed.eps_root} belongs to formula='optax', not to {fixed.formula!r}")


def bias_correction(group):
    """Refuse a group of another library's Adam that leaves the bias correction out, as those of Apex and transformers can."""
    for key in ("bias_correction", "correct_bias"):
        if not group.get(key, True):
            raise ValueError(f"{key}=False in a saved group: moments are always corrected here, and steps would differ")


def given(name, array):
    if array is None:
        raise TypeError(f"{name} is None, not an array")
    return array


FORMATS = KINDS["param"].formats  # of parameters and gradients
OF_ROWS = ("lr_scale", "where")  # operands that may have a number for each row
FLAGS_OF_INDICES = "w = np.zeros(shape, bool), then w[x] = True, has them for indices or a slice x"


def complex_parts(value):
    """Return what complex parameters are taken for: None, "joint" or "parts"."""
    return value if value is None else one_of(("joint", "parts"), "complex", value)


def components(value):
    """Return how many numbers share a v, an int."""
    if not is_number(value, Integral) or value not in (1, 2, 3, 4):
        raise ValueError(f"components={shown(value)} must be 1, 2, 3 or 4: how many neighbours share a v")
    return int(value)


def numbers(param, complex, components):
    """Return how many numbers of a parameter make an element, which has one v. The rest: `update.Updates`' own."""
    if param.of_complex and complex is None:
        raise TypeError(
            f"{param.name} has dtype {param.of_complex}, for which there are two Adams. Say which: complex='joint' has one v for "
            "each number, the mean of |gradient|**2, so that the step turns with the phase (optax, tike); complex='parts' has "
            "one for the real and one for the imaginary part (torch)"
        )
    if components > 1 and not param.of_complex:
        if not param.shape or param.shape[-1] != components:
            raise ValueError(
                f"{param.name} has shape {param.shape}; with components={components} its last dimension is of {components}: the "
                "numbers that share a v. Put parameters of other shapes into a group of their own"
            )
        neighbours(param, components)
    return sharing(param.of_complex, complex, components)


def neighbours(view, numbers):
    """Refuse an array in which the numbers of an element are apart."""
    if view.size and view.strides[-1] != view.dtype.itemsize:
        raise ValueError(
            f"{view.name} has strides {view.strides}; the {numbers} numbers that share a v must be neighbours in memory: pass a "
            "C-contiguous array"
        )


def ordered(param, numbers, h, views):
    """Refuse what needs an order of complex numbers. h: `hyperparameters.Fixed`."""
    if param.of_complex and numbers > 1 and (h.ordered or "low" in views or "high" in views):
        raise ValueError(
            f"{param.name} is complex, and bounds or clip_value would need an order of complex numbers: complex='parts' has it, "
            "for each part"
        )


def update(views, zero_grad=False, nonzero=False, numbers=1):
    """Check the arrays of one update. views: name of the operand -> View, in the order of `operands.operands_of`.

    nonzero: elements whose gradient is 0 stay. numbers: of an element.
    """
    for operand in OF_ROWS:
        if operand in views and views[operand].of_complex:
            name, dtype = views[operand].name, views[operand].of_complex
            raise TypeError(f"{name} has dtype {dtype}: it has real numbers, one for each complex number too")
    formats(views, nonzero, numbers)
    for operand, view in views.items():
        written, in_groups = is_written(operand, views, zero_grad), views["m"].format == "uint8"
        _operand(view, views["param"], operand, numbers, written, in_groups)


def beside(view, param, operand, written, numbers=1, in_groups=False, allowed=None):
    """Check an array beside a parameter, as an operand of updates that will come. written: whether these write it.

    numbers: of an element. in_groups: the parameter has 8-bit state. allowed: formats, if not all those of the operand.
    """
    _operand(view, param, operand, numbers, written, in_groups)  # first: of complex numbers beside real ones it says more
    one_format(view, allowed or KINDS[operand].formats, param if operand == "grad" else None)
    if operand in ("low", "high"):
        _format_of_bound(view, param)


def _format_of_bound(view, param):
    if view.format != param.format:
        raise TypeError(
            f"{view.name} has dtype {_name(view)}, {param.name} has {_name(param)}: bounds have the dtype of what they bound, so "
            "that no rounding leaves them"
        )


def order_of_bounds(label, low, high):
    """Refuse bounds in CPU memory that no number is between. low, high: an array, at least one of them; a number; or None."""
    if low is None or high is None:
        return
    low, high = np.broadcast_arrays(low, high)
    crossed = low > high  # false for a NaN, which is no bound
    if crossed.any():
        at = tuple(int(k) for k in np.argwhere(crossed)[0])
        raise ValueError(
            f"bounds of {label}: low is above high in {int(crossed.sum()):,} of {crossed.size:,} elements, as at {list(at)}: "
            f"{low[at]} and {high[at]}. Give the lower ends first, (low, high); NaN is for no bound"
        )


def _operand(view, param, operand, numbers, written, in_groups):
    """Check the shape, place and layout of an array of an update."""
    scales = (-(-param.size // GROUP),)
    if KINDS[operand].of_groups:
        if view.shape != scales:
            raise ValueError(
                f"{view.name} has shape {view.shape}; for {param.size} elements there are scales of shape {scales}, one for "
                f"each {GROUP} neighbours"
            )
    elif view.shape != (param.shape[:-1] if numbers > 1 and KINDS[operand].shared else param.shape):
        _other_shape(view, param, operand, numbers)
    elif numbers > 1 and not KINDS[operand].shared:
        neighbours(view, numbers)
    if view.device != param.device and param.size:
        raise ValueError(f"{view.name} is on device {view.device}, {param.name} on {param.device}: move one of them")
    layout(view, written)
    if written:
        writeable(view)
    if in_groups:
        _in_groups(view)


def _other_shape(view, param, operand, numbers):
    """Refuse an array whose shape is not the one that it must have beside a parameter."""
    has, param_has = (f"shape {x.shape[:-1] if x.of_complex else x.shape}" for x in (view, param))
    if view.of_complex or param.of_complex:
        has, param_has = f"dtype {_name(view)} and {has}", f"{_name(param)} and {param_has}"
    shape = param.shape[:-1] if param.of_complex else param.shape
    reshaped = f", as by .reshape({shape})" if view.shape and view.size == param.size else ""
    needed, of_rows = f"nothing is broadcast. Give an array of shape {shape}{reshaped}", operand in OF_ROWS
    both = of_rows or bool(view.of_complex) == bool(param.of_complex)
    if numbers > 1 and KINDS[operand].shared:
        needed = f"there is one {operand} for all {numbers} numbers of an element, so its shape is {param.shape[:-1]}"
        needed += ", or has its leading dimensions and so a number for each row" if of_rows else ""
        needed += ", and it is real" if param.of_complex and not of_rows else ""
        both = True
    elif not both:
        needed = "both are complex, or neither is"
        if operand == "grad":
            needed = "the gradient of a real parameter is real: give its real part, if that is what is meant"
            if param.of_complex:
                needed = (
                    "the gradient of a complex parameter is complex, dL/dRe + 1j * dL/dIm: "
                    f"grad.astype({shown(param.of_complex)}) if dL/dIm is 0"
                )
    elif of_rows:
        needed = "it must have that shape, or its leading dimensions and so a number for each row"
    raise (ValueError if both else TypeError)(f"{view.name} has {has}, {param.name} has {param_has}: {needed}")


def formats(views, nonzero=False, numbers=1):
    """Check the formats of the operands of one update. views: name of the operand -> View, or what has its name and format."""
    for operand, view in views.items():
        allowed = KINDS[operand].formats
        if view.format not in allowed and operand in STATE and "m_scale" not in views:  # 8-bit state is not what was meant
            allowed = tuple(format for format in allowed if format != "uint8")
        one_format(view, allowed, views["param"] if operand == "grad" else None)
    param, m = views["param"], views["m"]
    for operand in ("low", "high"):
        if operand in views:
            _format_of_bound(views[operand], param)
    for operand in ("v", "max_v"):
        if operand in views and views[operand].format != m.format:
            raise TypeError(f"{views[operand].name} has dtype {_name(views[operand])}, {m.name} has {_name(m)}: use one")
    if m.format == "uint8":
        if numbers > 1:
            of_8_bits(m.name)
        if not {"m_scale", "v_scale"} <= set(views):
            raise TypeError(f"{m.name} has dtype uint8, so it is 8-bit state, which needs m_scale and v_scale too")
        for view in views.values():
            _not_wide(view)
        if nonzero or "where" in views:
            raise TypeError(
                f"{m.name} has dtype uint8: where= cannot leave elements of 8-bit state as they are, which share scales"
            )
    elif "m_scale" in views or "v_scale" in views:
        raise TypeError(f"m_scale and v_scale belong to 8-bit state, and {m.name} has dtype {_name(m)}: it must be uint8")
    if "change" in views and (others := sorted({"remainder", "param_copy", "ema"} & set(views))):
        raise TypeError(
            f"{views['change'].name}: with change= param stays as it is, so there can be no {' and no '.join(others)}"
        )
    if "remainder" in views and param.format != "bfloat16":
        raise TypeError(f"{param.name} has dtype {_name(param)}: only a bfloat16 parameter has a remainder")


def of_8_bits(name):
    """Refuse 8-bit state where several numbers share a v."""
    raise TypeError(
        f"{name} would have 8 bits, and so would v, whose groups are of {GROUP} numbers: where several numbers share a v use "
        "state of 16 bits or more, or complex='parts'"
    )


def _not_wide(view):
    if view.format == "float64":
        raise TypeError(f"{view.name} has dtype float64, and 8-bit state is computed with in float32: use float64 state")


def eight_bits(param, numbers=1):
    """Check a parameter that is to have 8-bit state. numbers: of an element."""
    if numbers > 1:
        of_8_bits(f"m of {param.name}")
    _not_wide(param)
    _in_groups(param)


def _in_groups(view):
    """Refuse an array whose neighbours cannot be taken in groups."""
    is_aligned = not view.size or view.pointer % view.dtype.itemsize == 0
    if not view.contiguous and any(n > 1 and not stride for n, stride in zip(view.shape, view.strides, strict=True)):
        raise ValueError(
            f"{view.name} has one number for several elements, and the groups of 8-bit state need one for each: pass an array of "
            f"shape {view.shape}, as np.ascontiguousarray(np.broadcast_to(x, shape)) makes one"
        )
    if not view.contiguous or not is_aligned:
        wrong = f"aligned to its {view.dtype.itemsize}-byte elements" if view.contiguous else "C-contiguous"
        raise ValueError(f"{view.name} is not {wrong}, which the groups of 8-bit state need: pass a copy, or another state")


def one_format(view, allowed, param=None):
    """Refuse an array of another format. param: the View of the parameter beside which it is a gradient."""
    if view.format not in allowed or not view.dtype.isnative:
        is_long = view.dtype.kind == "f" and view.dtype.itemsize > 8
        wide = "float64" if is_long or (param is not None and param.format == "float64") else "float32"
        other = next(format for format in (view.format, wide, "float32", allowed[0]) if format in allowed)
        advice = cast(view, other)
        if view.format == "uint16" and "bfloat16" in allowed and len(allowed) > 1:
            advice += ", or gpuadam.Bits(x, 'bfloat16') if these are its bits"
        raise TypeError(
            f"{view.name} has dtype {_name(view)}; it must be {' or '.join(allowed)}, in native byte order: {advice}"
        )


def cast(view, other):
    """Return what makes an array of another format of a View's, in words. Objects, text and dates may be no numbers at all."""
    if not np.can_cast(view.dtype, "complex128", "same_kind"):
        return "give an array of numbers"
    if other == "bool":  # which indices become without a word
        return f"x != 0 has flags for numbers; {FLAGS_OF_INDICES}"
    if view.of_complex:
        other = "complex128" if other == "float64" else "complex64"
    return f"x = x.astype({other!r})"


def format_of_bits(name, given):
    if given.format not in ("bfloat16", "float16"):
        raise ValueError(f"{name} is Bits of {shown(given.format)}: they can be 'bfloat16' or 'float16'")
    return given.format


def bits(view, format):
    """Return a View of integers as one of what their bits stand for."""
    if view.dtype not in (np.dtype("uint16"), np.dtype("int16")):
        raise TypeError(f"{view.name} has dtype {shortened(str(view.dtype))}; Bits are of a uint16 or int16 array")
    return view._replace(bits=format)


def same_layout(own, loaded, any_layout):
    """Check that one array can be copied into another. any_layout: whether the backend's `copy` takes any strides."""
    if (own.shape, own.dtype) != (loaded.shape, loaded.dtype):
        theirs = f"{loaded.name} has shape {loaded.shape} and dtype {shortened(str(loaded.dtype))}"
        raise ValueError(f"{theirs}, the optimizer's {own.shape} and {own.dtype}")
    if own.device != loaded.device and own.size:
        raise ValueError(f"{loaded.name} is on device {loaded.device}, the optimizer's on {own.device}: move it")
    steps, loaded_steps = ([s for s, n in zip(view.strides, view.shape, strict=True) if n > 1] for view in (own, loaded))
    if not any_layout and steps != loaded_steps:
        raise ValueError(f"{loaded.name} has strides {loaded.strides}, the optimizer's {own.strides}: pass it in that order")
    writeable(own)


def writeable(view):
    """Refuse an array that must not be written."""
    if view.immutable:
        raise ValueError(f"{view.name}, which an update writes to, {view.immutable}")
    if not view.writeable:
        raise ValueError(f"{view.name} is read-only, and an update writes to it: pass a writeable array")


def param(view):
    """Check an array that is to be a parameter."""
    one_format(view, FORMATS)
    layout(view)
    writeable(view)


def no_gaps(view):
    """Refuse an array on a GPU that cannot be written from the host without writing between its elements too."""
    start, end = bounds(view)
    if view.device is not None and end - start != view.nbytes:
        raise ValueError(
            f"{view.name} has gaps between its elements, and cannot be loaded on a GPU: pass a contiguous array"
        )


def layout(view, written=True):
    """Refuse an array in CUDA memory that is off its elements' alignment, and one that is written whose elements share memory."""
    if view.contiguous and view.device is None:
        return
    itemsize = view.dtype.itemsize
    reach = itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(view.strides, view.shape, strict=True) if n > 1):
        if written and stride < reach and view.size:
            raise ValueError(
                f"{view.name} has shape {view.shape} and strides {view.strides}: elements share memory, or may (a broadcast "
                "or sliding view). Pass a copy"
            )
        reach += stride * (n - 1)
    if view.device is not None and (view.pointer % itemsize or any(s % itemsize for s in view.strides)):
        raise ValueError(f"{view.name} is not aligned to its {itemsize}-byte elements, which a GPU needs. Pass a copy")


def _name(view):
    dtype = view.dtype
    return (
        view.of_complex or view.format
        if dtype.isnative
        else f"{shortened(str(dtype.newbyteorder('=')))} in the other byte order ({dtype.str})"
    )


def given_once(views):
    """Refuse a parameter that is given twice, as the tied weights of a model are. views: of parameters."""
    first: dict[tuple, View] = {}
    for view in views:
        other = first.setdefault((view.pointer, view.shape, view.strides, view.format, view.device), view)
        if other is not view and view.size:
            raise ValueError(
                f"{other.name} and {view.name} are one array: give it once, under one name, and as its gradient the sum of the "
                "gradients of all its uses"
            )


def overlap(written, read):
    """Refuse arrays of which one is written and another shares memory with it. Two that are only read may."""
    extents = [(*bounds(view), True, view) for view in written]
    extents += [(*bounds(view), False, view) for view in read]
    extents = sorted((extent for extent in extents if extent[3].size), key=_start)
    run: list[tuple] = []  # extents that lie in one another
    end_of_run = 0
    for extent in extents:
        if extent[0] >= end_of_run:
            _overlap_in(run)
            run = []
        run.append(extent)
        end_of_run = max(end_of_run, extent[1])
    _overlap_in(run)


_start = operator.itemgetter(0)


def _overlap_in(extents):
    if len(extents) < 2 or not any(writes for _, _, writes, _ in extents) or in_rows_apart(extents):
        return
    for k, (start, _, writes, view) in enumerate(extents):
        for _, other_end, other_writes, other in extents[:k]:
            if start < other_end and (writes or other_writes) and _share_memory(view, other):
                raise ValueError(
                    f"{other.name} and {view.name} share memory, and an update writes to at least one of them: "
                    "pass arrays of their own, or a copy"
                )


class _Addresses:
    """NumPy's way to describe memory; it is not read, so it may as well be a GPU's."""

    def __init__(self, view):
        self.__array_interface__ = {
            "data": (view.pointer, True),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": view.dtype.str,
            "version": 3,
        }


def _share_memory(a, b):
    if a.device != b.device:
        return False
    try:
        return np.shares_memory(np.asarray(_Addresses(a)), np.asarray(_Addresses(b)), max_work=10**6)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True  # interleaved beyond telling: rather refused than wrong
