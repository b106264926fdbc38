"""The types of arguments: what the annotations of all signatures are made of.

Any array that shares its memory is an `Array`: of NumPy, CuPy, Numba, torch or JAX, whether or not these are installed. A
program whose functions take what `gpuadam.Adam` takes annotates them with the same names:

>>> import numpy as np, gpuadam
>>> from gpuadam.typing import LearningRate, Params
>>> def trained(params: Params, lr: LearningRate) -> gpuadam.Adam:
...     return gpuadam.AdamW(params, lr=lr, weight_decay=0.1)
>>> trained({"w": np.ones(3, "float32")}, lambda step: 1.0 / step)
AdamW(1 parameter, 3 elements, steps=0, lr=<<lambda>>, weight_decay=0.1)

| alias | values |
|---|---|
| `Array`, `OptionalArray` | one array: `numpy.ndarray`, `DLPackArray`, `CudaArray` or `gpuadam.Bits`; or None |
| `Params`, `GroupParams` | parameters: one array, a sequence or a dict of arrays, or a list of `Group`; those of one group |
| `LikeParams`, `LikeGroupParams` | arrays of this structure, with None where there is none: gradients, copies, rates |
| `ArrayTree` | arrays in sequences and dicts, in any depth; None where there is none |
| `Number`, `Integer` | numbers of Python or NumPy |
| `LearningRate` | a number, a callable of the number of the step, or, if `capturable`, an array of one number |
| `Betas` | beta1 and beta2 |
| `Bounds`, `ArrayBounds`, `ParamBounds` | low and high: numbers or None; also arrays; also arrays of the structure of `Params` |
| `Stream` | a stream of CuPy, Numba (`CudaStream`) or torch (`TorchStream`), or the handle of one |
| `FilePath` | the path of a file or of a folder |
| `Algorithm`, `Formula`, `Complex`, `Components` | the choices of the arguments of these names |
| `StateDtype`, `Format`, `BitsFormat` | names of formats: of state, of parameters, of what `gpuadam.Bits` holds |
| `Reduction`, `Side` | the choices of `reduction` of `gpuadam.ShardedAdam`, and of `update` of `gpuadam.OffloadAdam` |
| `RuleChanges` | the keywords of `gpuadam.Rule.scalars` |

The names of backends are `str`, because `gpuadam.backends.register` adds to them.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

import numpy as np

from .kernels.view import Bits, BitsFormat

__all__ = [  # noqa: RUF022 - in the order of the page
    "Array",
    "OptionalArray",
    "DLPackArray",
    "CudaArray",
    "Params",
    "GroupParams",
    "Group",
    "LikeParams",
    "LikeGroupParams",
    "ArrayTree",
    "Number",
    "Integer",
    "LearningRate",
    "Betas",
    "Bounds",
    "ArrayBounds",
    "ParamBounds",
    "Stream",
    "CudaStream",
    "TorchStream",
    "FilePath",
    "Algorithm",
    "Formula",
    "Complex",
    "Components",
    "StateDtype",
    "Format",
    "BitsFormat",
    "Reduction",
    "Side",
    "RuleChanges",
]


class DLPackArray(Protocol):
    """An array that shares its memory through DLPack, such as those of CuPy, torch and JAX."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a capsule with the memory."""

    def __dlpack_device__(self) -> Any:
        """Return the type of the device and its number."""


class CudaArray(Protocol):
    """An array in CUDA memory that describes it as CuPy's and Numba's arrays do."""

    @property
    def __cuda_array_interface__(self) -> Any:
        """Address, shape, strides and type of the memory."""


class CudaStream(Protocol):
    """A stream that names itself by the protocol of CUDA's Python libraries: one of CuPy or Numba."""

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol and the handle."""


class TorchStream(Protocol):
    """A stream of torch."""

    @property
    def cuda_stream(self) -> int:
        """The handle."""


Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
Integer: TypeAlias = int | np.integer[Any]
Array: TypeAlias = np.ndarray[Any, Any] | DLPackArray | CudaArray | Bits
OptionalArray: TypeAlias = Array | None

# A list has one type for arrays and groups, because mypy finds no dict of a `Group` in a union of lists
GroupParams: TypeAlias = Array | Mapping[str, Array] | Iterable[Array]
LikeGroupParams: TypeAlias = OptionalArray | Mapping[str, OptionalArray] | Iterable[OptionalArray]
LikeParams: TypeAlias = LikeGroupParams | Iterable[OptionalArray | Iterable[OptionalArray] | Mapping[str, LikeGroupParams]]
ArrayTree: TypeAlias = OptionalArray | Iterable["ArrayTree"] | Mapping[Any, "ArrayTree"]

LearningRate: TypeAlias = Number | Array | Callable[[int], Number | Array]
Betas: TypeAlias = tuple[Number, Number] | list[float]
Bounds: TypeAlias = tuple[Number | None, Number | None] | list[float] | list[float | None]
ArrayBounds: TypeAlias = Bounds | tuple[Number | OptionalArray, Number | OptionalArray]
ParamBounds: TypeAlias = Bounds | tuple[Number | LikeParams, Number | LikeParams]

Stream: TypeAlias = int | CudaStream | TorchStream
FilePath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

Algorithm: TypeAlias = Literal["adam", "nadam", "radam", "adamax"]
Formula: TypeAlias = Literal["torch", "apex", "eps-hat", "optax"]
Complex: TypeAlias = Literal["joint", "parts"]
Components: TypeAlias = Literal[1, 2, 3, 4]
StateDtype: TypeAlias = Literal["float32", "float64", "bfloat16", "8bit"]
Format: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]
Reduction: TypeAlias = Literal["mean", "sum"]
Side: TypeAlias = Literal["auto", "device", "host"]


class _NeededInGroup(TypedDict):
    params: GroupParams


class Group(_NeededInGroup, total=False):
    """A group of parameters: a dict with "params", and hyperparameters that go before those of the optimizer.

    Its other keys, each of which may be missing, are "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "clip_value",
    "bounds", "complex" and "components", as `gpuadam.Adam` has them.

    >>> import numpy as np, gpuadam
    >>> from gpuadam.typing import Group
    >>> groups: list[Group] = [{"params": [np.ones(2)], "lr": 1e-2}, {"params": {"b": np.ones(1)}, "weight_decay": 0.0}]
    >>> opt = gpuadam.AdamW(groups)
    """

    lr: LearningRate
    betas: Betas
    eps: Number
    weight_decay: Number
    amsgrad: bool
    maximize: bool
    clip_value: Number | None
    bounds: ParamBounds | None
    complex: Complex | None
    components: Components


class RuleChanges(TypedDict, total=False):
    """What `gpuadam.Rule.scalars` and `struct` can be told of one step by keywords: lr, betas, eps, and so on."""

    lr: Number
    betas: Betas
    eps: Number
    weight_decay: Number
    grad_scale: Number
    clip_value: Number | None
    bounds: Bounds | None


Params: TypeAlias = Array | Mapping[str, Array] | Iterable[Array | Group]
