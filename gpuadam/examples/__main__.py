"""python -m gpuadam.examples: list the examples."""

import importlib
import sys

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


def main():
    """Print each example's name and the first line of its docstring."""
    print("python -m gpuadam.examples.NAME runs one; --help shows its options.\n")
    for name in NAMES:
        text = importlib.import_module(f"{__package__}.{name}").__doc__ or ""
        print(f"{name:{max(map(len, NAMES))}}  {text.splitlines()[0]}")
    print('\nWhat they need: pip install "gpuadam[examples]"; torch_digits needs torch too, sharded_digits the extra mpi')


if __name__ == "__main__":
    sys.exit(main())
