"""Which call gives the numbers of the Adam that a program has.

Programs that carry an Adam of their own differ in where eps stands, in how m and v are corrected for their beginning at zero,
and in what weight decay multiplies. In the table m and v are the running means after this step, in the usual form:

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2

`m_hat` and `v_hat` are `m / (1 - beta1**t)` and `v / (1 - beta2**t)`, and t counts steps from 1. The right column has the
arguments of `gpuadam.adam_step` beside the arrays and `lr`, `betas` and `eps`. Each row is a test: the loop of the left column
in float64 NumPy beside the call.

| what the program has | the arguments that give the same numbers |
|---|---|
| `x -= lr * m_hat / (sqrt(v_hat) + eps)` | `step=t` |
| `x -= lr * sqrt(1 - beta2**t) / (1 - beta1**t) * m / (sqrt(v) + eps)` | `step=t, formula="eps-hat"` |
| `x -= lr * m_hat / sqrt(v_hat + eps)` | `step=t, formula="optax", eps_root=eps, eps=0` |
| `x -= lr * m / (sqrt(v) + eps)`: nothing is corrected | `step=1 << 40` |
| `x -= lr * m / (1 - beta1) / (sqrt(v / (1 - beta2)) + eps)`: the same correction always | `step=1` |
| `x += lr * m_hat / (sqrt(v_hat) + eps)`: up the gradient | `step=t, maximize=True`; m has the other sign |
| `g = g + decay * x` first | `step=t, weight_decay=decay` |
| `x *= 1 - lr * decay` first, or `decay * x` added to what lr multiplies last | `step=t, weight_decay=decay, decoupled=True` |
| `x *= 1 - decay` first: not times lr | `step=t, weight_decay=decay / lr, decoupled=True` |
| `v_max = maximum(v_max, v)` in the place of v | `step=t, max_v=v_max` |
| `v_max = maximum(v_max, v_hat)` in the place of v_hat | `step=t, max_v=v_max, formula="optax"` |
| `u = maximum(beta2 * u, abs(g) + eps)`, `x -= lr / (1 - beta1**t) * m / u` | `step=t, algorithm="adamax"`, u in v's place |
| `g = clip(g, -c, c)` first | `step=t, clip_value=c` |
| `x = clip(x, low, high)` last | `step=t, bounds=(low, high)` |
| `return -lr * m_hat / (sqrt(v_hat) + eps)`: the change, which the program adds or preconditions | `step=t, change=change` |
| all of it only where `g != 0` | `step=t, where="nonzero"` |
| `x -= (lr * rate)[:, None] * ...`: a rate for each row | `step=t, lr_scale=rate` |
| `v = beta2 * v + (1 - beta2) * (g * g.conj()).real`, of complex g | `step=t, complex="joint"`, and v is real |
| `g.real**2` and `g.imag**2` apart, each with a v of its own | `step=t, complex="parts"`, and v is complex |
| `v = beta2 * v + (1 - beta2) * (g**2).sum(-1)`: one v for the vector | `step=t, components=2`, or 3, or 4 |
| `lr = lr0 / (1 + 0.1 * t)` | `step=t, lr=lr0 / (1 + 0.1 * t)`, or `Adam(lr=lambda t: ...)` |

The classes (`gpuadam.Adam` and its family) count the steps themselves, and take the other arguments by the same names. A count
that stays at 1 needs `adam_step`. For one of `1 << 40` and more, set it once: `opt.state[name]["step"] = 1 << 40`,
or with capturable `opt.state[name]["step"][...] = 1 << 40`. An ema then begins at what is in its array: copy the parameter there.

A program that rebinds its array, `x = x - step`, makes a new one each time. Here x is updated in place, so whoever holds it
sees the new numbers; `change=` is for programs that must not.

Six programs, and what replaces their Adam. Each row is a test too: fifty steps of the program's formulas beside these calls.

| program | what its Adam has | what gives the same numbers |
|---|---|---|
| [ceviche](https://github.com/fancompute/ceviche) | bounds | `Adam(params, lr=lr, bounds=(low, high))` |
| [Qualia2.0](https://github.com/Kashu7100/Qualia2.0) | eps inside of the root, decay without lr | (1) |
| [gsplat](https://github.com/nerfstudio-project/gsplat) | visible rows alone; rows come and go; no correction | (2) |
| [dlx](https://github.com/quinnlue/dlx) | a schedule; clipping to a norm | (3) |
| [opt-disease-control](https://github.com/costantinobudroni/opt-disease-control) | the step is returned | (4) |
| [tike](https://github.com/AdvancedPhotonSource/tike) | complex; the same correction always; a direction to scale | (5) |

1. `AdamW(params, lr=lr, formula="optax", eps=0, eps_root=eps, weight_decay=decay / lr)`
2. `opt = Adam(points, lr=lr, eps=eps)` and `opt.state["0"]["step"] = 1 << 40`, then `opt.step(grad, where=visible)` and, for
   other rows, `opt.replace("0", points, rows)`
3. `opt = AdamW(params, lr=schedule)`, then `opt.step(grads, grad_scale=min(1, clip / norm))`: `max_norm=` adds 1e-6 to the norm
4. `adam_step(x, g, m, v, k + 1, lr=lr, change=change)`, where `change` is minus what the program's function returns
5. `adam_step(x, g, m, v, 1, lr=1.0, complex="joint", change=change)`, where `change` is minus the direction

Not the same in one call: decay of the new x after the step, `x = (x - step) * (1 - lr * decay)`; means without the factors
`1 - beta1` and `1 - beta2` (scale lr and eps instead); corrected means that are fed back into the next ones; a v that is the
norm of a whole array; a count of steps for each element; `v` of a complex `g**2`, which is not |g|**2 and has no real root.
"""
