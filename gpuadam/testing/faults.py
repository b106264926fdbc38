"""Faults in gradients, as overflow and bad data make them: does a training loop survive?"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import backends, checks
from ..clipping import named_arrays
from ..groups import is_sequence
from ..kernels.messages import shortened, shown
from ..kernels.state_formats import encoded
from ..typing import ArrayTree, Integer
from .bits import FLOATS

HUGE: Literal["huge"] = "huge"


class Fault(NamedTuple):
    """What was written, and where."""

    name: str  # of the gradient: "grads['w']"
    place: tuple[int, ...]  # the element's index
    value: float


def inject(
    grads: ArrayTree,
    value: float | Literal["huge"] = math.nan,
    *,
    at: int | Sequence[Any] | Mapping[Any, Any] | None = None,
    count: Integer = 1,
    seed: Integer = 0,
) -> list[Fault]:
    """Write a fault into gradients, in place, and return the list of Faults.

    grads: one array, or a sequence or dict of arrays, as for `global_norm`: of any library, on a GPU or the CPU; None is skipped.
    value: NaN, an infinity, any number, or "huge": the largest finite number of each array's format. Its square overflows
        float32 in every format but float16.
    at: where. An index (an integer, or one for each dimension) for one array; for several a dict or sequence of indices, as the
        gradients are, of those that get the fault. By default `count` different elements of all gradients, chosen by `seed`: the
        same on every backend. An element of a complex array is a real or imaginary part: its index ends with 0 or 1.

    Raises IndexError for a place that is not there, ValueError if there are fewer than `count` elements or an array is
    read-only, TypeError for arrays that are not of float16, bfloat16, float32, float64, complex64 or complex128, each before
    anything is written.

    >>> grads = {"w": np.ones((2, 2), "float32"), "b": np.ones(1, "float32")}
    >>> inject(grads, math.inf, at={"w": (0, 1)})
    [Fault(name="grads['w']", place=(0, 1), value=inf)]
    >>> print(grads["w"])
    [[ 1. inf]
     [ 1.  1.]]
    """
    named = list(named_arrays("grads", grads))
    if not named:
        raise ValueError("there is no gradient to put a fault into: grads must have one array at least")
    labelled = [(shortened(name), array) for name, array in named]
    kernels, views = backends.choose(labelled, backends.home(*labelled[0]))
    for view in views:
        checks.one_format(view, checks.FORMATS)
        checks.writeable(view)
    views = [view._replace(name=name) for view, (name, _) in zip(views, named, strict=True)]
    places = _chosen_places(at, views) if at is not None else _random_places(count, seed, views)
    faults = [Fault(view.name, index, FLOATS[view.format].largest if value == HUGE else value) for view, index in places]
    elements = [_element(checks.real("value", fault.value), view) for fault, (view, _) in zip(faults, places, strict=True)]
    for (view, index), element in zip(places, elements, strict=True):
        _write(kernels, view, index, element)
    return faults


class Faults:
    """Faults in some steps of a training loop, at random, but the same for the same seed on every backend.

    probability: of a fault in a step. values: one of which is taken, as in `inject`. count: elements of it in a step.
    Attributes: `log`, the list of Faults of each call so far.

    >>> faults, grads = Faults(seed=1, probability=0.5), np.ones(4, "float32")
    >>> [bool(faults.inject(grads)) for step in range(6)]
    [False, False, True, False, False, False]
    """

    def __init__(
        self,
        seed: Integer = 0,
        *,
        probability: float = 0.1,
        values: Sequence[float | Literal["huge"]] = (math.nan, math.inf, -math.inf, HUGE),
        count: Integer = 1,
    ) -> None:
        probability = checks.real("probability", probability)
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability={probability} must be in [0, 1]")
        if not values:
            raise ValueError("values is empty: give one value at least")
        self.log: list[list[Fault]] = []
        self._random = np.random.default_rng(checks.seed(seed))
        self._probability, self._values, self._count = probability, tuple(values), count

    def inject(self, grads: ArrayTree) -> list[Fault]:
        """Write the faults of this step into its gradients, in place, and return them: an empty list if there are none."""
        # each step takes as many random numbers, whether or not it gets a fault, so that later steps have the same ones
        chance, which, seed = self._random.random(), self._random.integers(len(self._values)), self._random.integers(2**63)
        bad = chance < self._probability
        self.log.append(inject(grads, self._values[which], count=self._count, seed=int(seed)) if bad else [])
        return self.log[-1]


def _chosen_places(at, views):
    """Return (View, index) of the places that a caller names."""
    by_name = {view.name: view for view in views}
    indices = {"grads": at}
    if "grads" not in by_name:
        if not isinstance(at, Mapping) and not is_sequence(at):
            raise TypeError(
                f"at={shown(at)} must be a dict or sequence of indices, one for each gradient that gets the fault"
            )
        keys = at.items() if isinstance(at, Mapping) else enumerate(at)
        indices = {f"grads[{key!r}]": index for key, index in keys if index is not None}
    if strange := [name for name in indices if name not in by_name]:
        named, there = (shortened(", ".join(names), 1000) for names in (strange, by_name))
        raise IndexError(f"at names {named}, and there are only {there}")
    return [(by_name[name], _index(index, by_name[name])) for name, index in indices.items()]


def _index(index, view):
    index = tuple(map(operator.index, index if is_sequence(index) else (index,)))
    if len(index) != len(view.shape) or not all(-n <= i < n for i, n in zip(index, view.shape, strict=True)):
        raise IndexError(f"at={shown(index)} is not an element of {shortened(view.name)}, which has shape {view.shape}")
    return tuple(i % n for i, n in zip(index, view.shape, strict=True))


def _random_places(count, seed, views):
    """Return (View, index) of different elements, counted through all arrays."""
    ends = np.cumsum([view.size for view in views])
    if not 1 <= checks.count("count", count) <= ends[-1]:
        raise ValueError(
            f"count={shown(count)} must be at least 1 and at most {ends[-1]}, which is how many elements there are"
        )
    elements = np.sort(np.random.default_rng(checks.seed(seed)).choice(int(ends[-1]), count, replace=False))
    places = []
    for element, k in zip(elements, np.searchsorted(ends, elements, side="right"), strict=True):
        index = np.unravel_index(element - ends[k] + views[k].size, views[k].shape)
        places.append((views[k], tuple(map(int, index))))
    return places


def _element(value, view):
    """Return a number as a NumPy array of shape () and of the dtype of an array, whose bits may stand for another format."""
    return encoded(np.array([value]), view.format).view(view.dtype).reshape(())


def _write(kernels, view, index, element):
    if view.device is None:
        view.array[index] = element
        return
    offset = sum(i * stride for i, stride in zip(index, view.strides, strict=True))
    place = view._replace(array=None, pointer=view.pointer + offset, shape=(), strides=(), contiguous=True)
    kernels.copy(place, kernels.view("the fault", kernels.from_host(element)))
