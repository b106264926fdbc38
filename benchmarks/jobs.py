"""Jobs of several ranks, for the other scripts."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpuadam.terminal import output


def mpiexec():
    """Return the path of mpiexec: that beside Python, where the extra mpi has it, or that on the PATH. Raises CommandError."""
    output.need("mpi", "mpi4py")
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise output.CommandError(f'there is no mpiexec beside {sys.executable} or on the PATH: pip install "gpuadam[mpi]"')
    return found
