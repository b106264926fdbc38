"""The fused Adam update for arrays: the same bits from CuPy, Numba CUDA and the CPU."""

from .backends import BackendUnavailableError, available_backends, backend_status, use_backend
from .checkpoint.saving import CheckpointError, load
from .clipping import global_norm
from .decay import decay_groups
from .family import AdaMax, AdamW, NAdam, RAdam
from .flat import Flat, flatten
from .functional import adam_step
from .kernels.view import Bits
from .offload import OffloadAdam
from .optimizer import Adam
from .sharded import transports
from .sharded.checkpoint import load_sharded
from .sharded.optimizer import ShardedAdam, ShardedAdamW

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of the reference
    "adam_step",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "AdaMax",
    "OffloadAdam",
    "ShardedAdam",
    "ShardedAdamW",
    "transports",
    "decay_groups",
    "load",
    "load_sharded",
    "CheckpointError",
    "global_norm",
    "flatten",
    "Flat",
    "Bits",
    "available_backends",
    "backend_status",
    "use_backend",
    "BackendUnavailableError",
]
