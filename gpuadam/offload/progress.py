"""The bar of a long step, by rich."""

import contextlib


def bars():
    """Return a function that makes the bar of a step of so many elements: a context that gives what advances it."""
    try:
        import rich.progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('progress=True needs the package rich: pip install "gpuadam[progress]"') from error

    @contextlib.contextmanager
    def bar(elements):
        with rich.progress.Progress(transient=True) as progress:
            task = progress.add_task("step", total=elements)
            yield lambda n: progress.advance(task, n)

    return bar
