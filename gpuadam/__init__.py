"""The fused Adam update for arrays: the same bits from CuPy, Numba CUDA and the CPU."""

from .backends import BackendUnavailableError, available_backends, backend_status, use_backend
from .checkpoint import CheckpointError
from .checkpoint.loading import load
from .clipping import global_norm
from .flat import Flat, flatten
from .functional import adam_step
from .groups import decay_groups
from .kernels.view import Bits
from .offload import OffloadAdam
from .optimizer import Adam, AdaMax, AdamW, NAdam, RAdam
from .sharded import transports
from .sharded.loading import load_sharded
from .sharded.optimizer import ShardedAdam, ShardedAdamW
from .version import __version__ as __version__

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
