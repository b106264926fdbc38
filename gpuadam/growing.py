"""Arrays that grow and shrink, come and go while an optimizer trains them, such as points that are split and pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np

from . import backends, checks, holders
from .groups import MAPPING, named_params, some
from .kernels.messages import shown
from .kernels.operands import GROUP, widened
from .kernels.view import is_array
from .parameters import check_state
from .state import OF_GROUPS, shape
from .state_dict import HasState
from .typing import Array, Integer
from .under_way import in_turn


class Grows(HasState):
    """What `Adam` does with its parameters beside updating them."""

    backend: str | None
    with_groups: Callable

    @in_turn
    def replace(self, name: str, param: Array, rows: Sequence[int] | Array, *, param_copy: Array | None = None) -> None:
        """Put another array in a parameter's place: row i takes over the state of row rows[i] of the old one.

        name: of the parameter. param: an array of its dtype and device, whose shape differs in the first dimension at most. What
            is in it is the caller's: this moves the state alone.
        rows: integers, one for each row of param: the number of the old row that it goes on from, or -1 for a row that begins
            anew, with moments of zero; ema of such a row begins at param. Several rows may go on from one. An array on a GPU is
            read, which waits.
        param_copy: the array for copies, if the parameter had one in `param_copies`.

        If params was given as a dict or a list, put the new array there first: later steps then go on looking whether the array
        there is the parameter.

        The step count is the parameter's, and stays, so the bias of new rows is not corrected. With 8-bit state a row has a
        multiple of 32 elements, because neighbours share a scale. While a graph is captured this is refused; a graph that was
        captured before updates the old arrays, and has to be captured again.

        Raises ValueError or TypeError, and then nothing has changed.

        >>> import numpy as np, gpuadam
        >>> points = np.zeros((3, 2), "float32")
        >>> opt = gpuadam.Adam({"points": points}, lr=0.1)
        >>> opt.step({"points": np.array([[1, 1], [2, 2], [3, 3]], "float32")})
        >>> rows = [2, 2, -1, 0]  # the last is split, the middle one pruned, and one is new
        >>> points = np.concatenate([points[[2, 2]], np.zeros((1, 2), "float32"), points[[0]]])
        >>> opt.replace("points", points, rows)
        >>> print(opt.state["points"]["m"][:, 0])
        [0.3 0.3 0.  0.1]
        """
        k, at, old = self._found(name)
        groups, label = self._groups_as_they_are(), self.arrangement.label(name)
        check_state(old, label)
        kernels, view = self._viewed(label, param)
        before, groups[k]["params"][at] = groups[k]["params"][at], param
        of_state = [(f"{key} of {label}", old.state[key]) for key in old.kept]
        of_old, (view_before, *sources) = backends.choose([(f"the old {label}", before), *of_state], self.backend)
        if (view.format, view.of_complex, view.device, kernels) != (
            view_before.format, view_before.of_complex, view_before.device, of_old
        ):  # fmt: skip
            was, now = (
                f"{x.of_complex or x.format} on {k.name}, device {x.device}"
                for x, k in ((view_before, of_old), (view, kernels))
            )
            raise TypeError(f"{label} was {was}, and the new one is {now}: they must be alike")
        if not view.shape or not view_before.shape or view.shape[1:] != view_before.shape[1:]:
            shapes = f"had shape {view_before.shape}, and the new one has {view.shape}"
            raise ValueError(f"{label} {shapes}: all but the first dimension must be the same")
        if (old.copy is None) != (param_copy is None):
            raise ValueError(f"{label} has {'no' if old.copy is None else 'a'} copy: give param_copy likewise")
        of_new = _checked_rows(rows, view.shape[0], view_before.shape[0])
        row_size = int(np.prod(view.shape[1:]))
        if "m_scale" in old.state and row_size % GROUP:
            raise ValueError(f"a row of {label} has {row_size} elements: with 8-bit state it must be a multiple of {GROUP}")
        others = {other: parameter.state for other, parameter in self.parameters.items() if other != name}
        twin = self._twin(groups, others, {name: param_copy})
        twin._check_arrays(name)
        new = twin.parameters[name]
        targets = [kernels.view(f"{key} of {label}", new.state[key]) for key in old.kept]
        for key, to, source in zip(old.kept, targets, sources, strict=True):
            needed = shape(key, view_before.shape) if key in OF_GROUPS else (view_before.shape[0], *to.shape[1:])
            if (source.shape, source.dtype, source.device) != (needed, to.dtype, to.device):
                raise ValueError(
                    f"{source.name} has shape {source.shape} and dtype {source.dtype} on device {source.device}; beside the old "
                    f"parameter, of shape {view_before.shape}, it must have {needed} and {to.dtype} on device {to.device}: put "
                    "back what its optimizer made"
                )
        for key, to, source in zip(old.kept, targets, sources, strict=True):
            if key == "ema" and (of_new < 0).any():
                self._begin_ema(label, new.state[key], param)
            if key in OF_GROUPS:
                to = _in_rows(kernels, to, view.shape[0], row_size // GROUP)
                source = _in_rows(kernels, source, view_before.shape[0], row_size // GROUP)
            kernels.copy_rows(to, source, of_new)
        new.state["step"] = old.state["step"]
        self._become(twin)
        holders.replaced(self.arrangement.places, name, param)

    @in_turn
    def add(self, name: str, param: Array, group: Integer = 0, *, param_copy: Array | None = None) -> None:
        """Add a parameter to a group, with state at its start.

        group: the number of the group, whose parameters were given as a dict. param_copy: an array for copies of it. With
        capturable it shares the group's step count, and its ema begins at param. The names of others stay: numbers, which are
        names in groups that were given as a list, are then not those that the same groups would get anew. Raises ValueError or
        TypeError, and then nothing has changed.

        >>> import numpy as np, gpuadam
        >>> opt = gpuadam.Adam({"a": np.zeros(2, "float32")})
        >>> opt.add("b", np.zeros(3, "float32"))
        >>> opt.step({"a": np.ones(2, "float32"), "b": np.ones(3, "float32")})
        >>> opt.remove("a")
        >>> list(opt.state)
        ['b']
        """
        groups = self._groups_as_they_are()
        if not checks.is_number(group, Integral) or int(group) not in range(len(groups)):
            raise ValueError(f"there is no group {shown(group)}: they are numbered from 0 to {len(groups) - 1}")
        self._check_named(group := int(group))
        if not isinstance(name, str) or name in self.parameters:
            raise ValueError(f"the name of a new parameter must be a string that none has, not {shown(name)}")
        self._viewed(label := f"params[{shown(name)}]", param)
        groups[group]["params"].append(param)
        groups[group]["names"].append(name)
        twin = self._twin(groups, {other: p.state for other, p in self.parameters.items()}, {name: param_copy})
        twin._check_arrays(name)
        if "ema" in (state := twin.parameters[name].state):  # which the first step sets, unless the group has taken steps
            self._begin_ema(label, state["ema"], param)
        self._become(twin)
        holders.added(self.arrangement.places, group, name, param)

    @in_turn
    def remove(self, name: str) -> None:
        """Forget a parameter and its state. Its group's parameters were given as a dict. Raises ValueError."""
        k, at, _ = self._found(name)
        self._check_named(k)
        if len(self.parameters) == 1:
            raise ValueError(f"{shown(name)} is the only parameter: an optimizer has one at least")
        groups = self._groups_as_they_are()
        del groups[k]["params"][at], groups[k]["names"][at]
        self._become(self._twin(groups, {other: p.state for other, p in self.parameters.items() if other != name}, {}))
        holders.removed(self.arrangement.places, name)

    def _found(self, name):
        """Return the number of a parameter's group, its place there, and the Parameter."""
        self.arrangement.check_number(self.groups)  # the parameter's dict may hold the new array already
        for k, structure in enumerate(self.arrangement.structures):
            if isinstance(name, str) and name in structure.names:
                return k, structure.names.index(name), self.parameters[name]
        raise ValueError(f"there is no parameter {shown(name)}, only {some(self.parameters)}")

    def _check_named(self, k):
        if self.arrangement.structures[k].kind != MAPPING:
            raise ValueError(
                f"the parameters of group {k} have numbers for names: give them as a dict, and add or remove by name"
            )

    def _groups_as_they_are(self):
        return [group | {"params": list(group["params"]), "names": list(group["names"])} for group in self.groups]

    def _twin(self, groups, states, copies):
        """Return an optimizer like this one with other groups. states: name -> that goes on. copies: of new parameters."""
        copies = {name: copy for name, copy in copies.items() if copy is not None}
        copies |= {name: p.copy for name, p in self.parameters.items() if name in states and p.copy is not None}
        return self.with_groups(groups, states, copies)

    def _check_arrays(self, new):
        """Refuse a copy that a step would refuse, and arrays that share memory. new: the name of the parameter that is new."""
        views = []
        for name, param in named_params(self.groups):
            label, parameter = self.arrangement.label(name), self.parameters[name]
            named = [(label, param)] + [(f"{key} of {label}", parameter.state[key]) for key in parameter.kind.kept]
            if parameter.copy is not None:
                named.append((f"param_copy of {label}", parameter.copy))
            _, of_name = backends.choose(named, self.backend)
            if name == new and parameter.copy is not None:
                in_groups = "m_scale" in parameter.state
                checks.beside(of_name[-1], of_name[0], "param_copy", True, parameter.kind.numbers, in_groups)
            views += of_name
        checks.overlap(views, [])

    def _begin_ema(self, label, ema, param):
        """Copy a parameter to its ema, which may have a wider dtype."""
        kernels, (to, source) = backends.choose([(f"ema of {label}", ema), (label, param)], self.backend)
        if to.dtype != source.dtype and not kernels.copies_any_layout:
            on_host = widened(np.asarray(kernels.to_host(source.array)), source.format).astype(to.dtype)
            source = kernels.view(source.name, kernels.from_host(on_host))
        if not kernels.copies_any_layout:
            checks.same_layout(to, source, any_layout=False)
        kernels.copy(to, source)

    def _become(self, twin):
        """Take over the parameters of a twin. `groups` and `state` stay the objects that a program may hold."""
        own = self.groups, self.state
        self.under_way.begin()
        for group, of_twin in zip(self.groups, twin.groups, strict=True):
            group.update(of_twin)
        self.state.become(twin.state)
        self.__dict__.update(vars(twin))
        self.groups, self.state = own
        self.under_way.end()

    def _viewed(self, label, param):
        """Return the backend and the View of a new array. Refuse it while a graph is captured."""
        kernels, (view,) = backends.choose([(label, checks.given(label, param))], self.backend)
        if kernels.memory == "CUDA" and kernels.place(view.device, None, [view.stream]).capturing:
            raise RuntimeError(f"a graph is being captured, and would not hold {label}: do this before the capture")
        return kernels, view


def _checked_rows(rows, n, n_old):
    """Return rows as a NumPy array of int64, of which there must be n, each -1 or the number of one of n_old rows."""
    if is_array(rows):
        kernels, (view,) = backends.choose([("rows", rows)])
        rows = kernels.to_host(view.array)
    try:
        rows = np.asarray(rows)
    except ValueError:  # NumPy's, of a list of lists
        raise TypeError(f"rows must be integers, not {shown(rows)}") from None
    if rows.dtype.kind not in "iu" and rows.size:
        advice = ": np.flatnonzero(mask) makes them of flags" if rows.dtype == bool else ""
        raise TypeError(f"rows must be integers, not {rows.dtype}{advice}")
    if rows.shape != (n,):
        raise ValueError(f"rows has shape {rows.shape}: it must have a number for each of the {n} rows")
    if n and (rows.min() < -1 or rows.max() >= n_old):
        raise ValueError(f"rows must be numbers of the {n_old} old rows, or -1; they are from {rows.min()} to {rows.max()}")
    return rows.astype(np.int64)


def _in_rows(kernels, view, n, of_row):
    """Return the View of scales as one of n rows."""
    return kernels.view(view.name, kernels.native(view).reshape(n, of_row))
