"""How a long loop says how far it is: a bar on a terminal, plain lines in a pipe."""

from . import output


def counted(console, total, describe, every):
    """Yield 1 to total. describe(n), asked after the n-th turn, returns a line on it.

    On a terminal a bar shows the last of some fifty lines; elsewhere every `every`-th line is printed.
    """
    (progress,) = output.need("demo", "rich.progress")
    if not console.is_terminal:
        for n in range(1, total + 1):
            yield n
            if n % every == 0:
                console.print(describe(n), highlight=False)
        return
    with progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        for n in range(1, total + 1):
            yield n
            shown = n % max(1, total // 50) == 0
            bar.update(task, advance=1, **({"description": describe(n)} if shown else {}))
