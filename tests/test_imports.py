"""Names that are imported inside functions exist: of those in tests for a GPU no run without one would tell."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("tests", "benchmarks", "gpuadam", "kernels")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Packages that need not be installed, or not work here
OPTIONAL = {
    *(
        "cuda",
        "cupy",
        "cupyx",
        "numba_cuda",
        "torch",
        "jax",
        "jaxlib",
        "optax",
        "deepspeed",
        "thinc",
        "drjit",
        "mpi4py",
        "ml_dtypes",
        "safetensors",
    ),
    *("matplotlib", "rich", "scipy", "skimage", "sklearn", "gpu_code"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_in_functions_is_there(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    folder = path.relative_to(ROOT).parent.parts
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for node in {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}:
        module = ".".join([*folder[: len(folder) - node.level + 1] * bool(node.level), *filter(None, [node.module])])
        names = [alias.name for alias in node.names]
        try:
            found = importlib.import_module(module)
            for name in names:
                assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")
        except (ImportError, pytest.skip.Exception) as error:
            missing = {name.partition(".")[0] for name in (module, getattr(error, "name", None) or "")}
            if not missing & OPTIONAL and not module.startswith("numba.cuda"):
                raise
