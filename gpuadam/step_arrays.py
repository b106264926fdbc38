"""Arrays that one step is given beside the gradients: change, lr_scale and where."""

import dataclasses
from typing import Any

from . import checks
from .kernels.messages import shown
from .kernels.operands import KINDS


class StepArrays:
    """What `Adam.step` was given of these arrays. arrangement: the optimizer's `groups.Arrangement`."""

    def __init__(self, arrangement, change, lr_scale, where):
        self._nonzero = isinstance(where, str)
        self._of_names: dict[str, dict] = {name: {} for structure in arrangement.structures for name in structure.names}
        if self._nonzero:
            checks.one_of(("nonzero",), "where", where)
        for operand, given in (("change", change), ("lr_scale", lr_scale), ("where", None if self._nonzero else where)):
            if given is None:
                continue
            for structure, arrays in zip(arrangement.structures, arrangement.in_order(given, operand), strict=True):
                for name, array in zip(structure.names, arrays, strict=True):
                    self._of_names[name] |= {} if array is None else {operand: array}

    def parts(self, updates):
        """Return Updates with these arrays: one for the parameters that have the same of them, and so on."""
        together: dict[tuple[str, ...], list[int]] = {}
        for n, name in enumerate(updates.names):
            together.setdefault(tuple(self._of_names[name]), []).append(n)
        if updates.now is not None and len(together) > 1:
            raise ValueError(
                "with capturable=True all parameters of a group have the same of change, lr_scale and where: in the group of "
                f"{shown(updates.names[0])} some have {' and some '.join(str(list(of_some)) for of_some in together)}"
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
