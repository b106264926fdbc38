"""Several vectors a thread, where one has too few bytes in flight: the bits, the bytes, and the machine code."""

import sys
from pathlib import Path

import pytest
from cases import (
    KEY_FORMS,
    OTHER_ALGORITHMS,
    assert_same_bits,
    assert_sentinels,
    at_offset,
    few,
    form_and_scalars,
    wide_state,
)
from launched import KEY, STEP_KEY, assert_same, copies, launched

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import in_flight  # noqa: E402

from gpuadam.cli.measuring import forms  # noqa: E402
from gpuadam.kernels import gpu_in_flight, limit  # noqa: E402
from gpuadam.kernels.cpu_backend import backend as numba_cpu  # noqa: E402
from gpuadam.kernels.layout import Split  # noqa: E402

# a warp takes 64 vectors of 4 elements at once, and a block of a table 256
SIZES = (0, 3, 255, 256, 300, 1024, 1500)
# What the CUDA 12 compiler does not know is left to the others
BLACKWELL = few(("sm_100", "sm_103", "sm_107", "sm_110", "sm_120"), "sm_107")
NARROW = ("all bfloat16", "bfloat16 param and grad + 16 bits", "where", "joint complex64", "components=3", "float64")


@pytest.fixture(params=["cupy", "numba-cuda"])
def compiler(request):
    """The compilers that know every architecture."""
    return request.param


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("vectors", few((2, 3, 4), 2))
@pytest.mark.parametrize("loop", ["contiguous", "table"])
def test_every_start_and_size_has_the_cpu_backends_bits_and_touches_its_own_bytes_alone(compiler, loop, vectors):
    form, scalars = form_and_scalars("all with adamw", "float32")
    for n in SIZES:
        for offsets in ((0,) * 5, (3,) * 5, (0, 1, 0, 0, 0)):
            given = wide_state(n, "float32", form.amsgrad, seed=n)
            expected = launched(form, copies(given), scalars)
            placed = [at_offset(a, offset) for a, offset in zip(given, offsets, strict=True)]
            arrays = [a for a, _ in placed]
            if loop == "contiguous":
                kernel = gpu_code.run(compiler, form, "sm_100", arrays, scalars, vectors=vectors)
            elif n:
                memory = gpu_code.memory_of(arrays)
                kernel = gpu_code.run_table(compiler, form, "sm_100", [arrays], scalars, memory, vectors=vectors)
            else:
                continue
            assert_same_bits(arrays, expected, f"n={n}, offsets={offsets}")
            for _, sentinels in placed:
                assert_sentinels(*sentinels, "an array")
            if loop == "contiguous":
                assert (kernel.loaded_bytes, kernel.stored_bytes) == (5 * 4 * n, 4 * 4 * n)


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("arch", BLACKWELL)
@pytest.mark.parametrize("loop", ["contiguous", "table"])
@pytest.mark.parametrize("name", few(NARROW, "all bfloat16", "components=3"))
def test_numbers_of_any_format_have_the_cpu_backends_bits(compiler, arch, loop, name):
    case = forms.FORMS[name]
    form, scalars = forms.form_and_scalars(case)
    arrays = list(forms.new_arrays(numba_cpu, case, 2500).values())
    expected = launched(form, copies(arrays), scalars)
    memory = gpu_code.memory_of(arrays)
    if loop == "contiguous":
        gpu_code.run(compiler, form, arch, arrays, scalars, key=KEY ^ STEP_KEY, vectors=2)
    else:
        gpu_code.run_table(compiler, form, arch, [arrays], scalars, memory, key=STEP_KEY, keys=[KEY], vectors=2)
    assert_same(form, arrays, expected, name)


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("arch", BLACKWELL)
def test_8_bit_state_of_any_size_has_the_cpu_backends_bits(compiler, arch):
    case = forms.FORMS["8-bit state"]
    form, scalars = forms.form_and_scalars(case)
    for n in (1, 8 * 160 + 5, 8 * 256, 8 * 300, 8 * 1300 + 3):
        arrays = list(forms.new_arrays(numba_cpu, case, n).values())
        for _ in range(2):
            expected = launched(form, copies(arrays), scalars)
            memory = gpu_code.memory_of(arrays)
            gpu_code.run_table(compiler, form, arch, [arrays], scalars, memory, key=STEP_KEY, keys=[KEY], vectors=2)
            assert_same(form, arrays, expected, f"n={n}")


@pytest.mark.in_short()
@pytest.mark.parametrize("name", few(["float32", "8-bit state"], "float32"))
def test_a_step_that_is_turned_off_zeroes_the_gradient_and_nothing_else(compiler, name):
    case = forms.FORMS[name]
    form, scalars = forms.form_and_scalars(case)
    form = form._replace(skips=True, zero_grad=True)
    arrays = list(forms.new_arrays(numba_cpu, case, 2500).values())
    before = [a.copy() for a in arrays]
    before[1][:] = 0
    memory = gpu_code.memory_of(arrays)
    gpu_code.run_table(compiler, form, "sm_100", [arrays], scalars, memory, True, STEP_KEY, [KEY], skip=1, vectors=2)
    assert_same(form, arrays, before, "skipped")


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_each_vector_and_each_element_has_one_thread(vectors):
    for whole in (0, 1, 63, 64, 70, 1000):
        cut = Split(3, whole, whole + 5)
        several = whole // (32 * vectors) * 32
        assert cut.threads_of(vectors) == several + (whole - several * vectors) + 5


def names_of_forms(*kept):
    return few(forms.FORMS, *kept)


@pytest.mark.in_short("compiler")
@pytest.mark.parametrize("arch", few(in_flight.LIMITS, "sm_100", "sm_107"))
@pytest.mark.parametrize("name", names_of_forms("float32", "8-bit state"))
def test_enough_bytes_are_in_flight_for_the_architecture(compiler, arch, name):
    form, _ = forms.form_and_scalars(forms.FORMS[name])
    for loop in in_flight.LOOPS:
        if loop == "contiguous" and form.arrays.grouped:  # it always goes by a table
            continue
        found = in_flight.in_flight(compiler, form, arch, loop)
        assert found.local_bytes == 0
        least = SHORT.get((compiler, arch, name), 1)
        assert found.bytes >= least * found.needed, (loop, found)


# What is known to have less in flight than is needed, and how large a share it has at least
SHORT = {("cupy", "sm_107", "8-bit state"): 0.6, ("numba-cuda", "sm_107", "8-bit state"): 0.5}
SHORT |= {("numba-cuda", "sm_107", "all bfloat16"): 0.75, ("numba-cuda", "sm_107", "change"): 0.9}


@pytest.mark.in_short()
@pytest.mark.parametrize("name", few((*KEY_FORMS, *OTHER_ALGORITHMS), "adam"))
def test_both_vectors_are_loaded_before_the_first_is_used(compiler, name):
    form, _ = form_and_scalars(name, "float32")
    for loop in in_flight.LOOPS:
        found = in_flight.in_flight(compiler, form, "sm_100", loop, vectors=2)
        assert found.loaded == found.asked == 2 * 16 * (5 if form.amsgrad else 4), (loop, found)


@pytest.mark.exhaustive
def test_the_limit_has_as_many_bytes_in_flight(compiler):
    form, _ = form_and_scalars("adam", "float32")
    sass = gpu_code.machine_code(compiler, form, "sm_107", rule=limit, vectors=2)
    assert gpu_code.loaded_before_use(sass) == 2 * gpu_in_flight.loaded_bytes(form)
