"""Learn to read handwritten digits on many ranks, and go on from a checkpoint with any other number of ranks.

    mpiexec -n 4 python -m mpi4py -m gpuadam.examples.sharded_digits --steps 60
    mpiexec -n 2 python -m mpi4py -m gpuadam.examples.sharded_digits --steps 60    # goes on where the four were

Each rank has a part of the images of `digits`, and of the optimizer's state; all have the same parameters after each step.
Without mpiexec it is one rank. Needs mpi4py and MPICH: pip install "gpuadam[mpi]".
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

import gpuadam

from . import command_line, digits


def main(argv: list[str] | None = None) -> None:
    """Train, print the loss on the way and at the end how many of the images held out are read rightly."""
    counts = {"steps": (60, "steps over all images"), "size": (128, "units of the hidden layer")}
    options = command_line.options(argv, __doc__, **counts, checkpoint=("digits.checkpoint", "the folder where it is saved"))
    command_line.need("mpi", "mpi4py")
    transport = gpuadam.transports.MPI()
    (x, y), (x_test, y_test) = [(np.asarray(x, "float32"), y) for x, y in digits.load_digits()]
    as_many = len(x) // transport.size * transport.size  # on each rank, or their mean would not be that of all images
    mine = slice(transport.rank, as_many, transport.size)
    params = {name: np.asarray(p, "float32") for name, p in digits.initial_parameters(options.size).items()}
    groups = gpuadam.decay_groups(params, no_decay="b*", weight_decay=0.1)
    if transport.exchange(Path(options.checkpoint).exists())[0]:
        opt = gpuadam.load_sharded(options.checkpoint, groups, transport, with_params=True)
    else:
        opt = gpuadam.ShardedAdamW(groups, transport, lr=1e-2)

    before, losses = opt.steps, [0.0]
    counted: Iterable[int] = range(options.steps)
    if transport.rank == 0:  # one of them says how it goes
        print(f"ranks: {transport.size}, steps before: {before}")
        counted = command_line.steps(options.steps, lambda: f"loss {losses[-1]:.4f}")
    for _ in counted:
        loss, grads = digits.loss_and_gradients(np, params, x[mine], y[mine])
        opt.step(grads, max_norm=1.0)
        losses.append(float(np.mean(transport.exchange(float(loss)))))
        if (opt.steps - before) % 20 == 0 or opt.steps - before == options.steps:
            opt.save(options.checkpoint, with_params=True)
    if transport.rank == 0:
        accuracy = digits.accuracy(np, params, x_test, y_test)
        print(f"of {len(y_test)} digits held out, {accuracy:.2%} are read rightly after {opt.steps} steps")


if __name__ == "__main__":
    command_line.run(main)
