#!/usr/bin/env bash
# The tests and the benchmarks that need a GPU, in sections that can be run by name.
#
#     benchmarks/gpu.sh OUTDIR                          the five that matter most, in order, within 6 minutes
#     benchmarks/gpu.sh OUTDIR SECTION ...              these sections; `all` is every one
#     benchmarks/gpu.sh --within SECONDS OUTDIR ...     likewise, and end by then
#     benchmarks/gpu.sh --list                          the sections, and how long each may take
#
# Needs no network and no installation: it runs from the tree with the CuPy, Numba and numba-cuda that it finds, and pytest; the
# section examples with matplotlib, scikit-learn and scikit-image, too. Torch, JAX and optax are measured beside it where they
# are there. With pytest-xdist the tests, of which most compile, run side by side. what_binds needs Nsight Compute's ncu, sanitize
# needs compute-sanitizer.
#
# OUTDIR gets these files, and no others:
#     log.txt                                           all that was printed, and the GPU's clocks around each section
#     results.csv                                       the rows of all benchmarks and backends
#     doctor.json                                       of the section doctor
#     launch_shapes.json                                of the section launch_shapes
#     what_binds-cupy.json, what_binds-numba-cuda.json  of the section what_binds
# A later call adds to results.csv and log.txt; a row that is measured again takes the old one's place. Nothing is drawn:
# benchmarks/README.md says how to draw from results.csv. What each section did and a short table of all rows come last.
#
# A section that fails, or reaches its limit, does not cost the others. If the section doctor finds that no GPU backend works, it
# is the last. The exit status is 0 if every section that was asked for passed or is not to be had here, and at least one passed.
#
# With GPUADAM_GPU=host it is a dry run, to the end: every process of Python has the stand-in for the CUDA driver (tests/stand_in),
# arrays are tiny, and times mean nothing.
set -u -o pipefail

# -- the sections: name, seconds that it may take, what it is

names=() of_default=(doctor large many small tests-gpu)
declare -A limit about
section() { names+=("$1") limit[$1]=$2 about[$1]=$3; }
section doctor 70 "both GPU backends work and give the contract's bits"
section large 110 "one large array on both backends, beside torch's fused Adam"
section many 55 "GPT-2's 148 arrays and 1,000 arrays, on both backends"
section small 40 "the host's time of a call, on both backends"
# last of those without names: figures that are cut short are lost, tests are not
section tests-gpu 130 "tests that only a real GPU can run: 2^31 elements and bytes, torch's CUDA; and a spread of the others"
section host_time 40 "the host's time of a step beside bare launches, on both backends"
section tests 420 "every test that is marked gpu"
section narrow 150 "every format of the arrays, on both backends"
section amp_step 80 "the whole step of mixed-precision training, on both backends"
section norms 40 "a step that returns its norms, on both backends"
section peers 90 "one large array and small ones on CuPy, beside every library that is there"
section what_binds 200 "the hardware's counters of a launch, by ncu"
section launch_shapes 45 "other block sizes, more vectors a thread, a grid-stride loop, cache hints"
section offload 230 "state in the host's memory: 8 GB, and up to 72 GB, as far as half of the memory goes"
section plan 45 "does python -m gpuadam plan predict the times?"
section memory 100 "what a step allocates beyond its state, on both backends"
section first_call 75 "the first step of a process, with cold and warm compile caches, on both backends"
section examples 120 "the demo, and the examples that have arrays on a GPU"
section bench 80 "python -m gpuadam bench, on both backends"
section sanitize-memcheck 200 "tests of kernels under compute-sanitizer: accesses outside of arrays"
section sanitize-racecheck 120 "likewise: races in shared memory"
section sanitize-initcheck 120 "likewise: reads of memory that nothing wrote"
sanitize=(sanitize-memcheck sanitize-racecheck sanitize-initcheck) # by the name sanitize, too

listed() {
    local name mark
    for name in "${names[@]}"; do
        mark=" "
        [[ " ${of_default[*]} " != *" $name "* ]] || mark="*"
        printf '%s %-20s%4s s  %s\n' "$mark" "$name" "${limit[$name]}" "${about[$name]}"
    done
    printf '  %-28s%s\n' sanitize "the three" all "every section" "" "* without names"
}
usage() {
    printf 'usage: benchmarks/gpu.sh [--within SECONDS] OUTDIR [SECTION ...], or --list. The sections:\n'
    listed
}
refuse() {
    printf 'gpu.sh: %s\n' "$1" >&2
    usage >&2
    exit 2
}

within=""
while [[ ${1:-} == -* ]]; do
    case $1 in
        --list) listed && exit 0 ;;
        -h | --help) usage && exit 0 ;;
        --within) within=${2:-} && shift $(($# > 1 ? 2 : 1)) && [[ $within =~ ^[1-9][0-9]*$ ]] || refuse "--within needs seconds" ;;
        *) refuse "there is no option $1" ;;
    esac
done
[ $# -gt 0 ] || refuse "where do the results go?"
outdir=$1 chosen=()
shift
choose() { [[ " ${chosen[*]:-} " == *" $1 "* ]] || chosen+=("$1"); }
for name in "$@"; do
    case $name in
        all) for each in "${names[@]}"; do choose "$each"; done ;;
        sanitize) for each in "${sanitize[@]}"; do choose "$each"; done ;;
        *) [ -n "${limit[$name]:-}" ] || refuse "there is no section $name" && choose "$name" ;;
    esac
done
[ $# -gt 0 ] || { chosen=("${of_default[@]}") within=${within:-360}; }

# -- where everything is

python=$(command -v "${PYTHON:-python3}") || refuse "there is no ${PYTHON:-python3}"
[[ $python == /* ]] || python=$PWD/$python
if ! why=$(PYTHONPATH=$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH} "$python" -c 'import gpuadam, numba' 2>&1); then
    printf 'gpu.sh: %s cannot import gpuadam and numba: %s\n' "$python" "${why##*$'\n'}" >&2
    printf 'Activate the environment that has them, as by ". .venv/bin/activate", or name its Python: PYTHON=.venv/bin/python\n' >&2
    exit 2
fi
mkdir -p "$outdir" && out=$(cd "$outdir" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} GPUADAM_REQUIRE_GPU=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # else JAX takes most of the memory
# an unwritable home must not cost the compile caches
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-${TMPDIR:-/tmp}/gpuadam-cupy-cache}
PATH=$PATH:/usr/local/cuda/bin # ncu and compute-sanitizer
# numba-cuda needs libNVVM. It looks where CUDA_HOME says, or else beside the NVRTC that it finds: torch's has none there
nvcc=$(command -v nvcc) && nvcc=$(readlink -f "$nvcc")
for toolkit in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda "${nvcc%/bin/nvcc}"; do
    if [ -n "$toolkit" ] && [ -d "$toolkit/nvvm" ]; then
        export CUDA_HOME=$toolkit
        [ "${CUDA_PATH:-}" = "$toolkit" ] || unset CUDA_PATH # of two toolkits one might refuse what the other compiled
        break
    fi
done
backends=(cupy numba-cuda)
heeding=(env --default-signal=INT) # which is of coreutils 8.31
"${heeding[@]}" true 2>/dev/null || heeding=()
log=$out/log.txt results=$out/results.csv
this=$(mktemp -d)
trap '[ -z "${reading:-}" ] || kill "$reading" 2>/dev/null; rm -rf "$this"' EXIT

# -- sizes and seconds

# tests of the clock and of free memory, which run alone; under a tool both are the tool's
of_time="overtake or nothing_waits or no_more_memory or no_device_memory"
of_one_thread="the_driver_repeats" # launches, which it does if Python has one thread: pytest-xdist has another
spread_files=(tests/test_gpu.py tests/test_gpu_narrow.py tests/test_gpu_captures.py)
spread="test_gpu.py or else or remainder or mean or rounded or RAdam or captured or recipe"
every_file=(tests) every="" # all names
host="" slower=1
if [ "${GPUADAM_GPU:-}" != host ]; then
    large=(--seconds 2 --sizes $((1 << 26)),$((1 << 28)))
    many=(--seconds 3)
    small=(--seconds 1)
    host_time=(--seconds 3)
    narrow=(--seconds 3) narrow_numba=(--seconds 2 --forms "bfloat16 state,8-bit state,all bfloat16")
    amp_step=(--seconds 2) amp_step_numba=(--seconds 2 --sizes gpt2)
    norms=(--seconds 1)
    peers_large=(--seconds 3 --sizes $((1 << 26)))
    launch_shapes=(--seconds 3)
    offload=(--sizes 8/1,72/8 --seconds 10)
    plan=(--seconds 3)
    memory=(--sizes 5e7)
    first_call=(--seconds 0.1)
    bench=(--seconds 0.2)
    demo=() arrays=cupy thomson=() gaussians=(--steps 50) digits=() tomography=(--steps 100) photons=()
else
    host="the stand-in for the CUDA driver, not a GPU: all times are meaningless"
    PYTHONPATH=$PWD/tests/stand_in/site:$PWD/tests:$PYTHONPATH # its sitecustomize.py starts the stand-in in every process
    CUPY_CACHE_DIR+=-host # PTX, no machine code
    slower=3 # that many times as long may everything take
    of_time="overtake or no_device_memory" spread="doctor or remainder"
    every_file=(tests/test_gpu.py tests/test_flat.py tests/test_offload_gpu.py) every="flat or empty or overtake"
    large=(--seconds 0 --sizes 4096,8192)
    many=(--seconds 0 --sizes 20x1000)
    small=(--seconds 0 --sizes 1000)
    host_time=(--seconds 0 --sizes 2)
    narrow=(--seconds 0 --sizes 4096 --forms "8-bit state") narrow_numba=("${narrow[@]}")
    amp_step=(--seconds 0 --sizes 3x1000) amp_step_numba=("${amp_step[@]}")
    norms=(--seconds 0 --sizes 4096)
    peers_large=(--seconds 0 --sizes 4096)
    launch_shapes=(--seconds 0 --elements 65536)
    what_binds=(--elements 4096)
    offload=(--sizes 0.001/0.0005,0.002/0.0005 --seconds 0)
    plan=(--seconds 0 --sizes 4096 --forms float32)
    memory=(--sizes 4096)
    first_call=(--seconds 0)
    bench=(--seconds 0 --sizes 4096)
    # CuPy's matrix products and exponentials are not executed there
    demo=(--backend numba-cpu) arrays=numpy thomson=(--steps 5) gaussians=(--steps 5) digits=(--steps 2) tomography=(--steps 5)
    photons=(--size 16 --steps 2)
fi

# -- how a section runs

said() { printf '%s\n' "$@" | tee -a "$log"; }
run() { # name, seconds that it may take, command: what it prints goes to log.txt; the section goes on after a failure
    local name=$1 most=$(($2 * slower)) left=$((section_until - SECONDS)) began=$SECONDS result
    shift 2
    [ "$most" -lt "$left" ] || most=$left
    printf '\n-- %s: %s\n' "$name" "$*" >>"$log"
    if [ "$most" -le 0 ]; then
        said "   $name FAILED: no time was left for it"
        outcome=FAILED
        return 1
    fi
    # an interrupt lets Python say what it came to: pytest which tests have failed. Where this script ignores them, so would Python
    timeout -s INT -k 10 "$most" ${heeding[@]+"${heeding[@]}"} "$@" >"$this/$name.log" 2>&1
    result=$?
    cat "$this/$name.log" >>"$log"
    if [ $result = 0 ]; then
        said "   $name: $((SECONDS - began)) s"
        return 0
    fi
    [ $result != 124 ] && [ $result != 137 ] || result="stopped after $most s"
    said "   $name FAILED ($result) after $((SECONDS - began)) s; the end of what it printed:"
    tail -n 40 "$this/$name.log"
    outcome=FAILED
    return 1
}
lacking() { # what is not there, of which the section consists
    said "   not to be had here: $1"
    [ "$outcome" = FAILED ] || outcome="not to be had here: $1"
}
benchmark() { # name, backend, seconds, options: its rows are added to results.csv, those of a run that was cut short too
    run "$1-$2" "$3" "$python" "benchmarks/$1.py" --backend "$2" --add "$results" "${@:4}"
}
both() { # name, seconds, options: likewise on each backend
    local backend
    for backend in "${backends[@]}"; do benchmark "$1" "$backend" "${@:2}"; done
}
gpu_state() { # before or after a section: its clocks and its load say whether figures can be trusted
    command -v nvidia-smi >/dev/null || return 0
    printf -- '-- the GPU %s: ' "$1" >>"$log"
    timeout 10 nvidia-smi --format=csv,noheader \
        --query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active,utilization.gpu >>"$log" 2>&1
}
tests() { # name, seconds, options. CuPy compiles a reduction with CUB in 4 s, and tests make many
    CUPY_ACCELERATORS="" run "$1" "$2" "$python" -m pytest -q --maxfail=20 -W default -p no:cacheprovider --durations=10 "${@:3}"
    [ ! -f "$this/$1.log" ] || tail -n 1 "$this/$1.log"
}
at_once() { # options that let tests run side by side, where pytest-xdist is there
    "$python" -c "import xdist" 2>/dev/null && [ -z "$host" ] || return
    printf '%s\n' -n $(($(nproc) < 16 ? 4 : 8)) --dist loadgroup
}
example() { # name, options
    run "example-$1" 40 "$python" -m gpuadam.examples "$1" "${@:2}"
}

# -- what each section does

section_doctor() {
    local backend works=0
    rm -f "$out/doctor.json"
    run doctor 900 "$python" -m gpuadam doctor --json "$out/doctor.json"
    [ -f "$out/doctor.json" ] || return
    grep "  works\|failed\|wrong\|mend it\|launches\|CUDA's\|NVVM" "$this/doctor.log"
    for backend in "${backends[@]}"; do
        if "$python" -c 'import json, sys
sys.exit(sys.argv[2] not in json.load(open(sys.argv[1]))["works"])' "$out/doctor.json" "$backend"; then
            works=$((works + 1))
        else
            said "   $backend does not work"
            outcome=FAILED
        fi
    done
    [ $works -gt 0 ] || stop="no GPU backend works"
}
section_tests-gpu() {
    local real side_by_side
    mapfile -t real < <(grep -lE 'real_gpu|cuda_torch' tests/test_*.py | grep -v test_examples) # these have a section
    mapfile -t side_by_side < <(at_once)
    tests tests-gpu-alone 95 -m gpu -k "real_gpu or $of_time or $of_one_thread" \
        tests/test_gpu_launch.py tests/test_gpu.py "${real[@]}"
    tests tests-gpu-spread 900 ${side_by_side[@]+"${side_by_side[@]}"} -m "gpu and not real_gpu" \
        -k "($spread) and not ($of_time or $of_one_thread)" "${spread_files[@]}"
}
section_large() { both large 55 "${large[@]}" --peers "torch fused"; }
section_many() { both many 30 "${many[@]}" --peers "torch fused,torch foreach"; }
section_small() { both small 22 "${small[@]}" --peers "torch fused,torch foreach"; }
section_host_time() { both host_time 22 "${host_time[@]}"; }
section_tests() {
    local side_by_side k=${every:+($every) and }
    mapfile -t side_by_side < <(at_once)
    local alone="real_gpu or $of_time or $of_one_thread"
    tests tests-alone 150 -m gpu -k "${k}($alone)" "${every_file[@]}"
    tests tests-others 900 ${side_by_side[@]+"${side_by_side[@]}"} -m gpu -k "${k}not ($alone)" "${every_file[@]}"
}
section_narrow() {
    benchmark narrow cupy 110 "${narrow[@]}"
    benchmark narrow numba-cuda 50 "${narrow_numba[@]}"
}
section_amp_step() {
    benchmark amp_step cupy 45 "${amp_step[@]}"
    benchmark amp_step numba-cuda 40 "${amp_step_numba[@]}"
}
section_norms() { both norms 22 "${norms[@]}"; }
section_peers() {
    benchmark large cupy 55 "${peers_large[@]}"
    benchmark small cupy 40 "${small[@]}"
}
section_what_binds() {
    local backend
    for backend in "${backends[@]}"; do
        if [ -n "$host" ]; then # what ncu would watch
            run "launches-$backend" 90 "$python" benchmarks/what_binds.py --launch --backend "$backend" "${what_binds[@]}"
        elif command -v ncu >/dev/null; then
            run "what_binds-$backend" 105 "$python" benchmarks/what_binds.py --backend "$backend" --out "$out" &&
                tail -n 20 "$this/what_binds-$backend.log"
        fi
    done
    if [ -n "$host" ]; then
        lacking "a GPU's counters; the launches alone ran"
    else
        command -v ncu >/dev/null || lacking "ncu, of NVIDIA Nsight Compute"
    fi
}
section_launch_shapes() {
    run launch_shapes 900 "$python" benchmarks/launch_shapes.py "${launch_shapes[@]}" --out "$out" &&
        cat "$this/launch_shapes.log"
}
section_offload() { benchmark offload cupy 900 "${offload[@]}"; }
section_plan() { benchmark plan cupy 900 "${plan[@]}"; }
section_memory() {
    benchmark memory cupy 65 "${memory[@]}" --peers "torch fused,torch foreach,plain CuPy"
    benchmark memory numba-cuda 40 "${memory[@]}" --peers none
}
section_first_call() {
    benchmark first_call cupy 45 "${first_call[@]}" --peers "torch fused"
    benchmark first_call numba-cuda 30 "${first_call[@]}" --peers none
}
section_examples() { # which draw
    run demo 40 "$python" -m gpuadam demo "${demo[@]}"
    example thomson --arrays numba "${thomson[@]}" --plot "$this/thomson.png"
    example gaussians --arrays "$arrays" "${gaussians[@]}" --plot "$this/gaussians.png"
    example digits --arrays "$arrays" "${digits[@]}"
    example tomography --arrays "$arrays" "${tomography[@]}" --plot "$this/tomography.png"
    example photons --arrays cupy "${photons[@]}" --plot "$this/photons.png"
    if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
        example torch_digits --device cuda --steps 5
    else
        said "   example-torch_digits was left out: there is no torch with CUDA"
    fi
}
section_bench() {
    local backend
    for backend in "${backends[@]}"; do
        run "bench-$backend" 45 "$python" -m gpuadam bench --backend "$backend" "${bench[@]}" --json "$this/bench-$backend.json"
        [ ! -f "$this/bench-$backend.json" ] ||
            run "rows-$backend" 20 "$python" benchmarks/report.py add "$results" "$this/bench-$backend.json"
    done
}
sanitized() { # tool, and the files of tests, each in a process of its own
    local tool=$1 file name options=()
    shift
    # a thread without a context asks for its device, which the driver refuses and the thread expects
    [ "$tool" != memcheck ] || options=(--report-api-errors no)
    if [ -n "$host" ] || ! command -v compute-sanitizer >/dev/null; then
        lacking "${host:+a GPU for }compute-sanitizer${host:+ to watch}"
        return
    fi
    for file in "$@"; do
        name=$tool-$file
        # without a pool each array is an allocation, whose end the tool knows
        GPUADAM_NO_POOL=1 run "$name" 900 compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 99 --log-file "$this/$name.errors" \
            "$python" -m pytest -q --maxfail=5 -m "gpu and not real_gpu" -W default -p no:cacheprovider -k "not ($of_time)" \
            "tests/$file.py"
        [ -f "$this/$name.errors" ] || continue
        cat "$this/$name.errors" >>"$log"
        said "   $(tail -n 1 "$this/$name.log"); $(grep -o 'SUMMARY.*' "$this/$name.errors" || echo 'no summary')"
    done
}
section_sanitize-memcheck() {
    sanitized memcheck test_gpu test_gpu_narrow test_global_norm test_adam test_flat test_offload_gpu
}
section_sanitize-racecheck() { sanitized racecheck test_global_norm test_gpu_narrow test_gpu; }
section_sanitize-initcheck() { sanitized initcheck test_global_norm test_gpu_narrow test_gpu; }

# -- all that was chosen

last=${within:+$((within - 20))} # then there is time for what does not end at once, and for the table
said "" "== $(date -u +%F' '%T) ${chosen[*]}${within:+, within $within s}${host:+; $host}"
if [ -z "$host" ]; then # from a disk that is cold, which would take the time of a section with a limit
    timeout 120 "$python" -c 'import contextlib, importlib
for name in ("cupy", "numba.cuda", "torch", "torch._dynamo"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)' </dev/null >/dev/null 2>&1 &
    reading=$!
fi
stop="" # why no other section is reached
declare -A state took
passed=0 failed=() not_reached=() not_here=()
for name in "${chosen[@]}"; do
    [ -z "$last" ] || [ $((last - SECONDS)) -ge 5 ] || stop=${stop:-no time was left}
    if [ -n "$stop" ]; then
        not_reached+=("$name") state[$name]="not reached: $stop"
        continue
    fi
    began=$SECONDS section_until=$((SECONDS + slower * limit[$name])) outcome=passed
    [ -z "$last" ] || [ $section_until -le "$last" ] || section_until=$last
    said "" "== $name: ${about[$name]} (at most $((section_until - SECONDS)) s)"
    gpu_state before
    "section_$name"
    gpu_state after
    state[$name]=$outcome took[$name]=$((SECONDS - began))
    said "   $name ${outcome%%:*}: ${took[$name]} s, $SECONDS s so far"
    case $outcome in
        passed) passed=$((passed + 1)) ;;
        FAILED) failed+=("$name") ;;
        *) not_here+=("$name") ;;
    esac
done

said "" "== summary"
if [ -f "$results" ]; then
    timeout 20 "$python" benchmarks/report.py summary "$results" | tee -a "$log" || failed+=("the table")
fi
for name in "${chosen[@]}"; do
    said "$(printf '%-20s%5s  %s' "$name" "${took[$name]:+${took[$name]} s}" "${state[$name]}")"
done
[ -z "$host" ] || said "This was $host."
verdict="$passed of ${#chosen[@]} sections passed"
[ ${#not_here[@]} = 0 ] || verdict+="; not to be had here: ${not_here[*]}"
[ ${#not_reached[@]} = 0 ] || verdict+="; NOT REACHED: ${not_reached[*]}"
[ ${#failed[@]} = 0 ] || verdict+="; FAILED: ${failed[*]}"
said "$verdict; $SECONDS s"
[ $passed -gt 0 ] && [ ${#failed[@]} = 0 ] && [ ${#not_reached[@]} = 0 ]
