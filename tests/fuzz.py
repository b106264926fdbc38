"""Random configurations of `Adam` and `adam_step`, all options at once, step by step against float64.

    python tests/fuzz.py --seconds 60 --seed 20261128

A round draws what kernels are compiled for, and then many cases for these kernels: shapes, layouts, groups, hyperparameters,
gradients, steps, and how the state is saved and loaded between them. A round that fails is made as small as it can be, and is
printed with its own seed, which gives this round again. By default the seed is today's date.
"""

import argparse
import datetime
import random
import sys
import tempfile
import time
import traceback
import warnings

import hypothesis
import numba
from random_cases import Round, check_function, check_optimizer, function_cases, optimizer_cases

CASES = 40  # of each of the two interfaces in a round


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=int(datetime.date.today().strftime("%Y%m%d")))
    parser.add_argument("--seconds", type=float, default=60, help="after which no round begins; the first one always does")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".* does nothing here", category=UserWarning)  # of options that are drawn too
    print(f"seed {given.seed}", flush=True)
    seeds = random.Random(given.seed)
    seed, rounds, ends = given.seed, 0, time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        numba.config.CACHE_DIR = folder  # random kernels are not worth keeping
        while rounds == 0 or time.monotonic() < ends:
            if report := report_of_round(seed, folder):
                print(report)
                return 1
            seed, rounds = seeds.getrandbits(48), rounds + 1
    print(f"{rounds} rounds of {2 * CASES} cases agree with float64")
    return 0


def report_of_round(seed, folder):
    """Return what is printed of a round that fails, or None."""
    drawn = Round.drawn(random.Random(seed))
    found = failure(drawn, seed, folder)
    if found is None:
        return None
    again = f"python tests/fuzz.py --seconds 0 --seed {seed}"
    print(f"{again}\nfails, and is made smaller", flush=True)
    smaller = drawn
    while smaller:
        drawn = smaller
        smaller = next((simpler for simpler in drawn.simpler() if failure(simpler, seed, folder)), None)
    case, error = failure(drawn, seed, folder, shrink=True) or found
    return f"{drawn}\n{case}\n{error}{again}"


def failure(drawn, seed, folder, shrink=False):
    """Return a case of a round that fails and its error, or None if all pass. shrink: return the smallest one."""

    def checked_optimizer(case):
        check_optimizer(drawn, case, folder)

    def checked_function(case):
        check_function(drawn, case)

    both = (optimizer_cases, checked_optimizer), (function_cases, checked_function)
    found = (failing_case(cases(drawn), check, seed, shrink) for cases, check in both)
    return next(filter(None, found), None)


def failing_case(cases, check, seed, shrink):
    latest = None

    def checked(case):
        nonlocal latest
        latest = case
        check(case)

    run = hypothesis.settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])),
        report_multiple_bugs=False,
    )(hypothesis.seed(seed)(hypothesis.given(cases)(checked)))
    try:
        run()
    except Exception as error:  # any error of a case is what is looked for
        if latest is None:  # no case has begun
            raise
        getattr(error, "__notes__", []).clear()  # the case once more
        return latest, "".join(traceback.format_exception(error))
    return None


if __name__ == "__main__":
    sys.exit(main())
