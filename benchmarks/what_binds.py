"""What binds a step on a GPU: the hardware's counters of one launch of each kernel, as Nsight Compute reads them.

    python benchmarks/what_binds.py [--backend cupy] [--elements 268435456] [--forms NAME,NAME] [--ncu ncu] [--out FOLDER]

Needs Nsight Compute's `ncu` and the right to read counters. Each kernel is launched twice, then once more under the profiler,
which replays that launch as often as the counters need. The clocks are left as they are.

    DRAM %      of the peak of the memory's throughput: near 90 is all that a memory gives
    occupancy   warps that are there, in percent of those that a multiprocessor has room for
    issue %     cycles in which a scheduler issues an instruction: near 100, the instructions bind
    sectors     of 32 bytes, for each request of a warp to load and to store: 16 where each thread has 16 bytes, side by side
    waiting     what warps wait for most, and how many of them do for each instruction that is issued
"""

import argparse
import csv
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


from gpuadam import backends
from gpuadam.cli.measuring import facts, forms, measure
from gpuadam.kernels import adam, limit
from gpuadam.terminal import arguments, output
from gpuadam.terminal.console import Console, Table

METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes": "dram__bytes.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sectors_load": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "sectors_store": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio",
    "registers": "launch__registers_per_thread",
}
STALLS = (
    "long_scoreboard",
    "lg_throttle",
    "math_pipe_throttle",
    "short_scoreboard",
    "wait",
    "not_selected",
    "no_instruction",
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
RULES = {"step": adam, "limit": limit}


def launch(backend, elements, chosen):
    """Launch each kernel, the third time under the profiler: the step of each form, then its limit."""
    kernels = backends.load(backend)
    begin, end = profiler(backend)
    for name in chosen:
        case = forms.FORMS[name]
        for rule in RULES.values():
            function = forms.launcher(kernels, case, forms.new_arrays(kernels, case, elements).values(), rule)
            function()
            function()
            measure.drain(kernels)
            begin()
            function()
            measure.drain(kernels)
            end()


def profiler(backend):
    """Return the functions between which the profiler looks."""
    if backend == "cupy":
        from cupy.cuda import profiler

        return profiler.start, profiler.stop
    from numba import cuda

    return cuda.profile_start, cuda.profile_stop


def profiled(options):
    """Return a row for each launch."""
    names = [*METRICS.values(), *map(STALL.format, STALLS)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        of_ncu = [options.ncu, "--csv", "--log-file", log, "--print-units", "base", "--profile-from-start", "off"]
        of_ncu += ["--clock-control", "none", "--metrics", ",".join(names)]
        own = [__file__, "--launch", "--backend", options.backend, "--elements", str(options.elements)]
        done = subprocess.run([*of_ncu, sys.executable, *own, "--forms", ",".join(options.forms)], check=False)
        text = log.read_text() if log.exists() else ""
    launches = counters(text)
    expected = list(itertools.product(options.forms, RULES))
    if done.returncode or len(launches) != len(expected):
        sys.exit(
            f"what_binds: {options.ncu} ended with {done.returncode}, {len(launches)} of {len(expected)} counted:\n{text}"
        )
    return [row(options, *of, found) for of, found in zip(expected, launches, strict=True)]


def counters(text):
    """Return name -> number of each launch in what ncu has written as CSV.

    >>> lines = ["==PROF== Connected", '"ID","Metric Name","Metric Unit","Metric Value"', '"0","a.sum","ns","1,234"']
    >>> counters("\\n".join([*lines, "==PROF== Disconnected"]))
    [{'a.sum': 1234.0}]
    """
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(line for line in lines[start:] if line.startswith('"')):  # not ncu's own, ==PROF==
        value = line["Metric Value"].replace(",", "")
        found.setdefault(line["ID"], {})[line["Metric Name"]] = float(value) if value != "n/a" else float("nan")
    return list(found.values())


def row(options, form, kernel, found):
    """Return what is shown of a launch, with the machine and the versions."""
    of_form = forms.bytes_moved(forms.FORMS[form])
    stalls = {stall: found[STALL.format(stall)] for stall in STALLS}
    waiting = max(stalls, key=lambda stall: stalls[stall])
    return {
        "form": form,
        "kernel": kernel,
        "backend": options.backend,
        "elements": options.elements,
        **{name: found[metric] for name, metric in METRICS.items()},
        "dram_bytes_x_minimum": found[METRICS["dram_bytes"]] / (of_form * options.elements),
        "waiting": waiting,
        "waiting_warps": stalls[waiting],
        **{f"stalled_{stall}": value for stall, value in stalls.items()},
        **facts.of_backend(options.backend),
    }


def table(rows):
    """Return the table of a backend's launches."""
    title = f"what binds: {rows[0]['backend']}, {rows[0]['elements']:,} elements, {rows[0]['device']}"
    heads = ("", "us", "DRAM %", "bytes x minimum", "occupancy", "issue %", "sectors", "registers", "waiting")
    lines = [
        (
            f"{each['form']}, {each['kernel']}",
            f"{each['nanoseconds'] / 1e3:,.1f}",
            f"{each['dram_percent']:.1f}",
            f"{each['dram_bytes_x_minimum']:.3f}",
            f"{each['occupancy_percent']:.1f}",
            f"{each['issue_percent']:.1f}",
            f"{each['sectors_load']:.1f}, {each['sectors_store']:.1f}",
            f"{each['registers']:.0f}",
            f"{each['waiting']} {each['waiting_warps']:.1f}",
        )
        for each in rows
    ]
    return Table(title, heads, lines)


@output.ending_plainly("what_binds")
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cupy", "numba-cuda"], default="cupy")
    parser.add_argument("--elements", type=arguments.whole, default=1 << 28, help="of the arrays; default %(default)s")
    names = arguments.names(forms.FORMS, "form")
    parser.add_argument("--forms", type=names, default="float32,all bfloat16,8-bit state", metavar="NAME,NAME")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's command; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write what_binds-BACKEND.json into it")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    options = parser.parse_args()
    backends.load(options.backend)
    if options.launch:
        launch(options.backend, options.elements, options.forms)
        return
    if not shutil.which(options.ncu):
        sys.exit(f"what_binds: there is no {options.ncu}: install NVIDIA Nsight Compute, or say where it is with --ncu")
    rows = profiled(options)
    Console().print(table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        output.write_json(str(options.out / f"what_binds-{options.backend}.json"), {"rows": rows})


if __name__ == "__main__":
    main()
