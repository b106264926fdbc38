"""python -m gpuadam.examples: list the examples."""

import ast
import sys
from pathlib import Path

NAMES = ("digits", "gaussians", "tomography", "thomson", "torch_digits", "sharded_digits")


def main():
    """Print each example's name and the first line of its docstring; none of them is imported."""
    print("python -m gpuadam.examples.NAME runs one; --help shows its options.\n")
    width = max(map(len, NAMES))
    for name in NAMES:
        module = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        first, *_ = (ast.get_docstring(module) or "").splitlines()
        print(f"{name:{width}}  {first}")
    print('\nWhat they need: pip install "gpuadam[examples]"; torch_digits needs torch too, sharded_digits the extra mpi')


if __name__ == "__main__":
    sys.exit(main())
