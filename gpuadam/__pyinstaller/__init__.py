"""The hook by which PyInstaller freezes a program that imports gpuadam."""

from pathlib import Path


def hook_dirs():
    """Return the folders that have hooks: the entry point `hook-dirs`."""
    return [str(Path(__file__).parent)]
