#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests that are marked gpu, which must not skip for want of one, and the benchmarks.
#
#     benchmarks/gpu.sh OUTDIR
#
# Needs no network and no installation: it runs from the tree with the CuPy, Numba and numba-cuda that it finds, and pytest, rich,
# matplotlib and scikit-learn; torch, JAX and optax are measured beside it where they are there. JSON, PNG and log.txt go to OUTDIR; a short table comes last. Ends within 8 minutes. Exit status 0 if all tests passed and all benchmarks ran.
set -u -o pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD GPUADAM_REQUIRE_GPU=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # else JAX takes most of the memory
# an unwritable home must not cost the compile caches
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-${TMPDIR:-/tmp}/gpuadam-cupy-cache}
python=${PYTHON:-python3}
status=0

section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS" | tee -a "$out/log.txt"; }
: >"$out/log.txt"
this=$(mktemp -d)
trap 'rm -rf "$this"' EXIT
run() { # name, limit in seconds, command: its output goes to log.txt; the run goes on after a failure
    local name=$1 limit=$2 result
    shift 2
    section "$name"
    timeout -k 5 "$limit" "$@" >"$this/$name" 2>&1
    result=$?
    cat "$this/$name" >>"$out/log.txt"
    if [ $result = 0 ]; then
        tail -n 3 "$this/$name"
    else
        echo "FAILED ($result); the end of what it printed:"
        tail -n 60 "$this/$name"
        status=1
    fi
}

run doctor 30 "$python" -m gpuadam doctor --json "$out/doctor.json"
run tests 190 "$python" -m pytest -q --maxfail=20 -m gpu -W default -p no:cacheprovider --durations=10 tests
for backend in cupy numba-cuda; do
    run "bench-$backend" 45 "$python" -m gpuadam bench --backend "$backend" --seconds 0.5 \
        --json "$out/bench-$backend.json" --plot "$out/bench-$backend.png"
    run "peers-$backend" 60 "$python" benchmarks/peers.py --backend "$backend" --seconds 2 \
        --sizes 1000,1048576,33554432,67108864 --json "$out/peers-$backend.json"
done
run demo 40 "$python" -m gpuadam demo

section "summary"
tail -n 2 "$this/tests"
for backend in cupy numba-cuda; do
    cat "$this/bench-$backend" "$this/peers-$backend"
done
[ $status = 0 ] && echo "all of it ran" || echo "something FAILED: see above"
exit $status
