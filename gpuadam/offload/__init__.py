"""Updates larger than a device's memory, or than the machine's. This page is for those who change it.

`optimizer.py` is `OffloadAdam`: Adam whose moments lie elsewhere. `jobs.py` checks the arrays of a step, `chunks.py` cuts them
into *chunks*, pieces of one or more parameters that fit in a part of the budget. They go through three stages, *fetch*, *update*
and *store*, several chunks at once (`pipeline.py`); `stages.py` has the stages of an update on the host and those of one on a
GPU. `mapped.py` is memory that is a file, `folder.py` the files that hold state and what says whether they can be relied on,
`state.py` state in memory.
"""

from .optimizer import OffloadAdam

__all__ = ["OffloadAdam"]
