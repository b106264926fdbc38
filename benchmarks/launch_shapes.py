"""What would another shape of the GPU kernel cost or gain: block size, vectors a thread, cache hints?

    python benchmarks/launch_shapes.py [--arch sm_90] [--elements 268435456] [--seconds 5] [--out FOLDER]

Each variant is CuPy's kernel with the rule left as it is. Compiling them needs no GPU: registers, the threads that fit on a
multiprocessor, and the bytes that these have in flight say what the memory will see. Where there is a GPU, they run in turn with
the kernel as it is launched and with the limit kernel.
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

import in_flight

import gpuadam
from gpuadam.cli.measuring import facts, forms, measure
from gpuadam.kernels import adam, limit
from gpuadam.kernels.layout import Split
from gpuadam.terminal import arguments, output


class Variant(NamedTuple):
    block: int = 128
    vectors: int = 1  # of 16 bytes of each array, to a thread, all loaded before the first is used
    hint: str = ""  # "cs": streaming loads and stores, which leave the caches first


VARIANTS = {
    "1 vector a thread": Variant(),
    "64 threads a block": Variant(block=64),
    "256 threads a block": Variant(block=256),
    "512 threads a block": Variant(block=512),
    "2 vectors a thread": Variant(vectors=2),
    "2 vectors, 256 threads": Variant(block=256, vectors=2),
    "4 vectors a thread": Variant(vectors=4),
    "streaming loads and stores": Variant(hint="cs"),
}

# In the place of the load and the store of `cuda_c_access.py`, for four floats
HINTS = (
    (
        "    return *as<Vector<N, S, M>>(p);",
        """    Vector<N, S, M> x;
    if constexpr (sizeof(x) == 16) *as<float4>(&x) = __ldcs(as<float4>(p));
    else x = *as<Vector<N, S, M>>(p);
    return x;""",
    ),
    (
        "    *as<Vector<N, S, M>>(p) = v;",
        """    if constexpr (sizeof(v) == 16) __stcs(as<float4>(p), *as<float4>(&v));
    else *as<Vector<N, S, M>>(p) = v;""",
    ),
)


def build(variant, form, rule=adam):
    """Return a variant as an ElementwiseKernel."""
    import cupy

    from gpuadam.kernels import cupy_kernels

    base = cupy_kernels.build(rule, form, "contiguous", vectors=variant.vectors)
    if not variant.hint:
        return base
    preamble = base.preamble
    for plain, hinted in HINTS:
        if preamble.count(plain) != 1:
            raise RuntimeError(f"kernels/cuda_c_access.py has no {plain.strip()!r} any more, which the hints replace")
        preamble = preamble.replace(plain, hinted)
    declared = [f"{'raw ' if p.raw else ''}{np.dtype(p.dtype).name} {p.name}" for p in base.params[:-1]]
    inputs, outputs = ", ".join(declared[: base.nin]), ", ".join(declared[base.nin :])
    return cupy.ElementwiseKernel(inputs, outputs, base.operation, f"{base.name}_{variant.hint}", preamble=preamble)


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


def run_on_gpu(kernels, form, scalars, options):
    """Return the median microseconds of every variant, of the package's kernel and of the limit, in turn on the same arrays."""
    import cupy

    from gpuadam.kernels.cupy_backend import backend

    n = options.elements // 2048 * 2048
    param, grad, m, v = (cupy.asarray(a) for a in measure.data(n, "float32"))

    def launcher(name):
        variant, kernel = VARIANTS[name], kernels[name]
        cut = Split(0, n // 4, n // 4)
        size = cut.threads_of(variant.vectors)
        return lambda: kernel(grad, 0, cut.vectors, *scalars, param, m, v, size=size, block_size=variant.block)

    launchers = {name: launcher(name) for name in kernels}
    arrays = [param, grad, m, v]
    launchers["the package's kernel"] = forms.launcher(backend, forms.FORMS["float32"], arrays, adam)
    launchers["limit"] = forms.launcher(backend, forms.FORMS["float32"], arrays, limit)
    times = measure.in_turn(backend, list(launchers.values()), options.seconds)
    return {name: 1e6 * float(np.median(t)) for name, t in zip(launchers, times, strict=True)}


@output.ending_plainly("launch_shapes")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of_arch = "architecture whose machine code is read: %(choices)s; default %(default)s"
    parser.add_argument("--arch", choices=tuple(in_flight.LIMITS), default="sm_90", metavar="ARCH", help=of_arch)
    parser.add_argument("--elements", type=arguments.whole, default=1 << 28, help="of the arrays; default %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="in which all variants are timed; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write launch_shapes.json into it")
    options = parser.parse_args()
    output.need("cuda13", "cupy")
    form, scalars = forms.form_and_scalars(forms.FORMS["float32"])
    kernels = {name: build(variant, form) for name, variant in VARIANTS.items()}
    measured = run_on_gpu(kernels, form, scalars, options) if "cupy" in gpuadam.available_backends() else {}
    rows = []
    print(f"{'':28}{'registers':>10}{'threads/SM':>12}{'KiB in flight/SM':>21}{'us':>10}{'x limit':>9}")
    for name, variant in VARIANTS.items():
        row, shown = {"variant": name, **variant._asdict()}, f"{'':43}"
        if in_flight.has_nvdisasm():
            registers, accesses, kinds = machine_code(kernels[name], options.arch)
            threads = in_flight.resident_threads(registers, options.arch, variant.block)
            row |= {"arch": options.arch, "registers": registers, "accesses": accesses, "kinds": kinds, "threads": threads}
            row["kib_in_flight"] = threads * 64 * variant.vectors / 1024
            shown = f"{registers:10}{threads:12}{row['kib_in_flight']:21.0f}"
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
