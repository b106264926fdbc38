"""The bar of a long step, by the package rich."""

import contextlib


def bar_by_rich():
    """Return the context of a step's bar: it takes a number of elements, and gives the function that counts them."""
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


def no_bar(elements):
    """Show nothing."""
    return contextlib.nullcontext(lambda n: None)
