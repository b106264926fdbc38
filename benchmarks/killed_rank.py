"""Does a job end when one of its ranks is killed, and is its last checkpoint intact? How often, and how soon.

    python benchmarks/killed_rank.py [TIMES]

Starts four ranks of `gpuadam.ShardedAdam` that step and save for ever, and kills one of them; which one and when is drawn by
chance. A job has ended well if mpiexec comes back with a status other than zero within 10 seconds. Its checkpoint is intact if
one `gpuadam.Adam` loads it, if it is the last one whose save has ended or the one that was being saved, and if its parameters
and state have the bits of as many steps of one optimizer.
"""

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jobs
import numpy as np

import gpuadam
from gpuadam.terminal import arguments, output

ROOT = Path(__file__).parent.parent
LIMIT = 10.0  # seconds
N = 300_000

RANK = f"""
import os, sys
import numpy as np
import gpuadam
from gpuadam import transports

transport = transports.MPI()
param = np.zeros({N}, "float32")
opt = gpuadam.ShardedAdam(param, transport, bucket_bytes=1 << 18)
pids = transport.exchange(os.getpid())
while True:
    opt.step(np.full_like(param, opt.steps % 7 - 3))
    opt.save(sys.argv[1], with_params=True)
    if transport.rank == 0:
        print(*(pids if opt.steps == 1 else ["saved", opt.steps]), flush=True)
"""


def killed(chance, folder):
    """Start a job and kill a rank. Return its exit status, or None, the seconds that it took to end, and the steps it saved."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = subprocess.Popen(
        [jobs.mpiexec(), "-n", "4", sys.executable, "-m", "mpi4py", "-c", RANK, folder],
        env=os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pids = [int(pid) for pid in job.stdout.readline().split()]
        if not pids:
            raise output.CommandError(f"the ranks did not start: {shlex.join(job.args[:-1])} says why")
        time.sleep(chance.uniform(0, 1))
        os.kill(chance.choice(pids), signal.SIGKILL)
        began = time.monotonic()
        status = job.wait(timeout=60)
    except subprocess.TimeoutExpired:
        status = None
    finally:  # of an interrupt, too
        if job.poll() is None:
            job.terminate()
    seconds = time.monotonic() - began
    saved = [int(line.split()[1]) for line in job.stdout if line.startswith("saved ")]  # mpiexec writes there, too
    return status, seconds, max(saved, default=1)


def is_intact(folder, steps):
    """Whether a checkpoint is of that many steps or of one more, and has their bits."""
    found = np.ones(N, "float32")
    opt = gpuadam.load(folder, found, with_params=True)
    wanted = np.zeros(N, "float32")
    reference = gpuadam.Adam(wanted)
    for step in range(opt.steps):
        reference.step(np.full_like(wanted, step % 7 - 3))
    pairs = [(found, wanted)] + [(opt.state["0"][key], reference.state["0"][key]) for key in ("m", "v")]
    return opt.steps in (steps, steps + 1) and all(a.tobytes() == b.tobytes() for a, b in pairs)


@output.ending_plainly("killed_rank")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", nargs="?", type=arguments.whole, default=20, help="how many jobs; default %(default)s")
    times = parser.parse_args().times
    chance, well, intact, amid, longest = random.Random(), 0, 0, 0, 0.0
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            status, seconds, steps = killed(chance, folder)
            well += bool(status) and seconds < LIMIT
            longest = max(longest, seconds)
            amid += len(list(Path(folder).iterdir())) != 6  # four parts, the index and the lock
            intact += is_intact(folder, steps)
    print(f"{well} of {times} jobs ended with a status other than zero within {LIMIT:g} s; the slowest took {longest:.2f} s")
    print(f"{intact} of {times} checkpoints were intact; {amid} of the ranks were killed while one was written")
    return 0 if well == intact == times else 1


if __name__ == "__main__":
    sys.exit(main())
