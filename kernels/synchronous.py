"""GPUADAM_SYNC=1: wait for each launch, so that its error is raised by the call that made it, under its name.

A launch returns before the GPU begins. An error there, such as an access to memory that was freed, is reported by whatever asks
the driver next, often another library. This is what CUDA_LAUNCH_BLOCKING is to CUDA, for the launches of this package alone.
Launches that a graph captures are not waited for: they do not run yet.
"""

from gpuadam.kernels import switches

ON = switches.is_on("GPUADAM_SYNC")


def launch(backend, stream, what, run, *arguments):
    """Call run(*arguments), which launches a kernel on a stream of the current device; with GPUADAM_SYNC=1 wait for it.

    what: a function that returns the operation and its sizes, for the error.
    Raises RuntimeError if the launch fails, and another if work that was enqueued before it has failed already.
    """
    if not ON or backend.is_capturing(stream):
        run(*arguments)
        return
    try:
        backend.synchronize_stream(stream)
    except Exception as error:  # CuPy's and the driver's, which differ
        raise RuntimeError(
            f"work on stream {stream} had failed before {backend.name} launched {what()}: {_reported(error)}. The error is of "
            "something enqueued before; CUDA_LAUNCH_BLOCKING=1 or `compute-sanitizer python ...` finds it"
        ) from error
    try:
        run(*arguments)
        backend.synchronize_stream(stream)
    except Exception as error:  # CuPy's, the driver's, and Numba's
        raise RuntimeError(
            f"{what()} failed on {backend.name}, stream {stream}: {_reported(error)}. If that is of an address, the memory of an "
            "array was freed, or is smaller than the array says (`compute-sanitizer python ...` finds where), and CUDA is of no "
            "more use in this process: start another"
        ) from error


def text_of_updates(updates, loop):
    """Return what an error calls the launch that makes some `layout.Update`s."""
    shown = [_text_of(update.views) for update in updates]
    size, device = sum(update.views[0].size for update in updates), updates[0].views[0].device
    count = f"{len(updates):,} parameter{'s' * (len(updates) != 1)}"
    return f"the update of {_first_three(shown, '; ')} ({count}, {size:,} elements, kernel {loop!r}, device {device})"


def text_of_norm(names, size, plan, number, *, device):
    """Return what an error calls the launch of a pass, counted from 1, of the global norm of arrays with names."""
    one = plan.passes[number - 1]
    return (
        f"pass {number} of {len(plan.passes)} of the global norm of {_first_three(names, ', ')} "
        f"({len(names):,} arrays, {size:,} elements; {one.form.format}, {one.chunks:,} chunks, device {device})"
    )


def _first_three(texts, separator):
    return separator.join(texts[:3]) + (f" and {len(texts) - 3:,} more" if len(texts) > 3 else "")


def _text_of(views):
    param, *others = views
    beside = ", ".join(f"{view.format} at {view.pointer:#x}" for view in others)
    return f"{param.name} of shape {param.shape}, {param.format} at {param.pointer:#x} (beside it {beside})"


def _reported(error):
    return f"{type(error).__name__}: {error}"
