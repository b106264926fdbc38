"""PyTorch's tensors as arrays: their memory, whether autograd lets it be written, and what autograd is told afterwards.

This file does not import torch, and is therefore not in the package `gpuadam.torch`, which does. Every step asks whether there
are tensors among its arrays. Where nobody has imported torch, there are none.

A step turns the tensors in CPU memory into NumPy arrays by `all_in_numpy`. Where that is not possible, and for tensors on
a GPU, `backends.choose` takes each by `plain`, which raises what is wrong with it.
"""

import contextlib
import functools
import itertools
import sys

from .kernels.view import Bits, a_kind


def _torch():
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "Tensor") else None  # another thread may be importing it


def is_tensor(array):
    torch = _torch()
    return torch is not None and isinstance(array, torch.Tensor)


def among(columns):
    """Whether there is a tensor in lists of arrays."""
    torch = _torch()
    return torch is not None and any(issubclass(t, torch.Tensor) for t in set(map(type, itertools.chain(*columns))))


def plain(name, tensor):
    """Return the memory of a tensor: a NumPy array, or a tensor on a GPU that needs no gradient. bfloat16 is in Bits.

    Raises TypeError for a tensor whose memory does not hold its values.
    """
    torch = sys.modules["torch"]
    if type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is {a_kind(tensor)}, which has no memory of its own, as a fake tensor or a DTensor: pass a tensor that "
            "has, to_local() of a DTensor"
        )
    if tensor.layout is not torch.strided:
        dense = "pass its to_dense()"
        if name.startswith("the gradient of ") and tensor.is_sparse:
            dense += (
                ". If a layer made it, such as torch.nn.Embedding with sparse=True, make that with sparse=False, or leave "
            )
            dense += "its parameter to torch.optim.SparseAdam"
        raise TypeError(f"{name} is a tensor of layout {tensor.layout}, not of strides: {dense}")
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError(f"{name} is a lazily negated or conjugated view: pass its resolve_neg().resolve_conj()")
    try:
        return _memory(tensor)
    except (RuntimeError, TypeError) as error:  # a meta tensor, a quantized one, one inside of vmap
        raise TypeError(f"{name}, {a_kind(tensor)}, does not share its memory: {error}") from error


def _memory(tensor):
    torch, bare = sys.modules["torch"], tensor.detach()
    if tensor.numel() and not tensor.is_meta and not tensor.data_ptr():  # NumPy would take new memory in its place
        raise TypeError("its storage was freed")
    is_bfloat16 = tensor.dtype is torch.bfloat16  # which NumPy and `__cuda_array_interface__` do not know
    if is_bfloat16:
        bare = bare.view(torch.int16)
    if not tensor.is_cuda:
        bare = bare.numpy()
    return Bits(bare, "bfloat16") if is_bfloat16 else bare


def why_immutable(tensor):
    """Return why a tensor must not be written in place, or "". The rule is that of torch.optim."""
    if tensor.is_leaf or tensor.retains_grad:
        return ""
    return "is not a leaf: autograd computed it from other tensors. Pass those, or its detach()"


def all_in_numpy(column, written=True):
    """Return the NumPy arrays over tensors in CPU memory that pass the checks of `plain`, and others as they are.

    written: whether an update writes them, so that the rule of torch.optim holds.
    """
    torch = sys.modules["torch"]
    if set(map(type, column)) <= {torch.Tensor, torch.nn.Parameter} and not (written and any(map(why_immutable, column))):
        with contextlib.suppress(RuntimeError, TypeError):  # at once is quicker, if all are on the CPU and of NumPy's dtypes
            if all(map(torch.Tensor.data_ptr, column)):  # else one has no elements, or its storage was freed
                if all(tensor.dtype is torch.bfloat16 for tensor in column):
                    return [Bits(tensor.view(torch.int16).numpy(), "bfloat16") for tensor in column]
                return list(map(torch.Tensor.numpy, map(torch.Tensor.detach, column)))
    converted = []
    for array in column:
        if isinstance(array, torch.Tensor) and array.is_cpu and not (written and why_immutable(array)):
            with contextlib.suppress(RuntimeError, TypeError):  # the checks will say what it is
                array = plain("", array)
        converted.append(array)
    return converted


def places(arrays):
    """Return the address, strides, shape and dtype of each tensor among arrays."""
    return [(t.data_ptr(), t.stride(), t.shape, t.dtype) for t in _tensors(arrays)]


def wrote(arrays):
    """Tell autograd that tensors among arrays were written, so that a backward pass that needs their old values raises."""
    tensors = _tensors(arrays)
    if not tensors:
        return
    increment = sys.modules["torch"].autograd.graph.increment_version
    if _counts_many():
        increment(tensors)
    else:
        for tensor in tensors:
            if not tensor.is_inference():
                increment(tensor)


def _tensors(arrays):
    """Return the tensors in a list of arrays and None."""
    torch = _torch()
    if torch is None:
        return []
    if set(map(type, arrays)) <= {torch.Tensor, torch.nn.Parameter}:  # as most often: quicker than to look at each
        return arrays
    return [a for a in (a.array if type(a) is Bits else a for a in arrays) if isinstance(a, torch.Tensor)]


@functools.cache
def _counts_many():
    """Whether torch's increment_version takes many tensors: before 2.5 it took one. Versions take long to compare."""
    return sys.modules["torch"].__version__ >= (2, 5)
