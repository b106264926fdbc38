"""The table of `gpuadam.guide.bring_your_adam`: each row, as a loop in NumPy, beside the call that it names."""

import numpy as np
import pytest
from numpy import sqrt

import gpuadam
from gpuadam.guide import bring_your_adam

LR, BETA1, BETA2, EPS, DECAY, SHAPE = 0.05, 0.9, 0.99, 1e-3, 0.1, (12, 2)
RATE = np.linspace(0.5, 1.5, SHAPE[0])
CHANGE = np.zeros(SHAPE)


def numbers(rng, complex=None):
    """Return random numbers, complex if that is given."""
    real = rng.standard_normal(SHAPE)
    return real + 1j * rng.standard_normal(SHAPE) if complex else real


class Loop:
    """A program with an Adam of its own: m and v, and a step that a row adds to."""

    def __init__(self, complex=None, components=1, **_):
        self.x = numbers(np.random.default_rng(0), complex)
        self.m, self.v_max = 0 * self.x, np.zeros(SHAPE)
        self.v = np.zeros(SHAPE[:-1] if components > 1 else SHAPE, complex and {"joint": "f8", "parts": "c16"}[complex])

    def mean(self, g, t):
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        return self.m / (1 - BETA1**t), self.v / (1 - BETA2**t)

    def direction(self, g, t):
        m_hat, v_hat = self.mean(g, t)
        return m_hat / (sqrt(v_hat) + EPS)


def plain(loop, g, t):
    loop.x -= LR * loop.direction(g, t)


def eps_hat(loop, g, t):
    loop.mean(g, t)
    loop.x -= LR * sqrt(1 - BETA2**t) / (1 - BETA1**t) * loop.m / (sqrt(loop.v) + EPS)


def eps_inside(loop, g, t):
    m_hat, v_hat = loop.mean(g, t)
    loop.x -= LR * m_hat / sqrt(v_hat + EPS)


def uncorrected(loop, g, t):
    loop.mean(g, t)
    loop.x -= LR * loop.m / (sqrt(loop.v) + EPS)


def corrected_alike(loop, g, t):
    loop.mean(g, t)
    loop.x -= LR * loop.m / (1 - BETA1) / (sqrt(loop.v / (1 - BETA2)) + EPS)


def upwards(loop, g, t):
    loop.x += LR * loop.direction(g, t)


def l2(loop, g, t):
    plain(loop, g + DECAY * loop.x, t)


def decayed_first(loop, g, t):
    loop.x *= 1 - LR * DECAY
    plain(loop, g, t)


def decayed_beside(loop, g, t):
    loop.x -= LR * (loop.direction(g, t) + DECAY * loop.x)


def decayed_without_lr(loop, g, t):
    loop.x *= 1 - DECAY
    plain(loop, g, t)


def amsgrad(loop, g, t):
    m_hat, _ = loop.mean(g, t)
    loop.v_max = np.maximum(loop.v_max, loop.v)
    loop.x -= LR * m_hat / (sqrt(loop.v_max / (1 - BETA2**t)) + EPS)


def amsgrad_corrected(loop, g, t):
    m_hat, v_hat = loop.mean(g, t)
    loop.v_max = np.maximum(loop.v_max, v_hat)
    loop.x -= LR * m_hat / (sqrt(loop.v_max) + EPS)


def adamax(loop, g, t):
    u = np.maximum(BETA2 * loop.v, np.abs(g) + EPS)
    loop.mean(g, t)
    loop.v = u
    loop.x -= LR / (1 - BETA1**t) * loop.m / u


def clipped(loop, g, t):
    plain(loop, np.clip(g, -0.5, 0.5), t)


def bounded(loop, g, t):
    plain(loop, g, t)
    loop.x = np.clip(loop.x, -0.5, 0.5)


def added(loop, g, t):
    change = -LR * loop.direction(g, t)
    loop.x = loop.x + change


def masked(loop, g, t):
    x, m, v = loop.x.copy(), loop.m, loop.v
    plain(loop, g, t)
    loop.x, loop.m, loop.v = (np.where(g != 0, new, old) for new, old in ((loop.x, x), (loop.m, m), (loop.v, v)))


def rates_of_rows(loop, g, t):
    loop.x -= (LR * RATE)[:, None] * loop.direction(g, t)


def joint(loop, g, t):
    loop.m = BETA1 * loop.m + (1 - BETA1) * g
    loop.v = BETA2 * loop.v + (1 - BETA2) * (g * g.conj()).real
    loop.x -= LR * loop.m / (1 - BETA1**t) / (sqrt(loop.v / (1 - BETA2**t)) + EPS)


def parts(loop, g, t):
    loop.m = BETA1 * loop.m + (1 - BETA1) * g
    loop.v = BETA2 * loop.v + (1 - BETA2) * (g.real**2 + 1j * g.imag**2)
    m_hat, v_hat = loop.m / (1 - BETA1**t), loop.v / (1 - BETA2**t)
    loop.x -= LR * (m_hat.real / (sqrt(v_hat.real) + EPS) + 1j * m_hat.imag / (sqrt(v_hat.imag) + EPS))


def vectors(loop, g, t):
    loop.m = BETA1 * loop.m + (1 - BETA1) * g
    loop.v = BETA2 * loop.v + (1 - BETA2) * (g**2).sum(-1)
    loop.x -= LR * loop.m / (1 - BETA1**t) / (sqrt(loop.v / (1 - BETA2**t)) + EPS)[:, None]


def slower(loop, g, t):
    loop.x -= LR / (1 + 0.1 * t) * loop.direction(g, t)


# the call as the table has it -> the loops that it stands for, and its arguments; a callable is called with t
ROWS = {
    "`step=t`": ([plain], {}),
    'formula="eps-hat"': ([eps_hat], {"formula": "eps-hat"}),
    'formula="optax", eps_root=eps, eps=0': ([eps_inside], {"formula": "optax", "eps_root": EPS, "eps": 0}),
    "step=1 << 40": ([uncorrected], {"step": 1 << 40}),
    "`step=1`": ([corrected_alike], {"step": 1}),
    "maximize=True": ([upwards], {"maximize": True}),
    "weight_decay=decay`": ([l2], {"weight_decay": DECAY}),
    "weight_decay=decay, decoupled=True": ([decayed_first, decayed_beside], {"weight_decay": DECAY, "decoupled": True}),
    "weight_decay=decay / lr, decoupled=True": ([decayed_without_lr], {"weight_decay": DECAY / LR, "decoupled": True}),
    "max_v=v_max`": ([amsgrad], {"max_v": np.zeros(SHAPE)}),
    'max_v=v_max, formula="optax"': ([amsgrad_corrected], {"max_v": np.zeros(SHAPE), "formula": "optax"}),
    'algorithm="adamax"': ([adamax], {"algorithm": "adamax"}),
    "clip_value=c": ([clipped], {"clip_value": 0.5}),
    "bounds=(low, high)": ([bounded], {"bounds": (-0.5, 0.5)}),
    "change=change": ([added], {"change": CHANGE}),
    'where="nonzero"': ([masked], {"where": "nonzero"}),
    "lr_scale=rate": ([rates_of_rows], {"lr_scale": RATE}),
    'complex="joint"': ([joint], {"complex": "joint"}),
    'complex="parts"': ([parts], {"complex": "parts"}),
    "components=2": ([vectors], {"components": 2}),
    "lr=lr0 / (1 + 0.1 * t)": ([slower], {"lr": lambda t: LR / (1 + 0.1 * t)}),
}


@pytest.mark.parametrize("call", ROWS)
def test_the_call_gives_the_numbers_of_the_loop(call):
    loops, options = ROWS[call]
    for program in loops:
        loop = Loop(**options)
        param, m, v = loop.x.copy(), loop.m.copy(), loop.v.copy()
        rng = np.random.default_rng(1)
        options = options | {name: np.zeros(SHAPE) for name in options.keys() & {"max_v"}}
        for t in range(1, 41):
            g = numbers(rng, options.get("complex")) * (rng.random(SHAPE) < 0.7)
            program(loop, g, t)
            now = {name: value(t) if callable(value) else value for name, value in options.items()}
            given = {"step": t, "lr": LR, "betas": (BETA1, BETA2), "eps": EPS} | now
            gpuadam.adam_step(param, g, m, v, **given)
            if "change" in options:
                param += CHANGE
        np.testing.assert_allclose(param, loop.x, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(-m if options.get("maximize") else m, loop.m, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(v, loop.v, rtol=1e-10, atol=1e-12)


def test_the_table_has_these_rows_and_no_others():
    rows = [
        line.split("|")[2]
        for line in bring_your_adam.__doc__.splitlines()
        if line.startswith("| `") or line.startswith("| all")
    ]
    assert len(rows) == len(ROWS)
    for call, row in zip(ROWS, rows, strict=True):
        assert call in row, (call, row)
