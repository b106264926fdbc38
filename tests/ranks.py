"""What the ranks of `mpi_jobs.py` do, and what they compare themselves with.

A job is a function here that every rank runs. Rank 0 prints what was found as one line of JSON; then all step on for ever,
until the test kills one of them.
"""

import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import gpuadam
from gpuadam import transports
from gpuadam.sharded.transports.sums import PIECE

STEPS, MORE = 2, 10
SHAPES = {
    "large": (3, 5000),
    "empty": (0,),
    "scalar": (),
    "one": (1,),
    "seven": (7,),
    "below a cell": (4095,),
    "a cell": (4096,),
    "above a cell": (4097,),
    "larger": (20_011,),
    "nothing, 2-D": (5, 0),
}
LAST = ("seven", "larger")  # in a group of their own, where there are groups


def float32(shape, rng):
    return rng.standard_normal(shape).astype("f4")


def float64(shape, rng):
    return rng.standard_normal(shape)


def bfloat16(shape, rng):
    bits = rng.standard_normal(shape).astype("f4").view("u4") >> 16
    return gpuadam.Bits(np.asarray(bits, "u2"), "bfloat16")


def strided(shape, rng):
    """Arrays in F order, and with gaps."""
    whole = rng.standard_normal((*shape[:-1], 2 * shape[-1]) if shape else shape).astype("f4")
    return np.asfortranarray(whole)[..., ::2] if shape else whole


# name: (an array of a parameter, arguments of the optimizer, arguments of the step)
CASES = {
    "any layout, some skipped": (strided, {}, {"skips": True}),
    "groups, clipped": (float32, {"weight_decay": 0.1, "decoupled": True, "groups": True}, {"max_norm": 0.5}),
    "views, clipped": (float32, {"views": True}, {"max_norm": 0.5}),
    "float64, clipped": (float64, {}, {"max_norm": 0.5}),  # float32 would round the last bits of the norm away
    "8 bits": (float32, {"state_dtype": "8bit", "seed": 3}, {}),
    "bfloat16": (bfloat16, {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 4}, {}),
    "remainder": (bfloat16, {"master": "remainder", "ema_decay": 0.5}, {}),
    "nadam": (float32, {"algorithm": "nadam"}, {}),
}


def params_of(case, rank=0):
    """Return the parameters of a case. Only those of rank 0 count."""
    rng = np.random.default_rng(rank)
    return {name: CASES[case][0](shape, rng) for name, shape in SHAPES.items()}


LARGEST = 2_000_000  # eight of them have 24 bits, as a float32; the sum of all squares has more than a float64's 53


@functools.cache
def draw(step, name, rank):
    rng = np.random.default_rng([step, list(SHAPES).index(name), rank])
    return rng.integers(-LARGEST, LARGEST, SHAPES[name]) / 1024


def grads_of(case, step, rank, ranks):
    """Return a rank's gradients: numbers whose sum over all ranks is exact, and the same for any number of ranks."""
    dtype = "f8" if CASES[case][0] is float64 else "f4"
    grads = {}
    for name in SHAPES:
        drawn = draw(step, name, rank)
        others = sum(draw(step, name, k) for k in range(1, ranks)) if rank == 0 else 0
        grads[name] = np.array(drawn - others, dtype)
    if "skips" in CASES[case][2]:
        grads["large" if step == 1 else "seven"] = None
    return grads


def grouped(case, params):
    """Return a dict of parameters or of gradients, in groups if the case has them."""
    if "groups" not in CASES[case][1]:
        return params
    rest = {name: array for name, array in params.items() if name not in LAST}
    return [{"params": rest}, {"params": {name: params[name] for name in LAST}, "lr": 0.05}]


def grads_in_groups(case, grads):
    found = grouped(case, grads)
    return [group["params"] for group in found] if isinstance(found, list) else found


def options_of(case):
    return {key: value for key, value in CASES[case][1].items() if key != "groups"}


def digest(*arrays):
    """Return a name for the bits of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        array = array.array if isinstance(array, gpuadam.Bits) else array
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


STATE = ("m", "v", "ema", "remainder", "m_scale", "v_scale")


def unsharded(case, folder=None):
    """Return two digests of parameters and state by one optimizer: after STEPS, and after MORE. Between them it is saved."""
    params, options = params_of(case), options_of(case)
    options.pop("views", None)
    decoupled, algorithm = options.pop("decoupled", False), options.pop("algorithm", "adam")
    make = gpuadam.NAdam if algorithm == "nadam" else gpuadam.AdamW if decoupled else gpuadam.Adam
    opt = make(grouped(case, params), lr=0.1, **options)
    run(case, opt, range(1, STEPS + 1))
    found = [of_unsharded(opt, params)]
    if folder is not None:
        opt.save(Path(folder, f"{case}.alone"), with_params=True)
    run(case, opt, range(STEPS + 1, STEPS + MORE + 1))
    return [*found, of_unsharded(opt, params)]


def of_unsharded(opt, params):
    state = [s[key] for key in STATE for name, s in opt.state.items() if key in s and np.prod(SHAPES[name])]
    return digest(*params.values(), *state)


def run(case, opt, steps):
    """Take some steps with an optimizer of one or of many ranks."""
    transport = getattr(opt, "transport", transports.Local())
    for step in steps:
        grads = grads_in_groups(case, grads_of(case, step, transport.rank, transport.size))
        if hasattr(opt, "transport") and options_of(case).get("views"):
            for name, grad in grads.items():
                opt.grads[name][...] = grad
            grads = opt.grads
        opt.step(grads, **step_options(case))


def step_options(case):
    return {key: value for key, value in CASES[case][2].items() if key != "skips"}


BUCKETS = {"bucket_bytes": 40_000}


def sharded(case, transport, folder=None):
    """Return the digest of this rank's parameters and of the state of all, after STEPS; and save them."""
    params, options = params_of(case, transport.rank), options_of(case)
    opt = gpuadam.ShardedAdam(grouped(case, params), transport, reduction="sum", **BUCKETS, **{"lr": 0.1} | options)
    run(case, opt, range(1, STEPS + 1))
    if folder is not None:
        opt.save(Path(folder, case), with_params=True)
    return of_sharded(case, opt, params)


def of_sharded(case, opt, params):
    state = [array for key in STATE for array in in_order_of_names(opt, opt.gathered(key))]
    return digest(*(opt.params if options_of(case).get("views") else params).values(), *state)


def resumed(case, transport, path):
    """Return the digest of what was saved and went on for MORE steps. The arrays that it is loaded into hold other numbers."""
    params = params_of(case, 100 + transport.rank)
    choices = BUCKETS | {"reduction": "sum", "views": "views" in options_of(case)}
    opt = gpuadam.load_sharded(path, grouped(case, params), transport, with_params=True, **choices)
    run(case, opt, range(STEPS + 1, STEPS + MORE + 1))
    return of_sharded(case, opt, params)


def resumed_alone(case, path):
    """As `resumed`, by one optimizer that is not over ranks."""
    params = params_of(case, 100)
    opt = gpuadam.load(path, grouped(case, params), with_params=True)
    run(case, opt, range(STEPS + 1, STEPS + MORE + 1))
    return of_unsharded(opt, params)


def in_order_of_names(opt, by_name):
    return [by_name[name] for group in opt.groups for name in group["names"] if name in by_name]


# Jobs


def bits():
    """Every case on 8 ranks, and on parts of them: 4, 3, 1, and four times 2. What 4 saved, and what one did, goes on on all.

    Or on 4 ranks, and on 3, 1, and two times 2.
    """
    from mpi4py import MPI

    world, folder = MPI.COMM_WORLD, os.environ["CHECKPOINTS"]
    splits = {
        8: ([0] * 8, [0] * 4 + [1] * 3 + [2], [0, 0, 1, 1, 2, 2, 3, 3]),
        4: ([0] * 4, [0] * 3 + [1], [0, 0, 1, 1]),
    }[world.size]
    of_splits = [transports.MPI(world.Split(colors[world.rank], world.rank)) for colors in splits]
    found = {}
    for case in CASES:
        for transport in of_splits:
            saves = folder if transport.size == 4 else None
            found.setdefault(f"{transport.size}", {}).setdefault(case, set()).add(sharded(case, transport, saves))
    world.Barrier()
    for case in CASES:
        for transport in of_splits:
            for saved, path in (("4", case), ("alone", f"{case}.alone")):
                key = f"{saved} to {transport.size}"
                found.setdefault(key, {}).setdefault(case, set()).add(resumed(case, transport, Path(folder, path)))
        if world.rank == 0:
            found.setdefault("4 to alone", {}).setdefault(case, set()).add(resumed_alone(case, Path(folder, case)))
    together = {}
    for of_rank in world.allgather(found):
        for key, of_cases in of_rank.items():
            for case, digests in of_cases.items():
                together.setdefault(case, {}).setdefault(key, set()).update(digests)
    go_on(transports.MPI(), {case: {key: sorted(d) for key, d in of_case.items()} for case, of_case in together.items()})


def training_and_refusals():
    """What four ranks learn, what they refuse, and when they leave a step out."""
    transport = transports.MPI()
    found = {
        "accuracy": accuracy(transport, os.environ.get("DIGITS")),
        "accuracy alone": accuracy(transports.Local(), os.environ.get("DIGITS")) if transport.rank == 0 else None,
        "refused": {name: refused(transport, **differing(transport.rank)) for name, differing in DIFFERING.items()},
        "refused steps": {name: refused_step(transport, of_rank) for name, of_rank in BAD_STEPS.items()},
        "conditions": conditions(transport),
        "mean": mean(transport),
        "shards": shards(transport),
    }
    everywhere = transport.exchange(found)
    go_on(transport, {key: [of_rank[key] for of_rank in everywhere] for key in found})


def accuracy(transport, digits):
    """Train two layers on handwritten digits for 100 steps, each rank with its part of them. Return what part it tells right.

    digits: a file of "x" and "y", or None.
    """
    if digits is None:
        return None
    with np.load(digits) as arrays:
        x, y = arrays["x"], arrays["y"]
    mine = slice(len(x) * transport.rank // transport.size, len(x) * (transport.rank + 1) // transport.size)
    rng = np.random.default_rng(0)
    params = {"w1": rng.standard_normal((64, 64)).astype("f4") / 8, "w2": rng.standard_normal((64, 10)).astype("f4") / 8}
    opt = gpuadam.ShardedAdamW(params, transport, lr=0.01)

    def forward(x):
        hidden = np.maximum(x @ params["w1"], 0)
        return hidden, hidden @ params["w2"]

    for _ in range(100):
        hidden, scores = forward(x[mine])
        p = np.exp(scores - scores.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(10, dtype="f4")[y[mine]]) / len(x[mine])
        of_hidden = error @ params["w2"].T * (hidden > 0)
        opt.step({"w1": x[mine].T @ of_hidden, "w2": hidden.T @ error}, max_norm=1.0)
    return float((forward(x)[1].argmax(1) == y).mean())


def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - what it is, the test says
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


W = np.ones((3, 4), "f4")
# what each rank gives, by its number
DIFFERING = {
    "a shape": lambda rank: {"params": {"w": W if rank != 2 else W.T.copy()}},
    "a dtype": lambda rank: {"params": {"w": W if rank != 1 else W.astype("f8")}},
    "a name": lambda rank: {"params": {"w" if rank != 3 else "v": W}},
    "lr": lambda rank: {"lr": 0.1 if rank != 2 else 0.2},
    "betas": lambda rank: {"betas": (0.9, 0.99 if rank != 2 else 0.999)},
    "the seed": lambda rank: {"seed": rank // 3},
    "the state's dtype": lambda rank: {"state_dtype": None if rank != 1 else "bfloat16"},
    "bucket_bytes": lambda rank: {"bucket_bytes": 1 << (20 if rank != 1 else 21)},
    "a bad array": lambda rank: {"params": {"w": W if rank != 1 else W.astype("i4")}},
    "state that does not fit": lambda rank: {"params": [np.ones(40_000), W.copy()], "state_dtype": "8bit"},
}


def refused(transport, params=None, **options):
    """Return what the constructor raises, and whether an array was written to."""
    params = {"w": W.copy()} if params is None else params
    before = digest(*(params.values() if isinstance(params, dict) else params))
    said = message(gpuadam.ShardedAdam, params, transport, **options)
    after = digest(*(params.values() if isinstance(params, dict) else params))
    return said, before == after


G = np.ones((3, 4), "f4")
# (gradients, options of the step) of each rank
BAD_STEPS = {
    "a gradient's shape": lambda rank: ({"w": G if rank != 2 else G[:2]}, {}),
    "a gradient of one rank": lambda rank: ({"w": G if rank != 2 else None}, {}),
    "max_norm": lambda rank: ({"w": G}, {"max_norm": 1.0 if rank else None}),
    "grad_scale": lambda rank: ({"w": G}, {"grad_scale": 1.0 + (rank == 3)}),
    "an lr that was changed": lambda rank: ({"w": G}, {"lr": 0.5 if rank == 1 else 0.1}),
    "a clip that rounds to 0": lambda rank: ({"w": G}, {"max_norm": 1e-60}),
}


def refused_step(transport, of_rank):
    """Return what a step raises, whether anything was changed, and whether the next step is as if it had not been."""
    params, twin = {"w": W.copy()}, {"w": W.copy()}
    opt = gpuadam.ShardedAdam(params, transport, lr=0.1)
    grads, options = of_rank(transport.rank)
    opt.groups[0]["lr"] = options.pop("lr", 0.1)
    said = message(opt.step, grads, **options)
    unchanged = opt.steps == 0 and (params["w"] == W).all()
    opt.groups[0]["lr"] = 0.1
    opt.step({"w": G})
    gpuadam.ShardedAdam(twin, transport, lr=0.1).step({"w": G})
    return said, bool(unchanged), digest(params["w"]) == digest(twin["w"])


def conditions(transport):
    """Return (steps taken, whether the parameter moved, the largest gradient after) of steps that one rank would leave out."""
    found = {}
    inf = np.full(5000, np.inf if transport.rank == 1 else 1, "f4")
    one = np.ones(5000, "f4")
    for name, grad, options in (
        ("found_inf", one, {"found_inf": transport.rank == 2}),
        ("infinite", inf, {"check_finite": True}),
        ("finite", one, {"check_finite": True}),
        ("not looked at", one, {}),
    ):
        param, grad = np.ones(5000, "f4"), grad.copy()
        opt = gpuadam.ShardedAdam(param, transport, zero_grad=True)
        opt.step(grad, **options)
        found[name] = opt.steps, bool((param != 1).any()), float(np.abs(grad).max())
    return found


def mean(transport):
    """Return whether a step by the mean is one by the sum that is divided in the same factor, and the caller's change counted."""
    params = [np.linspace(-1, 1, 9000, dtype="f4"), np.ones(5, "f4")]
    expected = [p.copy() for p in params]
    opt, reference = gpuadam.ShardedAdam(params, transport), gpuadam.Adam(expected)
    for step in range(STEPS):
        for p in params + expected:
            p[0] = step  # who owns the parameters may change them
        opt.step([np.full(p.shape, transport.rank + step, "f4") for p in params], max_norm=0.01)
        total = sum(rank + step for rank in range(transport.size))
        reference.step([np.full(p.shape, total, "f4") for p in params], grad_scale=1 / transport.size, max_norm=0.01)
    return [digest(*params), digest(*expected)]


def shards(transport):
    """Return (name, start, stop, shape of the state) of what this rank owns, and the bytes of its state."""
    params = {"w": np.ones((100, 300), "f4"), "b": np.ones(300, "f4")}
    opt = gpuadam.ShardedAdam(params, transport, bucket_bytes=40_000)
    opt.step({"w": params["w"].copy(), "b": params["b"].copy()})
    own = [(s.name, s.start, s.stop, list(s.state["m"].shape)) for s in opt.shards]
    right = all((s.param == params[s.name].reshape(-1)[s.start : s.stop]).all() for s in opt.shards)
    return own, sum(s.state["m"].nbytes + s.state["v"].nbytes for s in opt.shards), bool(right)


def go_on(transport, found):
    """Print what was found, then step for ever."""
    pids = transport.exchange(os.getpid())
    param = np.zeros(100_000, "f4")
    opt = gpuadam.ShardedAdam(param, transport, bucket_bytes=40_000)
    if transport.rank == 0:
        print(json.dumps({"pids": pids, "found": found}), flush=True)
    while True:
        opt.step(np.ones(param.size, "f4"), max_norm=1.0)


GOING_ON = 100_000  # elements


def saving():
    """Step and save for ever."""
    transport = transports.MPI()
    pids = transport.exchange(os.getpid())
    param = np.zeros(GOING_ON, "f4")
    opt = gpuadam.ShardedAdam(param, transport, bucket_bytes=40_000)
    while True:
        opt.step(going_on(opt.steps))
        opt.save(os.environ["CHECKPOINTS"], with_params=True)
        if transport.rank == 0 and opt.steps == 1:
            print(json.dumps({"pids": pids, "found": None}), flush=True)


def going_on(step):
    """Return the gradient of a step that all ranks have."""
    return np.full(GOING_ON, step % 7 - 3, "f4")


def one_raises():
    """One rank raises amid the steps, and nobody handles it."""
    transport = transports.MPI()
    param = np.zeros(10_000, "f4")
    opt = gpuadam.ShardedAdam(param, transport)
    for step in range(1000):
        opt.step(np.ones(param.size, "f4"))
        if (step, transport.rank) == (5, 1):
            raise RuntimeError("a rank has had enough")


def ends():
    """Rank 1 ends before its third step, or is missing from it, as HOW says. The others say what their third step raises."""
    seconds = os.environ.get("TIMEOUT")
    transport = transports.MPI(timeout=None if seconds is None else float(seconds))
    param = np.zeros(10_000, "f4")
    opt = gpuadam.ShardedAdam(param, transport)
    for _ in range(2):
        opt.step(np.ones(param.size, "f4"))
    if transport.rank == 1:
        WAYS[os.environ["HOW"]](opt)
    else:
        said = message(opt.step, np.ones(param.size, "f4"))
        sys.stdout.write(f"rank {transport.rank}: {opt.steps} steps, {said}\n")  # in one piece


def finalize(opt):
    from mpi4py import MPI

    MPI.Finalize()


def close(opt):
    opt.transport.close()
    sys.stdout.write(f"rank 1: {message(opt.step, opt.grads)}\n")


def interrupted(opt):
    """Catch the exception of a step that was cut short."""
    opt.transport.all_gather = None
    assert message(opt.step, opt.grads).startswith("TypeError")


def busy(opt):
    time.sleep(600)


WAYS = {
    "the end of the program": lambda opt: None,
    "SystemExit(0)": lambda opt: sys.exit(0),
    "SystemExit(3)": lambda opt: sys.exit(3),
    "MPI.Finalize": finalize,
    "close": close,
    "a step that was cut short": interrupted,
    "a step that was cut short, and other work": lambda opt: (interrupted(opt), busy(opt)),
    "other work": busy,
    "os._exit": lambda opt: os._exit(0),
    "SIGKILL": lambda opt: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda opt: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSTOP": lambda opt: os.kill(os.getpid(), signal.SIGSTOP),
}


def sums():
    """Start several sums at once, in pieces and smaller ones, and wait from the last on. Say which are in the ranks' order."""
    transport = transports.MPI()

    def gradients(rank, k, n, dtype):
        return np.random.default_rng([rank, k]).standard_normal((transport.size, n)).astype(dtype)

    for dtype in ("f4", "f8"):
        piece = PIECE // np.dtype(dtype).itemsize
        sizes = (2 * piece + 5, 1, piece, 4096)
        parts = [np.zeros(n, dtype) for n in sizes]
        buffers = [gradients(transport.rank, k, n, dtype).reshape(-1) for k, n in enumerate(sizes)]
        works = [transport.reduce_scatter(*pair) for pair in zip(buffers, parts, strict=True)]
        for work in reversed(works):
            work.wait()
        for k, (n, part) in enumerate(zip(sizes, parts, strict=True)):
            wanted, *terms = (gradients(rank, k, n, dtype)[transport.rank] for rank in range(transport.size))
            for term in terms:
                wanted = wanted + term
            sys.stdout.write(f"{dtype} {n} {np.array_equal(part, wanted)}\n")
    sys.stdout.write(f"{transport.exchange(1)}\n")  # nothing is left over


def alone_in_a_sum():
    """Rank 1 does something else, while the others start a sum of several pieces and say what they raise."""
    transport = transports.MPI(timeout=2)
    if transport.rank == 1:
        time.sleep(600)
    buffer, part = np.ones((transport.size, PIECE), "f4").reshape(-1), np.zeros(PIECE, "f4")
    sys.stdout.write(f"{message(transport.reduce_scatter(buffer, part).wait)}\n")


def not_made():
    """Rank 1 makes no transport, or rank 0 makes one with another timeout than OTHER."""
    from mpi4py import MPI

    rank, other = MPI.COMM_WORLD.rank, os.environ.get("OTHER")
    if rank == 1 and other is None:
        time.sleep(600)
    timeout = 1.0 if other is None else float(other) if rank else 50.0
    sys.stdout.write(message(transports.MPI, timeout=timeout) + "\n")
