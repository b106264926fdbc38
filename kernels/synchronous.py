"""GPUADAM_SYNC=1: wait for each launch, so that what goes wrong in it is raised by the call that made it, under its name.

A launch returns before the GPU begins. An error there, such as an access to memory that was freed, is reported by whatever asks
the driver next, often another library. This is what CUDA_LAUNCH_BLOCKING is to CUDA, for the launches of this package alone.
Launches that a graph captures are not waited for: they do not run yet.
"""

import os

ON = os.environ.get("GPUADAM_SYNC") == "1"


def launch(backend, stream, what, run, *arguments):
    """Run a launch on a stream of the current device, and wait for it. what: the operation and its sizes, for the error.

    Raises RuntimeError if the launch fails, and another if work that was enqueued before it has failed already.
    """
    if backend.is_capturing(stream):
        run(*arguments)
        return
    try:
        backend.synchronize_stream(stream)
    except Exception as error:  # CuPy's and the driver's, which differ
        raise RuntimeError(
            f"work on stream {stream} had failed before {backend.name} launched {what}: {_reported(error)}. The error is of "
            "something enqueued before; CUDA_LAUNCH_BLOCKING=1 or `compute-sanitizer python ...` finds it"
        ) from error
    try:
        run(*arguments)
        backend.synchronize_stream(stream)
    except Exception as error:  # likewise, and Numba's
        raise RuntimeError(
            f"{what} failed on {backend.name}, stream {stream}: {_reported(error)}. If that is of an address, the memory of an "
            "array was freed, or is smaller than the array says (`compute-sanitizer python ...` finds where), and CUDA is of no "
            "more use in this process: start another"
        ) from error


def updates_of(updates, loop):
    """Return what an error calls the launch that makes some `layout.Update`s."""
    count, size = len(updates), sum(update.views[0].size for update in updates)
    shown = [_update_of(update.views) for update in updates[:3]]
    rest = f" and {count - 3:,} more" if count > 3 else ""
    return (
        f"the update of {'; '.join(shown)}{rest} ({count:,} parameter{'s' * (count != 1)}, {size:,} elements, kernel {loop!r}, "
        f"device {updates[0].views[0].device})"
    )


def _update_of(views):
    param, *others = views
    beside = ", ".join(f"{view.format} at {view.pointer:#x}" for view in others)
    return f"{param.name} of shape {param.shape}, {param.format} at {param.pointer:#x} (beside it {beside})"


def _reported(error):
    return f"{type(error).__name__}: {error}"
