#!/usr/bin/env bash
# Everything that needs a GPU: the tests, which must not skip for want of one, and the benchmarks.
#
#     benchmarks/gpu.sh OUTDIR             the tests that are marked gpu, and the figures of steps
#     benchmarks/gpu.sh OUTDIR inspect     the hardware's counters, state larger than the GPU's memory, what a plan predicts,
#                                          memory, first calls, shapes of launches, the demo and the examples
#     benchmarks/gpu.sh OUTDIR sanitize    the tests of kernels under compute-sanitizer
#
# Needs no network and no installation: it runs from the tree with the CuPy, Numba and numba-cuda that it finds, and pytest, rich,
# matplotlib, scikit-learn and scikit-image; torch, JAX and optax are measured beside it where they are there; with pytest-xdist
# the tests, of which most compile, run four at a time; inspect needs Nsight Compute's ncu. OUTDIR gets results.csv (the rows of all
# benchmarks and backends), doctor.json, log.txt and a PNG each for large, small, many, narrow and amp_step: eight files. The other
# scripts draw theirs from rows with --rows. inspect adds inspect.csv, what_binds-BACKEND.json and inspect.txt, sanitize adds
# sanitize.txt. A short table comes last. Each ends within 8 minutes. Exit status 0 if all tests passed and all benchmarks ran.
set -u -o pipefail
what=${2:-figures}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [[ ! $what =~ ^(figures|inspect|sanitize)$ ]]; then
    echo "usage: benchmarks/gpu.sh OUTDIR [inspect | sanitize]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD GPUADAM_REQUIRE_GPU=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # else JAX takes most of the memory
# an unwritable home must not cost the compile caches
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-${TMPDIR:-/tmp}/gpuadam-cupy-cache}
python=${PYTHON:-python3}
backends=(cupy numba-cuda)
measure_until=445 # seconds: then there is time to draw and to print
status=0

log=$out/$what.txt
[ $what != figures ] || log=$out/log.txt
section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS" | tee -a "$log"; }
: >"$log"
this=$(mktemp -d)
trap 'rm -rf "$this"' EXIT
run() { # name, limit in seconds, command: its output goes to log.txt; the run goes on after a failure
    local name=$1 limit=$2 left=$((measure_until - SECONDS)) result
    shift 2
    section "$name"
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -le 0 ]; then
        echo "FAILED: no time was left for it" | tee -a "$log"
        status=1
        return
    fi
    timeout -k 5 "$limit" "$@" >"$this/$name.log" 2>&1
    result=$?
    cat "$this/$name.log" >>"$log"
    if [ $result = 0 ]; then
        tail -n 3 "$this/$name.log"
    else
        echo "FAILED ($result); the end of what it printed:"
        tail -n 60 "$this/$name.log"
        status=1
    fi
}
benchmark() { # name, backend, limit in seconds, options
    local name=$1 backend=$2 limit=$3
    shift 3
    run "$name-$backend" "$limit" "$python" "benchmarks/$name.py" --backend "$backend" --out "$this/$backend" "$@"
}

finish() {
    [ $status = 0 ] && echo "all of it ran" || echo "something FAILED: see above"
    exit $status
}

# tests of how long the host waits and of how much memory is free: under a tool both are the tool's
of_time="overtake nothing_waits no_more_memory no_device_memory"
sanitized() { # tool, seconds for all of it, and the files of tests, each in a process of its own
    local tool=$1 until=$((SECONDS + $2)) file name
    shift 2
    for file in "$@"; do
        name=$tool-$file
        # without a pool each array is an allocation, whose end the tool knows
        GPUADAM_NO_POOL=1 run "$name" $((until - SECONDS)) compute-sanitizer --tool "$tool" --error-exitcode 99 \
            --log-file "$this/$name.errors" "$python" -m pytest -q --maxfail=5 -m gpu -W default -p no:cacheprovider \
            -k "not beyond and not 2_31 and not ${of_time// / and not }" "tests/$file.py"
        cat "$this/$name.errors" >>"$log"
        summary+=("$name: $(tail -n 1 "$this/$name.log"); $(grep -o 'SUMMARY.*' "$this/$name.errors" || echo 'no summary')")
    done
}

if [ $what = sanitize ]; then
    summary=()
    sanitized memcheck 200 test_gpu test_gpu_narrow test_global_norm test_adam test_flat test_offload_gpu
    sanitized racecheck 120 test_global_norm test_gpu_narrow test_gpu
    sanitized initcheck 120 test_global_norm test_gpu_narrow test_gpu
    section "summary"
    printf '%s\n' "${summary[@]}" | tee -a "$log"
    finish
fi

example() { # name, options
    run "example-$1" 25 "$python" -m "gpuadam.examples.$1" "${@:2}"
}
merged() { # file: the rows of all that was measured go there
    shopt -s nullglob
    local rows=("$this"/*/*.csv "$this"/bench-*.json)
    [ ${#rows[@]} -gt 0 ] || return 0
    "$python" benchmarks/report.py merge "$1" "${rows[@]}" || status=1
}

if [ $what = inspect ]; then
    for backend in "${backends[@]}"; do
        run "what_binds-$backend" 90 "$python" benchmarks/what_binds.py --backend "$backend" --out "$out"
    done
    # the second is more than the GPU has: 72 GB of state, and 24 of parameters and gradients, in the host's memory
    benchmark offload cupy 230 --sizes 8/1,72/8 --seconds 10
    benchmark plan cupy 40 --seconds 3
    run launch_shapes 40 "$python" benchmarks/launch_shapes.py --seconds 3
    benchmark memory cupy 45 --sizes 5e7 --peers "torch fused,torch foreach,plain CuPy"
    benchmark first_call cupy 45 --seconds 0.1 --peers "torch fused"
    benchmark memory numba-cuda 30 --sizes 5e7 --peers none
    benchmark first_call numba-cuda 30 --seconds 0.1 --peers none
    run demo 40 "$python" -m gpuadam demo
    example thomson --arrays numba --plot "$this/thomson.png"
    example gaussians --arrays cupy --steps 50 --plot "$this/gaussians.png"
    example torch_digits --device cuda --steps 5
    for backend in "${backends[@]}"; do
        run "bench-$backend" 40 "$python" -m gpuadam bench --backend "$backend" --seconds 0.2 --json "$this/bench-$backend.json"
    done
    section "summary"
    merged "$out/inspect.csv"
    "$python" benchmarks/report.py summary "$out/inspect.csv" | tee -a "$log" || status=1
    finish
fi

run doctor 60 "$python" -m gpuadam doctor --json "$out/doctor.json"
tests() { # name, limit in seconds, options
    run "$1" "$2" "$python" -m pytest -q --maxfail=20 -m gpu -W default -p no:cacheprovider --durations=10 "${@:3}"
}
tests tests-alone 120 tests/test_gpu.py # of which some look at free memory and at the clock
"$python" -c "import xdist" 2>/dev/null && at_once=(-n 4 --dist loadgroup) || at_once=()
tests tests 190 "${at_once[@]}" --ignore=tests/test_gpu.py tests
# What matters most comes first. The others are measured in full beside cupy; beside numba-cuda only torch's fused Adam, the measure.
benchmark large cupy 100 --seconds 2
benchmark large numba-cuda 60 --seconds 2 --peers "torch fused"
for backend in "${backends[@]}"; do
    benchmark small "$backend" 35 --seconds 1
    benchmark many "$backend" 45 --seconds 3 --peers "torch fused,torch foreach"
done
benchmark narrow cupy 75 --seconds 3
benchmark amp_step cupy 45 --seconds 2
benchmark narrow numba-cuda 50 --seconds 2 --forms "bfloat16 state,8-bit state,all bfloat16"
benchmark amp_step numba-cuda 40 --seconds 2 --sizes gpt2

section "summary"
tail -n 2 "$this/tests-alone.log" "$this/tests.log"
merged "$out/results.csv"
if [ -f "$out/results.csv" ]; then
    for name in large small many narrow amp_step; do
        for measured in "$this"/*/"$name.csv"; do # of any backend: the plot has a panel for each
            "$python" "benchmarks/$name.py" --rows "$out/results.csv" --out "$out" >>"$out/log.txt" || status=1
            break
        done
    done
    "$python" benchmarks/report.py summary "$out/results.csv" | tee -a "$out/log.txt" || status=1
fi
finish
