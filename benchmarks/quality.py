"""Does a narrow state, or a narrow parameter, train as well as float32? Final training losses of two real tasks, over seeds.

    python benchmarks/quality.py [--tasks digits,text] [--seeds 5] [--steps N] [--out FOLDER]

digits: scikit-learn's 1,797 handwritten digits, a network of 64-128-10 (9,610 parameters), batches of 64, 2,000 steps; the
    loss is of all images after the last step.
text: a causal character transformer (2 layers of width 96, context 64, 248,448 parameters) over the source of this Python's
    own standard library (the top-level *.py, in order of name, the first 4 million characters; what is neither printable
    ASCII nor a newline becomes "?"), batches of 4 windows, 1,000 steps; the loss is of 1,024 windows, the same ones always.

Every optimizer is gpuadam.Adam with lr 1e-3. Runs of one seed have the same start and the same batches. torch computes the
gradients, in float32, from the parameters as they are stored; those of bfloat16 parameters are then rounded to bfloat16.
Training is chaotic: "lr x 1.001" shows how far apart runs of the same quality end that differ by as little as a rounding.
"""

import argparse
import functools
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import report

import gpuadam
from gpuadam.cli.measuring import facts
from gpuadam.terminal import arguments, output
from gpuadam.terminal.console import Console, Table

LR = 1e-3
FLOAT32 = "float32"


class Candidate(NamedTuple):
    """params: the format of parameters and gradients. options: of gpuadam.Adam, which also gets the seed."""

    options: dict
    params: str = "float32"


CANDIDATES = {
    FLOAT32: Candidate({}),
    "float32, lr x 1.001": Candidate({"lr": 1.001 * LR}),  # bfloat16 has 8 bits: it is off by up to 0.002
    "bfloat16 state": Candidate({"state_dtype": "bfloat16"}),
    "8-bit state": Candidate({"state_dtype": "8bit"}),
    "bfloat16 params, stochastic, and state": Candidate(
        {"state_dtype": "bfloat16", "stochastic_rounding": True}, "bfloat16"
    ),
    "bfloat16 params + 16 bits": Candidate({"master": "remainder"}, "bfloat16"),
    "bfloat16 params, to nearest": Candidate({}, "bfloat16"),  # what the two above are for: small updates are lost
}
NUMBERS = {"elements", "arrays", "steps", "seeds", "cores"}  # of the columns of a row
NUMBERS |= {"mean_loss", "sd_loss", "percent_of_float32", "least_percent", "most_percent"}


class Training:
    """A torch module whose parameters an optimizer updates in place."""

    def __init__(self, module, candidate, seed):
        self.tensors = list(module.parameters())
        for tensor in self.tensors:
            tensor.grad = tensor.detach().new_zeros(tensor.shape)
        self.narrow = [t.detach().bfloat16() for t in self.tensors] if candidate.params == "bfloat16" else None
        self._show()
        params = [_bits(t) for t in self.narrow] if self.narrow else [t.detach().numpy() for t in self.tensors]
        self.optimizer = gpuadam.Adam(params, **{"lr": LR, "seed": seed} | candidate.options)

    def step(self, loss):
        for tensor in self.tensors:
            tensor.grad.zero_()
        loss.backward()
        grads = [t.grad for t in self.tensors]
        self.optimizer.step([_bits(g.bfloat16()) for g in grads] if self.narrow else [g.numpy() for g in grads])
        self._show()

    def _show(self):
        """Make the module compute with what is stored."""
        for tensor, stored in zip(self.tensors, self.narrow or (), strict=bool(self.narrow)):
            tensor.data.copy_(stored)


def _bits(tensor):
    import torch

    return gpuadam.Bits(tensor.view(torch.int16).numpy(), "bfloat16")


class Task(NamedTuple):
    """build(seed, steps) -> (module, an iterator of functions that give a batch's loss, one that gives the final loss)."""

    build: Callable
    steps: int


def digits(seed, steps):
    import torch
    from sklearn.datasets import load_digits
    from torch.nn.functional import cross_entropy

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images.astype(np.float32) / 16), torch.from_numpy(labels.astype(np.int64))
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    picks = torch.from_numpy(np.random.default_rng(seed).integers(0, len(labels), (steps, 64)))

    def loss(pick=slice(None)):
        return cross_entropy(module(images[pick]), labels[pick])

    return module, (functools.partial(loss, pick) for pick in picks), loss


def text(seed, steps, windows=4, context=64):
    import torch
    from torch.nn.functional import cross_entropy

    symbols = torch.from_numpy(stdlib_text())
    torch.manual_seed(seed)
    module = transformer(symbols=96, context=context)

    def starts(seed, shape):
        return torch.from_numpy(np.random.default_rng(seed).integers(0, len(symbols) - context - 1, shape))

    def loss(at):
        x = symbols[at[:, None] + torch.arange(context + 1)]
        return cross_entropy(module(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    judged = starts(12345, (32, 32))
    batches = (functools.partial(loss, at) for at in starts(seed, (steps, windows)))
    return module, batches, lambda: torch.stack([loss(at) for at in judged]).mean()


TASKS = {"digits": Task(digits, 2000), "text": Task(text, 1000)}


@functools.cache
def stdlib_text(characters=4_000_000):
    """Return the source of the standard library as symbols from 0 to 95: a newline is the last."""
    source = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source += path.read_text("utf-8", "replace")
        if len(source) >= characters:
            break
    raw = np.frombuffer(source[:characters].encode("ascii", "replace"), np.uint8).astype(np.int64)
    return np.where(raw == ord("\n"), 95, np.where((raw >= 32) & (raw < 127), raw - 32, ord("?") - 32))


def transformer(symbols, context, width=96, heads=4, layers=2):
    """Return a module that takes symbols (batch, length) and gives the logits of the next (batch, length, symbols)."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            qkv = self.qkv(self.norm1(x)).chunk(3, -1)
            q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in qkv)
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
            for table in (self.symbol, self.place):
                nn.init.normal_(table.weight, std=0.02)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.symbol(x) + self.place.weight[: x.shape[1]])))

    return Transformer()


def final_loss(task, candidate, seed, steps):
    """Train, and return (the final loss, how many parameters there are, in how many arrays)."""
    import torch

    module, batches, judge = task.build(seed, steps)
    training = Training(module, candidate, seed)
    for loss in batches:
        training.step(loss())
    with torch.no_grad():
        return float(judge()), sum(t.numel() for t in training.tensors), len(training.tensors)


def rows_of(name, seeds, steps, show=lambda line: None):
    """Return a row for each candidate, the first of which is what the others are measured by."""
    task = TASKS[name]
    steps = steps or task.steps
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        for contender, candidate in CANDIDATES.items():
            loss, elements, arrays = final_loss(task, candidate, seed, steps)
            losses.setdefault(contender, []).append(loss)
            show(f"{name}, seed {seed}, {contender}: {loss:.5f}")
    rows = []
    for contender, of_one in losses.items():
        percent = [100 * own / base for own, base in zip(of_one, losses[FLOAT32], strict=True)]
        row = {"benchmark": "quality", "contender": contender, "backend": "numba-cpu", "task": name, "elements": elements}
        row |= {"arrays": arrays, "steps": steps, "seeds": seeds, "mean_loss": round(statistics.fmean(of_one), 6)}
        row["sd_loss"] = round(statistics.stdev(of_one), 6) if seeds > 1 else None
        row["percent_of_float32"] = round(100 * statistics.fmean(of_one) / statistics.fmean(losses[FLOAT32]), 3)
        row |= {"least_percent": round(min(percent), 3), "most_percent": round(max(percent), 3)}
        rows.append(row | {"losses": " ".join(f"{loss:.6f}" for loss in of_one)} | facts.of_backend("numba-cpu"))
    return rows


def table(rows):
    """Return the table of one task."""
    first = rows[0]
    title = f"quality: {first['task']}, {first['elements']:,} parameters, {first['steps']:,} steps, {first['seeds']} seeds"
    heads = ("", "final loss", "standard deviation", "% of float32's", "least of a seed", "most")
    lines = []
    for row in rows:
        spread = "" if row["sd_loss"] is None else f"{row['sd_loss']:.5f}"
        percent = (f"{row[key]:.2f}" for key in ("percent_of_float32", "least_percent", "most_percent"))
        lines.append([row["contender"], f"{row['mean_loss']:.5f}", spread, *percent])
    return Table(title, heads, lines)


@output.ending_plainly("quality")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = arguments.names(TASKS, "task")
    parser.add_argument(
        "--tasks", type=names, default="all", metavar="NAME,NAME", help=f"of {', '.join(TASKS)}; default all"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on; default %(default)s")
    parser.add_argument("--steps", type=int, help="fewer than the tasks' own, to try it out")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write quality.csv into it")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    (torch,) = output.need("torch", "torch")
    if "digits" in options.tasks:
        output.need("demo", "sklearn.datasets")
    torch.set_num_threads(1)  # so that sums have one order, and a run ends with the same loss again
    console = Console()
    rows = []
    for name in options.tasks:
        rows += rows_of(name, options.seeds, options.steps, console.print)
        console.print(table([row for row in rows if row["task"] == name]))
        if options.out:  # after each task: a run that is cut short keeps what it has
            options.out.mkdir(parents=True, exist_ok=True)
            report.write_csv(options.out / "quality.csv", rows)


if __name__ == "__main__":
    main()
