"""Loads and stores of neighbours in CUDA C, for CuPy: `update_lanes` applies a rule to them, of 8-bit state `update_group`."""

from gpuadam.kernels.primitives import conversions_for_cuda_c
from gpuadam.kernels.storage import GROUP, GROUP_LANES, RANDOM_BITS_FROM, VALUES, is_random, of_form

C_TYPES = {
    "float64": "double",
    "float32": "float",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int16": "bits16",
    "uint8": "unsigned char",
}

IN_CUDA_C = r"""
struct alignas(2) bfloat16 { unsigned short bits; };
struct alignas(2) float16 { unsigned short bits; };
struct alignas(2) bits16 { unsigned short bits; };
template <int LANES, class S> struct alignas(LANES * sizeof(S) < 16 ? LANES * sizeof(S) : 16) Vector { S lane[LANES]; };
template <int LANES, class S> __device__ __forceinline__ Vector<LANES, S>& vector_at(S* p) {
    return *reinterpret_cast<Vector<LANES, S>*>(p);
}
template <int LANES, class S> __device__ __forceinline__ const Vector<LANES, S>& vector_at(const S* p) {
    return *reinterpret_cast<const Vector<LANES, S>*>(p);
}
// in one instruction, which the compiler makes several of if it is left to it
template <int LANES, class S> __device__ __forceinline__ void store(S* p, const Vector<LANES, S>& v) { vector_at<LANES>(p) = v; }
template <class S> __device__ __forceinline__ unsigned word(const S& low, const S& high) { return low.bits | high.bits << 16; }
template <class S> __device__ __forceinline__ void store_words(S* p, const Vector<8, S>& v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(word(v.lane[0], v.lane[1])), "r"(word(v.lane[2], v.lane[3])), "r"(word(v.lane[4], v.lane[5])),
                 "r"(word(v.lane[6], v.lane[7]))
                 : "memory");
}
__device__ __forceinline__ void store(bfloat16* p, const Vector<8, bfloat16>& v) { store_words(p, v); }
__device__ __forceinline__ void store(float16* p, const Vector<8, float16>& v) { store_words(p, v); }
__device__ __forceinline__ void store(bits16* p, const Vector<8, bits16>& v) { store_words(p, v); }
template <class S, class U> __device__ __forceinline__ S* as(U* p) { return reinterpret_cast<S*>(p); }
template <class S, class U> __device__ __forceinline__ const S* as(const U* p) { return reinterpret_cast<const S*>(p); }
__device__ __forceinline__ void widen(double& r, float x) { r = widened_(x); }
__device__ __forceinline__ void widen(double& r, double x) { r = x; }
__device__ __forceinline__ void widen(float& r, float x) { r = x; }
__device__ __forceinline__ float narrow(double x) { return narrowed_(x); }
__device__ __forceinline__ float narrow(float x) { return x; }
__device__ __forceinline__ T decoded(double x) { T r; widen(r, x); return r; }
__device__ __forceinline__ T decoded(float x) { T r; widen(r, x); return r; }
__device__ __forceinline__ T decoded(bfloat16 x) { return decoded(from_bfloat16_(x.bits)); }
__device__ __forceinline__ T decoded(float16 x) { return decoded(from_float16_(x.bits)); }
__device__ __forceinline__ T decoded(bfloat16 x, bits16 rest) { return decoded(from_parts_(x.bits, rest.bits)); }
__device__ __forceinline__ void encode(double& r, T x) { r = x; }
__device__ __forceinline__ void encode(float& r, T x) { r = narrow(x); }
__device__ __forceinline__ void encode(bfloat16& r, T x) { r.bits = to_bfloat16_(narrow(x)); }
__device__ __forceinline__ void encode(float16& r, T x) { r.bits = to_float16_(narrow(x)); }
__device__ __forceinline__ void encode_randomly(bfloat16& r, T x, unsigned h) { r.bits = to_bfloat16_randomly_(narrow(x), h); }
__device__ __forceinline__ void encode_randomly(float16& r, T x, unsigned h) { r.bits = to_float16_randomly_(narrow(x), h); }
__device__ __forceinline__ unsigned rotated(unsigned h, int n) { return h >> n | h << (32 - n); }
"""


def for_cuda_c(form, scalars):
    """Return the CUDA C that a rule needs before it, and what comes after it: `update_lanes` or, of groups, `update_group`.

    `update_lanes<N>(operands..., index, key, skip, scalars...)` applies the rule to N neighbours. The operands are pointers to
    the first of them. Everything is loaded before the first store, because the compiler must take it that the arrays might
    overlap, and would load again. index is the number of the first element in its parameter.
    """
    found = of_form(form)
    kinds = {operand.name: C_TYPES[operand.format] for operand in found}
    declared = [f"{'' if o.stores else 'const '}{kinds[o.name]}* {o.name}" for o in found]
    numbers = "long long index, long long key, long long skip, " + ", ".join(f"T {name}" for name in scalars)
    # a step that is turned off leaves all but the gradient as it is
    zero = f"store(grad, Vector<N, {kinds['grad']}>{{}});" if form.zero_grad else ""
    if form.arrays.grouped:
        return conversions_for_cuda_c() + IN_CUDA_C, _update_group(form, found, kinds, declared, numbers, scalars)
    lines = [f"template <int N> __device__ __forceinline__ void update_lanes({', '.join(declared)}, {numbers}) {{"]
    if form.skips:
        lines += ["if (skip) {", zero, "return;", "}"]
    for o in found:
        if o.loads:
            lines.append(f"const Vector<N, {kinds[o.name]}> {o.name}_was = vector_at<N>({o.name});")
        if o.stores:
            lines.append(f"Vector<N, {kinds[o.name]}> {o.name}_is{' = {}' if o.name == 'grad' else ''};")
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {", *_updated(form, found, scalars)]
    lines += [*_encoded(form, found), "}"]
    lines += [f"store({o.name}, {o.name}_is);" for o in found if o.stores]
    return conversions_for_cuda_c() + IN_CUDA_C, "\n".join([*lines, "}\n"])


def _updated(form, found, scalars):
    """Return the lines that decode lane k and apply the rule, to variables named value_k."""
    given = {operand.name: f"{operand.name}_was.lane[k]" for operand in found}
    if form.arrays.remainder:
        given["param"] += ", remainder_was.lane[k]"
    lines = []
    for name in VALUES:
        source = name if name in given else "v" if name == "max_v" else "param"
        if form.arrays.grouped and source in ("m", "v"):
            lines.append(f"T {name}_k = from_{source}_code_({given[source]}, {source}_unit);")
        else:
            lines.append(f"T {name}_k = decoded({given[source]});")
    lines.append(f"update({', '.join(f'{name}_k' for name in VALUES)}, {', '.join(scalars)});")
    if form.arrays.random:
        lines.append("const long long number = index + k;")
        lines.append("const unsigned h = random_(number, number >> 32, key, key >> 32);")
    return lines


def _encoded(form, found):
    """Return the lines that put the variables named value_k into lane k of what will be stored, but for 8-bit state."""
    lines = []
    for o in found:
        if form.arrays.grouped and (o.of_groups or o.name in ("m", "v")):
            continue
        if o.name in ("param", "remainder") and form.arrays.remainder:
            lines.append(f"{o.name}_is.lane[k].bits = {'high' if o.name == 'param' else 'low'}_part_(narrow(param_k));")
        elif o.stores and o.name != "grad":
            value = "param" if o.name == "param_copy" else o.name
            random, first = is_random(form.arrays, o), RANDOM_BITS_FROM.get(o.name)
            bits = "" if not random else f", rotated(h, {first})" if first else ", h"
            lines.append(f"encode{'_randomly' if random else ''}({o.name}_is.lane[k], {value}_k{bits});")
    return lines


def _update_group(form, found, kinds, declared, numbers, scalars):
    """Return `update_group(operands..., at, size, whole, index, key, skip, scalars...)`.

    It applies the rule to GROUP_LANES neighbours, from `at` on, of `size`; all threads of a warp call it. whole: all of them are
    there, and can be loaded as vectors. Else lanes after the last load the last element, and store nothing.
    """
    each = [o for o in found if not o.of_groups]
    N = GROUP_LANES
    single = ["for (int k = 0; k < N; ++k) {", "if (at + k < size) {"]
    arguments = [*declared, "long long at", "long long size", "bool whole", numbers]
    lines = [
        f"__device__ __forceinline__ void update_group({', '.join(arguments)}) {{",
        f"constexpr int N = {N};",
        "const long long last = size - 1;",
    ]
    if form.skips:
        zero = ["#pragma unroll", *single, "grad[at + k] = {};", "}", "}"] if form.zero_grad else []
        lines += ["if (skip) {", *zero, "return;", "}"]
    for o in each:
        kind = f"Vector<N, {kinds[o.name]}>"
        lines += [f"{kind} {o.name}_was;"] if o.loads else []
        lines += [f"{kind} {o.name}_is{' = {}' if o.name == 'grad' else ''};"] if o.stores else []
    loads = [o.name for o in each if o.loads]
    lines += ["if (whole) {", *(f"{name}_was = vector_at<N>({name} + at);" for name in loads), "} else {"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {"]
    lines += [f"{name}_was.lane[k] = {name}[min(at + k, last)];" for name in loads]
    lines += ["}", "}", f"const long long group = min(at, last) / {GROUP};"]
    lines += [f"const float {x}_unit = {x}_unit_({x}_scale[group]);" for x in "mv"]
    lines += ["float new_m[N], new_v[N], new_root[N];", "unsigned bits[N], largest_m = 0, largest_root = 0;"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {", *_updated(form, found, scalars), *_encoded(form, found)]
    lines += ["new_m[k] = m_k;", "new_v[k] = v_k;", "new_root[k] = max_v_k;", "bits[k] = h;"]
    lines += ["largest_m = max(largest_m, at + k < size ? magnitude_(m_k) : 0u);"]
    lines += ["largest_root = max(largest_root, at + k < size ? magnitude_(max_v_k) : 0u);", "}"]
    lines += ["#pragma unroll", f"for (int other = 1; other < {GROUP} / N; other *= 2) {{"]
    lines += [f"{x} = max({x}, __shfl_xor_sync(0xffffffffu, {x}, other));" for x in ("largest_m", "largest_root")]
    lines += ["}", "const float m_inverse = m_inverse_(largest_m), v_inverse = v_inverse_(largest_root);"]
    lines += [f"const unsigned {x}_mask = {x}_mask_(largest_m, largest_root);" for x in "mv"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {"]
    lines += ["m_is.lane[k] = to_m_code_(new_m[k], m_inverse, m_mask, bits[k]);"]
    lines += ["v_is.lane[k] = to_v_code_(new_v[k], new_root[k], v_inverse, v_mask, bits[k]);", "}"]
    lines += [f"if (at < size && at % {GROUP} == 0) {{"]
    lines += [f"{x}_scale[group] = {x}_scale_(largest_m, largest_root);" for x in "mv"]
    stores = [o.name for o in each if o.stores]
    lines += ["}", "if (whole) {", *(f"store({name} + at, {name}_is);" for name in stores), "} else {", "#pragma unroll"]
    lines += [*single, *(f"{name}[at + k] = {name}_is.lane[k];" for name in stores), "}", "}", "}", "}\n"]
    return "\n".join(lines)
