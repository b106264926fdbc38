"""Jobs of several ranks, for the other scripts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpuadam.terminal import output


def run(script, ranks, *arguments, seconds, **environment):
    """Run a script in so many ranks of one thread each, with --rank and arguments; return what rank 0 prints, as JSON.

    seconds: that the ranks measure, of which the time-out follows. environment: variables beside those that are there.
    """
    texts = list(map(str, arguments))
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", script, "--rank", *texts]
    environment = os.environ | dict.fromkeys(("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"), "1") | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600 + 4 * seconds)
    if done.returncode:
        job = " ".join([f"{ranks} ranks of {Path(script).name}", *texts])
        raise RuntimeError(f"{job} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def mpiexec():
    """Return the path of mpiexec: that beside Python, where the extra mpi has it, or that on the PATH. Raises CommandError."""
    output.need("mpi", "mpi4py")
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise output.CommandError(f'there is no mpiexec beside {sys.executable} or on the PATH: pip install "gpuadam[mpi]"')
    return found
