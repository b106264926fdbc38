"""Reading the state of a checkpoint into an optimizer whose moments have another format."""

import contextlib
import itertools

from .. import checks
from ..kernels import array_bytes
from ..state import IN_MEMORY, dtype_of, kept
from ..state_conversion import CONVERTED, convert
from .tensors import PARAM


def as_saved(sections, state_dtype):
    """Return an optimizer's Sections with the formats that the checkpoint has. state_dtype: the saved option.

    Raises ValueError for state that no optimizer has.
    """
    saved = []
    for param, state in _by_parameter(sections):
        keys = [section.key for section in state]
        master = "remainder" if "remainder" in keys else None
        formats = kept(param.view.format, state_dtype, "max_v" in keys, master, "ema" in keys)
        checks.combination("adam", formats, stochastic=False)  # which the optimizer's own formats may not show
        saved.append(param)
        for key, format in formats.items():
            view = param.view._replace(dtype=dtype_of(format), bits=format if format in IN_MEMORY else "")
            saved.append(param._replace(key=key, view=view, is_master=False))
    return saved


def read_state(stored, sections, saved):
    """Read the state of all Sections. saved: what `as_saved` returned of them."""
    for (param, state), (_, in_file) in zip(_by_parameter(sections), _by_parameter(saved), strict=True):
        moments = {section.key: section for section in state if section.key in CONVERTED}
        sources = {section.key: section.view.format for section in in_file if section.key in CONVERTED}
        if sources == {key: section.view.format for key, section in moments.items()}:
            others = state
        else:
            others = [section for section in state if section.key not in CONVERTED]
            buffers = {
                key: (section.view.format, array_bytes.buffers(section.backend, section.view))
                for key, section in moments.items()
            }
            with contextlib.ExitStack() as files:
                chunks = {
                    key: (format, files.enter_context(contextlib.closing(stored.chunks(param, key))))
                    for key, format in sources.items()
                }
                convert(chunks, buffers, param.stop - param.start, param.numbers)
        for section in [param] * param.is_master + others:
            stored.read(section)


def _by_parameter(sections):
    """Yield the Section of each parameter, or of a part of one, and a list of those of its state."""
    for _, of_one in itertools.groupby(sections, lambda section: (section.param, section.start, section.stop)):
        param, *state = of_one
        assert param.key == PARAM
        yield param, state
