"""The programs of `gpuadam.guide.bring_your_adam`: the arithmetic of their Adam, as a loop in NumPy, beside what replaces it.

Each loop is written from the formulas of the program, in float64, and takes gradients where it stands itself. A step rounds
numbers of about 1 at other places, by 2**-53; the tolerance leaves room for a thousand of them.
"""

import re

import numpy as np
import pytest
from cases import few
from numpy import sqrt

import gpuadam
from gpuadam.guide import bring_your_adam

STEPS, SHAPE, LR, BETA1, BETA2 = 50, (12, 3), 0.05, 0.9, 0.999


def start():
    return np.random.default_rng(0).standard_normal(SHAPE)


def gradient(x, t):
    """Return the gradient of half the squared distance to 1, which step t sees with noise."""
    if x.dtype == complex:
        return gradient(x.real, t) + 1j * gradient(x.imag, t + STEPS)
    return x - 1 + 0.3 * np.random.default_rng(t).standard_normal(x.shape)


def means(m, v, g, beta1=BETA1, beta2=BETA2):
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2


class Ceviche:
    """Bounds: what a step leaves outside of them is set to them."""

    def theirs(self, x, low=0.0, high=0.75):
        m, v = np.zeros(SHAPE), np.zeros(SHAPE)
        for t in range(1, STEPS + 1):
            m, v = means(m, v, gradient(x, t))
            x -= LR * (m / (1 - BETA1**t)) / (sqrt(v / (1 - BETA2**t)) + 1e-8)
            x[x < low], x[x > high] = low, high
        return x

    def ours(self, x, low=0.0, high=0.75):
        opt = gpuadam.Adam(x, lr=LR, bounds=(low, high))
        for t in range(1, STEPS + 1):
            opt.step(gradient(x, t))
        return x


class Qualia:
    """eps is inside of the root, and weight decay is not multiplied by lr."""

    def theirs(self, x, decay=0.01, eps=1e-3):
        m, v = np.zeros(SHAPE), np.zeros(SHAPE)
        for t in range(1, STEPS + 1):
            m, v = means(m, v, gradient(x, t))
            x -= decay * x
            x -= LR * (m / (1 - BETA1**t)) / sqrt(v / (1 - BETA2**t) + eps)
        return x

    def ours(self, x, decay=0.01, eps=1e-3):
        opt = gpuadam.AdamW(x, lr=LR, formula="optax", eps=0, eps_root=eps, weight_decay=decay / LR)
        for t in range(1, STEPS + 1):
            opt.step(gradient(x, t))
        return x


class Gsplat:
    """Rows that a step does not see stay, nothing is corrected, and rows are pruned and duplicated on the way."""

    def seen(self, x, t):
        return np.random.default_rng(t).random(len(x)) < 0.5

    def densified(self, x, t):
        """Return the rows that x goes on with, and those of them that are copies."""
        kept = np.flatnonzero(np.random.default_rng(t).random(len(x)) < 0.8)
        return kept, kept[:3]

    def theirs(self, x):
        m, v = np.zeros(SHAPE), np.zeros(SHAPE)
        for t in range(1, STEPS + 1):
            rows = self.seen(x, t)
            m[rows], v[rows] = means(m[rows], v[rows], gradient(x, t)[rows])
            x[rows] -= LR * m[rows] / (sqrt(v[rows]) + 1e-15)
            if t % 10 == 0:
                kept, copied = self.densified(x, t)
                x = np.concatenate([x[kept], x[copied]])
                m, v = (np.concatenate([a[kept], np.zeros_like(x[: len(copied)])]) for a in (m, v))
        return x

    def ours(self, x):
        opt = gpuadam.Adam(x, lr=LR, eps=1e-15)
        opt.state["0"]["step"] = 1 << 40
        for t in range(1, STEPS + 1):
            opt.step(gradient(x, t), where=self.seen(x, t))
            if t % 10 == 0:
                kept, copied = self.densified(x, t)
                x = np.concatenate([x[kept], x[copied]])
                opt.replace("0", x, [*kept, *[-1] * len(copied)])
        return x


class Dlx:
    """AdamW with a schedule, of gradients that are clipped to a norm, without the 1e-6 that torch adds to it."""

    def params(self, x):
        return {"w": x, "b": x[0].copy()}

    def norm(self, grads):
        return sqrt(sum(np.linalg.norm(g) ** 2 for g in grads.values()))

    def schedule(self, t):
        return LR * min(1.0, t / 10)

    def theirs(self, x, clip=1.0, decay=0.1, beta2=0.95):
        params = self.params(x)
        state = {name: (np.zeros(p.shape), np.zeros(p.shape)) for name, p in params.items()}
        for t in range(1, STEPS + 1):
            grads = {name: gradient(p, t) for name, p in params.items()}
            norm = self.norm(grads)
            for name, p in params.items():
                g = grads[name] * (clip / norm if norm > clip else 1.0)
                m, v = state[name] = means(*state[name], g, beta2=beta2)
                p -= self.schedule(t) * decay * p
                p -= self.schedule(t) * (m / (1 - BETA1**t)) / (sqrt(v / (1 - beta2**t)) + 1e-8)
        return np.vstack([*params.values()])

    def ours(self, x, clip=1.0, decay=0.1, beta2=0.95):
        params = self.params(x)
        opt = gpuadam.AdamW(params, lr=self.schedule, betas=(BETA1, beta2), weight_decay=decay)
        for t in range(1, STEPS + 1):
            grads = {name: gradient(p, t) for name, p in params.items()}
            opt.step(grads, grad_scale=min(1.0, clip / self.norm(grads)))
        return np.vstack([*params.values()])


class OptDiseaseControl:
    """A function returns the increment and new means; the program subtracts it. Its count k begins at 0."""

    def theirs(self, x):
        m, v = np.zeros(SHAPE), np.zeros(SHAPE)
        for k in range(STEPS):
            m, v = means(m, v, gradient(x, k))
            x = x - LR * (m / (1 - BETA1 ** (k + 1))) / (sqrt(v / (1 - BETA2 ** (k + 1))) + 1e-8)
        return x

    def ours(self, x):
        m, v, change = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE)
        for k in range(STEPS):
            gpuadam.adam_step(x, gradient(x, k), m, v, k + 1, lr=LR, change=change)
            x = x + change
        return x


class Tike:
    """Complex numbers with one v, a correction that stays that of the first step, and a direction that the program scales."""

    def start(self, x):
        """Return complex numbers, and a preconditioner for each row."""
        return x + 1j * x[::-1], np.linspace(0.5, 1.5, len(x))[:, None]

    def theirs(self, x):
        x, preconditioner = self.start(x)
        m, v = np.zeros(SHAPE, "c16"), np.zeros(SHAPE)
        for t in range(1, STEPS + 1):
            g = gradient(x, t)
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * (g * g.conj()).real
            direction = m / (1 - BETA1) / (sqrt(v / (1 - BETA2)) + 1e-8)
            x = x - LR * direction / preconditioner
        return x

    def ours(self, x):
        x, preconditioner = self.start(x)
        m, v, change = np.zeros(SHAPE, "c16"), np.zeros(SHAPE), np.zeros(SHAPE, "c16")
        for t in range(1, STEPS + 1):
            gpuadam.adam_step(x, gradient(x, t), m, v, 1, lr=1.0, complex="joint", change=change)
            x = x + LR * change / preconditioner
        return x


PROGRAMS = {
    "ceviche": Ceviche(),
    "Qualia2.0": Qualia(),
    "gsplat": Gsplat(),
    "dlx": Dlx(),
    "opt-disease-control": OptDiseaseControl(),
    "tike": Tike(),
}


@pytest.mark.parametrize("name", few(PROGRAMS, "gsplat", "tike"))
def test_the_program_and_what_replaces_it_end_alike(name):
    program = PROGRAMS[name]
    ours = program.ours(start())
    np.testing.assert_allclose(ours, program.theirs(start()), rtol=1e-12, atol=1e-13)
    assert np.abs(ours.real - 1).mean() < 0.6 * np.abs(start() - 1).mean()  # it has gone some way to the minimum


def test_the_page_has_these_programs_and_no_others():
    assert re.findall(r"^\| \[([^]]+)\]\(https://github.com/", bring_your_adam.__doc__, re.MULTILINE) == list(PROGRAMS)
