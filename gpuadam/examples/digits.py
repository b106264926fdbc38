"""Learn to read handwritten digits: a two-layer network, forward and backward in plain array code.

The digits are scikit-learn's `load_digits`, 1,797 images of 8 x 8 pixels from the UCI repository; a fifth is held out.
`python -m gpuadam demo` trains it too, beside the same in float64.
"""

from typing import Any

import numpy as np

import gpuadam

from . import command_line


def main(argv: list[str] | None = None) -> None:
    """Train, print the loss on the way and at the end how many of the images held out are read rightly."""
    counts = {"steps": (30, "passes over the images"), "size": (128, "units of the hidden layer")}
    options = command_line.options(argv, __doc__, **counts, arrays="cupy")
    xp = command_line.array_module(options.arrays)
    (x, y), (x_test, y_test) = [(xp.asarray(x, "float32"), xp.asarray(y)) for x, y in load_digits()]
    params = {name: xp.asarray(p, "float32") for name, p in initial_parameters(options.size).items()}
    opt = gpuadam.AdamW(gpuadam.decay_groups(params, no_decay="b*", weight_decay=0.1), lr=2e-3)

    losses: list[float] = []
    passes = train(xp, params, opt.step, x, y)
    for _ in command_line.steps(options.steps, lambda: f"loss {losses[-1]:.4f}"):
        losses.append(next(passes))
    print(f"of {len(y_test)} digits held out, {accuracy(xp, params, x_test, y_test):.2%} are read rightly")


def load_digits() -> Any:
    """Return ((images, labels) to train on, those held out), pixels from 0 to 1."""
    datasets, selection = command_line.need("demo", "sklearn.datasets", "sklearn.model_selection")
    images, labels = datasets.load_digits(return_X_y=True)
    x, x_test, y, y_test = selection.train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    return (x, y), (x_test, y_test)


def initial_parameters(hidden: int) -> Any:
    """Return float64 parameters (He et al. 2015, arXiv:1502.01852) that float32 holds exactly, so runs in both start as one."""
    rng = np.random.default_rng(1)

    def layer(n_in: int, n_out: int) -> Any:
        return (rng.standard_normal((n_in, n_out)) * np.sqrt(2 / n_in)).astype("float32").astype("float64")

    return {"w1": layer(64, hidden), "b1": np.zeros(hidden), "w2": layer(hidden, 10), "b2": np.zeros(10)}


def train(xp: Any, params: Any, step: Any, images: Any, labels: Any, batch: int = 64) -> Any:
    """Yield the mean loss of each pass over the images, for ever. step(grads) is called for each batch and changes params.

    The order of the images is new in each pass, and the same in every run.
    """
    rng = np.random.default_rng(2)
    while True:
        losses, order = [], rng.permutation(len(images))
        for start in range(0, len(images), batch):
            chosen = xp.asarray(order[start : start + batch])
            loss, grads = loss_and_gradients(xp, params, images[chosen], labels[chosen])
            step(grads)
            losses.append(loss)
        yield float(xp.stack(losses).mean())


def loss_and_gradients(xp: Any, p: Any, x: Any, y: Any) -> Any:
    """Return the mean cross-entropy of a batch and its gradient for every parameter; xp is numpy or cupy."""
    hidden = xp.maximum(x @ p["w1"] + p["b1"], 0)
    logits = hidden @ p["w2"] + p["b2"]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probability = logits - xp.log(xp.exp(logits).sum(axis=1, keepdims=True))
    rows = xp.arange(len(y))
    loss = -log_probability[rows, y].mean()

    d_logits = xp.exp(log_probability)
    d_logits[rows, y] -= 1
    d_logits /= len(y)
    d_hidden = d_logits @ p["w2"].T
    d_hidden[hidden <= 0] = 0
    return loss, {
        "w1": x.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "w2": hidden.T @ d_logits,
        "b2": d_logits.sum(axis=0),
    }


def accuracy(xp: Any, p: Any, x: Any, y: Any) -> float:
    """Return the fraction of images that are read rightly."""
    hidden = xp.maximum(x @ p["w1"] + p["b1"], 0)
    return float(((hidden @ p["w2"] + p["b2"]).argmax(axis=1) == y).mean())


if __name__ == "__main__":
    command_line.run(main)
