"""Do mypy and pyright accept what users write, and refuse what they must not write?

    python tests/typed/check.py [--checker mypy|pyright] [--installed torch ...] [--folder FOLDER]

It needs mypy and pyright; `pip install "pyright[nodejs]"` brings the node that pyright runs on. Other libraries, such as torch
and CuPy, may be missing. Checked are, with `mypy --strict` and with pyright in its basic and in its strict mode:

    right_uses.py                          no error
    the Python of README.md                no error
    that of the guide and of all           no error; functions that Numba compiles have no annotations
      docstrings that the reference shows
    gpuadam/examples                       no error of gpuadam's types: the programs themselves have no annotations
    wrong_uses.py                          an error in each line, of the codes that its comment has, and in no other line

They are copied into a folder outside the repository, as files of a user.
"""

import argparse
import ast
import doctest
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WRONG = "wrong_uses.py"
# Packages that are not all installed where this runs, or have no types: all that is in them is taken for Any
OTHERS = [
    "cupy",
    "cupyx",
    "jax",
    "matplotlib",
    "mpi4py",
    "numba",
    "numba.cuda",
    "numba_cuda",
    "optax",
    "skimage",
    "sklearn",
    "torch",
]
STUB = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"
MYPY = """
[mypy]
strict = True
python_version = 3.10
[mypy-gpuadam.*]
follow_imports = silent
"""
# What strict modes say of functions that Numba compiles, and of numbers whose dtype NumPy's types do not know
OF_EXAMPLES = {"untyped-decorator", "reportUntypedFunctionDecorator"}
OF_EXAMPLES |= {f"reportUnknown{what}Type" for what in ("Argument", "Lambda", "Member", "Parameter", "Variable")}
# and of docstrings, which define functions in passing and print by expressions
OF_PAGES = OF_EXAMPLES | {"no-untyped-def", "no-untyped-call", "reportMissingParameterType", "reportPossiblyUnboundVariable"}
OF_PAGES |= {f"reportUnused{what}" for what in ("Expression", "Import", "Variable")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checker", choices=("mypy", "pyright"), help="one of the two; by default both")
    parser.add_argument("--installed", nargs="*", default=[], help="libraries whose own types are taken, such as torch")
    parser.add_argument("--folder", type=Path, help="where the files are written, to look at; by default they are temporary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        n = write(folder, options.installed)
        wrong = 0
        for name, errors in checks(folder, options.checker):
            lines = [f"  {error}" for error in differences(folder, name, errors)]
            print(
                "\n".join(
                    [f"{name}: {n} files, {len(expected(folder, 'mypy'))} wrong uses, {len(lines)} differences", *lines]
                )
            )
            wrong += len(lines)
    return int(bool(wrong))


# The files


def write(folder, installed):
    """Write the files of a user. Return how many. installed: libraries that are there, with types of their own."""
    files = {path.name: path.read_text() for path in HERE.glob("*_uses.py")}
    for k, block in enumerate(blocks((ROOT / "README.md").read_text())):
        files[f"readme_{k}.py"] = block
    for path in sorted((ROOT / "gpuadam").rglob("*.py")):
        name = "_".join(path.relative_to(ROOT / "gpuadam").with_suffix("").parts)
        if path.parent.name == "examples" and path.stem not in ("__init__", "__main__", "command_line"):
            files[f"example_{name}.py"] = as_program(path.read_text())
        for k, code in enumerate(of_page(path.read_text(), path.parent.name == "guide")):
            files[f"page_{name}_{k}.py"] = code
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "mypy.ini").write_text(MYPY)
    for library in set(OTHERS) - set(installed):
        stub = folder / "typings" / library.replace(".", "/")
        stub.mkdir(parents=True, exist_ok=True)
        (stub / "__init__.pyi").write_text(STUB)
    return len(files)


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def as_program(text):
    """Return an example as a file of its own: with the names of its package in full."""
    text = re.sub(r"^from \.\.(\w+)", r"from gpuadam.\1", text, flags=re.M)
    text = re.sub(r"^from \.(\w+)", r"from gpuadam.examples.\1", text, flags=re.M)
    return re.sub(r"^from \. import", "from gpuadam.examples import", text, flags=re.M)


def of_page(text, is_page):
    """Yield the Python in the docstrings of a file: blocks, and the examples of each docstring, of public names alone."""
    tree = ast.parse(text)
    named = [(tree, [])]
    while named:
        node, names = named.pop(0)
        docstring = ast.get_docstring(node)
        inner = [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]
        named += [(n, [*names, n.name]) for n in inner]
        if docstring and (is_page or names or isinstance(node, ast.Module)):
            yield from blocks(docstring)
            examples = doctest.DocTestParser().get_examples(docstring)
            if any(re.search(r"import .*\bgpuadam\b", example.source) for example in examples):
                yield "".join(example.source for example in examples if not example.exc_msg)


# The checkers: each gives (file, line, code, message) of each error


def checks(folder, checker):
    """Yield the name of each run and its errors."""
    if checker in (None, "mypy"):
        yield "mypy --strict", mypy(folder)
    if checker in (None, "pyright"):
        for mode in ("basic", "strict"):
            yield f"pyright, {mode}", pyright(folder, mode)


def mypy(folder):
    files = [path.name for path in sorted(folder.glob("*.py"))]
    paths = {"MYPYPATH": f"{folder / 'typings'}{os.pathsep}{ROOT}"}
    done = run([sys.executable, "-m", "mypy", "--output", "json", *files], folder, env=os.environ | paths)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode not in (0, 1) or (done.returncode and not found):
        sys.exit(f"mypy failed: {done.stdout}{done.stderr}")
    return [(Path(e["file"]).name, e["line"], e["code"], e["message"]) for e in found if e["severity"] == "error"]


def pyright(folder, mode):
    settings = {"typeCheckingMode": mode, "pythonVersion": "3.10", "extraPaths": [str(ROOT)], "ignore": ["typings"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = run(command, folder)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except (json.JSONDecodeError, KeyError):
        sys.exit(f"pyright failed: {done.stdout}{done.stderr}")
    errors = [e for e in found if e["severity"] == "error"]
    return [(Path(e["file"]).name, e["range"]["start"]["line"] + 1, e.get("rule", "syntax"), e["message"]) for e in errors]


def run(command, folder, **options):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)


# What is right


def expected(folder, checker):
    """Return line -> the codes of which a checker says one there, of wrong_uses.py."""
    found = {}
    for number, line in enumerate((folder / WRONG).read_text().splitlines(), 1):
        if comment := re.search(r"\S  # (.+), (.+)$", line):
            found[number] = set(comment[1 + (checker == "pyright")].split())
    return found


def excused(file):
    """Return the codes of errors that do not count in a file."""
    return OF_PAGES if file.startswith("page_") else OF_EXAMPLES if file.startswith("example_") else set()


def differences(folder, name, errors):
    """Return what a checker says that it should not, and what it should say, in words."""
    wanted, found = expected(folder, name.split()[0].strip(",")), {}
    texts = []
    for file, line, code, message in errors:
        first = message.splitlines()[0][:300]
        if file == WRONG:
            found.setdefault(line, set()).add(code)
        elif code not in excused(file):
            texts.append(f"{file}:{line}: {first} [{code}]")
    lines = (folder / WRONG).read_text().splitlines()
    for line in sorted(wanted.keys() | found.keys()):
        said, should = found.get(line, set()), wanted.get(line, set())
        if not said & should:
            texts.append(f"{WRONG}:{line}: {lines[line - 1].strip()}: {sorted(said)}, and not one of {sorted(should)}")
    return texts


if __name__ == "__main__":
    sys.exit(main())
