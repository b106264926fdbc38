"""Does a job end when one of its ranks is killed amid a step? How often, and how soon.

    python benchmarks/killed_rank.py [TIMES]

Starts four ranks of `gpuadam.ShardedAdam` that step for ever, and kills one of them; which one and when is drawn by chance.
A job has ended well if mpiexec comes back with a status other than zero within 10 seconds.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 10.0  # seconds

RANK = """
import os, sys
import numpy as np
import gpuadam
from gpuadam import transports

transport = transports.MPI()
param = np.zeros(300_000, "float32")
opt = gpuadam.ShardedAdam(param, transport, bucket_bytes=1 << 18)
opt.step(np.ones_like(param), max_norm=1.0)
pids = transport.exchange(os.getpid())
if transport.rank == 0:
    print(*pids, flush=True)
while True:
    opt.step(np.ones_like(param), max_norm=1.0)
"""


def killed(chance):
    """Start a job and kill one of its ranks. Return its exit status, or None, and the seconds that it took to end."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = subprocess.Popen(
        [mpiexec, "-n", "4", sys.executable, "-m", "mpi4py", "-c", RANK],
        env=os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pids = [int(pid) for pid in job.stdout.readline().split()]
    time.sleep(chance.uniform(0, 1))
    os.kill(chance.choice(pids), signal.SIGKILL)
    began = time.monotonic()
    try:
        status = job.wait(timeout=60)
    except subprocess.TimeoutExpired:
        job.terminate()
        return None, time.monotonic() - began
    return status, time.monotonic() - began


def main(times):
    chance, well, longest = random.Random(), 0, 0.0
    for _ in range(times):
        status, seconds = killed(chance)
        well += bool(status) and seconds < LIMIT
        longest = max(longest, seconds)
    print(f"{well} of {times} jobs ended with a status other than zero within {LIMIT:g} s; the slowest took {longest:.2f} s")
    return 0 if well == times else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
