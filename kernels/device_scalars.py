"""The scalars of a step, computed on the device by one thread: for graphs captured once and replayed with current values.

It advances the step count and does what `hyperparameters.form_and_scalars` does on the host: the same float64 operations, rounded
once to the compute type, so the bits are the same. The text is here twice, as in `adam.py`, over the primitives of float64.
What the host knows for good, such as 1 - beta2, comes as an argument.
"""

from typing import NamedTuple

import numpy as np

from gpuadam.kernels.adam import SCALARS


class Form(NamedTuple):
    """What is known when the kernel is compiled. lr, grad_scale: the dtype of the array on the device, or None for a number."""

    dtype: np.dtype  # the compute type
    lr: np.dtype | None
    grad_scale: np.dtype | None
    decoupled: bool


class Settings(NamedTuple):
    """What the host knows, in the order of kernel arguments: float64."""

    advance: int  # added to the step count first: 0 where it was advanced for another dtype
    sign: float  # of the gradient: -1 to maximize
    beta1: float
    beta2: float
    weight_decay: float
    w1: float  # these three go through as they are
    w2: float
    eps: float


class Memory:
    """Scalars in device memory: of float32 or float64, side by side from `address`, in the order of `adam.Scalars`."""

    def __init__(self, owner, address, dtype, device):
        self.owner, self.address, self.dtype, self.device = owner, address, dtype, device

    def __len__(self):
        return len(SCALARS)


def in_python(form, op, narrow):
    """Return the computation as a Python function for Numba to compile. narrow: float64 to the compute type."""
    sub, mul, div, sqrt, neg = op.sub, op.mul, op.div, op.sqrt, op.neg
    DECOUPLED = form.decoupled

    def scalars(t, lr, grad_scale, sign, beta1, beta2, weight_decay, w1, w2, eps):
        power1, power2 = 1.0, 1.0
        while t:
            if t & 1:
                power1, power2 = mul(power1, beta1), mul(power2, beta2)
            beta1, beta2 = mul(beta1, beta1), mul(beta2, beta2)
            t >>= 1
        decay = mul(neg(lr), weight_decay) if DECOUPLED else weight_decay
        inv_sqrt_bias2 = div(1.0, sqrt(sub(1.0, power2)))
        neg_lr = div(neg(lr), sub(1.0, power1))
        return (
            narrow(mul(sign, grad_scale)), narrow(decay), narrow(w1), narrow(w2),
            narrow(inv_sqrt_bias2), narrow(eps), narrow(neg_lr),
        )  # fmt: skip

    return scalars


IN_CUDA_C = r"""
long long t = step[0] + advance;
step[0] = t;
double power1 = 1.0, power2 = 1.0, b1 = beta1, b2 = beta2;
while (t) {
    if (t & 1) {
        power1 = mul_(power1, b1);
        power2 = mul_(power2, b2);
    }
    b1 = mul_(b1, b1);
    b2 = mul_(b2, b2);
    t >>= 1;
}
const double eta = wide(LR);
const double decay = DECOUPLED ? mul_(neg_(eta), weight_decay) : weight_decay;
const double inv_sqrt_bias2 = div_(1.0, sqrt_(sub_(1.0, power2)));
const double neg_lr = div_(neg_(eta), sub_(1.0, power1));
const double all[] = {mul_(sign, wide(GRAD_SCALE)), decay, w1, w2, inv_sqrt_bias2, eps, neg_lr};
#pragma unroll
for (int k = 0; k < sizeof(all) / sizeof(double); ++k)
    narrow(scalars[k], all[k]);
"""


def preamble(form):
    """Return what IN_CUDA_C needs of its form."""
    # a plain cast would flush subnormal numbers: CuPy compiles with -ftz=true
    return f"""
#define DECOUPLED {form.decoupled:d}
#define LR lr{"" if form.lr is None else "[0]"}
#define GRAD_SCALE grad_scale{"" if form.grad_scale is None else "[0]"}
__device__ __forceinline__ double wide(double x) {{ return x; }}
__device__ __forceinline__ double wide(float x) {{ double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(x)); return r; }}
__device__ __forceinline__ void narrow(double& r, double x) {{ r = x; }}
__device__ __forceinline__ void narrow(float& r, double x) {{ asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(x)); }}
"""
