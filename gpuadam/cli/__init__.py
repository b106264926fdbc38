"""The commands of `python -m gpuadam`, one file each."""
