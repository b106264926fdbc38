"""Which arrays an optimizer keeps for a parameter: their names and shapes."""

import numpy as np

from .kernels.storage import GROUP

OF_GROUPS = ("m_scale", "v_scale")  # the operands with one element for each GROUP neighbours of the parameter


def shape(key, param_shape):
    """Return the shape of an array of the state.

    >>> shape("m", (5, 20)), shape("m_scale", (5, 20))
    ((5, 20), (4,))
    """
    return (-(-int(np.prod(param_shape)) // GROUP),) if key in OF_GROUPS else tuple(param_shape)
