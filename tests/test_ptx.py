"""The PTX runner: what it refuses, and what compilers make of CUDA C and of Python."""

import numpy as np
import pytest
from ptx import Refused
from ptx_kernels import kernel_of, same, words

REFUSED = [
    "add.f32 %r4, %r5, %r6",
    "mul.ftz.f32 %r4, %r5, %r6",
    "sub.f64 %d4, %d5, %d6",
    "add.f16 %h4, %h5, %h6",
    "neg.f16 %h4, %h5",
    "abs.bf16 %h4, %h5",
    "fma.rn.f16 %h4, %h5, %h6, %h7",
    "max.f32 %r4, %r5, %r6",
    "min.NaN.f32 %r4, %r5, %r6",
    "max.bf16 %h4, %h5, %h6",
    "rcp.approx.f32 %r4, %r5",
    "ex2.approx.ftz.f32 %r4, %r5",
    "fma.rz.f32 %r4, %r5, %r6, %r7",
    "add.rn.sat.f32 %r4, %r5, %r6",
    "cvt.rz.f16.f32 %h4, %r5",
    "cvt.rn.ftz.f16.f32 %h4, %r5",
    "cvt.ftz.f32.f16 %r4, %h5",
    "cvt.rn.satfinite.bf16.f32 %h4, %r5",
    "cvt.rz.f32.s32 %r4, %r5",
    "cvt.f32.s32 %r4, %r5",
    "cvt.s32.f32 %r4, %r5",
    "cvt.sat.s8.s32 %r4, %r5",
    "cvt.rni.ftz.s32.f64 %r4, %d5",
    "cvt.rn.f32.f32 %r4, %r5",
    "add.cc.u32 %r4, %r5, %r6",
    "addc.u32 %r4, %r5, %r6",
    "add.sat.s32 %r4, %r5, %r6",
    "mul.s32 %r4, %r5, %r6",
    "mul24.lo.s32 %r4, %r5, %r6",
    "prmt.b32.f4e %r4, %r5, %r6, %r7",
    "vadd4.u32.u32.u32 %r4, %r5, %r6, %r7",
    "dp4a.s32.s32 %r4, %r5, %r6, %r7",
    "setp.ltx.s32 %p0, %r4, %r5",
    "setp.lt.f16 %p0, %h4, %h5",
    "ld.global.b12 %r4, [%a0]",
    "ld.u32 %r4, [%a0]",
    "ld.volatile.shared.u32 %r4, [%a0]",
    "ld.shared.global.u32 %r4, [%a0]",
    "st.param.u32 [a0], %r4",
    "ld.param.u32 %r4, [b0]",
    "ld.shared.u32 %r4, [room]",
    "atom.global.add.u32 %r4, [%a0], 1",
    "cvta.shared.u64 %d4, %d5",
    "shfl.bfly.b32 %r4, %r5, 1, 31",
    "match.any.sync.b32 %r4, %r5, -1",
    "vote.ballot.b32 %r4, %p0",
    "bar.sync 1",
    "bar.sync 0, 64",
    "bar.red.popc.u32 %r4, 0, %p0",
    "barrier.cluster.arrive",
    "membar.gl",
    "trap",
    "mov.u32 %r4, %tid.y",
    ".shared .align 4 .b8 two[8], three[8]",
    ".extern .shared .align 4 .b8 dynamic[]",
]


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_runner_does_not_know_is_refused(line):
    with pytest.raises(Refused):
        kernel_of(f"{line};", 1, (4,))


SOURCES = {
    "bfloat16": """__global__ void bfloat16(const unsigned short* x, unsigned short* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        unsigned u = __float_as_uint(__fmul_rn(__uint_as_float((unsigned)x[i] << 16), 1.5f));
        out[i] = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; }""",
    "hash": """__global__ void hash(const unsigned* x, unsigned* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        unsigned h = x[i];
        h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
        out[i] = ((h << 13) | (h >> 19)) ^ __umulhi(h, 0xD2511F53u); }""",
    "bytes": """__global__ void bytes(const int4* x, uint2* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        if (i >= n) return;
        int4 v = x[i];
        unsigned word = (v.x & 255) | (v.y & 255) << 8 | (v.z & 255) << 16 | (unsigned)v.w << 24;
        float sum = 0;
        for (int k = 0; k < 4; k++) sum = __fadd_rn(sum, (float)(signed char)(word >> 8 * k));
        out[i] = make_uint2(word, (unsigned)__float2int_rn(__fmul_rn(sum, 0.5f))); }""",
    "maximum": """__global__ void maximum(const float* x, float* out, long long n) {
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        unsigned u = i < n ? __float_as_uint(x[i]) & 0x7fffffffu : 0;
        for (int k = 16; k; k >>= 1) u = max(u, __shfl_xor_sync(0xffffffffu, u, k));
        if (i < n) out[i] = __uint_as_float(u); }""",
    "total": """__global__ void total(const double* x, double* out, long long n) {
        __shared__ double part[32];
        double s = 0;
        for (long long i = threadIdx.x; i < n; i += blockDim.x) s = __dadd_rn(s, x[i]);
        for (int k = 16; k; k >>= 1) s = __dadd_rn(s, __shfl_down_sync(0xffffffffu, s, k));
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
        __syncthreads();
        if (threadIdx.x >= 32) return;
        s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0;
        for (int k = 16; k; k >>= 1) s = __dadd_rn(s, __shfl_down_sync(0xffffffffu, s, k));
        if (threadIdx.x == 0) out[0] = s; }""",
}


def numba_kernels():
    """Return the same kernels in Python and the types of their arguments, addresses as int64."""
    from numba import cuda, float32, float64, int8, int32, int64, types, uint16, uint32
    from numba.cuda import libdevice

    def bfloat16(x, out, n):
        i = cuda.grid(1)
        if i < n:
            widened = uint32(uint32(x[i]) << uint32(16)).view(np.float32)
            u = uint32(libdevice.fmul_rn(widened, float32(1.5)).view(np.uint32))
            rounded = uint32(u + uint32(0x7FFF) + ((u >> uint32(16)) & uint32(1))) >> uint32(16)
            out[i] = uint16(0x7FFF if (u & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded)

    def hash_(x, out, n):
        i = cuda.grid(1)
        if i < n:
            h = uint32(x[i])
            h = uint32((h ^ (h >> uint32(16))) * uint32(0x85EBCA6B))
            h = uint32((h ^ (h >> uint32(13))) * uint32(0xC2B2AE35))
            h = uint32(h ^ (h >> uint32(16)))
            high = uint32((types.uint64(h) * types.uint64(0xD2511F53)) >> types.uint64(32))
            out[i] = uint32(uint32(h << uint32(13)) | (h >> uint32(19))) ^ high

    def bytes_(x, out, n):
        i = cuda.grid(1)
        if i < n:
            word, total = uint32(0), float32(0)
            for k in range(4):
                byte = int8(x[4 * i + k])
                word |= uint32(int32(byte) & int32(255)) << uint32(8 * k)
                total = libdevice.fadd_rn(total, float32(byte))
            out[2 * i] = word
            out[2 * i + 1] = uint32(libdevice.float2int_rn(libdevice.fmul_rn(total, float32(0.5))))

    def maximum(x, out, n):
        i = cuda.grid(1)
        u = int32(0)
        if i < n:
            u = int32(x[i].view(np.int32) & int32(0x7FFFFFFF))
        for k in (16, 8, 4, 2, 1):
            u = int32(max(u, cuda.shfl_xor_sync(0xFFFFFFFF, u, k)))
        if i < n:
            out[i] = u.view(np.float32)

    def total(x, out, n):
        part = cuda.shared.array(32, float64)
        s, t = 0.0, cuda.threadIdx.x
        for i in range(t, n, cuda.blockDim.x):
            s = libdevice.dadd_rn(s, x[i])
        for k in (16, 8, 4, 2, 1):
            s = libdevice.dadd_rn(s, cuda.shfl_down_sync(0xFFFFFFFF, s, k))
        if t % 32 == 0:
            part[t // 32] = s
        cuda.syncthreads()
        if t < 32:
            s = part[t] if t < cuda.blockDim.x // 32 else 0.0
            for k in (16, 8, 4, 2, 1):
                s = libdevice.dadd_rn(s, cuda.shfl_down_sync(0xFFFFFFFF, s, k))
            if t == 0:
                out[0] = s

    def taking(x, out):
        return types.Array(x, 1, "C"), types.Array(out, 1, "C"), int64

    return {
        "bfloat16": (bfloat16, taking(uint16, uint16)),
        "hash": (hash_, taking(uint32, uint32)),
        "bytes": (bytes_, taking(int32, uint32)),
        "maximum": (maximum, taking(float32, float32)),
        "total": (total, taking(float64, float64)),
    }


def run_compiled(compiler, arch, name, x, out, n, block, grid):
    gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)
    if compiler == "numba-cuda":
        text = gpu_code.compile_numba(*numba_kernels()[name], arch)
        # an array is seven parameters: what it belongs to, two of them, its size, itemsize, address, shape and stride
        array = [[0, 0, a.size, a.itemsize, a.ctypes.data, a.size, a.itemsize] for a in (x, out)]
        values = [*array[0], *array[1], n]
    else:
        options = ["-ftz=true", f"-arch={arch.replace('sm', 'compute')}"]
        source = f'extern "C" {SOURCES[name]}'
        text = gpu_code.nvrtc(12 if compiler == "cupy-cuda12" else 13).compile(source, options, "PTX").rstrip(b"\0").decode()
        values = [x.ctypes.data, out.ctypes.data, n]
    kernel = gpu_code.loaded(text)
    memory = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in (x, out)]
    kernel.run(grid, block, [np.int64(v).tobytes() for v in values], memory)
    return out


# one of each kind of code that NVRTC and NVVM write
some_architectures = pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])


@some_architectures
def test_compiled_bfloat16_arithmetic(compiler, arch):
    x = np.arange(65536, dtype="u2")
    with np.errstate(over="ignore", invalid="ignore"):
        product = (x.astype("u4") << 16).view("f4") * np.float32(1.5)
    if compiler != "numba-cuda":  # -ftz=true: both what goes in and what comes out
        product[(x & 0x7F80 == 0) | (np.abs(product) < np.finfo("f4").tiny)] *= 0
    u = product.view("u4")
    expected = np.where(np.isnan(product), 0x7FFF, (u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("u2")
    out = run_compiled(compiler, arch, "bfloat16", x, np.zeros_like(x), x.size, 128, 512)
    same(out, expected)


@some_architectures
def test_a_compiled_hash(compiler, arch):
    x = words("u4", 1000)
    h = x ^ x >> 16
    h = h * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    h ^= h >> 16
    expected = (h << 13 | h >> 19) ^ (h.astype("u8") * 0xD2511F53 >> 32).astype("u4")
    same(run_compiled(compiler, arch, "hash", x, np.zeros_like(x), x.size, 128, 8), expected)


@some_architectures
def test_compiled_bytes_are_packed_and_unpacked(compiler, arch):
    x = words("i4", 4000)
    four = x.astype("i1").reshape(-1, 4)
    halves = np.rint(four.sum(1, dtype="i4") / 2).astype("i4").view("u4")
    expected = np.stack([four.view("u4")[:, 0], halves], 1).ravel()
    same(run_compiled(compiler, arch, "bytes", x, np.zeros(2000, "u4"), 1000, 128, 8), expected)


@some_architectures
def test_a_compiled_maximum_of_groups(compiler, arch):
    x = np.random.default_rng(0).normal(size=3000).astype("f4")
    groups = np.resize(np.append(np.abs(x), np.zeros(8, "f4")), (94, 32)).max(1)
    same(run_compiled(compiler, arch, "maximum", x, np.zeros_like(x), x.size, 128, 24), np.repeat(groups, 32)[:3000])


@some_architectures
def test_a_compiled_sum_of_a_block(compiler, arch):
    x = np.random.default_rng(0).normal(size=5000)
    threads = np.zeros(1024)
    for start in range(0, x.size, 1024):
        part = x[start : start + 1024]
        threads[: part.size] += part
    for _ in range(2):  # the sum of each warp, and then of these
        rows = threads.reshape(-1, 32)
        for k in (16, 8, 4, 2, 1):
            rows = rows[:, :k] + rows[:, k : 2 * k]
        threads = rows[:, 0]
    same(run_compiled(compiler, arch, "total", x, np.zeros(1), x.size, 1024, 1), threads)
