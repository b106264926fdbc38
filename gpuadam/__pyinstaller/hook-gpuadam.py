"""What PyInstaller cannot see: the backends are imported by name, and compiled kernels are kept by the text of their folder."""

from gpuadam.backends import BACKENDS

hiddenimports = [row.module for row in BACKENDS.values()]
module_collection_mode = {"gpuadam.kernels": "pyz+py"}
