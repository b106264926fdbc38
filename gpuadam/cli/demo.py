"""python -m gpuadam demo: a textbook problem and real images, trained with gpuadam.

a. Fit y = w x + b to five points: Adam's numbers, step by step.
b. Learn to read 1,797 handwritten digits (scikit-learn's `load_digits`, from the UCI repository) with a two-layer network,
   its forward and backward pass in plain array code (`gpuadam/examples/digits.py`). Beside it the same training with the float64
   reference.
"""

import time
from typing import Any

import numpy as np

import gpuadam

from .. import backends, testing
from ..examples import command_line
from ..examples import digits as example
from ..terminal import arguments, figures, output
from ..terminal.console import Table
from .measuring import facts, plots

HELP = "train on real data, here and now, on the best backend there is"
TEXTBOOK_STEPS = 1000
EPOCHS, HIDDEN = 40, 128


def add_options(parser):
    arguments.add_plot(parser, "demo", "write the loss and accuracy curves")
    parser.add_argument("--backend", choices=list(backends.BACKENDS), help="default: the best available")


def run(options):
    """Run both parts; return 0 if the test accuracy is at least 97 %."""
    console = output.console(options)
    backend = options.backend or backends.some_available()[0]
    backends.load(backend)
    data = example.load_digits()
    # Numba's device arrays have no arithmetic; CuPy's lie in the same memory
    xp = command_line.array_module("numpy" if backend == "numba-cpu" else "cupy")
    console.print(f"gpuadam {gpuadam.__version__}, backend {backend}, arrays of {xp.__name__}\n")
    of_textbook = textbook(xp, backend, console)
    of_digits = digits(xp, backend, console, data)
    if options.plot:
        figures.save(_plot(backend, of_digits), options.plot)
        console.print(f"curves: {options.plot}")
    result = {"backend": backend, "textbook": of_textbook, "digits": of_digits}
    output.write_json(options.json, result | {"versions": facts.versions(), "machine": facts.machine()})
    return 0 if of_digits["test_accuracy"] >= 0.97 else 1


def textbook(xp, backend, console):
    """Fit y = w x + b to y = 2 x by the mean squared error, from w = 0.5, b = 0. Return and print the steps."""
    x = xp.arange(1, 6, dtype="float32")
    y = 2 * x
    params = {"w": xp.full(1, 0.5, "float32"), "b": xp.zeros(1, "float32")}
    beta1, beta2 = betas = (0.9, 0.999)
    opt = gpuadam.Adam(params, lr=0.1, betas=betas, eps=1e-8, backend=backend)
    first_steps = []
    for step in range(1, TEXTBOOK_STEPS + 1):
        residual = params["w"] * x + params["b"] - y
        grads = {"w": (2 * residual * x).mean().reshape(1), "b": (2 * residual).mean().reshape(1)}
        opt.step(grads)
        for name, value in params.items() if step <= 5 else ():
            m, v = (float(opt.state[name][moment][0]) for moment in ("m", "v"))
            moments = {"m": m, "v": v, "m_hat": m / (1 - beta1**step), "v_hat": v / (1 - beta2**step)}
            row = {"step": step, "parameter": name, "g": float(grads[name][0]), **moments, "value": float(value[0])}
            first_steps.append(row)
    lines = [[f"{x:.5g}" if isinstance(x, float) else str(x) for x in row.values()] for row in first_steps]
    console.print(Table("a. fit y = w x + b to y = 2 x with lr = 0.1", list(first_steps[0]), lines, labels=2))
    w, b = (float(value[0]) for value in params.values())
    console.print(f"after {TEXTBOOK_STEPS} steps: w = {w:.6f}, b = {b:.6f}\n")
    return {"first_steps": first_steps, "steps": TEXTBOOK_STEPS, "w": w, "b": b}


def digits(xp, backend, console, data):
    """Train on the digits twice, with gpuadam in float32 and with the reference in float64. Return and print how well."""
    exact = example.initial_parameters(HIDDEN)
    params = {name: xp.asarray(p, dtype="float32") for name, p in exact.items()}
    settings: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1}
    opt = gpuadam.AdamW(params, **settings, backend=backend)
    reference = testing.Reference(exact, decoupled=True, **settings)
    update_seconds = []

    def step(grads):
        began = time.perf_counter()
        opt.step(grads)
        update_seconds.append(time.perf_counter() - began)

    def exact_step(grads):
        reference.step(grads)
        exact.update(zip(exact, reference.params.values(), strict=True))

    in_float32 = [(xp.asarray(images, dtype="float32"), xp.asarray(labels)) for images, labels in data]
    ours, references = _epochs(xp, params, step, in_float32), _epochs(np, exact, exact_step, data)
    epochs: list[tuple] = []

    def described(epoch):
        return f"epoch {epoch:3d}  loss {epochs[-1][0]:.4f}  test accuracy {epochs[-1][1]:.2%}"

    console.print(f"b. learn to read {len(data[0][1]):,} handwritten digits in {EPOCHS} epochs")
    for _ in output.counted(console, EPOCHS, described, every=10):
        epochs.append((*next(ours), *next(references)))
    curves: dict = dict(
        zip(("loss", "accuracy", "reference_loss", "reference_accuracy"), zip(*epochs, strict=True), strict=True)
    )
    result = curves | {
        "train_images": len(data[0][1]),
        "test_images": len(data[1][1]),
        "epochs": EPOCHS,
        "updates": len(update_seconds),
        "test_accuracy": curves["accuracy"][-1],
        "reference_test_accuracy": curves["reference_accuracy"][-1],
        "largest_parameter": max(float(np.abs(p).max()) for p in exact.values()),
        "largest_difference_from_float64": max(
            float(np.abs(command_line.on_host(params[name]) - exact[name]).max()) for name in exact
        ),
        "microseconds_per_update": 1e6 * float(np.median(update_seconds)),
    }
    console.print(
        "of {test_images} digits held out, read rightly: {test_accuracy:.2%}; "
        "by the float64 reference {reference_test_accuracy:.2%}\n"
        "{updates} updates of 4 arrays, {microseconds_per_update:.0f} us each\n"
        "largest difference between the two in a parameter: {largest_difference_from_float64:.1e} "
        "of {largest_parameter:.2f}".format(**result)
    )
    return result


def _epochs(xp, params, step, data):
    """Yield the loss and the test accuracy of each epoch."""
    images_and_labels, held_out = data
    for loss in example.train(xp, params, step, *images_and_labels):
        yield loss, example.accuracy(xp, params, *held_out)


def _plot(backend, curves):
    figure, ((left, right),) = figures.panels(1, 2, width=4.5, height=3.25)
    epochs = range(1, curves["epochs"] + 1)
    left.semilogy(epochs, curves["loss"], color=plots.OURS, label=f"gpuadam, float32 ({backend})")
    left.semilogy(epochs, curves["reference_loss"], "--", color=plots.LIMIT, label="reference, float64")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", title="Loss")
    right.plot(epochs, [100 * accuracy for accuracy in curves["accuracy"]], color=plots.OURS)
    right.plot(epochs, [100 * accuracy for accuracy in curves["reference_accuracy"]], "--", color=plots.LIMIT)
    right.set(xlabel="epoch", ylabel="test images read rightly (%)", title="Accuracy")
    left.legend()
    figures.plain_log(left.yaxis)
    for axis in (left, right):
        axis.grid()
    return figure
