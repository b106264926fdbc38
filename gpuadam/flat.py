"""Many parameters in one buffer: one array to the optimizer, the old arrays to everyone else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import backends, checks
from .groups import MAPPING, ONE, SEQUENCE, as_given
from .kernels.layout import VECTOR_BYTES
from .kernels.messages import shown
from .typing import Array


class Flat(NamedTuple):
    """Two buffers that `flatten` made. `params` and `grads` are views of them, in the shapes and structure of the arrays."""

    param: Any  # 1-D: every array after the other
    grad: Any  # 1-D: zeros
    params: Any
    grads: Any

    def __copy__(self):
        return self

    def __reduce__(self):
        raise TypeError(
            "what flatten returned is not copied or pickled, because the views of a copy would be views of no buffer: copy the "
            "arrays, and flatten the copies"
        )


def flatten(arrays: Array | Sequence[Array] | Mapping[str, Array], backend: str | None = None) -> Flat:
    """Copy arrays into one buffer, and return it with views of it in their shapes and, likewise, a buffer of zeros for gradients.

    arrays: one array, a sequence or a dict name -> array: of one dtype, on one device; NumPy, CuPy or Numba device arrays.
    backend: as in `adam_step`; by default the arrays decide.

    The buffer is C-contiguous. Each array starts at a multiple of 16 bytes; the elements between are 0, and stay 0 under an
    optimizer while their gradients are 0. An optimizer over `param` has one array, whatever the number of views, and its step
    one launch and no table. From then on use the views: the arrays that were given are copied and left as they are.
    Write into the views, `flat.grads["w"][...] = x`; another array in the place of one raises TypeError, and so do one more and
    one less, and a deep copy and a pickle of what is returned.

    Raises ValueError for no arrays or more than one device, TypeError for more than one dtype or library.

    >>> import numpy as np, gpuadam
    >>> flat = gpuadam.flatten({"w": np.ones((2, 3), "float32"), "b": np.zeros(2, "float32")})
    >>> opt = gpuadam.Adam(flat.param, lr=0.1)
    >>> flat.grads["w"][0] = 5.0
    >>> opt.step(flat.grad)
    >>> print(flat.params["w"])
    [[0.9 0.9 0.9]
     [1.  1.  1. ]]
    """
    labelled: list[tuple[str, Any]]
    if isinstance(arrays, Mapping):
        kind, labelled = MAPPING, [(f"arrays[{shown(name)}]", array) for name, array in arrays.items()]
    elif isinstance(arrays, (list, tuple)):
        kind, labelled = SEQUENCE, [(f"arrays[{k}]", array) for k, array in enumerate(arrays)]
    else:
        kind, labelled = ONE, [("arrays", arrays)]
    if not labelled:
        raise ValueError("there are no arrays to flatten")
    kernels, views = backends.choose([(label, checks.given(label, array)) for label, array in labelled], backend)
    first = views[0]
    for view in views:
        checks.one_format(view, checks.FORMATS)
        checks.layout(view)
        if (view.dtype, view.of_complex) != (first.dtype, first.of_complex):
            dtypes = (
                f"{view.name} has dtype {view.of_complex or view.dtype}, {first.name} has {first.of_complex or first.dtype}"
            )
            raise TypeError(f"{dtypes}: flatten each dtype by itself")
    devices = {view.device: view.name for view in views if view.size}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(devices.values())} are on devices {sorted(devices)}: flatten each device by itself")

    dtype, shapes = np.dtype(first.of_complex or first.dtype), [view.shape for view in views]
    if first.of_complex:  # whose views are of both parts
        shapes = [shape[:-1] for shape in shapes]
    sizes, lanes = list(map(math.prod, shapes)), VECTOR_BYTES // dtype.itemsize
    *starts, size = itertools.accumulate((-(-n // lanes) * lanes for n in sizes), initial=0)
    param, grad = kernels.zeros_in_one([size] * 2, dtype, next(iter(devices), 0), ("param", "grad"))
    params, grads = (
        [buffer[start : start + n].reshape(shape) for start, n, shape in zip(starts, sizes, shapes, strict=True)]
        for buffer in (param, grad)
    )
    for place, view in zip(params, views, strict=True):
        _, (target,) = backends.choose([(view.name, place)], kernels.name)
        checks.same_layout(target, view, kernels.copies_any_layout)
        kernels.copy(target, view)
    return Flat(param, grad, *(_fixed(as_given(kind, arrays, of_buffer)) for of_buffer in (params, grads)))


def _refuse(views, *args, **kwargs):
    raise TypeError(
        "the views of a buffer stay those that flatten made, in their order: write into them, or make a collection of your own, "
        "list(views) or dict(views)"
    )


class Views(dict):
    """Views of a buffer by name. Another array in the place of one would be none of the buffer, so it is refused."""

    __delitem__ = clear = pop = popitem = setdefault = _refuse

    def __setitem__(self, name, array):
        if name not in self:
            _refuse(self)
        _check_same(self[name], name, array)

    def update(self, *args, **kwargs):
        for name, array in dict(*args, **kwargs).items():
            self[name] = array

    def __ior__(self, arrays):  # type: ignore[misc]  # narrower than dict.__or__: a mapping alone
        self.update(arrays)
        return self

    def __reduce__(self):
        return (dict, (dict(self),))


class ListedViews(list):
    """Views of a buffer in order, likewise."""

    __delitem__ = __iadd__ = __imul__ = append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __setitem__(self, number, array):
        _check_same(self[number], number, array)

    def __reduce__(self):
        return (list, (list(self),))


def _check_same(view, key, array):
    if array is not view:  # `views[key] += x` gives back the view itself
        raise TypeError(
            f"[{shown(key)}] is a view of a buffer, which is what a step takes: write into it, [{shown(key)}][...] = x"
        )


def _fixed(views):
    """Return views in a dict or a list that lets none be replaced."""
    if isinstance(views, dict):
        return Views(views)
    return ListedViews(views) if isinstance(views, list) else views
