"""What a backend is: the interface that the rest of gpuadam uses, and what all backends share.

A backend updates the arrays of one library in one kind of memory. `gpu_backend.GpuBackend` adds what the two GPU backends share;
`cpu_backend.py`, `cupy_backend.py` and `numba_cuda_backend.py` each hold one backend, the module's `backend`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuadam.kernels import adam
from gpuadam.kernels.layout import Update, offset_like, strides_like
from gpuadam.kernels.operands import Arrays
from gpuadam.kernels.view import View


class Batch:
    """Updates that one launch makes, known but for the form and the scalars.

    `begun` says whether elements may have been written since `prepare`. `group` is the caller's, to tell batches apart.
    """

    # whether it can be launched again, without its arrays being checked, while they stay where they are
    lasts = False
    device: int | None = None  # the number of the GPU

    def __init__(self, updates: Sequence[Update], arrays: Arrays) -> None:
        """updates: `layout.Update`s. arrays: the `operands.Arrays` of all."""
        self.updates, self.arrays, self.is_random = updates, arrays, arrays.random
        self.names: Sequence[str] = [update.views[0].name for update in updates]  # of the parameters, for errors
        self.group, self.begun = 0, False

    def place(self, stream: int | None) -> Any:
        """Return where a launch goes, for `check` and `prepare`, or None on the CPU. stream: the handle of one, or None."""
        refuse_stream(stream)

    def check(self, place: Any, on_device: bool) -> None:
        """Refuse what a CUDA graph that is being captured cannot hold. on_device: whether the scalars are in device memory."""

    def prepare(self, rule: Any, form: adam.Form, scalars: Any, place: Any, key: int = 0) -> None:
        """Do what may fail before anything is written, and keep the arguments for `launch`.

        rule: `adam` or `limit`. form: an `adam.Form`. scalars: `adam.Scalars` of form.dtype, or on a GPU the
        `scalars.ScalarsMemory` that will hold them. key: of the step, for random rounding.
        """
        self.prepared, self.begun = (rule, form, scalars, place, key), False

    def launch(self) -> None:
        """Make the updates that were prepared, or enqueue them on a GPU."""

    def release(self) -> None:
        """Give back what the Batch holds on a device."""


def refuse_stream(stream: object) -> None:
    """Raise TypeError if a stream was given for arrays of the CPU."""
    if stream is not None:
        raise TypeError("stream is for arrays on a GPU; these are on the CPU, which has no streams")


class Backend(abc.ABC):
    """A backend. There is one instance of each class, the attribute `backend` of its module.

    The abstract methods are the interface: every backend has to have its own.

    `view` is a `gpuadam.kernels.view.View`: what is known of an array. `array` is an array of the backend's library. `stream` is
    the handle of a CUDA stream; None stands for the current one, or the one that the arrays name.
    """

    name: str  # as in `backend="numba-cpu"`
    memory: str  # which arrays it can update: those in "CPU" or in "CUDA" memory
    boundary: int  # bytes: state begins as far behind a multiple of this as its parameter does
    copies_any_layout = True  # whether `copy` takes arrays of different strides

    def __reduce__(self) -> str:
        return "backend"  # copies and pickles are the one instance, which its module has under this name

    @abc.abstractmethod
    def status(self) -> tuple[bool, str] | tuple[bool, str, str]:
        """Return (whether the backend can run on this machine, its version or what is missing).

        What mends it may follow, if it is anything but the driver of a GPU.
        """

    @abc.abstractmethod
    def view(self, name: str, array: Any) -> View:
        """Return the View of an array of any library that shares this memory. Nothing is copied. name: for errors."""

    # Updates

    @abc.abstractmethod
    def batches(self, updates: Sequence[Update], arrays: Arrays) -> Sequence[Batch]:
        """Return the `Batch`es of several updates, of any shapes: one for all dense arrays, one for each other.

        updates: `layout.Update`s of arrays on one device, which were checked. arrays: the `operands.Arrays` of all.
        """

    def launch(self, form: adam.Form, views: Sequence[View], scalars: Any, key: int = 0) -> None:
        """Make one update in place.

        views: in the order of `operands.operands_of`, of one shape and device, checked. The other arguments are those of
        `Batch.prepare`.
        """
        for batch in self.batches([Update(list(views))], form.arrays):
            batch.prepare(adam, form, scalars, batch.place(None), key)
            batch.launch()

    # The global norm, in the order of norm_order.py

    @abc.abstractmethod
    def norm(self, views: Sequence[View], out: View | None, device: int | None, stream: int | None) -> Any:
        """Return the norm of arrays, an array of shape () and dtype float64, or on a GPU enqueue it.

        out: the View of an array that the norm is written to and that is returned; or None, for a new one. device: the number of
        the arrays' device; None for the CPU, or if no array has elements.
        """

    def step_norms(self, params: Mapping[str, View], device: int | None, out: Any) -> Any:
        """Return the `change_sums.NormPasses` of a step, whose docstring has the arguments. A backend need not have them."""
        raise NotImplementedError(f"the backend {self.name} takes no norms of a step: leave norms out")

    @abc.abstractmethod
    def chunk_sums(self, views: Sequence[View]) -> np.ndarray[Any, Any]:
        """Return the sums of squares of all chunks of arrays on one device, as a NumPy array. The host waits for a GPU."""

    # Memory

    @abc.abstractmethod
    def zeros(self, n: int, dtype: npt.DTypeLike, device: int | None) -> Any:
        """Return a 1-D array of n zeros, at a boundary. They are there, for any stream, when this returns."""

    @abc.abstractmethod
    def shaped(self, memory: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Any:
        """Return an array of a shape and of strides (in bytes; None for C order) over a 1-D array."""

    def zeros_in_one(
        self, sizes: Sequence[int], dtype: npt.DTypeLike, device: int | None, operands: Sequence[str] = ()
    ) -> list[Any]:
        """Return 1-D arrays of zeros, of some sizes, each at a boundary. They may be parts of one allocation.

        operands: the operand of each array, if a step goes through those of several side by side. Those of one follow one
        another.
        """
        return [self.zeros(n, dtype, device) for n in sizes]

    def zeros_like_all(self, views: Sequence[View], dtype: npt.DTypeLike, operands: Sequence[str] = ()) -> list[Any]:
        """Return zeros for the state of arrays on one device, of a dtype, in one allocation if the backend makes one.

        Each has the shape of its array and the order of its memory, and its boundaries at the same elements. operands: as in
        `zeros_in_one`.
        """
        offsets = [offset_like(view, dtype, self.boundary) for view in views]
        sizes = [offset + view.size for offset, view in zip(offsets, views, strict=True)]
        memories = self.zeros_in_one(sizes, dtype, views[0].device, operands)
        return [
            self.shaped(memory[offset:], view.shape, strides_like(view, dtype))
            for memory, offset, view in zip(memories, offsets, views, strict=True)
        ]

    @abc.abstractmethod
    def fill_zero(self, view: View, stream: int | None = None) -> None:
        """Store zeros in an array, in the order of a launch."""

    @abc.abstractmethod
    def copy(self, to: View, source: View) -> None:
        """Copy one array, given as a View, to another of the same shape, in the order of a launch.

        If `copies_any_layout` the strides may differ, and the dtype of `to` may be wider. Otherwise both must be equal, and the
        arrays without gaps.
        """

    @abc.abstractmethod
    def copy_rows(self, to: View, source: View, rows: np.ndarray[Any, Any]) -> None:
        """Copy row rows[k] of an array to row k of another, given as Views, in the order of a launch; where rows[k] is -1, none.

        Both are of one dtype, and of shapes that differ in the first dimension alone. rows: a NumPy array of int64.
        """

    @abc.abstractmethod
    def from_host(self, array: np.ndarray[Any, Any]) -> Any:
        """Return a copy of a NumPy array in this backend's memory. It is there when this returns."""

    @abc.abstractmethod
    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """Return a NumPy copy of an array in this backend's memory, of any library, after waiting for its device."""

    @abc.abstractmethod
    def native(self, view: View) -> Any:
        """Return an array as one of the backend's library, over the same memory."""

    # Time

    @abc.abstractmethod
    def now(self) -> Any:
        """Return a moment for `seconds_between`; on a GPU it is of the current stream."""

    @abc.abstractmethod
    def seconds_between(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments, after waiting for the later one."""
