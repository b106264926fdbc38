"""Arrays that one step is given beside the gradients: change, lr_scale, where, and bounds that are arrays."""

import dataclasses
from typing import Any

from . import checks
from .groups import in_order
from .kernels.messages import shown
from .kernels.operands import KINDS
from .kernels.view import is_array

ENDS = "low", "high"  # operands


def bounds_apart(bounds):
    """Return bounds with None in the place of each end that is made of arrays, and both ends, None if they are not.

    >>> import numpy as np
    >>> bounds_apart((0.0, np.ones(3)))
    ((0.0, None), None, array([1., 1., 1.]))
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        return bounds, None, None
    ends = [end if is_array(end) or isinstance(end, (dict, list, tuple)) else None for end in bounds]
    return tuple(None if end is not None else given for end, given in zip(ends, bounds, strict=True)), *ends


def without_arrays(settings):
    """Return the settings of a group with bounds of numbers alone."""
    bounds = settings.get("bounds")
    return settings if bounds is None else settings | {"bounds": bounds_apart(bounds)[0]}


ARRAYS = "arrays"  # in the place of such an end in saved settings


def saved_bounds(bounds):
    """Return bounds as a state_dict has them: "arrays" in the place of an end that is made of arrays."""
    numbers, *ends = bounds_apart(bounds)
    if all(end is None for end in ends):
        return numbers
    return tuple(given if end is None else ARRAYS for given, end in zip(numbers, ends, strict=True))


def bounds_of_loaded(saved, own):
    """Return the bounds that a group goes on with: those that were saved, with its own arrays where arrays were."""
    if not isinstance(saved, (tuple, list)) or ARRAYS not in saved:
        return saved
    ends = bounds_apart(own)[1:]
    if any(one == ARRAYS and end is None for one, end in zip(saved, ends, strict=True)):
        raise ValueError(
            "the saved bounds were arrays, which are not saved. Make the optimizer with bounds of arrays, and then use "
            'load_state_dict; or load with groups, [{"params": params, "bounds": bounds}], whose steps take a list of gradients, '
            "or a dict of all names"
        )
    return tuple(end if one == ARRAYS else one for one, end in zip(saved, ends, strict=True))


def of_bounds(groups, structures):
    """Return name -> {"low" or "high": array}, of all groups whose bounds are arrays."""
    of_names: dict[str, dict[str, Any]] = {}
    for k, (settings, structure) in enumerate(zip(groups, structures, strict=True)):
        for operand, end in zip(ENDS, bounds_apart(settings.get("bounds"))[1:], strict=True):
            if end is not None:
                arrays = in_order(end, structure, f"the bounds of group {k}, {operand},")
                for name, array in zip(structure.names, arrays, strict=True):
                    of_names.setdefault(name, {}).update({} if array is None else {operand: array})
    return of_names


class StepArrays:
    """What `Adam.step` was given of these arrays.

    arrangement: the optimizer's `groups.Arrangement`. bounds: what `of_bounds` returned.
    """

    def __init__(self, arrangement, change, lr_scale, where, bounds=None):
        self._nonzero = isinstance(where, str)
        self._of_names: dict[str, dict] = {name: {} for structure in arrangement.structures for name in structure.names}
        if self._nonzero:
            checks.nonzero(where)
        for operand, given in (("change", change), ("lr_scale", lr_scale), ("where", None if self._nonzero else where)):
            if given is None:
                continue
            for structure, arrays in zip(arrangement.structures, arrangement.in_order(given, operand), strict=True):
                for name, array in zip(structure.names, arrays, strict=True):
                    if isinstance(array, str):
                        raise ValueError(
                            f"{operand} of {arrangement.label(name)} is {shown(array)}: give an array, or where='nonzero' "
                            "for all parameters"
                        )
                    self._of_names[name] |= {} if array is None else {operand: array}
        for name, ends in (bounds or {}).items():
            self._of_names[name] |= ends

    def parts(self, updates):
        """Return Updates with these arrays: one for the parameters that have the same of them, and so on."""
        together: dict[tuple[str, ...], list[int]] = {}
        for n, name in enumerate(updates.names):
            together.setdefault(tuple(self._of_names[name]), []).append(n)
        if updates.now is not None and len(together) > 1:
            raise ValueError(
                "with capturable=True all parameters of a group have the same of change, lr_scale, where and bounds: in the "
                f"group of {shown(updates.names[0])} some have {' and some '.join(str(list(of_some)) for of_some in together)}"
            )
        return [self._part(updates, operands, chosen) for operands, chosen in together.items()]

    def _part(self, updates, further, chosen):
        """Return the Updates of the chosen parameters, by their numbers, with further operands."""

        def of_chosen(values):
            return values and [values[n] for n in chosen]

        names, bits = of_chosen(updates.names), dict(zip(updates.operands, updates.bits, strict=False))
        columns: dict[str, Any] = dict(zip(updates.operands, map(of_chosen, updates.columns), strict=True))
        columns |= {operand: [self._of_names[name][operand] for name in names] for operand in further}
        operands = tuple(operand for operand in KINDS if operand in columns)
        return dataclasses.replace(
            updates,
            columns=[columns[operand] for operand in operands],
            operands=operands,
            names=names,
            bits=tuple(bits.get(operand, "") for operand in operands) if bits else (),
            keys=of_chosen(updates.keys),
            starts=of_chosen(updates.starts),
            nonzero=self._nonzero,
        )
