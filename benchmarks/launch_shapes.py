"""What would another shape of the GPU kernel cost or gain: block size, vectors a thread, one-shot or grid-stride, cache hints?

    python benchmarks/launch_shapes.py [--arch sm_90] [--elements 268435456] [--seconds 5] [--out FOLDER]

Each variant is CuPy's kernel with its loop changed and the rule left as it is. Compiling them needs no GPU: registers, the
threads that fit on a multiprocessor, and the bytes that these have on their way say what the memory will see. Where there is a
GPU, they run in turn with the kernel as it is and with the limit kernel.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import gpuadam
from gpuadam import hyperparameters
from gpuadam.cli.measuring import facts, forms, measure
from gpuadam.kernels import adam, limit
from gpuadam.kernels.operands import Arrays
from gpuadam.terminal import output

THREADS, REGISTERS, BLOCKS = 2048, 65536, 32  # of a multiprocessor of an A100, H100 or B200
HYPERPARAMETERS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}


class Variant(NamedTuple):
    block: int = 128
    vectors: int = 1  # of 16 bytes of each array, to a thread, all loaded before the first is stored
    grid_stride: bool = False
    hint: str = ""  # "cs": streaming loads and stores, which leave the caches first


VARIANTS = {
    "as it is": Variant(),
    "64 threads a block": Variant(block=64),
    "256 threads a block": Variant(block=256),
    "512 threads a block": Variant(block=512),
    "2 vectors a thread": Variant(vectors=2),
    "4 vectors a thread": Variant(vectors=4),
    "grid-stride": Variant(grid_stride=True),
    "streaming loads and stores": Variant(hint="cs"),
}

HINTS = """
typedef Vector<LANES, T> Lanes;
__device__ __forceinline__ Lanes load_(const T* p) {
    float4 x = __ldcs((const float4*)p); return *reinterpret_cast<Lanes*>(&x); }
__device__ __forceinline__ void store_(T* p, Lanes x) { __stcs((float4*)p, *reinterpret_cast<float4*>(&x)); }
"""
PLAIN = """
typedef Vector<LANES, T> Lanes;
__device__ __forceinline__ Lanes load_(const T* p) { return vector_at<LANES>(p); }
__device__ __forceinline__ void store_(T* p, Lanes x) { vector_at<LANES>(p) = x; }
"""
# Arrays without a head or a tail: what is measured is the vectors.
LOOP = """
const ptrdiff_t threads = (ptrdiff_t)gridDim.x * blockDim.x;
for (ptrdiff_t j = i; j < vectors / %(vectors)d; j += threads) {
    Lanes G[%(vectors)d], P[%(vectors)d], M[%(vectors)d], V[%(vectors)d];
    #pragma unroll
    for (int n = 0; n < %(vectors)d; ++n) {
        const ptrdiff_t at = (j / 32 * 32 * %(vectors)d + n * 32 + j %% 32) * LANES;  // a warp's vectors lie side by side
        G[n] = load_(&grad[at]); P[n] = load_(&param[at]); M[n] = load_(&m[at]); V[n] = load_(&v[at]);
    }
    #pragma unroll
    for (int n = 0; n < %(vectors)d; ++n) {
        const ptrdiff_t at = (j / 32 * 32 * %(vectors)d + n * 32 + j %% 32) * LANES;
        #pragma unroll
        for (int k = 0; k < LANES; ++k) {
            T max_v = V[n].lane[k], ema = P[n].lane[k];  // which this form does not have
            update(P[n].lane[k], G[n].lane[k], M[n].lane[k], V[n].lane[k], max_v, ema, %(scalars)s);
        }
        store_(&param[at], P[n]); store_(&m[at], M[n]); store_(&v[at], V[n]);
    }
    %(one_shot)s
}
break;
"""


def build(variant, form):
    """Return a variant as an ElementwiseKernel."""
    import cupy

    from gpuadam.kernels import cupy_elementwise

    base = cupy_elementwise.build(adam, form, "contiguous")
    names = [(p.raw, np.dtype(p.dtype).name, p.name) for p in base.params[:-1]]
    declared = [f"{'raw ' if raw else ''}{dtype} {name}" for raw, dtype, name in names]
    body = LOOP % {
        "vectors": variant.vectors,
        "scalars": ", ".join(adam.scalar_names(form)),
        "one_shot": "" if variant.grid_stride else "break;",
    }
    return cupy.ElementwiseKernel(
        ", ".join(declared[: base.nin]),
        ", ".join(declared[base.nin :]),
        body,
        f"variant_{variant.block}_{variant.vectors}_{variant.grid_stride}_{variant.hint}",
        preamble=base.preamble + (HINTS if variant.hint else PLAIN),
    )


def machine_code(kernel, arch):
    """Return (registers of a thread, its accesses of 16 bytes, the cache hints on them)."""
    import gpu_code

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(gpu_code.compile_cupy(kernel, arch, "CUBIN"))
        usage, sass = (
            subprocess.run(
                [gpu_code.find(f"cu13/bin/{tool}"), *options, cubin], check=True, capture_output=True, text=True
            ).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    accesses = re.findall(r"\b((?:LDG|STG)\.[\w.]*128[\w.]*)", sass)
    return int(re.search(r"\bREG:(\d+)", usage)[1]), len(accesses), " ".join(sorted(set(accesses)))


def occupancy(registers, block):
    """Return how many threads fit on a multiprocessor: registers are given out to warps in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    warps = REGISTERS // per_warp
    return min(warps * 32 // block, BLOCKS, THREADS // block) * block


def run_on_gpu(kernels, form, scalars, options):
    """Return the median microseconds of every variant, of the package's kernel and of the limit, in turn on the same arrays."""
    import cupy

    from gpuadam.kernels import cupy_elementwise

    n = options.elements // 2048 * 2048
    param, grad, m, v = (cupy.asarray(a) for a in measure.data(n, "float32"))
    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]

    def launcher(name):
        variant, kernel = VARIANTS[name], kernels[name]
        vectors = n // 4
        threads = vectors // variant.vectors
        if variant.grid_stride:
            threads = multiprocessors * THREADS
        return lambda: kernel(grad, 0, vectors, *scalars, param, m, v, size=threads, block_size=variant.block)

    launchers = {name: launcher(name) for name in kernels}
    arrays = [param, grad, m, v]
    launchers["the package's kernel"] = forms.launcher(cupy_elementwise, forms.FORMS["float32"], arrays, adam)
    launchers["limit"] = forms.launcher(cupy_elementwise, forms.FORMS["float32"], arrays, limit)
    times = measure.in_turn(cupy_elementwise, list(launchers.values()), options.seconds)
    return {name: 1e6 * float(np.median(t)) for name, t in zip(launchers, times, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--elements", type=lambda x: int(float(x)), default=1 << 28)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write launch_shapes.json into it")
    options = parser.parse_args()
    try:
        output.need("cuda13", "cupy")
    except output.MissingExtraError as error:
        sys.exit(f"launch_shapes: {error}")
    h = hyperparameters.checked(**HYPERPARAMETERS)
    form, scalars = hyperparameters.form_and_scalars(h, 10, Arrays())
    kernels = {name: build(variant, form) for name, variant in VARIANTS.items()}
    measured = run_on_gpu(kernels, form, scalars, options) if "cupy" in gpuadam.available_backends() else {}
    rows = []
    print(f"{'':28}{'registers':>10}{'threads/SM':>12}{'KiB on their way/SM':>21}{'us':>10}{'x limit':>9}")
    for name, variant in VARIANTS.items():
        row, shown = {"variant": name, **variant._asdict()}, f"{'':43}"
        if any(Path(folder, "nvidia/cu13/bin/nvdisasm").exists() for folder in sys.path):  # the wheels of the test extra
            registers, accesses, kinds = machine_code(kernels[name], options.arch)
            threads = occupancy(registers, variant.block)
            row |= {"arch": options.arch, "registers": registers, "accesses": accesses, "kinds": kinds, "threads": threads}
            row["kib_on_their_way"] = threads * 64 * variant.vectors / 1024
            shown = f"{registers:10}{threads:12}{row['kib_on_their_way']:21.0f}"
        if name in measured:
            row |= {"p50_us": measured[name], "x_limit": measured[name] / measured["limit"]}
            shown += f"{row['p50_us']:10.1f}{row['x_limit']:9.3f}"
        print(f"{name:28}{shown}")
        rows.append(row)
    for name in ("the package's kernel", "limit"):
        if name in measured:
            rows.append({"variant": name, "p50_us": measured[name], "x_limit": measured[name] / measured["limit"]})
            print(f"{name:28}{'':43}{measured[name]:10.1f}{rows[-1]['x_limit']:9.3f}")
    if not measured:
        print("no GPU here: nothing was timed")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        output.write_json(options.out / "launch_shapes.json", {"rows": rows, "elements": options.elements} | facts.machine())


if __name__ == "__main__":
    main()
