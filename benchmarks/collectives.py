"""Which calls of MPI sum gradients over ranks, and collect parameters, the fastest on one machine?

    python benchmarks/collectives.py [--sizes 1e6,2e7] [--seconds 10] [--out FOLDER]

A size is the float32 elements of each rank's buffer. In a reduce-scatter a rank receives its part of the other ranks' buffers,
and sums these parts; in an all-gather it receives their parts. All ways, and `gpuadam.transports.MPI`, take turns in one job of 2
and in one of 4 ranks, each rank with one thread. A time is that of the slowest rank, from a barrier on. The limit is a memory
copy of the bytes that a rank receives, by all ranks at once. "x present" is over MPI's non-blocking collective.

"+ sum" is a local sum by NumPy, in the order of the ranks. Its memory is kept from call to call. "pairs" are Isend and Irecv; in
chunks, a chunk is summed while it is in the caches, and two are under way. With shared memory the buffers themselves lie where
all ranks of a machine read them, so nothing is sent; that memory has small pages, the others' has huge ones where it is large.

A setting of MPICH's is read when a job starts, so each has jobs of its own, in turn with the others: of MPI's non-blocking
collective, and where it concerns both, of gpuadam's transport. CH4_CMA_ENABLE=0 is as in a container in which no process may
read another's memory. "sum" says whether the bits are those of a sum in the order of the ranks; two numbers have one order.
"""

import functools
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jobs
import numpy as np
import report

from gpuadam import backends, transports
from gpuadam.cli.measuring import facts, measure
from gpuadam.kernels import messages
from gpuadam.terminal.console import Table

RANKS = (2, 4)
ROUNDS = 3  # of jobs
FEWEST = 3  # turns in a job
PRESENT = {"reduce-scatter": "Ireduce_scatter_block", "all-gather": "Iallgather"}
COPY = "limit: a memory copy"
TRANSPORT = "gpuadam.transports.MPI"
CHUNKS = {"256 KB": 1 << 18, "1 MB": 1 << 20, "4 MB": 1 << 22}
SUMS = ("noncommutative", "pairwise", "recursive_doubling", "recursive_halving")
GATHERS = ("sched_ring", "sched_recursive_doubling", "tsp_ring", "tsp_recexch_doubling")
NO_CMA = "MPIR_CVAR_CH4_CMA_ENABLE=0"
SETTINGS = (
    "MPIR_CVAR_IREDUCE_SCATTER_BLOCK_INTRA_ALGORITHM=tsp_recexch",
    *(f"MPIR_CVAR_IREDUCE_SCATTER_BLOCK_INTRA_ALGORITHM=sched_{name}" for name in SUMS),
    *(f"MPIR_CVAR_IALLGATHER_INTRA_ALGORITHM={name}" for name in GATHERS),
    NO_CMA,
)


class Ranks:
    """The buffers of this rank, and the ways to sum them and to collect parameters: functions by name.

    parts: the buffer, a row for each rank. shared: copies of all ranks' buffers in memory that they share, which lies on small
    pages. part: where the rank's sum comes to be.
    """

    def __init__(self, mpi, n):
        self.mpi, self.comm = mpi, mpi.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        # from the next rank on, so that no two ranks begin with the same one
        self.others = [(self.rank + k) % self.size for k in range(1, self.size)]
        length = n // self.size
        # on huge pages, as the optimizer's buffers
        zeros = functools.partial(backends.load("numba-cpu").zeros, dtype="f4", device=None)
        self.parts, self.received, self.copied = (zeros(length * self.size).reshape(self.size, -1) for _ in range(3))
        self.buffer, self.part = self.parts.reshape(-1), zeros(length)
        self.rooms = [zeros(self.parts.size) for _ in range(2)]
        self.parts[...] = np.random.default_rng(self.rank).standard_normal((self.size, length), "f4")
        self.segment = mpi.Win.Allocate_shared(self.parts.nbytes, 4, comm=self.comm)
        of_ranks = [np.frombuffer(self.segment.Shared_query(rank)[0], "f4") for rank in range(self.size)]
        self.shared = [buffer.reshape(self.size, length) for buffer in of_ranks]
        self.shared[self.rank][...] = self.parts
        self.window = mpi.Win.Allocate(4 * length, 4, comm=self.comm)
        self.summed = np.frombuffer(self.window.tomemory(), "f4")
        self.neighbours = self.comm.Create_dist_graph_adjacent(self.others, self.others)
        self.transport = transports.MPI()
        self.kept = []  # persistent requests

    def until(self, *requests):
        """Wait as `gpuadam.transports.MPI` does, which lets another rank run where there are more of them than cores."""
        for polls in itertools.count(1):
            if all(request.Test() for request in requests):  # MPICH 5.0's Testall refuses a persistent collective
                return
            if polls % 64 == 0:
                time.sleep(0)

    def together(self):
        self.until(self.comm.Ibarrier())

    def add(self, parts, out):
        np.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            np.add(out, part, out=out)

    def add_received(self):
        self.add([self.parts[rank] if rank == self.rank else part for rank, part in enumerate(self.received)], self.part)

    def send(self, rows):
        """Start to send a row of an array to each of the other ranks."""
        return [self.comm.Isend(rows[rank], rank) for rank in self.others]

    def receive(self, rows):
        return [self.comm.Irecv(rows[rank], rank) for rank in reversed(self.others)]

    def in_pairs(self):
        self.until(*self.receive(self.received), *self.send(self.parts))
        self.add_received()

    def in_chunks(self, n_bytes):
        edges = [slice(at, at + n_bytes // 4) for at in range(0, self.part.size, n_bytes // 4)]
        sent = list(itertools.chain.from_iterable(self.send(self.parts[:, edge]) for edge in edges))

        def received(k):
            length = self.part[edges[k]].size
            rows = self.rooms[k % 2][: self.size * length].reshape(self.size, length)
            return rows, self.receive(rows)

        coming = [received(k) for k in range(min(2, len(edges)))]
        for k, edge in enumerate(edges):
            rows, requests = coming.pop(0)
            self.until(*requests)
            terms = [self.parts[rank, edge] if rank == self.rank else row for rank, row in enumerate(rows)]
            self.add(terms, self.part[edge])
            if k + 2 < len(edges):
                coming.append(received(k + 2))
        self.until(*sent)

    def accumulated(self):
        self.summed[...] = self.parts[self.rank]
        self.window.Fence()
        for rank in self.others:
            self.window.Accumulate(self.parts[rank], rank, op=self.mpi.SUM)
        self.window.Fence()

    def read_there(self):
        self.together()
        self.add([parts[self.rank] for parts in self.shared], self.part)
        self.together()

    def gathered_there(self):
        self.together()
        for rank in self.others:
            self.copied[rank] = self.shared[rank][rank]
        self.together()

    def copy(self):
        for rank in self.others:
            self.copied[rank] = self.parts[rank]

    def persistent(self, request):
        """Return a function that makes the collective of a persistent request."""
        self.kept.append(request)

        def function():
            request.Start()
            self.until(request)

        return function

    def free(self):
        for held in (*self.kept, self.segment, self.window, self.neighbours):
            held.Free()

    def then_sum(self, blocking=None, starts=None):
        def function():
            self.until(starts()) if starts else blocking()
            self.add_received()

        return function

    def sums(self):
        """Return name -> a reduce-scatter."""
        mpi, comm, until, buffer, part, received = self.mpi, self.comm, self.until, self.buffer, self.part, self.received
        # one count and one place for each neighbour, in elements
        out, back = ([rank * part.size for rank in self.others] for _ in range(2))
        counts = [part.size] * len(self.others)

        def to_neighbours():
            return self.neighbours.Ineighbor_alltoallv([buffer, (counts, out)], [received, (counts, back)])

        return {
            PRESENT["reduce-scatter"]: lambda: until(comm.Ireduce_scatter_block(buffer, part, mpi.SUM)),
            "Reduce_scatter_block": lambda: comm.Reduce_scatter_block(buffer, part, mpi.SUM),
            "Reduce_scatter": lambda: comm.Reduce_scatter(buffer, part, [part.size] * self.size, mpi.SUM),
            "Reduce_scatter_block_init": self.persistent(comm.Reduce_scatter_block_init(buffer, part, mpi.SUM)),
            "Alltoall + sum": self.then_sum(lambda: comm.Alltoall(buffer, received)),
            "Ialltoall + sum": self.then_sum(starts=lambda: comm.Ialltoall(buffer, received)),
            "Ineighbor_alltoallv + sum": self.then_sum(starts=to_neighbours),
            "Win.Accumulate": self.accumulated,
            "shared memory + sum": self.read_there,
            "pairs + sum": self.in_pairs,
            **{f"pairs + sum, chunks of {name}": lambda n=n: self.in_chunks(n) for name, n in CHUNKS.items()},
            TRANSPORT: lambda: self.transport.reduce_scatter(buffer, part).wait(),
            COPY: self.copy,
        }

    def gathers(self):
        """Return name -> an all-gather."""
        comm, until, buffer, here = self.comm, self.until, self.buffer, self.mpi.IN_PLACE
        counts, at = [self.part.size] * len(self.others), [rank * self.part.size for rank in self.others]
        own = self.parts[self.rank]

        def to_neighbours():
            return self.neighbours.Ineighbor_allgatherv(own, [self.copied, (counts, at)])

        return {
            PRESENT["all-gather"]: lambda: until(comm.Iallgather(here, buffer)),
            "Allgather": lambda: comm.Allgather(here, buffer),
            "Allgather_init": self.persistent(comm.Allgather_init(here, buffer)),
            "Ineighbor_allgatherv": lambda: until(to_neighbours()),
            "shared memory": self.gathered_there,
            "pairs": lambda: until(*self.receive(self.parts), *self.send([own] * self.size)),
            TRANSPORT: lambda: self.transport.all_gather(buffer).wait(),
            COPY: self.copy,
        }

    def check(self, name, function):
        """Call a reduce-scatter, and return whether its bits are those of the sum in the order of the ranks."""
        if name == COPY:
            return None
        result = self.summed if name == "Win.Accumulate" else self.part
        wanted = np.zeros_like(self.part)
        self.add([parts[self.rank] for parts in self.shared], wanted)
        result[...] = 0
        self.together()
        function()
        if not np.allclose(result, wanted, rtol=1e-5, atol=1e-5):
            raise SystemExit(f"collectives: {name} has another sum")
        return all(self.comm.allgather(np.array_equal(result, wanted)))

    def measured(self, functions, seconds):
        """Return name -> the seconds of the slowest rank, on rank 0."""
        times = {name: [] for name in functions}
        shuffle, began, go_on = np.random.default_rng(0).permutation, time.perf_counter(), True
        while go_on:
            for name in shuffle(list(functions)).tolist():
                self.together()
                start = time.perf_counter()
                functions[name]()
                times[name].append(time.perf_counter() - start)
            enough = len(times[COPY]) >= FEWEST and time.perf_counter() - began > seconds
            go_on = not self.comm.bcast(enough)  # rank 0's clock decides for all
        of_ranks = self.comm.gather(list(times.values()))
        return self.rank or dict(zip(times, np.max(of_ranks, axis=0).tolist(), strict=True))


def rank_main(sizes, seconds, setting):
    """Measure on this rank. Rank 0 prints what is found: the seconds of each, and whether it sums in order."""
    from mpi4py import MPI as mpi

    found = {}
    for n in sizes:
        ranks = Ranks(mpi, n)
        operations = {"reduce-scatter": ranks.sums(), "all-gather": ranks.gathers()}
        for operation, functions in operations.items():
            if setting:
                functions = {name: functions[name] for name in of_setting(setting, operation)}
            if not functions:
                continue
            of_sums = operation == "reduce-scatter"
            order = {name: ranks.check(name, function) if of_sums else None for name, function in functions.items()}
            for function in functions.values():
                function()
            times = ranks.measured(functions, seconds / len(operations) / len(sizes))
            if ranks.rank == 0:
                found.setdefault(n, {})[operation] = {name: [times[name], order[name]] for name in times}
        ranks.free()
    if mpi.COMM_WORLD.rank == 0:
        library = mpi.Get_library_version().split("\n")[0].replace("Version:", "").split()
        print(json.dumps({"library": " ".join(library), "found": found}), flush=True)


def of_setting(setting, operation):
    """Return which functions a setting of MPICH's is measured with: none if it is one of the other operation."""
    if {"reduce-scatter": "GATHER", "all-gather": "SCATTER"}[operation] in setting:
        return ()
    return (PRESENT[operation], *([TRANSPORT] if setting == NO_CMA else []), COPY)


def of_job(ranks, sizes, seconds, setting=""):
    environment = dict([setting.split("=")] if setting else [])
    return jobs.run(__file__, ranks, ",".join(map(str, sizes)), seconds, setting, seconds=seconds, **environment)


def measure_rows(backend, options, notes):
    if backend.name != "numba-cpu":
        notes.append(f"not measured: {backend.name} (collectives on GPUs are NCCL's)")
        return
    cores = facts.of_backend(backend.name)["cores"]
    if max(RANKS) > cores:
        notes.append(f"{max(RANKS)} ranks share {messages.how_many(cores, 'core')}")
    sizes = report.numbers(options.sizes)
    for ranks in RANKS:
        yield from _tables(ranks, backend, sizes, options.seconds * 2 * len(sizes) / ROUNDS)


def _tables(ranks, backend, sizes, seconds):
    """Yield the rows of each table of some ranks. seconds: of a round."""
    samples, order, library = {}, {}, ""
    for _, setting in itertools.product(range(ROUNDS), ("", *SETTINGS)):
        if setting and not library.startswith("MPICH"):
            continue
        done = of_job(ranks, sizes, seconds / 2 / (len(SETTINGS) if setting else 1), setting)
        library = done["library"]
        for n, of_size in done["found"].items():
            for operation, of_names in of_size.items():
                for name, (times, in_order) in of_names.items():
                    if setting and name != COPY:
                        name = f"{name}, {setting.removeprefix('MPIR_CVAR_')}"
                    samples.setdefault((operation, int(n)), {}).setdefault(name, []).extend(times)
                    order[operation, name] = in_order
    for (operation, n), of_names in samples.items():
        received = 4 * n // ranks * (ranks - 1)
        rows = []
        for name, times in of_names.items():
            row = measure.row("collectives", name, backend.name, n, state=operation, seconds=times, moved=received)
            in_order = {True: "in order", False: "in another", None: None}[order[operation, name]]
            rows.append(row | {"driver": library, "ranks": ranks, "sum": in_order})
        present = next(row["p50_us"] for row in rows if row["contender"] == PRESENT[operation])
        yield [row | {"x_present": float(f"{row['p50_us'] / present:.6g}")} for row in measure.add_ratios(rows)]


def table(rows):
    """Return the table of one operation, number of ranks and size, the fastest first."""
    first = rows[0]
    title = f"{first['state']}: {first['ranks']:g} ranks, {first['elements']:,} float32 each, {first['driver']}"
    heads = ["", "p20", "median", "p80", "x present", "x memory copy", "sum"]
    lines = []
    for row in sorted(rows, key=lambda row: row["p50_us"]):
        name = "a memory copy" if row["contender"] == measure.LIMIT else row["contender"]
        times = [report.time(row[f"p{q}_us"]) for q in (20, 50, 80)]
        lines.append([name, *times, f"{row['x_present']:.2f}", f"{row['x_limit']:.2f}", row["sum"] or ""])
    return Table(title, heads, lines)


def draw(rows, path):
    """Draw the times of the largest size, for each number of ranks."""
    largest = max(row["elements"] for row in rows)
    rows = [row for row in rows if row["elements"] == largest]

    def title(operation, ranks, n, of_size):
        return f"{operation}, {ranks:g} ranks\n{n:,} float32 each"

    report.draw_bars(rows, path, title, "median time", width=7.5, height=5.0, lines=("state", "ranks"))


if __name__ == "__main__":
    if "--rank" in sys.argv[1:2]:
        sizes, seconds, setting = sys.argv[2:]
        rank_main([int(n) for n in sizes.split(",")], float(seconds), setting)
    else:
        sizes = dict.fromkeys(("CPU", "CUDA"), "1e6,2e7")
        tables = ("state", "ranks", "elements")
        report.main("collectives", __doc__, measure_rows, draw, seconds=10.0, sizes=sizes, table=tables, show=table)
