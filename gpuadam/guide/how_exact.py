"""How exact an update is, how that is shown, and where the limits are.

Every backend gives the same bits. So a test that passes on a laptop says what a GPU will compute. **No GPU has run this code
yet.** The evidence below comes from machines without a GPU, which execute the code that the GPU's compilers emit.

## The arithmetic

One step on one element is a fixed sequence of IEEE-754 operations. Each is rounded once, to nearest even, and subnormal
numbers are kept. Every multiplication that meets an addition is one explicit `fma(a, b, c)`, which is a*b + c with one
rounding. So a compiler has nothing left to contract. m and v are torch's `exp_avg` and `exp_avg_sq`, and optax's `mu` and
`nu`.

    g      = grad_scale * grad                      only with grad_scale or maximize
    g      = min(max(g, -clip_value), clip_value)   only with clip_value; NaN stays
    g      = fma(weight_decay, param, g)            only with L2 decay: Adam
    param  = fma(-lr * weight_decay, param, param)  only with decoupled decay: AdamW
    m      = lerp(m, g, 1 - beta1)
    v      = lerp(v, g*g, 1 - beta2)                g*g - v is one fma(g, g, -v)
    max_v  = the larger of max_v and v              only with AMSGrad; NaN wins
    denom  = fma(sqrt(v or max_v), 1 / sqrt(1 - beta2**t), eps)
    param  = fma(-lr / (1 - beta1**t), m / denom, param)
    param  = min(max(param, low), high)             only with bounds; NaN stays
    ema    = lerp(ema, param, 1 - ema_decay)        only with ema

`maximize` makes `grad_scale` negative. `lerp(x, y, w)` starts from the nearer end, as torch's does: `fma(w, y - x, x)` if w
< 1/2, else `fma(w - 1, y - x, y)`. When state is stored, values of m, v and max_v below the smallest normal number become 0.
m also becomes 0 where the divisor (v, or max_v with AMSGrad) is below that number.

Scalars such as `1 - beta2` and the bias corrections are computed once a step, in float64, and rounded once. `beta**t` is a
fixed loop of multiplications, because `**` would give other bits. With `capturable=True` a kernel of one thread computes the
same scalars on the GPU.

The text of the rule is `kernels/adam.py`, in Python and in CUDA C side by side.

## Why this form

* `1 - beta2` formed in float32 is wrong by 1.3e-5. `beta2*v + (1 - beta2)*g*g`, with both factors rounded, has a bias of
  that size in v. The lerp form has neither: v is 1.3 to 17 times closer to float64 with beta2 of 0.999 and more.
* A decay by `(1 - lr*weight_decay) * param` errs to the same side at each step, by the rounding of the factor: 2.2e-4 after
  10,000 steps in float32. The fma form, also one operation, errs some 100 times less.
* m of a parameter whose gradient stays zero becomes subnormal after some 800 steps, and a CPU is then 80 times slower. So it
  is stored as 0.

## The family and the formulas

`gpuadam.AdamW`, `gpuadam.NAdam`, `gpuadam.RAdam` and `gpuadam.AdaMax` are the same rule with other scalars or with one other
line. With m and v corrected for their bias:

| class | what differs from Adam | source |
|---|---|---|
| `AdamW` | decay is `lr * weight_decay * param`, off the parameter | Loshchilov & Hutter 2019 |
| `NAdam` | a mean of m and g takes the place of m; torch's momentum_decay, 0.004, or optax's constant beta1 | Dozat 2016 |
| `RAdam` | lr is rectified; in the first steps the denominator is 1 | Liu et al. 2020, Algorithm 2 |
| `AdaMax` | v is max(beta2 * v, abs(g) + eps), and is the denominator | Kingma & Ba 2015, Algorithm 2 |

Libraries put eps in different places. `formula=` chooses, for Adam and AdamW (`NAdam(formula="optax")` is optax.nadam):

| `formula` | step, in units of -lr | of |
|---|---|---|
| `"torch"`, the default; `"apex"` | m / (sqrt(v) + eps) | PyTorch, apex, DeepSpeed: one formula here |
| `"optax"` | m / (sqrt(v + eps_root) + eps); AMSGrad takes the maximum of the corrected v | optax |
| `"eps-hat"` | m / (sqrt(v) + eps / sqrt(1 - beta2**t)): eps counts for more in the first steps | TensorFlow, chainer, thinc |

## What has the same bits, and what does not

The same: CPU and GPU; CuPy and Numba CUDA; one thread and many; one array and pieces of it; contiguous and strided arrays; a
step in memory, offloaded (`gpuadam.offload`), over many ranks (`gpuadam.sharded`, for equal sums of gradients) and in kernels
of users (`gpuadam.Rule`, for equal gradients); a training that was saved and loaded (`gpuadam.checkpoint`). Random rounding,
8-bit state and the norm are included.

Not the same:

* **NaN payloads.** A NaN is a NaN on every backend, but its other bits may differ.
* **Other libraries.** torch and optax round in another order, so their bits differ from gpuadam's.
* **A CPU that flushes subnormals.** If another library sets it to (`torch.set_flush_denormal`), the bits differ. `python -m
  gpuadam doctor` says so.

## The evidence

None of these needs a GPU. All are tests; the long ones run with `--exhaustive`.

**It is Adam.** The rule is compared with a float64 reference written from the papers (`gpuadam.reference`): after 1,000
steps, with gradients from 1e-15 to 1e15 and betas from 0 to 0.9999, errors are at most 1.2 times those of PyTorch's for-loop
form.

**One set of bits on the CPU.** Serial and parallel, vector body and tail, in pieces, strided, unaligned.

**The same bits in the GPU's code.** NVRTC (CUDA 12 and 13) and NVVM compile the kernels to PTX for five architectures,
sm_75, sm_80, sm_90, sm_100 and sm_120. The PTX is executed on the CPU: 0 different bits for every option, size and alignment
tried, and for the first and last blocks of arrays of more than 2^31 elements.

**Many arrays in one launch change nothing.** The kernels that read a table of arrays are executed likewise, on arrays of
every size and alignment mixed. Each array gets the bits that it gets alone, and nothing is written between the arrays.

**A captured graph computes the host's scalars.** The one-thread kernel is executed likewise: 102,000 random steps, betas,
learning rates and decays, 0 different bits.

**The launch path, whole.** The real CuPy and numba-cuda run over a stand-in for the CUDA driver, which executes the code
that they load. It has memory with bounds, streams that do their work as late as their order allows, captures, and calls that
fail.

**The memory's limit.** The machine code of both float32 kernels has, for each thread, four 16-byte loads, three 16-byte
stores, no local memory, and at most 64 registers on these five architectures.

**Training resumes.** k steps, save, load and k steps have the bits of 2k steps, in twelve forms of state.

**A checkpoint survives.** Fifty kills in the middle of saves, every truncation, 10,000 changed bytes, a full disk.

**Many ranks' checkpoints.** Saved by 4 ranks, and loaded by 1, 2, 3, 8 and by a single `Adam`: the next ten steps have the
same bits. One of 4 ranks is killed in the middle of a save.

**The evidence can fail.** The rule and its loop are broken in 30 ways, one at a time, and each is noticed.

**Still to be shown, on a GPU:** what ptxas and the chip make of the code, and every speed. `benchmarks/gpu.sh OUTDIR tests`
runs every test marked `gpu` there, and `benchmarks/gpu.sh OUTDIR sanitize` the kernels under compute-sanitizer.

## Limits of the arithmetic

* |g| of 1.85e19 and more overflows g*g in float32: v becomes infinite, and in the next step the parameter becomes NaN. In
  float64 the element recovers. `check_finite=True` leaves such a step out.
* An `eps` above 0 that rounds to 0 in the dtype is refused.
* On a CPU without fused multiply-add instructions the bits are the same, and the update is slow.
"""
