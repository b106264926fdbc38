#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests that are marked gpu, which must not skip for want of one, and the benchmarks.
#
#     benchmarks/gpu.sh OUTDIR
#
# Needs no network and no installation: it runs from the tree with the CuPy, Numba and numba-cuda that it finds. JSON, PNG and logs
# go to OUTDIR; a short table comes last. Ends within 8 minutes. Exit status 0 if all tests passed and all benchmarks ran.
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

section() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
run() { # name, limit in seconds, command: kept in a log; the run goes on after a failure
    local name=$1 limit=$2
    shift 2
    section "$name"
    if timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; then
        tail -n 3 "$out/$name.log"
    else
        echo "FAILED ($?): the end of $out/$name.log:"
        tail -n 60 "$out/$name.log"
        status=1
    fi
}

run doctor 40 "$python" -m gpuadam doctor --json "$out/doctor.json"
run tests 210 "$python" -m pytest -q --maxfail=20 -m gpu -W default -p no:cacheprovider --durations=10 tests
for backend in cupy numba-cuda; do
    run "bench-$backend" 35 "$python" -m gpuadam bench --backend "$backend" --seconds 0.5 \
        --json "$out/bench-$backend.json" --plot "$out/bench-$backend.png"
    run "peers-$backend" 40 "$python" benchmarks/peers.py --backend "$backend" --seconds 2 \
        --sizes 1000,1048576,33554432,268435456 --json "$out/peers-$backend.json"
done
run demo 45 "$python" -m gpuadam demo --json "$out/demo.json" --plot "$out/demo.png"

section "summary"
tail -n 5 "$out/tests.log"
for backend in cupy numba-cuda; do
    cat "$out/bench-$backend.log" "$out/peers-$backend.log"
done
[ $status = 0 ] && echo "all of it ran" || echo "something FAILED: see above"
exit $status
