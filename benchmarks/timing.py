"""Timing by the host's clock, for the other scripts. `gpuadam.cli.measuring.measure` has that by the device's clock."""

import time

import numpy as np


def on_host(functions, finish, seconds, calls=1, at_least=11):
    """Run functions one after the other, in a new order each round, and return the host's seconds of every call of each.

    They are the seconds until a call returns, which on a GPU is before its work is done.

    calls: how many each function makes in its turn. The first fifth of several finds the caches as the others left them and is
        not timed; of the rest the mean is one sample.
    finish: waits for whatever is still running. It is called between the turns and not timed, so that no queue fills up.
    """
    shuffle = np.random.default_rng(0).permutation
    for _ in range(3):
        for function in functions:
            function()
            finish()
    untimed = range(calls // 5)
    timed = range(calls - len(untimed))
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < deadline:
        for k in shuffle(len(functions)):
            function = functions[k]
            for _ in untimed:
                function()
            began = time.perf_counter()
            for _ in timed:
                function()
            times[k].append((time.perf_counter() - began) / len(timed))
            finish()
    return times
