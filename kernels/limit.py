"""The limit rule: the bytes of an Adam step and no arithmetic worth the name.

What it reaches is the memory's limit, so it is the measure of every other rule: `python -m gpuadam bench` runs both in turn,
through the same kernels and on the same arrays.
"""


def in_python(form, op):
    """Return the rule as a Python function for Numba to compile; op holds the primitives."""
    add = op.add

    def update(param, grad, m, v, max_v, grad_scale, decay, w1, w2, inv_sqrt_bias2, eps, neg_lr):
        return add(param, grad), add(m, grad), add(v, grad), add(max_v, grad)

    return update


def in_cuda_c(form):
    """Return the rule as CUDA C over `T`."""
    return (
        f"#define AMSGRAD {form.amsgrad:d}\n"
        + r"""__device__ __forceinline__ void update(T& param, T grad, T& m, T& v, T& max_v, T, T, T, T, T, T, T) {
    param = add_(param, grad), m = add_(m, grad), v = add_(v, grad), max_v = add_(max_v, grad);
}
"""
    )
