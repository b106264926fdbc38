"""Dispatch: what is loaded when, which backend is chosen, and what is said where one is missing."""

import ast
import importlib
import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import libraries
import numpy as np
import pytest
from cases import few, state

import gpuadam
from gpuadam import backends

ROOT = Path(__file__).parent.parent


def run(code, path=(), **env):
    """Run code in a fresh process with folders of fake packages first on its path; return what it printed."""
    full = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])} | env
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=full, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_numba_nor_cupy_nor_torch():
    heavy = "{'numba', 'cupy', 'llvmlite', 'torch', 'jax', 'rich', 'matplotlib', 'sklearn', 'cuda'}"
    assert run(f"import gpuadam, sys; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_import_adds_only_this_package_and_the_standard_library():
    added = run(
        """
        import sys, numpy
        before = set(sys.modules)
        import gpuadam
        roots = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(roots - {"numpy"} - set(sys.stdlib_module_names)))
        """
    )
    assert added.strip() == "['gpuadam']"


def test_dir_lists_the_public_names_and_pages_load_on_first_use():
    code = """
    import gpuadam, sys
    assert set(gpuadam.__all__) | {"backends", "planning", "torch", "__version__"} <= set(dir(gpuadam)), dir(gpuadam)
    assert not {"checks", "step_arrays"} & set(dir(gpuadam))
    assert "gpuadam.planning" not in sys.modules
    print('h100' in gpuadam.planning.MACHINES, hasattr(gpuadam, "plannin"))
    sys.modules["torch"] = None
    try:
        gpuadam.torch
    except AttributeError as error:
        print(error)
    """
    assert run(code).splitlines() == ["True False", 'gpuadam.torch needs torch: pip install "gpuadam[torch]"']


def test_importing_the_drop_in_without_torch_says_what_to_install():
    code = """
    import sys
    sys.modules["torch"] = None
    try:
        import gpuadam.torch
    except ModuleNotFoundError as error:
        print(error.name, error)
    """
    assert run(code).strip() == 'torch gpuadam.torch needs torch: pip install "gpuadam[torch]"'


def test_state_for_torch_without_torch_says_what_to_install():
    code = """
    import sys
    import numpy as np, gpuadam
    sys.modules["torch"] = None
    try:
        gpuadam.foreign_state.to_torch(gpuadam.Adam({"w": np.zeros(2, "float32")}))
    except ModuleNotFoundError as error:
        print(error.name, error)
    """
    assert run(code).strip() == 'torch to_torch needs torch: pip install "gpuadam[torch]"'


def test_a_cpu_step_loads_no_gpu_library():
    code = """
    import gpuadam, numpy as np, sys
    gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), 1)
    print(sorted({"cupy", "numba.cuda", "numba_cuda", "torch"} & set(sys.modules)))
    """
    assert run(code).strip() == "[]"


def test_numpy_arrays_go_to_the_cpu():
    assert "numba-cpu" in gpuadam.available_backends()
    assert list(gpuadam.backend_status()) == ["cupy", "numba-cuda", "numba-cpu"]


def test_every_reason_comes_with_what_mends_it():
    for status in gpuadam.backend_status().values():
        assert status.reason and (status.available or status.fix)


def step(**options):
    arrays = state(10)
    gpuadam.adam_step(*arrays[:4], 1, **options)


def test_use_backend_and_the_environment_choose_as_the_argument_does(monkeypatch):
    step(backend="numba-cpu")
    with gpuadam.use_backend("numba-cpu"):
        step()
    with gpuadam.use_backend("cupy"):
        with pytest.raises(TypeError, match="'cupy' holds arrays in CUDA memory"):
            step()
        step(backend="numba-cpu")
    step()
    monkeypatch.setattr(backends, "_environment", "numba-cuda")
    with pytest.raises(TypeError, match="'numba-cuda' holds"):
        step()
    with gpuadam.use_backend("numba-cpu"):
        step()
    monkeypatch.setattr(backends, "_environment", "cuda")
    with pytest.raises(ValueError, match="GPUADAM_BACKEND: there is no backend 'cuda', only cupy, numba-cuda, numba-cpu"):
        step()


def test_the_environment_variable_is_heeded():
    code = """
    import gpuadam, numpy as np
    try:
        gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), 1)
    except TypeError as error:
        print(error)
    """
    assert "'cupy' holds arrays in CUDA memory" in run(code, GPUADAM_BACKEND="cupy")
    assert run(code, GPUADAM_BACKEND="numba-cpu") == ""


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="use_backend: there is no backend 'gpu'"), gpuadam.use_backend("gpu"):
        pass


CUDA_ARRAYS = """
import numpy as np, gpuadam
class Array:
    def __init__(self):
        self.a = np.ones(3, "f4")
        self.__cuda_array_interface__ = {"data": (self.a.ctypes.data, False), "shape": (3,), "typestr": "<f4", "version": 3}
try:
    gpuadam.adam_step(*(Array() for _ in range(4)), 1)
except gpuadam.BackendUnavailableError as error:
    print(error)
gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), 1)
"""

FAKES = {
    "not installed": ("", "CuPy is not installed", 'pip install "gpuadam[cuda13]"'),
    "PermissionError at import": (
        "raise PermissionError(13, 'Permission denied', '/nowhere/.cupy')",
        "PermissionError",
        "CUPY_CACHE_DIR",
    ),
    "ImportError at import": ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13", "reinstall it"),
    "no driver": (
        """
        class ndarray: pass
        class cuda:
            class runtime:
                class CUDARuntimeError(RuntimeError): pass
                @staticmethod
                def getDeviceCount(): raise cuda.runtime.CUDARuntimeError('cudaErrorInsufficientDriver')
        __version__ = "14.0"
        """,
        "cudaErrorInsufficientDriver",
        "nvidia-smi",
    ),
    "no device": (
        """
        class ndarray: pass
        class cuda:
            class runtime:
                class CUDARuntimeError(RuntimeError): pass
                @staticmethod
                def getDeviceCount(): return 0
        __version__ = "14.0"
        """,
        "no CUDA device",
        "nvidia-smi",
    ),
}

HIDE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names} else find_spec(name, package)
"""


def environment(tmp_path, what):
    """Make a folder of fake packages in which CuPy fails in one way and numba-cuda is missing."""
    source, reason, fix = FAKES[what]
    hidden = {"numba_cuda"} if source else {"numba_cuda", "cupy"}
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    if source:
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").write_text(textwrap.dedent(source))
    return reason, fix


@pytest.mark.parametrize("what", few(FAKES, *list(FAKES)[:1]))
def test_a_missing_backend_is_refused_with_its_reason_and_the_cpu_still_works(tmp_path, what):
    reason, fix = environment(tmp_path, what)
    said = run(CUDA_ARRAYS, [tmp_path])
    assert reason in said and fix in said and "Available: numba-cpu" in said


@pytest.mark.parametrize("what", few(FAKES, next(iter(FAKES))))
def test_doctor_names_the_reason(tmp_path, what):
    reason, fix = environment(tmp_path, what)
    code = "import gpuadam.__main__ as m, sys; sys.exit(m.main(['doctor', '--json', '-']))"
    report = json.loads(run(code, [tmp_path]))
    assert reason in report["backends"]["cupy"]["reason"] and fix in report["backends"]["cupy"]["fix"]
    assert report["backends"]["numba-cuda"]["reason"] == "numba-cuda is not installed"
    assert report["backends"]["numba-cpu"]["bits"] == "as the contract says"


def test_an_unwritable_home_and_a_broken_numba_cache_do_not_matter(tmp_path):
    (tmp_path / "garbage").write_text("not a folder")
    code = """
    import gpuadam, numpy as np
    gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), 1)
    print(gpuadam.backend_status()["numba-cpu"].available)
    """
    home = str(tmp_path / "garbage" / "home")
    assert run(code, HOME=home, NUMBA_CACHE_DIR=home).strip() == "True"


@pytest.mark.exhaustive
def test_doctor_says_which_cache_cannot_be_written(tmp_path):
    (tmp_path / "garbage").write_text("not a folder")
    home = str(tmp_path / "garbage" / "home")
    code = "import gpuadam.__main__ as m, sys; sys.exit(m.main(['doctor', '--json', '-']))"
    report = json.loads(run(code, HOME=home, CUPY_CACHE_DIR=""))
    assert report["caches"]["CuPy"]["writable"] is False and "garbage" in report["caches"]["CuPy"]["folder"]


def test_doctor_names_a_numba_cache_that_cannot_be_written_and_where_kernels_are_kept_instead(tmp_path):
    (tmp_path / "garbage").write_text("not a folder")
    garbage = str(tmp_path / "garbage" / "cache")
    code = "import gpuadam.__main__ as m, sys; sys.exit(m.main(['doctor', '--json', '-']))"
    report = json.loads(run(code, NUMBA_CACHE_DIR=garbage))
    assert any(f"NUMBA_CACHE_DIR={garbage} cannot be written" in warning for warning in report["warnings"])
    assert report["caches"]["Numba"]["writable"] and "garbage" not in report["caches"]["Numba"]["folder"]
    assert report["backends"]["numba-cpu"]["bits"] == "as the contract says"


def test_a_folder_in_one_that_may_not_be_read_cannot_be_written(monkeypatch):
    from gpuadam.cli import doctor

    monkeypatch.setattr(Path, "exists", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert not doctor._writable(Path("/nowhere/cache"))


def test_doctor_says_that_no_kernel_can_be_kept(monkeypatch):
    from gpuadam.cli import doctor
    from gpuadam.kernels import compiled_cache

    monkeypatch.setattr(compiled_cache, "FunctionCache", mock.Mock(side_effect=RuntimeError("no locator available")))
    found = doctor._caches()["Numba"]
    assert not found["writable"] and "NUMBA_CACHE_DIR" in found["fix"]


def test_a_numba_cuda_that_cannot_be_imported_is_a_reason_and_no_error(tmp_path):
    (tmp_path / "numba_cuda").mkdir()
    (tmp_path / "numba_cuda" / "__init__.py").write_text("raise ImportError('libnvvm.so.4: cannot open')")
    code = """
    import gpuadam, numpy as np
    gpuadam.adam_step(*(np.ones(3, "f4") for _ in range(4)), 1)
    status = gpuadam.backend_status()["numba-cuda"]
    print(status.available, status.reason, status.fix)
    """
    said = run(code, [tmp_path])
    assert said.startswith("False it cannot be loaded: ImportError") and "libnvvm.so.4" in said and "reinstall it" in said


def test_a_warning_that_is_an_error_is_no_broken_installation(tmp_path):
    (tmp_path / "numba_cuda").mkdir()
    (tmp_path / "numba_cuda" / "__init__.py").write_text("raise DeprecationWarning('use another')")
    code = """
    import gpuadam
    print(*gpuadam.backend_status()["numba-cuda"][1:], sep="; ")
    """
    said = run(code, [tmp_path]).strip()
    assert said.startswith("its import warned, and warnings are errors here: DeprecationWarning: use another; let this")
    assert "reinstall" not in said


def test_a_number_of_threads_that_numba_refuses_is_no_broken_installation():
    code = """
    import gpuadam
    print(*gpuadam.backend_status()["numba-cpu"], sep="; ")
    """
    said = run(code, NUMBA_NUM_THREADS="0").strip()
    assert said.startswith("False; NUMBA_NUM_THREADS='0': ") and said.endswith(
        "; set NUMBA_NUM_THREADS to 1 or more, or unset it"
    )


WITHOUT_NUMBA = {
    "not installed": ("", "Numba is not installed", "pip install numba"),
    "NumPy is too new": (
        "raise ImportError('Numba needs NumPy 2.4 or less')",
        "ImportError: Numba needs",
        "pip install numba",
    ),
    "a file is missing": ("open('/no/such/file')", "FileNotFoundError", "reinstall it: pip install numba"),
    "half of it": ("", "it cannot be loaded", "reinstall it: pip install numba"),
    "NUMBA_DISABLE_JIT": (None, "NUMBA_DISABLE_JIT=1: no compiled kernels", "unset NUMBA_DISABLE_JIT"),
}


@pytest.mark.parametrize("what", few(WITHOUT_NUMBA, "NUMBA_DISABLE_JIT"))
def test_where_numba_compiles_nothing_all_say_so_and_what_mends_it(tmp_path, what):
    source, reason, fix = WITHOUT_NUMBA[what]
    hidden = {"numba_cuda", "cupy"} | ({"numba"} if what == "not installed" else set())
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    if source is not None and "numba" not in hidden:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text(source)
    code = """
    import contextlib, io, json
    import numpy as np, gpuadam, gpuadam.__main__ as m
    said = {}
    arrays = [np.ones(3, "f4") for _ in range(4)]
    try:
        gpuadam.adam_step(*arrays, 1)
    except gpuadam.BackendUnavailableError as error:
        said["step"] = str(error)
    assert all((a == 1).all() for a in arrays)
    for command in ("bench", "demo", "doctor"):
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                said[command + " status"] = m.main([command])
            except SystemExit as ended:
                said[command + " status"] = ended.code
        said[command] = err.getvalue() + out.getvalue()
    print(json.dumps(said))
    """
    said = json.loads(run(code, [tmp_path], NUMBA_DISABLE_JIT=str(int(what == "NUMBA_DISABLE_JIT"))))
    assert [said[f"{command} status"] for command in ("bench", "demo", "doctor")] == [2, 2, 1]
    for text in (said["step"], said["bench"], said["demo"], said["doctor"]):
        assert reason in text and fix in text
    assert said["bench"].startswith("gpuadam bench: no backend is available. ") and "Works: nothing" in said["doctor"]


def test_numbas_simulator_of_a_gpu_is_no_backend():
    libraries.imported("numba_cuda")
    code = """
    import gpuadam, numpy as np
    from numba import cuda
    print(gpuadam.backend_status()["numba-cuda"])
    arrays = [cuda.to_device(np.ones(3, "f4")) for _ in range(4)]
    gpuadam.adam_step(*arrays, 1)  # they are in the CPU's memory
    print(arrays[0].copy_to_host()[0] < 1)
    """
    said = run(code, NUMBA_ENABLE_CUDASIM="1")
    assert "available=False, reason='NUMBA_ENABLE_CUDASIM=1: no compiled kernels', fix='unset" in said and said.endswith(
        "True\n"
    )


def test_the_examples_are_listed_without_numba(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names={"numba"}))
    assert "thomson" in run("from gpuadam.examples import __main__ as m; m.main()", [tmp_path])


def test_pyinstaller_is_told_of_every_backend_and_of_what_rules_need():
    entry = '[project.entry-points.pyinstaller40]\nhook-dirs = "gpuadam.__pyinstaller:hook_dirs"\n'
    assert entry in (ROOT / "pyproject.toml").read_text()
    (folder,) = importlib.import_module("gpuadam.__pyinstaller").hook_dirs()
    hook = runpy.run_path(str(Path(folder) / "hook-gpuadam.py"))
    of_rules = {"gpuadam.kernels.element", "gpuadam.kernels.element_numba"}
    assert set(hook["hiddenimports"]) == {row.module for row in backends.BACKENDS.values()} | of_rules


def methods(file):
    """Return the methods of the backend's class in a file, and the names of those that are nothing but a docstring."""
    classes = {
        node.name: node for node in ast.parse((ROOT / "kernels" / file).read_text()).body if isinstance(node, ast.ClassDef)
    }
    (name,) = classes.keys() & {"Backend", "GpuBackend", "NumbaCpu", "Cupy", "NumbaCuda"}
    functions = [node for node in classes[name].body if isinstance(node, ast.FunctionDef)]
    assigned = {ast.unparse(node.targets[0]) for node in classes[name].body if isinstance(node, ast.Assign)}
    empty = {f.name for f in functions if len(f.body) == 1 and ast.get_docstring(f)}
    return assigned | {f.name for f in functions}, empty


def test_every_backend_has_every_method_of_the_interface():
    (_, interface), (of_gpus, interface_of_gpus) = methods("backend.py"), methods("gpu_backend.py")
    assert {"view", "batches", "norm", "zeros", "copy", "from_host", "to_host", "now"} <= interface
    assert {"on", "current_stream", "pinned", "device_bytes", "run", "launch_one_thread", "launch_sums"} <= interface_of_gpus
    assert interface <= methods("cpu_backend.py")[0]
    for file in ("cupy_backend.py", "numba_cuda_backend.py"):
        assert interface | interface_of_gpus <= methods(file)[0] | (of_gpus - interface_of_gpus)


def test_foreign_arrays_that_are_mixed_are_listed():
    class Foreign:
        def __dlpack_device__(self):
            return (8, 0)  # Metal

    arrays = list(state(3)[:4])
    arrays[2] = Foreign()
    with pytest.raises(TypeError, match="m is on a device of DLPack type 8"):
        gpuadam.adam_step(*arrays, 1)
    assert np.isfinite(arrays[0]).all()
