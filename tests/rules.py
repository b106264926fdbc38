"""What the tests of `gpuadam.Rule` share: options, arrays, and the comparison with adam_step."""

import numpy as np
from cases import FORMS, assert_same_bits, wide_state

import gpuadam

# The options of a Rule: FORMS, and what they do not have. All over three steps, also those of which RAdam is not yet rectified.
OPTIONS = {name: {key: value for key, value in form.items() if key != "step"} for name, form in FORMS.items()} | {
    "ema": {"ema_decay": 0.99},
    "ema, from param": {"ema_decay": 0.25, "bounds": (-0.5, 0.5)},
    "eps-hat": {"formula": "eps-hat"},
    "all with adamw, and ema": FORMS["all with adamw"] | {"ema_decay": 0.99},
}
KEYS = ("nadam", "all with adamw, and ema")  # these stand for all where kernels take long to compile
STEPS = (1, 2, 9)


def arrays_of(rule, n=1003, seed=1):
    """Return the arrays of a rule's arguments, over the whole range of its dtype."""
    param, grad, m, v, max_v = wide_state(n, rule.dtype, True, seed)
    return [
        {"param": param, "grad": grad, "m": m, "v": v, "max_v": max_v, "ema": param[::-1].copy()}[x] for x in rule.arguments
    ]


def in_adam_step(options, arrays, arguments, step):
    """Return copies of arrays after adam_step."""
    copies = dict(zip(arguments, (array.copy() for array in arrays), strict=True))
    of_step = {key: value for key, value in options.items() if key != "amsgrad"}
    gpuadam.adam_step(**copies, step=step, backend="numba-cpu", **of_step)
    return list(copies.values())


def assert_steps(options, rule, run):
    """Run some steps and compare each with adam_step. run: called with the arrays, which it changes, and the scalars."""
    arrays = arrays_of(rule)
    for step in STEPS:
        expected = in_adam_step(options, arrays, rule.arguments, step)
        run(arrays, rule.scalars(step))
        assert_same_bits(arrays, expected, f"in step {step}")
        arrays[1][:] = np.roll(arrays[1], 1)
        for array in arrays:  # the elements that overflowed say no more
            array[~np.isfinite(array)] = 0.5


def over_elements(rule, update, loop, grad="grad[i]", **names):
    """Return a loop over elements as a function of the rule's arrays and scalars.

    loop: its text, up to the body. grad: the text of the gradient. names: of what the text uses.
    """
    values = ", ".join(grad if name == "grad" else f"{name}[i]" for name in rule.arguments)
    new = ", ".join(f"{name}[i]" for name in rule.arguments if name != "grad")
    namespace = {"update": update} | names
    exec(f"def kernel({', '.join(rule.arguments)}, s):\n{loop}{new} = update({values}, s)", namespace)
    return namespace["kernel"]
