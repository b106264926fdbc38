"""Jobs of MPI whose ranks run a function of `ranks.py`: they are started, killed, and their end is looked at."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import libraries
import ranks

ROOT = Path(__file__).parent.parent
ENDED_WITHIN = 10  # seconds


def started(n, function, *, run=("-m", "mpi4py"), **environment):
    """Return the process of a job in `ranks.py` on n ranks."""
    one_thread = dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [libraries.mpiexec(), "-n", str(n), sys.executable, *run, "-c", f"import ranks; ranks.{function}()"],
        env=os.environ | one_thread | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Return (its exit status, the seconds that it took to end, what it wrote)."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, time.monotonic() - began, out + err


def job(n, function, **environment):
    """Return what a job found, and how it ended when one of its ranks was killed amid a step."""
    process = started(n, function, **environment)
    line = process.stdout.readline()
    assert line, f"exit status and output: {ended(process)}"
    found = json.loads(line)
    chance = random.Random()
    time.sleep(chance.uniform(0, 0.2))
    os.kill(chance.choice(found["pids"]), signal.SIGKILL)
    return found["found"], ended(process)


@functools.cache
def expected():
    """The bits of every case by one optimizer, twice. It compiles what the ranks then find on disk."""
    return {case: ranks.unsharded(case) for case in ranks.CASES}


def assert_ended_as_a_failure(end):
    status, seconds, output = end
    assert status != 0 and seconds < ENDED_WITHIN, output
