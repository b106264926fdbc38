"""python -m gpuadam.examples: list the examples; python -m gpuadam.examples NAME: run one."""

import importlib
import runpy
import sys

from ..kernels.messages import shown
from ..terminal.console import Console
from ..terminal.output import CommandError, ending_plainly

NAMES = (
    "digits",
    "gaussians",
    "tomography",
    "line_scan",
    "ptychography",
    "photons",
    "thomson",
    "torch_digits",
    "sharded_digits",
)


@ending_plainly()
def main() -> None:
    """Run the example that is named, with the options after its name, or print what each shows."""
    name = next(iter(sys.argv[1:]), "--help")
    if name in NAMES:
        del sys.argv[1]
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
    elif name not in ("-h", "--help"):
        raise CommandError(f"there is no example {shown(name)}, only {', '.join(NAMES)}")
    console = Console()
    console.print("python -m gpuadam.examples NAME runs one; with --help it shows its options.\n")
    width = max(map(len, NAMES))
    for name in NAMES:
        text = importlib.import_module(f"{__package__}.{name}").__doc__ or ""  # none under python -OO
        first = next(iter(text.splitlines()), "")
        console.print(f"{name:{width}}  {first}".rstrip(), indent=width + 2)
    console.print(
        '\nWhat they need: pip install "gpuadam[examples]"; torch_digits needs the extra torch too, sharded_digits mpi'
    )


if __name__ == "__main__":
    main()
