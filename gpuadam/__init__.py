"""The fused Adam update for arrays: the same bits from CuPy, Numba CUDA and the CPU."""

from . import transports
from .arrays import Bits
from .backends import BackendUnavailableError, available_backends, backend_status, use_backend
from .flat import Flat, flatten
from .functional import adam_step
from .norm import global_norm
from .optimizer import Adam, AdaMax, AdamW, NAdam, RAdam
from .sharded import ShardedAdam, ShardedAdamW

__version__ = "0.1.0"

__all__ = [
    "AdaMax",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "Bits",
    "Flat",
    "NAdam",
    "RAdam",
    "ShardedAdam",
    "ShardedAdamW",
    "adam_step",
    "available_backends",
    "backend_status",
    "flatten",
    "global_norm",
    "transports",
    "use_backend",
]
