"""The rule in kernels of users: the update of one element, as CUDA C. `element_numba.py` has it for Numba.

A user's kernel passes the values that a form has, and no others: `arguments` lists them. Other values that the rule takes
are filled in here and in `element_numba.py`.

The types must be exact, because C++ and Numba convert silently: a literal makes a float32 gradient a float64, with which a GPU
computes many times slower.
"""

from gpuadam.kernels import adam, primitives
from gpuadam.kernels.cuda_c_access import C_TYPES
from gpuadam.kernels.operands import RESULTS, VALUES


def arguments(form):
    """Return the names of the values that the update of a form takes, in their order. All but grad are its results too."""
    optional = {"max_v": form.amsgrad, "ema": form.arrays.ema != ""}
    return ["param", "grad", "m", "v", *(name for name, there in optional.items() if there)]


# All is loaded before the first store: the compiler must assume that references overlap.
IN_CUDA_C = r"""
namespace %(namespace)s {
namespace rule {
%(rule)s
template <class S> struct IsT { static const bool value = false; };
template <> struct IsT<T> { static const bool value = true; };
}
struct Scalars { rule::T value[%(count)s]; };
template <class G> __device__ __forceinline__ void update(%(parameters)s, const Scalars& s) {
    static_assert(rule::IsT<G>::value, "grad must be a %(type)s, as the rule computes: cast it, and the literals in it");
    %(loads)s
    rule::update(%(values)s, %(scalars)s);
    %(stores)s
}
}
"""


def in_cuda_c(form, namespace):
    """Return CUDA C: a namespace with the struct Scalars, and update(param, grad, m, v, ..., scalars) over references."""
    given, kind, scalars = arguments(form), C_TYPES[form.dtype.name], adam.scalar_names(form)
    results = [name for name in given if name != "grad"]
    own = {name: f"new_{name}" for name in RESULTS} | {"grad": "grad"}
    return IN_CUDA_C % {
        "namespace": namespace,
        "type": kind,
        "rule": primitives.for_cuda_c(form.dtype)
        + adam.in_cuda_c(form)
        + "".join(f"#undef {name}\n" for name in adam.options(form)),  # no namespace holds a macro
        "count": len(scalars),
        "parameters": ", ".join("G grad" if name == "grad" else f"rule::T& {name}" for name in given),
        "loads": " ".join(f"rule::T new_{name} = {name if name in given else 'param'};" for name in RESULTS),
        "values": ", ".join(own.get(name, "param") for name in VALUES),
        "scalars": ", ".join(f"s.value[{k}]" for k in range(len(scalars))),
        "stores": " ".join(f"{name} = new_{name};" for name in results),
    }
