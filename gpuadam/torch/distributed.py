"""DTensors, as `fully_shard` makes them of a model's parameters: each rank updates its own part of each.

An update is of one element at a time, so it needs no other rank. State is distributed as its parameter is. Where ranks hold whole
rows, as `fully_shard` has it, random rounding draws the bits that one process would draw.
"""

import sys

import torch

from .. import torch_tensors
from ..kernels.messages import label_of

PLAIN = {torch.Tensor, torch.nn.Parameter}


def is_distributed(tensor):
    """Whether a tensor is a DTensor. Where nobody has imported their module, there are none. In torch 2.4 it is not public."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor):
    """Return this rank's part of a DTensor, and any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def local_columns(names, columns):
    """Return the columns of Updates with this rank's parts in the place of DTensors, and the `starts` of these parts.

    A gradient that is distributed in another way is redistributed, as torch's own optimizers have it. Raises ValueError or
    TypeError for a parameter that is a sum over ranks, and for a gradient or state that is not distributed beside it.
    """
    params = columns[0]
    if set(map(type, params)) <= PLAIN:
        return columns, None
    rows = [
        _local_row(name, *row) if is_distributed(row[0]) else row
        for name, row in zip(names, zip(*columns, strict=True), strict=True)
    ]
    starts = [_start(param) if is_distributed(param) else 0 for param in params]
    return list(map(list, zip(*rows, strict=True))), starts


def wrote(params):
    """Tell autograd that the DTensors among parameters were written: of their parts it has been told."""
    if not set(map(type, params)) <= PLAIN:
        torch_tensors.wrote(list(filter(is_distributed, params)))


def _local_row(name, param, grad, *state):
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{label_of(name)} has the placements {param.placements}: ranks hold summands of it, and a step needs its "
            "elements. Redistribute it to Replicate() or Shard(...) first"
        )
    beside = param.device_mesh, param.placements
    for what, tensor in (("gradient", grad), *(("state", tensor) for tensor in state)):
        if not is_distributed(tensor):
            raise TypeError(
                f"{label_of(name)} is a DTensor and its {what} a {type(tensor).__name__}: it must be a DTensor too"
            )
        if tensor is not grad and (tensor.device_mesh, tensor.placements) != beside:
            raise ValueError(
                f"the state of {label_of(name)} has the placements {tensor.placements}, its parameter {param.placements}: "
                "load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
    if (grad.device_mesh, grad.placements) != beside:
        grad = grad.redistribute(*beside)
    return [tensor.to_local() for tensor in (param, grad, *state)]


def _start(param):
    """Return the number, within the whole parameter, of the first element of this rank's part, for random rounding.

    Where parts are not whole rows there is none, and each part has numbers of its own.
    """
    mesh, part = param.device_mesh, 0
    sharded = [(k, placement.dim) for k, placement in enumerate(param.placements) if placement.is_shard()]
    if [dim for _, dim in sharded] == [0]:
        (k, _), n_rows = *sharded, param.shape[0]
        return min(mesh.get_local_rank(k) * -(-n_rows // mesh.size(k)), n_rows) * param.shape[1:].numel()
    for k, _ in sharded:
        part = part * mesh.size(k) + mesh.get_local_rank(k)
    return part * param.numel()
