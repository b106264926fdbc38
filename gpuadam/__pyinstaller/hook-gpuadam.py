"""What PyInstaller cannot see: modules that are imported by name; and compiled kernels are kept by the text of their folder."""

from gpuadam.backends import BACKENDS

hiddenimports = [row.module for row in BACKENDS.values()]
hiddenimports += [f"gpuadam.kernels.{name}" for name in ("element", "element_numba")]
module_collection_mode = {"gpuadam.kernels": "pyz+py"}
