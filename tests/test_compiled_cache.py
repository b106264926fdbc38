"""Compiled kernels on disk: found again by the next process, never one for another, and never in the way of a step."""

import functools
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numba
import numpy as np
import pytest
from cases import DTYPES, few, form_and_scalars, in_memory, state, strided_table_of, table_of

from gpuadam.kernels import adam, compiled_cache, ownership
from gpuadam.kernels.cpu_backend import backend as numba_cpu

ROOT = Path(__file__).parent.parent

# Prints the bytes of a step's result, which kernels were compiled and which loaded, and what was warned of.
STEP = """
import json, os, re, sys, warnings
import numba.core.event as ev

class Compiled(ev.Listener):
    names = []

    def on_start(self, event):
        self.names.append(event.data["dispatcher"].py_func.__qualname__)

    def on_end(self, event):
        pass

ev.register("numba:compile", Compiled())
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import numpy as np
    import gpuadam
    from gpuadam.kernels.cpu_backend import backend as numba_cpu
    {before}
    param, grad, m, v = (np.linspace(0.1, 1, 9, dtype="f4") for _ in range(4))
    gpuadam.adam_step(param, grad, m, v, 3{options})
names = [re.sub("_[0-9a-f]{{16}}$", "", name).rpartition(".")[2] for name in Compiled.names]
own = [name for name in names if name in ("serial", "read", "read_one", "read_four")]
print(json.dumps([param.tobytes().hex(), own, [f"{{w.category.__name__}}: {{w.message}}" for w in warned]]))
"""


def start(folder, options="", before="", root=ROOT, **environment):
    environment = os.environ | {"PYTHONPATH": str(root), "NUMBA_CACHE_DIR": str(folder)} | environment
    code = STEP.format(options=options, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def outcome(process):
    """Return (bytes of param, names of the kernels that were compiled, warnings)."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, f"exit code {process.returncode}: {error}"
    return json.loads(out)


def step(folder, *args, **options):
    return outcome(start(folder, *args, **options))


@functools.cache
def expected(name="adam"):
    """The bytes that STEP must print, by a kernel that no cache has seen."""
    form, scalars = form_and_scalars(name, "float32")
    kernel = numba.njit(error_model="numpy")(numba_cpu.build(adam, form, "serial").py_func)
    arrays = [np.linspace(0.1, 1, 9, dtype="f4") for _ in range(4)]
    kernel(table_of(arrays), 0, 9, 0, in_memory(scalars))
    return arrays[0].tobytes().hex()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty cache for the kernels that `build` makes from here on."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    # as in a new process: nothing has been built
    monkeypatch.setattr(numba_cpu, "build", functools.cache(numba_cpu.build.__wrapped__))
    return tmp_path


def loaded(kernel):
    return sum(kernel.stats.cache_hits.values())


NEEDED = ["read_four", "serial"]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one process has filled, and what that process printed."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, step(folder)


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(filled[0], tmp_path / "cache"))


def test_the_first_process_compiles_and_keeps_what_it_compiled(filled):
    folder, (param, compiled, warned) = filled
    assert param == expected() and sorted(compiled) == NEEDED and warned == []
    assert len(files(folder)) == len(NEEDED) and all(path.suffix == ".nbc" for path in files(folder))


def test_the_next_process_compiles_nothing(cache):
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert step(cache) == [expected(), [], []]
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == before


def test_the_next_process_does_not_wait_for_what_only_a_compiler_needs(cache):
    """What Numba can translate it learns from modules like these, which take half of a first step's time."""
    not_needed = "numba.np.linalg", "numba.typed.typeddict", "scipy.linalg"
    assert step(cache, f"); assert not set({not_needed}) & sys.modules.keys(") == [expected(), [], []]


@pytest.mark.exhaustive
def test_the_next_process_can_compile_as_well(cache):
    """What was left out to load a kernel is made up for, and machine code that was loaded goes on."""
    compiled = "import numba; assert numba.njit(lambda x: {1: x.sum()}[1])(np.ones(4)) == 4.0"
    assert step(cache, f"); {compiled}; gpuadam.adam_step(param, grad, m, v, 4, lr=0.0") == [expected(), [], []]


@pytest.mark.exhaustive
def test_another_form_is_compiled_beside_the_first(cache):
    assert step(cache, ", maximize=True") == [expected("maximize"), ["serial"], []]
    assert len(files(cache)) == len(NEEDED) + 1
    assert step(cache) == [expected(), [], []]
    assert step(cache, ", maximize=True") == [expected("maximize"), [], []]


# Damage

DAMAGE = {
    "empty": lambda data: b"",
    "short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "other bytes": lambda data: bytes(np.random.default_rng(0).integers(0, 256, len(data), "u1")),
    "zeros at the end": lambda data: data[:-4096] + bytes(4096),
    # LLVM ends the process over these, if it gets to see them
    "no object file": lambda data: data.replace(b"\x7fELF", b"\0\0\0\0"),
    "zeros in the code": lambda data: (
        data[: data.index(b"\x7fELF") + 64] + bytes(200) + data[data.index(b"\x7fELF") + 264 :]
    ),
    "a pickle of something else": lambda data: pickle.dumps({"a": 1}),
}


def one_more(x):
    return x + 1


def one_less(x):
    return x - 1


def kept(function, *key):
    """Return whether a function came out of the cache, when it is compiled as in a new process, and 5 of it."""
    dispatcher = compiled_cache.stored(numba.njit(function), *key)
    value = dispatcher(5)
    return loaded(dispatcher) == 1, value


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_and_written_again(here, damage):
    assert kept(one_more) == (False, 6)
    (path,) = files(here)
    good = path.read_bytes()
    if damage in ("no object file", "zeros in the code") and b"\x7fELF" not in good:
        pytest.skip("object files of this system are no ELF")
    path.write_bytes(DAMAGE[damage](good))
    assert path.read_bytes() != good
    assert kept(one_more) == (False, 6)
    assert kept(one_more) == (True, 6)


def test_one_functions_file_in_anothers_place_is_not_taken(here):
    kept(one_more)
    (one,) = files(here)
    kept(one_less)
    (other,) = set(files(here)) - {one}
    one.write_bytes(other.read_bytes())
    assert kept(one_more) == (False, 6)


def test_an_index_of_numbas_is_not_looked_at(here):
    kept(one_more)
    (path,) = files(here)
    path.with_name(path.name.rsplit(".", 2)[0] + ".nbi").write_bytes(b"garbage")
    assert kept(one_more) == (True, 6)


def test_a_file_that_cannot_be_read_is_compiled_and_put_in_its_place(here):
    kept(one_more)
    (path,) = files(here)
    path.unlink()
    path.symlink_to(here)  # reading it fails, as of another user's file
    assert kept(one_more) == (False, 6)
    assert kept(one_more) == (True, 6)


def test_keys_and_types_are_not_mixed_up(here):
    assert kept(one_more, "a") == (False, 6) and kept(one_more, "b") == (False, 6) and kept(one_more, "a") == (True, 6)
    dispatcher = compiled_cache.stored(numba.njit(one_more), "a")
    assert dispatcher(0.5) == 1.5 and loaded(dispatcher) == 0


# Folders that cannot be written or read


@pytest.mark.exhaustive
def test_a_folder_that_becomes_unusable_brings_a_warning_of_ours(tmp_path):
    folder = tmp_path / "cache"
    before = "import pathlib, shutil; p = pathlib.Path(os.environ['NUMBA_CACHE_DIR']); shutil.rmtree(p); p.write_text('')"
    param, compiled, warned = step(folder, before=before)
    assert param == expected() and "read_four" in compiled
    assert len(warned) == len(NEEDED) - 1
    assert all(
        w.startswith("RuntimeWarning: compiled kernels cannot be kept in ") and "NUMBA_CACHE_DIR" in w for w in warned
    )


@pytest.mark.exhaustive
def test_the_disk_that_fills_up_brings_a_warning_and_leaves_no_half_file(tmp_path):
    """Written by way of a limit on the size of files, which fails as a full disk does."""
    resource = pytest.importorskip("resource", reason="this system limits no file's size")
    assert resource
    before = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    )
    param, compiled, warned = step(tmp_path, before=before)
    assert param == expected() and sorted(compiled) == NEEDED
    assert len(warned) == len(NEEDED) and all("cannot be kept" in w and w.startswith("RuntimeWarning") for w in warned)
    assert files(tmp_path) == []


def test_a_cache_folder_below_a_file_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("")
    assert step(tmp_path / "file" / "cache")[::2] == [expected(), []]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes to every folder")
def test_a_full_cache_that_cannot_be_written_is_read(cache):
    for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        folder.chmod(0o500)
    try:
        assert step(cache)[::2] == [expected(), []]
    finally:
        for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
            folder.chmod(0o700)


# Files and folders of other users


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def poisoned(here, tmp_path_factory, monkeypatch):
    """The path of a file that harms who reads it, in the place of a good one, and a function that says whether it was read."""
    keys = []
    with monkeypatch.context() as patch:
        patch.setattr(compiled_cache.KernelFiles, "save", lambda self, key, data: keys.append((self._path(key), key)))
        kept(one_more)
    ((path, key),) = keys
    harm = tmp_path_factory.mktemp("harm") / "done"
    data = pickle.dumps(Harm(harm))
    Path(path).write_bytes(hashlib.sha256(key + data).digest() + data)
    ownership.folder_of_others.cache_clear()
    return Path(path), harm.exists


OTHER = 12345  # a user
OPEN = {
    "the file": lambda file: file.chmod(0o666),
    "its folder": lambda file: file.parent.chmod(0o777),
    "its folder, whose sticky bit is set": lambda file: file.parent.chmod(0o1777),
    "the folder above": lambda file: file.parent.parent.chmod(0o777),
    "another user's file": lambda file: os.chown(file, OTHER, -1),
    "another user's folder": lambda file: os.chown(file.parent, OTHER, -1),
    "another user's folder above": lambda file: os.chown(file.parent.parent, OTHER, -1),
    "a link of another user": lambda file: linked(file) and os.chown(file, OTHER, -1, follow_symlinks=False),
}


def linked(file):
    file.symlink_to(file.rename(file.with_name("target")))
    return True


def needs_users(case):
    if os.name == "nt":
        pytest.skip("Windows has other permissions")
    if "another user" in case and os.geteuid():
        pytest.skip("only root gives files away")


def test_a_file_with_the_right_checksum_is_read(poisoned):
    """So the tests below show what keeps one from being read."""
    _, is_harmed = poisoned
    kept(one_more)
    assert is_harmed()


@pytest.mark.parametrize("case", OPEN)
def test_what_another_user_may_have_written_is_not_read_and_a_warning_says_so_once(poisoned, case):
    needs_users(case)
    file, is_harmed = poisoned
    OPEN[case](file)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR") as warned:
        assert kept(one_more) == (False, 6) and kept(one_less) == (False, 4)
    assert not is_harmed() and len(warned) == 1
    assert ("folder" in case) == (kept(one_more) == (False, 6))  # a file is replaced by one's own
    if "above" in case:
        assert compiled_cache.folder() is None


def test_a_folder_in_one_that_all_may_write_to_is_taken_if_the_sticky_bit_is_set(here):
    here.chmod(0o1777)
    assert kept(one_more) == (False, 6) and kept(one_more) == (True, 6)


@pytest.mark.parametrize(
    "name, members, is_taken", [("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("us", [], False)]
)
def test_a_folder_that_a_group_may_write_to_is_taken_if_the_group_is_the_users_own(
    tmp_path, monkeypatch, name, members, is_taken
):
    pytest.importorskip("grp", reason="Windows has other permissions")
    monkeypatch.setattr("pwd.getpwuid", lambda user: types.SimpleNamespace(pw_name="me"))
    monkeypatch.setattr("grp.getgrgid", lambda group: types.SimpleNamespace(gr_name=name, gr_mem=members))
    monkeypatch.setattr(ownership, "_is_private", ownership._is_private.__wrapped__)
    tmp_path.chmod(0o775)
    assert (ownership.folder_of_others.__wrapped__(str(tmp_path)) == "") is is_taken


def test_folders_above_the_home_folder_and_above_the_code_are_not_examined(tmp_path, monkeypatch):
    """Who can write there can change the code itself, and in a container they may seem to be nobody's."""
    home, code = tmp_path / "homes" / "me", tmp_path / "shared" / "site-packages" / "ownership.py"
    for folder in (home, home / "cache", code.parent / "__pycache__"):
        folder.mkdir(parents=True)
    code.touch()
    for folder in (home.parent, code.parent, code.parent.parent):
        folder.chmod(0o777)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(ownership, "_source", lambda: code)
    assert ownership.folder_of_others.__wrapped__(str(home / "cache")) == ""
    assert ownership.folder_of_others.__wrapped__(str(code.parent / "__pycache__")) == ""
    home.chmod(0o777)
    (code.parent / "__pycache__").chmod(0o777)
    assert "other users may write" in ownership.folder_of_others.__wrapped__(str(home / "cache"))
    assert "other users may write" in ownership.folder_of_others.__wrapped__(str(code.parent / "__pycache__"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_a_kernels_place_is_not_waited_for(here):
    kept(one_more)
    (path,) = files(here)
    path.unlink()
    os.mkfifo(path)
    assert kept(one_more) == (False, 6)
    assert kept(one_more) == (True, 6)


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    """A copy of the package in which no file can be kept, not by root either: files stand where folders should."""
    root = tmp_path_factory.mktemp("nowhere")
    shutil.copytree(ROOT / "gpuadam", root / "gpuadam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("gpuadam/kernels/__pycache__", "gpuadam/__pycache__", "home"):
        (root / name).write_text("")
    return root


HOMES = ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE")


def test_a_step_works_where_nothing_can_be_kept_and_says_nothing(nowhere):
    home = str(nowhere / "home")
    param, compiled, warned = step("", root=nowhere, **dict.fromkeys(HOMES, home))
    assert param == expected() and sorted(compiled) == NEEDED and warned == []
    assert not list(nowhere.rglob("*.nbc"))


@pytest.mark.skipif(sys.platform != "linux", reason="where the user's cache is differs")
@pytest.mark.exhaustive
def test_the_users_cache_folder_is_taken_where_the_packages_cannot_be_written(nowhere, tmp_path):
    assert step("", root=nowhere, **dict.fromkeys(HOMES, str(tmp_path)))[0] == expected()
    assert len(files(tmp_path)) == len(NEEDED)


# Several processes


@pytest.mark.exhaustive
def test_processes_that_fill_one_cache_at_once_get_their_own_forms(tmp_path):
    """Through Numba's index, one of two that store at once may be given the other's kernel ever after."""
    folder, forms = tmp_path / "not" / "there", {"adam": "", "l2": ", weight_decay=0.1"}
    first = [start(folder, options) for options in forms.values()]
    assert [outcome(process)[::2] for process in first] == [[expected(name), []] for name in forms]
    assert len(files(folder)) == len(NEEDED) + 1 and all(path.suffix == ".nbc" for path in files(folder))
    then = [start(folder, options) for options in forms.values()]
    assert [outcome(process) for process in then] == [[expected(name), [], []] for name in forms]


# What makes the key


def run(name="adam", dtype="float32", loop="serial", rule=adam):
    """Make a step with a kernel that is built anew. Return the kernel and the result."""
    numba_cpu.build.cache_clear()
    form, scalars = form_and_scalars(name, dtype)
    arrays = [a for a in state(100, dtype, form.amsgrad) if a is not None]
    kernel = numba_cpu.build(rule, form, loop)
    if loop == "strided serial":
        kernel(strided_table_of(form, arrays), 0, 0, 0, in_memory(scalars))
    else:
        kernel(table_of(arrays), *((0, 100) if loop == "serial" else (100, 2)), 0, in_memory(scalars))
    return kernel, b"".join(a.tobytes() for a in arrays)


@pytest.mark.parametrize("loop", ["serial", "strided serial"])
def test_every_loop_is_found_again(here, loop):
    (first, result), (second, again) = run(loop=loop), run(loop=loop)
    assert (loaded(first), loaded(second)) == (0, 1)
    assert result == again


@pytest.mark.exhaustive
def test_forms_and_dtypes_are_not_mixed_up(here):
    rows = [(name, dtype) for name in ("adam", "from g") for dtype in DTYPES]
    fresh = [run(*row) for row in rows]
    assert not any(loaded(kernel) for kernel, _ in fresh) and len({result for _, result in fresh}) == len(rows)
    again = [run(*row) for row in rows]
    assert all(loaded(kernel) == 1 for kernel, _ in again)
    assert [result for _, result in fresh] == [result for _, result in again]


def test_another_text_of_a_file_in_the_folder_is_another_key(here, monkeypatch):
    run()
    monkeypatch.setattr(compiled_cache, "_sources", lambda: "another text")
    assert loaded(run()[0]) == 0
    assert loaded(run()[0]) == 1


def test_the_text_of_every_file_in_the_folder_is_in_the_key(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(Path(compiled_cache.__file__).parent, tmp_path / "kernels"))
    monkeypatch.setattr(compiled_cache, "__file__", str(folder / "compiled_cache.py"))
    keys = {compiled_cache._sources.__wrapped__()}
    assert keys == {compiled_cache._sources.__wrapped__()}
    texts = sorted(folder.glob("*.py"))
    for path in texts:
        path.write_bytes(path.read_bytes() + b"#")
        keys.add(compiled_cache._sources.__wrapped__())
    assert len(keys) == len(texts) + 1 > 10


@pytest.mark.parametrize("package", few(["numba", "llvmlite"], "numba"))
def test_another_version_of_the_compiler_is_another_key(here, monkeypatch, package):
    run()
    monkeypatch.setattr(getattr(compiled_cache, package), "__version__", "0.0")
    assert loaded(run()[0]) == 0


def test_kernels_whose_text_cannot_be_read_are_not_kept(here, monkeypatch):
    """In a zip archive, say: nothing would tell them from those of the next version."""
    monkeypatch.setattr(compiled_cache, "__file__", str(here / "archive.zip" / "compiled_cache.py"))
    monkeypatch.setattr(compiled_cache, "_sources", compiled_cache._sources.__wrapped__)
    run()
    assert files(here) == []


def test_a_rule_that_is_not_of_this_package_is_never_kept(here, examples):
    """Its text is not in the key: a broken one could take the good one's place."""
    broken = types.ModuleType("broken")
    broken.in_python = adam.in_python
    for loop in ("serial", *examples((), ("parallel", "strided serial"))):
        run(loop=loop, rule=broken)
    assert files(here) == []
    own, _ = run()
    assert loaded(own) == 0 and len(files(here)) == 1


def test_two_that_store_at_once_do_not_take_each_others_place(here, monkeypatch):
    """Two processes, played by two threads of events: both have looked for files before either writes one."""
    held, write = [], compiled_cache.KernelFiles.save
    monkeypatch.setattr(compiled_cache.KernelFiles, "save", lambda *args: held.append(args))
    results = [run("adam")[1], run("maximize")[1]]
    for args in reversed(held):
        write(*args)
    monkeypatch.undo()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(here))
    again = [run("adam"), run("maximize")]
    assert [loaded(kernel) for kernel, _ in again] == [1, 1]
    assert [result for _, result in again] == results
