"""A rule as a `cupy.ElementwiseKernel`: the backend `cupy`.

CuPy's own indexing gives each thread one element and 4-byte accesses. Here the arrays are `raw` and a thread takes 16 bytes of
each, so `size` counts threads, not elements.
"""

import functools

import cupy

from gpuadam.arrays import View, on_cuda
from gpuadam.kernels import adam, primitives
from gpuadam.kernels.alignment import VECTOR_BYTES, split

PREAMBLE = r"""
typedef %(ctype)s T;
constexpr int LANES = %(vector_bytes)d / sizeof(T);
struct alignas(%(vector_bytes)d) Vector { T lane[LANES]; };
__device__ __forceinline__ Vector& vector_at(T* p) { return *reinterpret_cast<Vector*>(p); }
__device__ __forceinline__ const Vector& vector_at(const T* p) { return *reinterpret_cast<const Vector*>(p); }
"""

# i is CuPy's: the number of this thread, 64 bits wide. Everything is loaded before the first store, because the compiler must
# take it that the arrays might overlap, and would load again.
CONTIGUOUS = r"""
if (i < vectors) {
    const ptrdiff_t at = head + i * LANES;
    const Vector G = vector_at(&grad[at]);
    Vector P = vector_at(&param[at]), M = vector_at(&m[at]), V = vector_at(&v[at]);
#if AMSGRAD
    Vector X = vector_at(&max_v[at]);
#else
    Vector X = V;
#endif
    #pragma unroll
    for (int k = 0; k < LANES; ++k)
        update(P.lane[k], G.lane[k], M.lane[k], V.lane[k], X.lane[k], %(scalars)s);
    vector_at(&param[at]) = P;
    vector_at(&m[at]) = M;
    vector_at(&v[at]) = V;
#if AMSGRAD
    vector_at(&max_v[at]) = X;
#endif
} else {
    const ptrdiff_t k = i - vectors, at = k < head ? k : k + vectors * LANES;
    const T G = grad[at];
    T P = param[at], M = m[at], V = v[at];
#if AMSGRAD
    T X = max_v[at];
#else
    T X = V;
#endif
    update(P, G, M, V, X, %(scalars)s);
    param[at] = P;
    m[at] = M;
    v[at] = V;
#if AMSGRAD
    max_v[at] = X;
#endif
}
"""

# Not raw: CuPy finds the element of each array, whatever its strides.
STRIDED = r"""
T P = param, M = m, V = v;
#if AMSGRAD
T X = max_v;
#else
T X = V;
#endif
update(P, grad, M, V, X, %(scalars)s);
param = P;
m = M;
v = V;
#if AMSGRAD
max_v = X;
#endif
"""


def view(name, array):
    """View a CuPy array, or anything with `__cuda_array_interface__`."""
    if isinstance(array, cupy.ndarray):
        memory = array.data
        contiguous = array.flags.c_contiguous
        return View(name, array, memory.ptr, array.shape, array.strides, array.dtype, True, contiguous, memory.device_id)
    return on_cuda(name, array, _device_of)


def _device_of(pointer):
    device = cupy.cuda.runtime.pointerGetAttributes(pointer).device
    if device < 0:
        raise ValueError(f"address {pointer:#x} is not CUDA memory")
    return device


def zeros_like(view):
    """Return zeros for a moment of an array: the same shape, order of memory and offset from a 16-byte boundary."""
    with cupy.cuda.Device(view.device):
        head = view.pointer % VECTOR_BYTES // view.dtype.itemsize
        flat = cupy.zeros(head + view.size, view.dtype)[head:]
        array = _native(view)
        strides = array.strides if _in_one_order([array]) else None
        return cupy.ndarray(view.shape, view.dtype, flat.data, strides)


def from_host(array):
    """Return a copy of a NumPy array in this backend's memory."""
    return cupy.asarray(array)


def to_host(array):
    """Return a copy of an array of this backend as a NumPy array."""
    return cupy.asnumpy(array)


def now():
    """Return a moment of the current stream for `seconds_between`."""
    return cupy.cuda.get_current_stream().record()


def seconds_between(start, end):
    """Return the device's time between two moments, after waiting for the later one."""
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


copies_any_layout = True


def copy(to, source):
    """Copy one array into another of the same shape and dtype, on the current stream."""
    with cupy.cuda.Device(to.device):
        _wait_for((to, source))
        _native(to)[...] = _native(source)
        _let_wait((to, source))


def launch(form, views, scalars, rule=adam):
    """Update arrays in CUDA memory in place, on their device and CuPy's current stream.

    views: of param, grad, m, v, max_v (None without AMSGrad), of one shape, device and of form.dtype, checked.
    scalars: `adam.Scalars` of form.dtype.
    """
    used = [view for view in views if view is not None]
    size = used[0].size
    if size == 0:
        return
    with cupy.cuda.Device(used[0].device):
        _wait_for(used)
        param, grad, *state = map(_native, used)
        if not _in_one_order((param, grad, *state)):
            build(rule, form, "strided")(grad, *scalars, param, *state)
            _let_wait(used)
            return
        param, grad, *state = (a if a.ndim == 1 else cupy.ndarray((size,), a.dtype, a.data) for a in (param, grad, *state))
        head, vectors, threads = split([view.pointer for view in used], size, form.dtype.itemsize)
        build(rule, form, "contiguous")(grad, head, vectors, *scalars, param, *state, size=threads)
        _let_wait(used)


def _native(view):
    if isinstance(view.array, cupy.ndarray):
        return view.array
    if view.size == 0:
        return cupy.empty(view.shape, view.dtype)
    # UnownedMemory keeps the caller's object alive
    memory = cupy.cuda.UnownedMemory(view.pointer, view.nbytes, view.array, view.device)
    return cupy.ndarray(view.shape, view.dtype, cupy.cuda.MemoryPointer(memory, 0), view.strides)


def _other_streams(views):
    """Return CuPy's current stream, and those streams of the arrays' own libraries that are not it."""
    current = cupy.cuda.get_current_stream()
    others = {view.stream for view in views} - {None, current.ptr or 1}  # 1 is CUDA's name for the default stream
    return current, [cupy.cuda.ExternalStream(stream) for stream in others]


def _wait_for(views):
    """Order the current stream after the work that wrote the arrays."""
    current, others = _other_streams(views)
    for other in others:
        current.wait_event(other.record())


def _let_wait(views):
    """Order whatever the arrays' own streams do next after the current stream."""
    current, others = _other_streams(views)
    for other in others:
        other.wait_event(current.record())


@functools.cache
def build(rule, form, loop):
    """Return the ElementwiseKernel of a form; CuPy compiles it at its first call. loop: "contiguous" or "strided"."""
    raw = "raw " if loop == "contiguous" else ""
    counts = ["int64 head", "int64 vectors"] if loop == "contiguous" else []
    state = ["param", "m", "v"] + ["max_v"] * form.amsgrad
    constants = {
        "ctype": {"float32": "float", "float64": "double"}[form.dtype.name],
        "vector_bytes": VECTOR_BYTES,
        "scalars": ", ".join(adam.SCALARS),
    }
    options = [name for name, used in form._asdict().items() if used is True]
    return cupy.ElementwiseKernel(
        ", ".join([f"{raw}{form.dtype} grad", *counts, *(f"{form.dtype} {name}" for name in adam.SCALARS)]),
        ", ".join(f"{raw}{form.dtype} {name}" for name in state),
        (CONTIGUOUS if loop == "contiguous" else STRIDED) % constants,
        "_".join(["gpuadam", rule.__name__.rpartition(".")[2], form.dtype.name, *options, loop]),
        preamble=PREAMBLE % constants + primitives.for_cuda_c(form.dtype) + rule.in_cuda_c(form),
    )


def _in_one_order(arrays):
    """Whether all arrays fill their memory without gaps and in the same order of dimensions."""
    if all(a.flags.c_contiguous for a in arrays):
        return True
    strides = arrays[0].strides
    outer_first = sorted(range(len(strides)), key=lambda k: -strides[k])
    return all(a.strides == strides for a in arrays) and arrays[0].transpose(outer_first).flags.c_contiguous
