"""Zeros in the place of gradients that are summed up over several backward passes."""

from . import backends, checks, torch_tensors
from .kernels import streams


def fill_with_zeros(labelled, backend, stream):
    """Fill gradients with zeros, after checking all of them.

    labelled: (what errors call it, the parameter itself, its gradient or None) of each parameter.
    """
    filled, params, arrays = [], [], []
    for label, param, grad in labelled:
        pair = [(label, param), (f"the gradient of {label}", grad)][: 1 + (grad is not None)]
        kernels, (of_param, *of_grad) = backends.choose(pair, backend)
        params.append(of_param)
        for view in of_grad:
            checks.beside(view, of_param, "grad", written=True)
            filled.append((kernels, view))
            arrays.append(grad)
    checks.overlap([view for _, view in filled], params)
    handle = streams.handle(stream)
    for kernels, view in filled:
        kernels.fill_zero(view, handle)
    torch_tensors.wrote(arrays)
