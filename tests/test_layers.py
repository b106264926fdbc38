"""The house: imports go down, there is no circle, and no file uses what another keeps private."""

import ast
import functools
from pathlib import Path

import pytest

import gpuadam

ROOT = Path(gpuadam.__file__).parent

# From the ground up. A module imports from its own floor and from those below, but no circle; `name.*` is a package.
FLOORS = [
    ("kernels.*",),
    ("typing", "strict_json"),
    ("checks", "torch_tensors", "backends", "terminal.*", "under_way", "version"),
    ("hyperparameters", "state", "state_conversion", "reference", "holders"),
    ("options", "groups", "device_step", "step_counts", "clipping", "remembered", "flat", "step_arrays"),
    ("step_norms",),
    ("numpy_batches",),
    ("description", "gradients", "update", "repeated", "repeated_on_cpu", "repeated_on_gpu", "functional", "rule"),
    ("parameters",),
    ("sharded.transports.*", "sharded.agreement", "sharded.layout", "checkpoint", "checkpoint.safetensors"),
    ("checkpoint.saving", "checkpoint.*"),
    ("state_dict", "growing", "optimizer", "family"),
    ("checkpoint.loading", "foreign_state", "sharded.*", "offload.*", "torch.*"),
    ("sharded.loading", "offload.loading", "planning.*"),
    ("", "testing.*", "guide.*"),
    ("examples.*",),
    ("cli.*", "__main__", "__pyinstaller.*"),
]

# What is imported inside functions: where it is used, because it is heavy or may not be there
HEAVY = {
    "cupy", "numba", "rich", "matplotlib", "torch", "jax", "mpi4py", "sklearn", "skimage", "PIL", "llvmlite", "optax", "cuda",
    "safetensors", "ml_dtypes", "pytest",
}  # fmt: skip
ON_USE = {"checkpoint.saving"}  # modules of ours that are imported inside functions, for programs that have no use for them

# Names of other libraries; `_mmap` is NumPy's, `_cache` Numba's, and nothing public does what they do
OF_LIBRARIES = {"_replace", "_fields", "_asdict", "_foreach_add_", "_foreach_copy_", "_version", "_mmap", "_cache"}


@functools.cache
def files():
    """Return module -> its path, the name without "gpuadam."."""
    found = {}
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):  # the second is a link
        if "pytest_plugin" not in path.parts:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(module):
    return ast.parse(files()[module].read_text())


def package_of(module):
    is_package = files()[module].name == "__init__.py"
    return ["gpuadam", *module.split(".")] if module and is_package else ["gpuadam", *module.split(".")[:-1]]


def imports(module):
    """Yield (node, name of the module of gpuadam, the name taken from it or None, the name here) of all imports."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gpuadam":
                    yield node, alias.name.removeprefix("gpuadam").lstrip("."), None, alias.asname or "gpuadam"
        elif isinstance(node, ast.ImportFrom):
            package = package_of(module)
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            if base.split(".")[0] != "gpuadam":
                continue
            base = base.removeprefix("gpuadam").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                here = alias.asname or alias.name
                yield (node, inner, None, here) if inner in files() else (node, base, alias.name, here)


def graph():
    return {module: {other for _, other, *_ in imports(module) if other != module} for module in files()}


def floor_of(module):
    """Return the floor of a module: an exact name goes before a pattern, a longer pattern before a shorter one."""
    best = None
    for number, floor in enumerate(FLOORS):
        for pattern in floor:
            package = pattern.removesuffix(".*")
            fits = module == pattern or (pattern.endswith(".*") and (module == package or module.startswith(package + ".")))
            if fits and (best is None or len(pattern) + 99 * (module == pattern) > best[0]):
                best = len(pattern) + 99 * (module == pattern), number
    assert best is not None, f"{module} is on no floor: add it to FLOORS"
    return best[1]


def test_imports_go_down():
    upward = [f"{m} -> {o}" for m, others in graph().items() for o in others if floor_of(o) > floor_of(m)]
    assert upward == []


def test_there_is_no_circle():
    left = graph()
    while left:
        free = [module for module, others in left.items() if not others & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        for module in free:
            del left[module]


def test_kernels_import_nothing_of_gpuadam_but_kernels():
    others = {
        f"{m} -> {o}" for m, found in graph().items() for o in found if m.startswith("kernels") > o.startswith("kernels")
    }
    assert others == set()


@pytest.mark.parametrize("module", sorted(files()))
def test_an_import_inside_a_function_is_of_something_heavy(module):
    inside, ours = [], {node: (base, name) for node, base, name, _ in imports(module)}
    for function in (n for n in ast.walk(parsed(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))):
        for node in ast.walk(function):
            if node in ours:
                inside += {".".join(filter(None, ours[node]))} - ON_USE
            elif isinstance(node, ast.ImportFrom):
                inside += [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Import):
                inside += [alias.name.split(".")[0] for alias in node.names]
    assert set(inside) - HEAVY == set()


@pytest.mark.parametrize("module", sorted(files()))
def test_no_private_name_of_another_file_is_used(module):
    tree = parsed(module)
    taken = [name for _, _, name, _ in imports(module) if name and is_private(name)]
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_self(n.value)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value) and node.attr not in own:
            taken.append(ast.unparse(node))
    assert [name for name in taken if name.rpartition(".")[2] not in OF_LIBRARIES] == []


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")
