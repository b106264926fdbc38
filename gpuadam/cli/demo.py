"""python -m gpuadam demo: a textbook problem and real images, trained with gpuadam.

a. Fit y = w x + b to five points: Adam's numbers, step by step.
b. Learn to read 1,797 handwritten digits (scikit-learn's `load_digits`, from the UCI repository) with a two-layer network,
   its forward and backward pass in plain array code; beside it the same training with the float64 reference.
"""

import time

import numpy as np

import gpuadam

from .. import backends, reference
from . import output

TEXTBOOK_STEPS = 1000
EPOCHS, BATCH, HIDDEN = 40, 64, 128


def run(options):
    """Run both parts; return 0 if the test accuracy is at least 97 %."""
    rich_console, _ = output.need("demo", "rich.console", "sklearn.datasets")
    if options.plot:
        output.need("demo", "matplotlib")
    console = rich_console.Console(stderr=options.json == "-")
    backend = options.backend or gpuadam.available_backends()[0]
    backends.load(backend)
    xp = _array_module(backend)
    console.print(f"gpuadam {gpuadam.__version__}, backend {backend}, arrays of {xp.__name__}\n")

    result = {"backend": backend, "textbook": textbook(xp, backend)}
    _print_textbook(console, result["textbook"])
    result["digits"] = digits(xp, backend, console)
    _print_digits(console, result["digits"])
    if options.plot:
        _plot(options.plot, result)
        console.print(f"curves: {options.plot}")
    if options.json:
        output.write_json(options.json, result | {"versions": output.versions(), "machine": output.machine()})
    return 0 if result["digits"]["test_accuracy"] >= 0.97 else 1


def _array_module(backend):
    """Return the module of the arrays that a backend updates and plain array code can compute with."""
    if backend == "numba-cpu":
        return np
    return output.need("cuda13", "cupy")[0]  # Numba's device arrays have no arithmetic; CuPy's lie in the same memory


def textbook(xp, backend):
    """Fit y = w x + b to y = 2 x by the mean squared error, from w = 0.5, b = 0. Return the steps."""
    x = xp.arange(1, 6, dtype="float32")
    y = 2 * x
    w, b = xp.full(1, 0.5, "float32"), xp.zeros(1, "float32")
    beta1, beta2 = betas = (0.9, 0.999)
    opt = gpuadam.Adam({"w": w, "b": b}, lr=0.1, betas=betas, eps=1e-8, backend=backend)
    first_steps = []
    for step in range(1, TEXTBOOK_STEPS + 1):
        residual = w * x + b - y
        grads = {"w": (2 * residual * x).mean().reshape(1), "b": (2 * residual).mean().reshape(1)}
        opt.step(grads)
        if step <= 5:
            for name, value in (("w", w), ("b", b)):
                m, v = (float(opt.state[name][moment][0]) for moment in ("m", "v"))
                first_steps.append(
                    {
                        "step": step,
                        "parameter": name,
                        "g": float(grads[name][0]),
                        "m": m,
                        "v": v,
                        "m_hat": m / (1 - beta1**step),
                        "v_hat": v / (1 - beta2**step),
                        "value": float(value[0]),
                    }
                )
    return {"first_steps": first_steps, "steps": TEXTBOOK_STEPS, "w": float(w[0]), "b": float(b[0])}


def digits(xp, backend, console):
    """Train on the digits twice, with gpuadam in float32 and with the reference in float64. Return curves and accuracies."""
    (x, y), (x_test, y_test) = _load_digits()
    ours = {name: xp.asarray(p, dtype="float32") for name, p in _initial_parameters().items()}
    exact = _initial_parameters()
    settings = {"lr": 2e-3, "weight_decay": 0.1}
    opt = gpuadam.AdamW(ours, **settings, backend=backend)
    moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in exact.items()}
    data = [xp.asarray(a, dtype=t) for a, t in ((x, "float32"), (y, "int64"), (x_test, "float32"), (y_test, "int64"))]
    order = np.random.default_rng(2)
    curves: dict[str, list[float]] = {"loss": [], "accuracy": [], "reference_loss": [], "reference_accuracy": []}
    update_seconds = []
    with _Progress(console, EPOCHS) as progress:
        for epoch in range(1, EPOCHS + 1):
            losses, exact_losses = [], []
            shuffled = order.permutation(len(x))
            for start in range(0, len(x), BATCH):
                batch = shuffled[start : start + BATCH]
                there = xp.asarray(batch)
                loss, grads = loss_and_gradients(xp, ours, data[0][there], data[1][there])
                losses.append(loss)
                began = time.perf_counter()
                opt.step(grads)
                update_seconds.append(time.perf_counter() - began)
                exact_loss, exact_grads = loss_and_gradients(np, exact, x[batch], y[batch])
                exact_losses.append(exact_loss)
                for name, grad in exact_grads.items():
                    exact[name], m, v, _ = reference.adam_step(
                        exact[name], grad, *moments[name], opt.steps, decoupled=True, **settings
                    )
                    moments[name] = m, v
            curves["loss"].append(float(xp.stack(losses).mean()))
            curves["accuracy"].append(accuracy(xp, ours, *data[2:]))
            curves["reference_loss"].append(float(np.mean(exact_losses)))
            curves["reference_accuracy"].append(accuracy(np, exact, x_test, y_test))
            progress.show(epoch, curves)
    apart = max(float(np.abs(np.asarray(_to_host(ours[name])) - exact[name]).max()) for name in exact)
    return curves | {
        "train_images": len(x),
        "test_images": len(x_test),
        "epochs": EPOCHS,
        "updates": len(update_seconds),
        "test_accuracy": curves["accuracy"][-1],
        "reference_test_accuracy": curves["reference_accuracy"][-1],
        "largest_parameter": max(float(np.abs(p).max()) for p in exact.values()),
        "largest_difference_from_float64": apart,
        "microseconds_per_update": 1e6 * float(np.median(update_seconds)),
    }


def _load_digits():
    """Return ((images, labels) to train on, those held out), pixels from 0 to 1."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16.0, labels, test_size=0.2, stratify=labels, random_state=0)
    return (x, y), (x_test, y_test)


def _initial_parameters():
    """Return float64 parameters (He et al. 2015, arXiv:1502.01852) that float32 holds exactly, so both runs start as one."""
    rng = np.random.default_rng(1)

    def layer(n_in, n_out):
        return (rng.standard_normal((n_in, n_out)) * np.sqrt(2 / n_in)).astype("float32").astype("float64")

    return {"w1": layer(64, HIDDEN), "b1": np.zeros(HIDDEN), "w2": layer(HIDDEN, 10), "b2": np.zeros(10)}


def loss_and_gradients(xp, p, x, y):
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


def accuracy(xp, p, x, y):
    """Return the fraction of images that are read rightly."""
    hidden = xp.maximum(x @ p["w1"] + p["b1"], 0)
    return float(((hidden @ p["w2"] + p["b2"]).argmax(axis=1) == y).mean())


def _to_host(array):
    return array.get() if hasattr(array, "get") else array


class _Progress:
    """A progress bar on a terminal; in a pipe, a plain line for every tenth epoch."""

    def __init__(self, console, total):
        (progress,) = output.need("demo", "rich.progress")
        self.console, self.total = console, total
        self.bar = progress.Progress(console=console, transient=True) if console.is_terminal else None

    def __enter__(self):
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.total)
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()

    def show(self, epoch, curves):
        line = f"epoch {epoch:3d}  loss {curves['loss'][-1]:.4f}  test accuracy {curves['accuracy'][-1]:.2%}"
        if self.bar:
            self.bar.update(self.task, advance=1, description=line)
        elif epoch % 10 == 0:
            self.console.print(line, highlight=False)


def _print_textbook(console, result):
    rich_table, rich_box = output.need("demo", "rich.table", "rich.box")
    table = rich_table.Table(title="a. fit y = w x + b to y = 2 x with lr = 0.1", title_justify="left", box=rich_box.SIMPLE)
    columns = list(result["first_steps"][0])
    for column in columns:
        table.add_column("" if column == "parameter" else column, justify="right")
    for row in result["first_steps"]:
        table.add_row(
            *(f"{row[c]:.5g}" if isinstance(row[c], float) else str(row[c]) for c in columns),
            end_section=row["parameter"] == "b",
        )
    console.print(table)
    console.print(f"after {result['steps']} steps: w = {result['w']:.6f}, b = {result['b']:.6f}\n", highlight=False)


def _print_digits(console, result):
    console.print(
        f"b. {result['train_images']} handwritten digits, {result['epochs']} epochs, {result['updates']} updates of 4 arrays, "
        f"{result['microseconds_per_update']:.0f} us each\n"
        f"   of {result['test_images']} digits held out, read rightly: {result['test_accuracy']:.2%}; "
        f"by the float64 reference {result['reference_test_accuracy']:.2%}\n"
        f"   largest difference between the two in a parameter: {result['largest_difference_from_float64']:.1e} "
        f"of {result['largest_parameter']:.2f}",
        highlight=False,
    )


def _plot(path, result):
    pyplot = _pyplot()
    curves = result["digits"]
    epochs = range(1, curves["epochs"] + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.semilogy(epochs, curves["loss"], label=f"gpuadam, float32 ({result['backend']})")
    left.semilogy(epochs, curves["reference_loss"], "--", label="reference, float64")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", title="Loss")
    right.plot(epochs, [100 * a for a in curves["accuracy"]])
    right.plot(epochs, [100 * a for a in curves["reference_accuracy"]], "--")
    right.set(xlabel="epoch", ylabel="test images read rightly (%)", title="Accuracy")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot():
    matplotlib, pyplot = output.need("demo", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    return pyplot
