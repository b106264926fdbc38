"""What a step found out about its arrays. It holds until an array is replaced, moved or changed in shape.

At each step whatever may have changed is read again and compared: arrays by identity, and of each what its library lets change
while the object stays the same. No gradient is kept alive; parameters and state are, as by their optimizer.

NumPy's arrays are not remembered: to read their structs anew takes less time than to compare (`kernels/numpy_struct.py`).
"""

import itertools
import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from . import backends, torch_tensors
from .kernels.step_objects import same
from .kernels.view import bare, torch_stream, type_name

CUPY = "cupy.ndarray"
NUMBA = "numba.cuda.cudadrv.devicearray.DeviceNDArray"
TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")

# By type, so that nothing is imported: functions that read all that checks and launches depend on of an array
READ_ALL: dict[str, list[Callable]] = {
    CUPY: [operator.attrgetter("data.ptr", "data.device_id", "shape", "strides", "dtype")],
    NUMBA: [
        operator.attrgetter(
            "device_ctypes_pointer.value", "gpu_data.context.device.id", "shape", "strides", "dtype", "stream"
        )
    ],
}
for name in TENSORS:
    methods = [operator.methodcaller(method) for method in ("data_ptr", "stride", "is_neg")]
    READ_ALL[name] = [*methods, operator.attrgetter("shape", "dtype", "device", "is_leaf")]
# The same, less what cannot change while an array is the same object. It may keep the array's memory alive.
READ_CHANGING = READ_ALL | {
    CUPY: [operator.attrgetter("shape")],
    NUMBA: [operator.attrgetter("gpu_data", "shape", "strides", "dtype", "stream")],  # quicker than the address
}


READ = {name: READ_ALL[name][0] for name in (CUPY, NUMBA)}  # what reads all of an array, without the array
MOST_NORMS = 8  # of different arrays, in each thread


class ArraysRead(NamedTuple):
    """What was read of the arrays of Updates."""

    what: tuple  # which operands there are, and whether elements whose gradient is 0 stay
    held: list[Any]  # params and state, compared by identity
    read: list[Any]  # of these, and of the gradients

    def same(self, other):
        return same(self.held, other.held) and (self.what, self.read) == (other.what, other.read)


def arrays_read(updates):
    """Return the ArraysRead of Updates, or None if an array is of a type that is not listed here."""
    params, grads, *state = updates.columns
    held, formats = bare([*params, *itertools.chain.from_iterable(state)])
    grads, formats_of_grads = bare(grads)
    changing, all_of_grads = read(held, READ_CHANGING), read(grads, READ_ALL)
    if changing is None or all_of_grads is None:
        return None
    return ArraysRead((updates.operands, updates.nonzero), held, [changing, formats, all_of_grads, formats_of_grads])


def read(arrays, functions):
    """Return what functions read of arrays; None if one is of another type, or has no memory. functions: by a type's name."""
    values: list[Any] = []
    for kind, of_kind in itertools.groupby(arrays, type):
        name = type_name(kind)
        if name not in functions:
            return None
        run = list(of_kind)
        values.append(kind)
        try:
            values += [list(map(function, run)) for function in functions[name]]
        except RuntimeError:  # a tensor without memory of its own
            return None
        if name in TENSORS:
            values += map(torch_stream, {tensor.device for tensor in run if tensor.is_cuda})
    return values


def release(batches):
    """Give back what batches hold on devices."""
    for batch in batches:
        batch.release()


class Remembered:
    """What an optimizer remembers of its last step: the batches of arrays on GPUs, and NumPy arrays over torch's on the CPU."""

    def __init__(self):
        self._backend, self._known = None, []
        self.kept = []  # the batches of the last step that can be launched again
        self._numpy = {}  # number of the Updates -> what was read of the tensors, the NumPy arrays

    def batches(self, groups, backend):
        """Return the batches of the last step if its arrays were the same in all that matters, or None."""
        if not self.kept or self._backend != backends.forced(backend) or len(self._known) != len(groups):
            return None
        for before, group in zip(self._known, groups, strict=True):
            now = arrays_read(group)
            if now is None or not before.same(now):
                return None
        return self.kept

    def keep(self, groups, backend, batches):
        """Take over the batches of a step: to launch them again, if that is possible, or to release them."""
        last, self._known, self.kept = self.kept, [], []  # first, so that an interrupt leaves none that was released
        release(last)
        of_groups = [arrays_read(group) for group in groups] if all(batch.lasts for batch in batches) else [None]
        if all(of_groups):
            self._backend, self._known, self.kept = backends.forced(backend), of_groups, batches
        else:
            release(batches)

    def in_numpy(self, group, tensors):
        """Return NumPy arrays over the memory of torch's tensors: the same ones while these stay what they were.

        A tensor can get other memory, another shape or dtype and remain the same object, by `tensor.data = ...` for one.
        """
        now = read(tensors, READ_ALL)
        before, arrays = self._numpy.get(group, (None, None))
        if now is None or now != before:
            arrays = torch_tensors.all_in_numpy(tensors)
            self._numpy[group] = now, arrays
        return arrays

    def __reduce__(self):  # a copy of an optimizer finds out anew
        return (Remembered, ())


class NormsOnGpu(threading.local):
    """The last norms that a thread asked for, by what is read of their arrays. No array is kept alive but a result."""

    def __init__(self):
        self._kept: dict[Any, tuple] = {}

    def key(self, arrays, out, backend):
        """Return what tells a call from others, or None if its arrays are not remembered. out: None, or another such array."""
        cls = type(arrays[0])
        all_arrays = arrays if out is None else [*arrays, out]
        if type_name(cls) not in READ or any(type(array) is not cls for array in all_arrays):
            return None
        return backends.forced(backend), cls, out is None, *map(READ[type_name(cls)], all_arrays)

    def taken(self, key, out, stream):
        """Return the norm of a call that was made before, or None."""
        if key not in self._kept:
            return None
        kernels, norm, place_of = self._kept[key]
        result = kernels.take(norm, place_of, stream)
        return result if out is None or result is None else out

    def take(self, key, kernels, views, device, place_of, stream):
        """Return the norm of another call, and keep what it is made from; None if a graph is captured."""
        norm = kernels.norm_again(views, device)
        result = kernels.take(norm, place_of, stream)
        if result is None:
            norm.release()
            return None
        if key in self._kept or len(self._kept) == MOST_NORMS:
            self._kept.pop(key if key in self._kept else next(iter(self._kept)))[1].release()
        self._kept[key] = kernels, norm, place_of
        return result
