"""How many bytes does each kernel have in flight on a GPU's multiprocessor, beside what its memory needs?

    python benchmarks/in_flight.py [--arch sm_90,sm_100] [--compilers cupy,numba-cuda] [--forms all] [--vectors 1] [--out FOLDER]

The kernels are compiled, and their machine code is read, which needs no GPU but the wheels of the test extra. Bytes in flight are
the threads that fit on a multiprocessor, times the bytes that each loads before it uses the first. What an architecture needs is
what NVIDIA's CUB tunes its transforms for (`kernels/gpu_in_flight.py`). --vectors takes as many vectors a thread everywhere, in
the place of what a launch takes.

Limits of a multiprocessor: blocks and threads from libcu++'s architecture traits (cuda/__device/arch_traits.h of CCCL 3.5) and
the CUDA programming guide's table of compute capabilities; 65,536 registers in four partitions, given out to warps in units of
256, from cuda_occupancy.h of CUDA 13.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gpuadam.cli.measuring import facts, forms
from gpuadam.kernels import gpu_in_flight
from gpuadam.kernels.gpu_table import BLOCK
from gpuadam.kernels.layout import WARP
from gpuadam.terminal import arguments, output

REGISTERS, PARTITIONS, UNIT = 65536, 4, 256
COMPILERS = "cupy", "cupy-cuda12", "numba-cuda"
LOOPS = "contiguous", "table"  # of one array, and of many


class Limits(NamedTuple):
    """What a multiprocessor holds, whatever a thread takes."""

    threads: int
    blocks: int
    gpus: str


LIMITS = {
    "sm_75": Limits(1024, 16, "T4"),
    "sm_80": Limits(2048, 32, "A100"),
    "sm_86": Limits(1536, 16, "A10, RTX 3090"),
    "sm_89": Limits(1536, 24, "L40S, RTX 4090"),
    "sm_90": Limits(2048, 32, "H100, H200"),
    "sm_100": Limits(2048, 32, "B200"),
    "sm_103": Limits(2048, 32, "B300"),
    "sm_107": Limits(1024, 16, "Rubin"),
    "sm_110": Limits(1536, 24, "Thor"),
    "sm_120": Limits(1536, 24, "RTX 5090"),
}


class InFlight(NamedTuple):
    """What the machine code of a kernel says."""

    registers: int
    local_bytes: int  # spilled, of a thread
    threads: int  # that fit on a multiprocessor
    vectors: int  # of each array, that a thread takes
    loaded: int  # bytes that a thread loads before it uses the first
    asked: int  # bytes of all its vectors
    needed: int  # on a multiprocessor

    @property
    def bytes(self):
        return self.threads * self.loaded

    @property
    def enough(self):
        return self.bytes >= self.needed


def capability(arch):
    """Return the compute capability of an architecture.

    >>> capability("sm_107")
    (10, 7)
    """
    return int(arch[3:-1]), int(arch[-1])


def resident_threads(registers, arch, block=BLOCK):
    """Return how many threads fit on a multiprocessor. registers: of a thread.

    >>> resident_threads(40, "sm_90"), resident_threads(41, "sm_90"), resident_threads(40, "sm_107")
    (1536, 1280, 1024)
    """
    of_warp = -(-registers * WARP // UNIT) * UNIT
    warps = REGISTERS // PARTITIONS // of_warp * PARTITIONS
    limits = LIMITS[arch]
    return min(warps * WARP // block, limits.blocks, limits.threads // block) * block


def has_nvdisasm():
    """Return whether NVIDIA's disassembler is installed, as by the wheels of the test extra."""
    return any(Path(folder, "nvidia/cu13/bin/nvdisasm").exists() for folder in sys.path)


def in_flight(compiler, form, arch, loop, vectors=None):
    """Return the InFlight of a kernel. compiler: of `cases.COMPILERS`. vectors: None for as many as a launch takes."""
    import gpu_code

    if vectors is None:
        vectors = gpu_in_flight.vectors_of(form, loop, capability(arch), compiler != "numba-cuda")
    registers, local_bytes = gpu_code.resources(compiler, form, arch, loop=loop, vectors=vectors)
    sass = gpu_code.machine_code(compiler, form, arch, loop=loop, vectors=vectors)
    asked = vectors * gpu_in_flight.loaded_bytes(form)
    loaded = min(asked, gpu_code.loaded_before_use(sass))
    threads, needed = resident_threads(registers, arch), gpu_in_flight.needed(capability(arch))
    return InFlight(registers, local_bytes, threads, vectors, loaded, asked, needed)


def rows_of(options):
    for arch in options.arch:
        for compiler in options.compilers:
            for loop in LOOPS:
                for name in options.forms:
                    form, _ = forms.form_and_scalars(forms.FORMS[name])
                    if not (form.arrays.grouped and loop == "contiguous"):  # 8-bit state always goes by a table
                        found = in_flight(compiler, form, arch, loop, options.vectors)
                        yield {"arch": arch, "compiler": compiler, "loop": loop, "form": name} | found._asdict()


@output.ending_plainly("in_flight")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of_arch = f"architectures: all or {', '.join(LIMITS)}; default %(default)s"
    of_compilers = f"all or {', '.join(COMPILERS)}; default %(default)s"
    of_forms = 'formats, formulas and algorithms, such as "float32,8-bit state"; default %(default)s'
    archs, compilers = arguments.names(LIMITS, "architecture"), arguments.names(COMPILERS, "compiler")
    names = arguments.names(forms.FORMS, "form")
    parser.add_argument("--arch", type=archs, default="sm_90,sm_100", metavar="ARCH,ARCH", help=of_arch)
    parser.add_argument("--compilers", type=compilers, default="cupy,numba-cuda", metavar="NAME,NAME", help=of_compilers)
    parser.add_argument("--forms", type=names, default="all", metavar="NAME,NAME", help=of_forms)
    of_vectors = "vectors of each array that a thread takes; by default as many as a launch takes"
    parser.add_argument("--vectors", type=arguments.whole, metavar="N", help=of_vectors)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write in_flight.json into it")
    options = parser.parse_args()
    output.need("cuda13", "cupy", "numba_cuda")
    if not has_nvdisasm():
        sys.exit("in_flight: no nvdisasm is installed: pip install -e '.[test]' has it on Linux")
    print(f"{'':54}{'vectors':>8}{'registers':>10}{'threads':>9}{'bytes each':>12}{'KiB':>6}{'needed':>8}")
    rows = []
    for row in rows_of(options):
        found = InFlight(*[row[field] for field in InFlight._fields])
        rows.append(row | {"bytes": found.bytes, "enough": found.enough})
        name = f"{row['arch']:7}{row['compiler']:11}{row['loop']:11}{row['form']}"
        print(
            f"{name:62.62}{found.vectors}{found.registers:10}{found.threads:9}{found.loaded:12}{found.bytes / 1024:6.0f}"
            f"{found.needed / 1024:8.0f}{'' if found.enough else '  short'}",
            flush=True,
        )
    short = sum(not row["enough"] for row in rows)
    print(f"{len(rows) - short} of {len(rows)} kernels have as many bytes in flight as CUB tunes for")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        output.write_json(options.out / "in_flight.json", {"rows": rows} | facts.machine())


if __name__ == "__main__":
    main()
