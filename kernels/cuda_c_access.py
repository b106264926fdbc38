"""Loads and stores of neighbours in CUDA C, for CuPy: `update_lanes` applies a rule to them, of 8-bit state `update_group`.

Both take several vectors of neighbours at once, each APART elements behind the one before. All are loaded before the rule is
applied to the first, so that all their bytes are on the way together.
"""

from gpuadam.kernels import conversions
from gpuadam.kernels.operands import GROUP, GROUP_LANES, KINDS, VALUES, decodings, operands_of_form

C_TYPES = {"float64": "double", "float32": "float", "uint8": "unsigned char"} | dict.fromkeys(
    ("bfloat16", "float16", "int16"), "unsigned short"
)


def place(operand, i):
    """Return the CUDA C of how many numbers of an operand are before element i."""
    return f"{i} * {operand.numbers}" if operand.numbers > 1 else i


def vector_of(operand, n="N"):
    """Return the CUDA C of the type of n lanes of an operand."""
    return f"Vector<{n}, {C_TYPES[operand.format]}, {operand.numbers}>"


def pointer_to(operand):
    """Return the CUDA C of the type of a pointer to an operand."""
    return f"{'' if operand.stores else 'const '}{C_TYPES[operand.format]}*"


IN_CUDA_C = r"""
#define FOR_LANES _Pragma("unroll") for (int k = 0; k < N; ++k)
#define FOR_VECTORS _Pragma("unroll") for (int n = 0; n < TIMES; ++n)
#define FOR_NUMBERS _Pragma("unroll") for (int j = 0; j < NUMBERS; ++j)
template <class S, class U> __device__ __forceinline__ S* as(U* p) { return reinterpret_cast<S*>(p); }
template <class S, class U> __device__ __forceinline__ const S* as(const U* p) { return reinterpret_cast<const S*>(p); }
// N lanes of M numbers. Alone, a lane is aligned to a number, and else to what an access of it takes (`layout.aligned_to`).
__device__ constexpr int aligned_to(int n) { return (n & -n) < 16 ? n & -n : 16; }
template <int N, class S, int M = 1>
struct alignas(N == 1 ? sizeof(S) : aligned_to(N * M * sizeof(S))) Vector { S lane[N * M]; };
template <int N, int M = 1, class S> __device__ __forceinline__ Vector<N, S, M> load(const S* p) {
    return *as<Vector<N, S, M>>(p);
}
template <int N, class S, int M> __device__ __forceinline__ void store(S* p, const Vector<N, S, M>& v) {
    *as<Vector<N, S, M>>(p) = v;
}
// by 16 bytes in one instruction, which the compiler makes several of if it is left to it
template <int M> __device__ __forceinline__ void store(unsigned short* p, const Vector<8, unsigned short, M>& v) {
    #pragma unroll
    for (int n = 0; n < 8 * M; n += 8) {
        unsigned word[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = v.lane[n + 2 * k] | v.lane[n + 2 * k + 1] << 16;
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p + n)),
                     "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
    }
}
__device__ __forceinline__ void widen(double& r, float x) { r = widened_(x); }
template <class S> __device__ __forceinline__ void widen(S& r, S x) { r = x; }
template <class S> __device__ __forceinline__ T wide(S x) { T r; widen(r, x); return r; }
__device__ __forceinline__ float narrow(double x) { return narrowed_(x); }
__device__ __forceinline__ float narrow(float x) { return x; }
__device__ __forceinline__ unsigned rotated(unsigned h, int n) { return n ? h >> n | h << (32 - n) : h; }
"""

# Everything is loaded before the first store, because the compiler must assume that the arrays overlap, and would load again. A
# step that is turned off leaves all but the gradient as it is.
UPDATE_LANES = """
template <int N, int TIMES> __device__ __forceinline__ void update_lanes(%(arguments)s) {
    if (skip) {
        %(zero_lanes)s
        return;
    }
    %(declare)s
    FOR_VECTORS { const int at = n * APART; %(load_lanes)s }
    FOR_VECTORS {
        const int at = n * APART;
        FOR_LANES { %(update)s %(encode)s }
        %(store_lanes)s
    }
}
"""

# All threads of a warp call it. Lanes after the last element load that element, and store nothing.
UPDATE_GROUP = """
template <int TIMES> __device__ __forceinline__ void update_group(%(arguments)s) {
    constexpr int GROUP = %(GROUP)s, N = %(GROUP_LANES)s;
    const long long last = size - 1;
    if (skip) {
        FOR_VECTORS {
            const long long at = first + n * APART;
            FOR_LANES if (at + k < size) { %(zero_one)s }
        }
        return;
    }
    %(declare)s
    float m_unit[TIMES], v_unit[TIMES];
    FOR_VECTORS {
        const long long at = first + n * APART, group = min(at, last) / GROUP;
        if (whole) { %(load_lanes)s } else {
            FOR_LANES { %(load_one)s }
        }
        m_unit[n] = m_scale[group], v_unit[n] = v_scale[group];
    }
    FOR_VECTORS {
        const long long at = first + n * APART, group = min(at, last) / GROUP;
        m_unit[n] = m_unit_(m_unit[n]), v_unit[n] = v_unit_(v_unit[n]);
        float new_m[N], new_root[N];
        unsigned bits[N], largest_m = 0, largest_root = 0;
        FOR_LANES {
            %(update)s
            %(encode)s
            new_m[k] = m_k; new_root[k] = max_v_k; bits[k] = h[0];  // a rule returns the root in max_v's place
            largest_m = max(largest_m, at + k < size ? magnitude_(m_k) : 0u);
            largest_root = max(largest_root, at + k < size ? magnitude_(max_v_k) : 0u);
        }
        #pragma unroll
        for (int other = 1; other < GROUP / N; other *= 2) {
            largest_m = max(largest_m, __shfl_xor_sync(0xffffffffu, largest_m, other));
            largest_root = max(largest_root, __shfl_xor_sync(0xffffffffu, largest_root, other));
        }
        const float m_inverse = m_inverse_(largest_m), v_inverse = v_inverse_(largest_root);
        const unsigned m_mask = m_mask_(largest_m, largest_root), v_mask = v_mask_(largest_m, largest_root);
        FOR_LANES {
            m_is[n].lane[k] = to_m_code_(new_m[k], m_inverse, m_mask, bits[k]);
            v_is[n].lane[k] = to_v_code_(new_root[k], v_inverse, v_mask, bits[k]);
        }
        if (at < size && at %% GROUP == 0) {
            m_scale[group] = m_scale_(largest_m, largest_root);
            v_scale[group] = v_scale_(largest_m, largest_root);
        }
        if (whole) { %(store_lanes)s } else {
            FOR_LANES if (at + k < size) { %(store_one)s }
        }
    }
}
"""

# Nothing is stored. i: the place of a number in the arrays.
PARAM_OF = """
__device__ __forceinline__ void param_of(T& old_param, T& new_param, %(arguments)s) {
    constexpr int k = 0, n = 0;
    %(load)s
    %(decode)s
    old_param = number_of(param_k, i %% NUMBERS);
    %(update)s
    new_param = number_of(param_k, i %% NUMBERS);
}
"""


def for_cuda_c(form, scalars):
    """Return the CUDA C that a rule needs before it, and the function that calls it. scalars: the names of the rule's scalars.

    `update_lanes<N, TIMES>(operands..., index, key, skip, scalars...)` applies the rule to TIMES vectors of N neighbours. The
    operands are pointers to the first of them. index is the number of the first element in its parameter.

    `update_group<TIMES>(operands..., first, size, whole, index, key, skip, scalars...)` applies it to TIMES vectors of
    GROUP_LANES neighbours with 8-bit state, from `first` on, of `size`. whole: all of them are there, and can be loaded as
    vectors.

    The kernel defines APART.
    """
    operands, grouped = operands_of_form(form), form.arrays.grouped
    arguments = [f"{pointer_to(o)} {o.name}" for o in operands]
    arguments += ["long long first", "long long size", "bool whole"] if grouped else []
    arguments += ["long long index", "long long key", "long long skip", *(f"T {name}" for name in scalars)]
    loads, stores = ([o for o in operands if getattr(o, does) and not o.of_groups] for does in ("loads", "stores"))
    lines = {
        "zero_lanes": [f"FOR_VECTORS store(grad + n * APART * NUMBERS, {vector_of(operands[1])}{{}});"] * form.zero_grad,
        "zero_one": ["grad[at + k] = {};"] * form.zero_grad,
        "declare": [f"{vector_of(o)} {o.name}_was[TIMES];" for o in loads]
        + [f"{vector_of(o)} {o.name}_is[TIMES] = {{}};" for o in stores],
        "load_lanes": [f"{o.name}_was[n] = load<N, {o.numbers}>({o.name} + {place(o, 'at')});" for o in loads],
        "load_one": [f"{o.name}_was[n].lane[k] = {o.name}[min(at + k, last)];" for o in loads],
        "update": _update(form, scalars),
        "encode": [_encode(o) for o in operands if o.value],
        "store_lanes": [f"store({o.name} + {place(o, 'at')}, {o.name}_is[n]);" for o in stores],
        "store_one": [f"{o.name}[at + k] = {o.name}_is[n].lane[k];" for o in stores],
    }
    parts = {name: "\n".join(text) for name, text in lines.items()} | {"arguments": ", ".join(arguments)}
    parts |= {"GROUP": str(GROUP), "GROUP_LANES": str(GROUP_LANES)}
    return conversions.for_cuda_c() + IN_CUDA_C, (UPDATE_GROUP if grouped else UPDATE_LANES) % parts


def param_for_cuda_c(form, scalars):
    """Return the function of CUDA C for a pass that stores nothing. It goes behind the rule.

    `param_of(old_param, new_param, operands..., i, scalars...)` sets both to number i of the parameter, before and after.
    """
    operands = operands_of_form(form)
    arguments = [f"const {C_TYPES[o.format]}* {o.name}" for o in operands]
    arguments += ["long long i", *(f"T {name}" for name in scalars)]
    load = [
        f"const {vector_of(o, 1)} {o.name}_was[1] = {{load<1, {o.numbers}>({o.name} + {place(o, 'i / NUMBERS')})}};"
        for o in operands
        if o.loads and not o.of_groups
    ]
    if form.arrays.grouped:
        load += [f"const float {x}_unit[1] = {{{x}_unit_({x}_scale[i / {GROUP}])}};" for x in ("m", "v")]
    lines = {"load": load, "decode": _decode(form), "update": [_apply(scalars)]}
    return PARAM_OF % ({name: "\n".join(text) for name, text in lines.items()} | {"arguments": ", ".join(arguments)})


def _update(form, scalars):
    """Return the lines that decode lane k and apply the rule, to variables named value_k."""
    lines = [*_decode(form), _apply(scalars)]
    if form.arrays.random:
        lines.append("unsigned h[NUMBERS];")
        lines.append("FOR_NUMBERS {")
        lines.append("const long long number = (index + n * APART + k) * NUMBERS + j;")
        lines.append("h[j] = random_(number, number >> 32, key, key >> 32); }")
    return lines


def _apply(scalars):
    return f"update({', '.join(f'{name}_k' for name in VALUES)}, {', '.join(scalars)});"


def _decode(form):
    lines, several = [], form.arrays.numbers > 1
    for value, (row, names) in decodings(form).items():
        is_vector = several and not KINDS[value].shared
        place = "k * NUMBERS + j" if is_vector else "k"
        stored = ", ".join(f"{name}[n]" if name.endswith("_unit") else f"{name}_was[n].lane[{place}]" for name in names)
        x = f"wide({f'{row}_({stored})' if row else stored})"
        lines.append(f"V {value}_k; FOR_NUMBERS {value}_k.number[j] = {x};" if is_vector else f"T {value}_k = {x};")
    return lines


def _encode(operand):
    """Return the line that puts a value of lane k into the vector that will be stored."""
    several = operand.numbers > 1
    value = f"{operand.value}_k{'.number[j]' * several}"
    x = value if operand.format == "float64" else f"narrow({value})"
    if operand.encoding:
        bits = f", rotated(h[{'j' if several else 0}], {operand.random_bits_from})"
        x = f"{operand.encoding}_({x}{'' if operand.random_bits_from is None else bits})"
    return (
        f"FOR_NUMBERS {operand.name}_is[n].lane[k * NUMBERS + j] = {x};"
        if several
        else f"{operand.name}_is[n].lane[k] = {x};"
    )
