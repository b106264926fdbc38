"""The fused Adam update for arrays: the same bits from CuPy, Numba CUDA and the CPU."""

from .backends import BackendUnavailableError, available_backends, backend_status, use_backend
from .flat import Flat, flatten
from .functional import adam_step
from .optimizer import Adam, AdamW

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "Flat",
    "adam_step",
    "available_backends",
    "backend_status",
    "flatten",
    "use_backend",
]
