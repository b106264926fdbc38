"""What does a conversion of state lose: of m, of v, of the step, and of a training that goes on with it?

    python benchmarks/conversion.py [--seeds 5] [--steps N] [--out FOLDER]

The task is `digits` of quality.py. After half of the steps the state is converted, and training goes on. The errors are of the
state right after the conversion, in percent: that of m, of v and of m / (sqrt(v) + eps), which is the
direction of the step, each as the norm of the difference over the norm of what was converted; and the median error of v. The
final losses are in percent of those of a training without a conversion.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import quality
import report

import gpuadam
from gpuadam.cli.measuring import facts
from gpuadam.terminal import output
from gpuadam.terminal.console import Console, Table

UNCHANGED = "float32 throughout"
# name -> (state_dtype of the first half, of the second)
CONVERSIONS = {
    UNCHANGED: (None, None),
    "float32 to bfloat16": (None, "bfloat16"),
    "float32 to 8 bits": (None, "8bit"),
    "bfloat16 to float32": ("bfloat16", "float32"),
    "8 bits to float32": ("8bit", "float32"),
}
ERRORS = ("m_percent", "v_percent", "direction_percent", "median_v_percent")
MEASURED = (*ERRORS, "mean_loss", "percent_of_float32", "least_percent", "most_percent")
NUMBERS = {"elements", "steps", "seeds", "cores", *MEASURED}


def moments(optimizer):
    """Return m and v of all elements, as a step reads them, in float64."""
    wide = gpuadam.Adam(optimizer.groups[0]["params"], state_dtype="float32")
    wide.load_state_dict(optimizer.state_dict(), convert=True)
    states = wide.state.values()
    return tuple(np.concatenate([state[key].reshape(-1) for state in states]).astype("f8") for key in ("m", "v"))


def errors(before, after):
    """Return what `ERRORS` names. before, after: m and v."""
    directions = [m / (np.sqrt(v) + 1e-8) for m, v in (before, after)]
    pairs = (*zip(before, after, strict=True), directions)
    norms = [100 * np.linalg.norm(new - old) / np.linalg.norm(old) for old, new in pairs]
    old, new = (v[before[1] > 0] for v in (before[1], after[1]))
    return [float(x) for x in (*norms, 100 * np.median(np.abs(new / old - 1)))]


def trained(seed, steps, first, second):
    """Train and convert half-way. Return (the errors, the final loss, how many elements there are)."""
    import torch

    module, batches, judge = quality.TASKS["digits"].build(seed, steps)
    training = quality.Training(module, quality.Candidate({"state_dtype": first}), seed)
    found = [0.0] * len(ERRORS)
    for number, loss in enumerate(batches):
        if number == steps // 2 and second:
            old = training.optimizer
            params = old.groups[0]["params"]
            training.optimizer = gpuadam.Adam(params, state_dtype=second, seed=seed)
            training.optimizer.load_state_dict(old.state_dict(), convert=True)
            found = errors(moments(old), moments(training.optimizer))
        training.step(loss())
    with torch.no_grad():
        return found, float(judge()), sum(t.numel() for t in training.tensors)


def rows_of(seeds, steps):
    """Return a row for each of CONVERSIONS."""
    rows, base = [], None
    for contender, (first, second) in CONVERSIONS.items():
        runs = [trained(seed, steps, first, second) for seed in range(seeds)]
        losses = [loss for _, loss, _ in runs]
        base = base or losses
        percent = [100 * own / other for own, other in zip(losses, base, strict=True)]
        row = {"benchmark": "conversion", "contender": contender, "backend": "numba-cpu", "elements": runs[0][2]}
        row |= {"steps": steps, "seeds": seeds}
        mean_errors = [statistics.fmean(column) for column in zip(*(found for found, *_ in runs), strict=True)]
        row |= {name: float(f"{error:.3g}") for name, error in zip(ERRORS, mean_errors, strict=True)}
        row["mean_loss"] = round(statistics.fmean(losses), 6)
        row["percent_of_float32"] = round(100 * statistics.fmean(losses) / statistics.fmean(base), 3)
        row |= {"least_percent": round(min(percent), 3), "most_percent": round(max(percent), 3)}
        rows.append(row | {"losses": " ".join(f"{loss:.6f}" for loss in losses)} | facts.of_backend("numba-cpu"))
    return rows


@output.ending_plainly("conversion")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; default %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="default %(default)s")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write conversion.csv into it")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 2:
        parser.error("--seeds must be at least 1, and --steps 2")
    (torch,) = output.need("torch", "torch")
    output.need("demo", "sklearn.datasets")
    torch.set_num_threads(1)  # so that sums have one order, and a run ends with the same loss again
    rows = rows_of(options.seeds, options.steps)
    title = f"conversion after {options.steps // 2:,} of {options.steps:,} steps, {options.seeds} seeds"
    heads = ("", "m, %", "v, %", "step, %", "v, median, %", "final loss", "% of float32's", "least of a seed", "most")
    lines = [[row["contender"], *(str(row[name]) for name in MEASURED)] for row in rows]
    Console().print(Table(title, heads, lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_csv(options.out / "conversion.csv", rows)


if __name__ == "__main__":
    main()
