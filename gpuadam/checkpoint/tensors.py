"""The arrays that a checkpoint holds: which they are, what they are called in a file, and how they become tensors of it."""

from functools import partial
from typing import Any, NamedTuple

from .. import backends, checks
from ..groups import named_params
from ..kernels import array_bytes
from ..kernels.view import View
from ..parameters import check_state
from ..state import shape
from .safetensors import Tensor

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int16": "I16", "uint8": "U8"}
PARAM = "param"  # beside the keys of the state


class Section(NamedTuple):
    """The elements start ... stop - 1, in C order, of a parameter, or of its state the elements that belong to them."""

    param: str  # the name of the parameter
    start: int
    stop: int
    key: str  # "m", "v", ... of the state, or PARAM
    backend: Any
    view: View
    numbers: int = 1  # of the parameter that share a v
    is_master: bool = False  # it is a parameter's exact value, which is state

    @property
    def array_name(self):
        """The name of the whole array: "w.m"."""
        return f"{self.param}.{self.key}"

    @property
    def piece_name(self):
        """The name of a tensor with this section alone: "w[4096:8192].m"."""
        return f"{self.param}[{self.start}:{self.stop}].{self.key}"

    def tensor(self, name):
        """Return the elements as a Tensor."""
        return Tensor(name, DTYPES[self.view.format], self.view.shape, partial(array_bytes.chunks, self.backend, self.view))


def sections(opt, ranges=None):
    """Return the Sections of an `Adam`: each parameter, followed by the arrays of its state.

    A float32 master is the parameter, because it is its exact value.

    ranges: of an optimizer whose parameters are parts of others, name -> (the whole parameter's name, start, stop).
    """
    listed = []
    for name, param in named_params(opt.groups):
        label = opt.arrangement.label(name)
        check_state(opt.parameters[name], label)
        kept = {key: opt.array_of_state(name, key) for key in opt.state[name] if key != "step"}
        master = kept.pop("master", None)
        of_param = ("master of " + label, master) if master is not None else (label, param)
        viewed = {PARAM: backends.choose([of_param], opt.backend if master is None else opt.state_backend)}
        for key, array in kept.items():
            viewed[key] = backends.choose([(f"{key} of {label}", array)], opt.state_backend)
        numbers = opt.parameters[name].kind.numbers
        _check(viewed, opt.options, numbers)
        whole, start, stop = ranges[name] if ranges else (name, 0, viewed[PARAM][1][0].size)
        listed += [
            Section(whole, start, stop, key, backend, view, numbers, master is not None and key == PARAM)
            for key, (backend, (view,)) in viewed.items()
        ]
    return listed


def _check(viewed, options, numbers):
    """Refuse state that has another shape or format than the parameter's: it could be written, and would not load."""
    _, (param,) = viewed[PARAM]
    kept = options.kept(param, "max_v" in viewed, numbers) | {PARAM: param.format}
    for key, (_, (view,)) in viewed.items():
        its_shape = param.shape if key == PARAM else shape(key, param.shape, numbers)
        if (view.shape, view.format) != (its_shape, kept[key]):
            raise ValueError(
                f"{view.name} is {view.format} of shape {view.shape}, and must be {kept[key]} of shape {its_shape}"
            )
        checks.one_format(view, (kept[key],))  # bytes in the other order would be read in this machine's


def chosen(sections, with_params):
    """Return the Sections of the state, and also those of the parameters if with_params is true."""
    return [section for section in sections if with_params or section.key != PARAM or section.is_master]
