"""The fused Adam update for arrays: the same bits from CuPy, Numba CUDA and the CPU.

>>> import numpy as np
>>> import gpuadam
>>> params = {"w": np.array([0.5, -1.0, 2.0], "float32"), "b": np.array([0.0], "float32")}
>>> opt = gpuadam.AdamW(params, lr=0.1)
>>> opt.step({name: 2 * p for name, p in params.items()})  # a gradient

Arrays are updated in place. So write into them, `params["w"][...] = x`; a step refuses a dict in which another array has taken
the place of one, because it would update the array before.

This is the reference. It has a guide, pages about larger subjects, and below the classes and functions.

| subject | page |
|---|---|
| arrays, backends, streams; groups, schedules, weight decay | `gpuadam.guide.arrays_and_groups` |
| bfloat16, float16 and 8-bit state | `gpuadam.guide.narrow_numbers` |
| unscaling, clipping, running means, CUDA graphs | `gpuadam.guide.whole_step` |
| complex numbers, bounds, parts of arrays, the change, norms for stopping | `gpuadam.guide.array_programs` |
| the numbers of the Adam that a program has | `gpuadam.guide.bring_your_adam` |
| the update in a kernel of your own: `Rule` | `gpuadam.guide.own_kernels` |
| which options go together | `gpuadam.guide.options` |
| PyTorch and JAX | `gpuadam.guide.pytorch`, `gpuadam.torch` |
| the arithmetic, its evidence, its limits | `gpuadam.guide.how_exact` |
| what has been measured | `gpuadam.guide.how_fast` |
| nine short programs | `gpuadam.guide.examples` |
| saving and loading; the state of torch and optax | `gpuadam.checkpoint`, `gpuadam.foreign_state` |
| many ranks | `gpuadam.sharded` |
| state larger than a memory | `gpuadam.offload` |
| bytes and time of a step, before a machine is rented | `gpuadam.planning` |
| the types of arguments | `gpuadam.typing` |
| testing without a GPU; the float64 reference | `gpuadam.testing`, `gpuadam.reference` |
| adding a variant, a format or a backend | `gpuadam.kernels` |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .backends import BackendUnavailableError, available_backends, backend_status, use_backend
from .clipping import global_norm
from .family import AdaMax, AdamW, NAdam, RAdam
from .flat import Flat, flatten
from .functional import adam_step
from .groups import decay_groups
from .kernels.messages import shown
from .kernels.view import Bits
from .optimizer import Adam
from .version import __version__ as __version__

__all__ = [  # noqa: RUF022 - in the order of the reference
    "adam_step",
    "Rule",
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
    "load_offload",
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

# Loaded on first use, as `gpuadam.torch`, because a program that uses none should not wait for them: pages of the reference,
# other modules, and names by the module that has them
_PAGES = ("backends", "foreign_state", "planning", "reference", "testing", "torch", "typing")
_MODULES = {name: name for name in (*_PAGES, "checkpoint", "offload", "sharded")} | {"transports": "sharded.transports"}
_PLACES = {
    "CheckpointError": "checkpoint",
    "load": "checkpoint.loading",
    "OffloadAdam": "offload",
    "load_offload": "offload.loading",
    "Rule": "rule",
    "ShardedAdam": "sharded.optimizer",
    "ShardedAdamW": "sharded.optimizer",
    "load_sharded": "sharded.loading",
}

if TYPE_CHECKING:
    from . import backends as backends
    from . import foreign_state as foreign_state
    from . import planning as planning
    from . import reference as reference
    from . import testing as testing
    from . import torch as torch
    from . import typing as typing
    from .checkpoint import CheckpointError
    from .checkpoint.loading import load
    from .offload import OffloadAdam
    from .offload.loading import load_offload
    from .rule import Rule
    from .sharded import transports
    from .sharded.loading import load_sharded
    from .sharded.optimizer import ShardedAdam, ShardedAdamW
else:  # a type checker that saw this would take every name for one of the package

    def __getattr__(name):
        if name in _PLACES:
            found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
            return found
        if name in _MODULES:
            try:
                module = globals()[name] = importlib.import_module(f"{__name__}.{_MODULES[name]}")
                return module
            except ModuleNotFoundError as error:  # an AttributeError, so that hasattr and help() work
                wanted = '"gpuadam[torch]"' if error.name == "torch" else error.name
                raise AttributeError(f"gpuadam.{name} needs {error.name}: pip install {wanted}", name=name) from error
        raise AttributeError(f"module 'gpuadam' has no attribute {shown(name)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PAGES, "__version__"])
