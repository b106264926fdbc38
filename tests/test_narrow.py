"""Arrays of narrow and of mixed formats: one set of bits on every backend, which is the float32 update, rounded."""

from typing import Any

import narrow_model as model
import numpy as np
import pytest
from cases import few, form_and_scalars
from launched import KEY, STEP_KEY, assert_same, assert_same_in_any_split, copies, launched, names_of, placed

from gpuadam.kernels import gpu_table, limit
from gpuadam.kernels.operands import Arrays, bytes_per_element, lanes_of, operands_of_form

# name: (formats, options of the step)
COMBINATIONS: dict[str, tuple[Arrays, dict[str, Any]]] = {
    "bfloat16": (Arrays("bfloat16", "bfloat16"), {}),
    "float16": (Arrays("float16", "float16"), {"grad_scale": 0.3}),
    "bfloat16 grads": (Arrays("float32", "bfloat16"), {"zero_grad": True}),
    "float16 grads": (Arrays("float32", "float16", amsgrad=True), {"weight_decay": 0.1, "decoupled": True}),
    "all bfloat16, randomly": (
        Arrays("bfloat16", "bfloat16", "bfloat16", amsgrad=True, stochastic=True),
        {"weight_decay": 0.1, "zero_grad": True},
    ),
    "bfloat16, randomly": (Arrays("bfloat16", "float32", stochastic=True), {}),
    "float16, randomly": (Arrays("float16", "float16", stochastic=True), {"weight_decay": 0.1, "decoupled": True}),
    "remainder": (Arrays("bfloat16", "bfloat16", remainder=True), {}),
    "bfloat16 copy": (Arrays(param_copy="bfloat16"), {}),
    "float32 copy": (Arrays("float16", "float32", param_copy="float32", stochastic=True), {}),
    "float64 copy": (Arrays("float32", "float32", param_copy="float64"), {}),
    "ema": (Arrays(ema="float32"), {"ema_decay": 0.3}),
    "ema in float64": (Arrays("bfloat16", "float16", ema="float64"), {}),
    "float64 params, float16 grads": (Arrays("float64", "float16", "float64", param_copy="float16", ema="float64"), {}),
    "float64 state": (Arrays("float32", "bfloat16", "float64"), {"betas": (0.2, 0.3)}),
    "float64 grads": (Arrays("bfloat16", "float64", "bfloat16", stochastic=True), {"zero_grad": True}),
    "nadam": (Arrays("bfloat16", "bfloat16", "bfloat16", ema="float32"), {"algorithm": "nadam"}),
    "radam": (Arrays("float16", "bfloat16", "bfloat16", stochastic=True), {"algorithm": "radam", "step": 8}),
    "adamax": (Arrays("bfloat16", "float16", "bfloat16", remainder=True), {"algorithm": "adamax"}),
    "change": (Arrays(change="float32", amsgrad=True), {"weight_decay": 0.1, "decoupled": True}),
    "change alone": (Arrays(change="float32"), {}),
    "narrow change": (Arrays("bfloat16", "float32", "bfloat16", change="bfloat16"), {"bounds": (-0.5, 1.0)}),
    "lr_scale": (Arrays(lr_scale="float32"), {"weight_decay": 0.1}),
    "where": (Arrays(ema="float32", where="array"), {"zero_grad": True}),
    "nonzero": (Arrays("bfloat16", "bfloat16", "bfloat16", where="nonzero"), {"algorithm": "adamax"}),
    "change, lr_scale and where": (
        Arrays("float16", "bfloat16", "bfloat16", change="float16", lr_scale="float32", where="array"),
        {"weight_decay": 0.1, "decoupled": True, "clip_value": 0.5},
    ),
    "float64 with change, lr_scale and nonzero": (
        Arrays("float64", "float64", "float64", change="float32", lr_scale="float64", where="nonzero"),
        {"bounds": (None, 0.5)},
    ),
    "everything": (
        Arrays(
            "bfloat16",
            "float16",
            "bfloat16",
            True,
            remainder=True,
            param_copy="float16",
            ema="float32",
            lr_scale="float32",
            where="array",
        ),
        {"zero_grad": True, "weight_decay": 0.1, "decoupled": True, "grad_scale": 3.0, "betas": (0.2, 0.4)},
    ),
}

RANDOM = [name for name, (arrays, _) in COMBINATIONS.items() if arrays.random]
# Left for the long run: others have their formats and options between them
ALIKE = (
    "float16", "bfloat16 grads", "bfloat16, randomly", "float32 copy", "float64 copy", "ema", "float64 state", "float64 grads",
    "radam", "change", "narrow change", "lr_scale",
)  # fmt: skip
NAMES = few(COMBINATIONS, *(name for name in COMBINATIONS if name not in ALIKE))
# Of several item sizes, with and without random rounding, 8 lanes: these stand for all where code repeats
KEY_COMBINATIONS = ("all bfloat16, randomly", "float16 grads", "everything")


def form_of(name, **changes):
    arrays, options = COMBINATIONS[name]
    return form_and_scalars("adam", arrays, **(options | changes))


def given(form, n, seed=0, ordinary=False):
    """Return arrays in the order of the operands: of the whole range of each format, or of usual size."""
    rng = np.random.default_rng(seed)
    positive = ("v", "max_v")
    if ordinary:
        made = [np.abs(x) if o.name in positive else x for o in operands_of_form(form) for x in [rng.standard_normal(n)]]
        return [x.astype(model.DTYPES[o.format]) for x, o in zip(made, operands_of_form(form), strict=True)]
    return [model.wide(o.format, n, rng, signed=o.name not in positive) for o in operands_of_form(form)]


def modelled(form, arrays, scalars, start=0):
    """Return the update as documented: decoded, updated by the kernel of the compute type alone, and rounded."""
    old, formats = dict(zip(names_of(form), arrays, strict=True)), form.arrays
    compute, n = form.dtype, arrays[0].size
    param = model.whole(old["param"], old["remainder"]) if formats.remainder else old["param"]
    taken = {name: old[name] for name in ("param", "grad", "m", "v", "max_v", "ema", "change", "lr_scale") if name in old}
    with np.errstate(invalid="ignore"):
        # exact: no format is wider than what is computed with
        by_name = {name: a.astype(compute) for name, a in (taken | {"param": param}).items()}
    by_name |= {"where": old["where"]} if "where" in old else {}
    wide = {name: compute.name for name in ("ema", "change", "lr_scale") if name in old}
    wide = Arrays(compute.name, compute.name, compute.name, formats.amsgrad, where=formats.where, **wide)
    launched(form._replace(arrays=wide, zero_grad=False), list(by_name.values()), scalars)
    by_name["param_copy"] = by_name["param"]
    h = model.random_bits(np.arange(start, start + n), KEY ^ STEP_KEY)
    found = []
    for operand in operands_of_form(form):
        name, format = operand.name, operand.format
        if name in ("lr_scale", "where") or (name == "param" and formats.change):
            found.append(old[name])
        elif name == "grad":
            found.append(np.zeros_like(old["grad"]) if form.zero_grad else old["grad"])
        elif formats.remainder and name in ("param", "remainder"):
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                high, low = model.parts(by_name["param"].astype(np.float32))
            found.append(high if name == "param" else low)
        else:
            random = name in ("m", "v", "max_v") or (name == "param" and formats.stochastic)
            found.append(model.stored(by_name[name], format, name, h if random else None))
    return found


# The CPU backend


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_that_of_the_decoded_numbers_rounded(name):
    for eps in (0.0, 1e-20, 1e-8):
        form, scalars = form_of(name, eps=eps)
        for ordinary in (False, True):
            arrays = given(form, 5003, seed=1, ordinary=ordinary)
            expected = modelled(form, arrays, scalars)
            assert_same(form, launched(form, arrays, scalars), expected, f"eps={eps}")


@pytest.mark.parametrize("name", few(["all bfloat16, randomly", "everything"], "everything"))
def test_serial_parallel_in_pieces_and_strided_give_the_same_bits(name):
    form, scalars = form_of(name)
    arrays = given(form, 70_001, seed=2)
    expected = modelled(form, arrays, scalars)
    assert_same_in_any_split(form, arrays, scalars, expected)
    own = [np.repeat(a, 2)[::2] for a in arrays]
    assert_same(form, launched(form, own, scalars), expected, "strided")


@pytest.mark.parametrize("name", RANDOM)
def test_an_update_in_two_pieces_equals_the_whole(name):
    form, scalars = form_of(name)
    arrays = given(form, 1003, seed=3)
    expected = launched(form, copies(arrays), scalars)
    for cut in (1, 500):
        own = copies(arrays)
        launched(form, [a[:cut] for a in own], scalars)
        launched(form, [a[cut:] for a in own], scalars, start=cut)
        assert_same(form, own, expected, f"cut at {cut}")


@pytest.mark.parametrize("start", [2**32 - 5, 2**32, 3 * 2**32 - 1000, 2**40 + 7])
def test_the_random_bits_go_on_beyond_an_index_of_2_32(start):
    form, scalars = form_of("all bfloat16, randomly")
    arrays = given(form, 1003, ordinary=True)
    expected = modelled(form, arrays, scalars, start)
    wrapped = launched(form, copies(arrays), scalars, start % 2**32)
    assert_same(form, launched(form, arrays, scalars, start), expected)
    first_above = max(0, 2**32 - start)
    assert model.different(arrays[0][first_above:], wrapped[0][first_above:]) > (0 if start % 2**32 != start else -1)


LAYOUTS = {
    "F order": lambda a: np.asfortranarray(a),
    "transposed": lambda a: a.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    "strided": lambda a: np.repeat(a, 3, axis=2)[:, :, ::3],
    "reversed": lambda a: a[::-1, :, ::-1].copy()[::-1, :, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_elements_random_bits_are_those_of_its_place_in_c_order(layout):
    form, scalars = form_of("all bfloat16, randomly")
    arrays = [a.reshape(5, 20, 7) for a in given(form, 700, ordinary=True)]
    expected = launched(form, copies(arrays), scalars)
    own = [LAYOUTS[layout](a) for a in arrays]
    assert not own[0].flags.c_contiguous
    assert_same(form, launched(form, own, scalars), expected)
    mixed = [LAYOUTS[layout](a) if k % 2 else a.copy() for k, a in enumerate(arrays)]
    assert_same(form, launched(form, mixed, scalars), expected)


@pytest.mark.parametrize("name", RANDOM)
def test_another_parameter_and_another_step_are_rounded_by_other_bits(name):
    form, scalars = form_of(name)
    arrays = given(form, 1003, ordinary=True)
    results = [
        launched(form, copies(arrays), scalars, key=key, step_key=step_key)
        for key, step_key in ((KEY, STEP_KEY), (KEY + 1, STEP_KEY), (KEY, STEP_KEY + 1), (KEY + 2**40, STEP_KEY))
    ]
    for other in results[1:]:
        for k, operand in enumerate(operands_of_form(form)):
            changed = model.different(results[0][k], other[k])
            # a parameter moves by less than its last bit, so that many are rounded back whatever the bits
            assert (changed > 50) if operand.random_bits_from is not None else changed == 0, operand.name


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 copy", "remainder", "ema"])
def test_what_is_not_rounded_randomly_takes_no_key(name):
    form, scalars = form_of(name)
    arrays = given(form, 303)
    expected = launched(form, copies(arrays), scalars, key=0, step_key=0)
    assert_same(form, launched(form, arrays, scalars), expected)


# The compiled code of the GPU backends

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

BOTH = ["cupy", "numba-cuda"]
gpu_compilers = pytest.mark.parametrize("compiler", BOTH)


def bytes_of(form, n):
    """Return the bytes that an update loads and stores."""
    loaded = sum(o.itemsize * n for o in operands_of_form(form) if o.loads)
    stored = sum(o.itemsize * n for o in operands_of_form(form) if o.stores)
    return loaded, stored


@pytest.mark.in_short()
@gpu_compilers
@pytest.mark.parametrize("name", NAMES)
def test_gpu_code_gives_the_cpus_bits_and_moves_each_byte_once(compiler, name):
    for eps in (0.0, 1e-8):
        form, scalars = form_of(name, eps=eps)
        arrays = given(form, 1003, seed=4)
        expected = launched(form, copies(arrays), scalars)
        kernel = gpu_code.run(compiler, form, "sm_90", arrays, scalars, key=KEY ^ STEP_KEY)
        assert_same(form, arrays, expected, f"eps={eps}")
        assert (kernel.loaded_bytes, kernel.stored_bytes) == bytes_of(form, 1003)
        assert sum(bytes_of(form, 1003)) == bytes_per_element(form) * 1003


@gpu_compilers
def test_the_limit_moves_the_bytes_of_arrays_that_are_only_read_too(compiler):
    formats = Arrays(lr_scale="float32", where="array", low="float32", high="float32")
    form, scalars = form_and_scalars("adam", formats, bounds=(-2.0, 2.0))
    arrays = [np.ones(1003, model.DTYPES[operand.format]) for operand in operands_of_form(form)]
    kernel = gpu_code.run(compiler, form, "sm_90", arrays, scalars, rule=limit)
    assert (kernel.loaded_bytes, kernel.stored_bytes) == bytes_of(form, 1003)
    assert all((array == 1).all() for array in arrays)


@pytest.mark.in_short()
@pytest.mark.parametrize(
    "compiler, arch, name",
    [
        *(("cupy", "sm_75", name) for name in KEY_COMBINATIONS),
        *(("cupy-cuda12", "sm_120", name) for name in KEY_COMBINATIONS),
        ("numba-cuda", "sm_80", "all bfloat16, randomly"),
        ("numba-cuda", "sm_120", "everything"),
    ],
)
def test_so_it_does_on_other_architectures(compiler, arch, name):
    form, scalars = form_of(name)
    arrays = given(form, 1003, seed=5)
    expected = launched(form, copies(arrays), scalars)
    gpu_code.run(compiler, form, arch, arrays, scalars, key=KEY ^ STEP_KEY)
    assert_same(form, arrays, expected)


# by the number of an array; arrays of the same offset in elements have 16-byte boundaries at the same elements
SHARED = {f"after {k}": lambda _, k=k: k for k in (0, 1, 3, 6)}
OFFSETS = SHARED | {"unshared": lambda k: k, "the second apart": lambda k: int(k == 1)}


@gpu_compilers
@pytest.mark.parametrize("name", KEY_COMBINATIONS)
def test_every_start_and_size_touches_its_own_bytes_alone(compiler, name):
    form, scalars = form_of(name)
    for n in (*range(21), 1003):
        arrays = given(form, n, seed=n)
        expected = launched(form, copies(arrays), scalars)
        for where, offset in OFFSETS.items():
            own, arena, inside = placed(form, arrays, offset)
            kernel = gpu_code.run(compiler, form, "sm_90", own, scalars, key=KEY ^ STEP_KEY)
            assert_same(form, own, expected, f"n={n}, {where}")
            assert (arena[~inside] == 0xA5).all(), f"n={n}, {where}: bytes between the arrays were written"
            assert (kernel.loaded_bytes, kernel.stored_bytes) == bytes_of(form, n)


@gpu_compilers
@pytest.mark.parametrize("start", [5, 2**32 - 500, 2**40])
def test_gpu_code_counts_elements_from_where_it_is_told(compiler, start):
    form, scalars = form_of("all bfloat16, randomly")
    arrays = given(form, 1003, ordinary=True)
    expected = modelled(form, arrays, scalars, start)
    own, *_ = placed(form, arrays, lambda k: 3)
    gpu_code.run(compiler, form, "sm_90", own, scalars, key=KEY ^ STEP_KEY, start=start)
    assert_same(form, own, expected, "contiguous")
    own = [np.repeat(a, 2)[::2] for a in arrays]
    gpu_code.run_strided(compiler, form, "sm_90", own, scalars, key=KEY ^ STEP_KEY, start=start)
    assert_same(form, own, expected, "strided")


@gpu_compilers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_code_counts_elements_of_any_layout_in_c_order(compiler, layout):
    form, scalars = form_of("all bfloat16, randomly")
    arrays = [a.reshape(5, 20, 7) for a in given(form, 700, ordinary=True)]
    expected = launched(form, copies(arrays), scalars)
    for every in (1, 2):
        own = [a.copy() if k % every else LAYOUTS[layout](a) for k, a in enumerate(arrays)]
        gpu_code.run_strided(compiler, form, "sm_90", own, scalars, key=KEY ^ STEP_KEY)
        assert_same(form, own, expected)


@gpu_compilers
@pytest.mark.parametrize("name", ["remainder", "float64 params, float16 grads"])
def test_strided_arrays_of_several_item_sizes_are_updated_where_they_lie(compiler, name):
    form, scalars = form_of(name)
    arrays = given(form, 315)
    expected = launched(form, copies(arrays), scalars)
    wholes = [np.full(3 * a.size, 42).astype(a.dtype) for a in arrays]
    own = [whole[k % 3 :: 3] for k, whole in enumerate(wholes)]
    for view, a in zip(own, arrays, strict=True):
        view[:] = a
    gpu_code.run_strided(compiler, form, "sm_90", own, scalars)
    assert_same(form, own, expected)
    for k, whole in enumerate(wholes):
        assert all((whole[j::3] == 42).all() for j in range(3) if j != k % 3)


@pytest.mark.in_short()
@gpu_compilers
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "scalars in memory"])
@pytest.mark.parametrize("name", KEY_COMBINATIONS[1:])
def test_arrays_in_a_table_get_the_bits_that_each_gets_alone(compiler, name, on_device):
    form, scalars = form_of(name)
    keys = [KEY, 7, -9, 2**50, 0, 1, 2]
    chunk = gpu_table.CHUNK * lanes_of(form)
    for where in ("after 0", "after 3", "unshared"):
        updates = [given(form, n, seed=n) for n in (1, 7, 16, 1003, chunk - 1, chunk + 9, 30)]
        expected = [launched(form, copies(a), scalars, key=key) for a, key in zip(updates, keys, strict=True)]
        there = [placed(form, arrays, OFFSETS[where]) for arrays in updates]
        spans = gpu_code.memory_of([arena for _, arena, _ in there])
        memory = [(min(start for start, _ in spans), max(end for _, end in spans))]
        own = [arrays for arrays, *_ in there]
        gpu_code.run_table(compiler, form, "sm_90", own, scalars, memory, on_device, STEP_KEY, keys)
        for (arrays, arena, inside), wanted in zip(there, expected, strict=True):
            assert_same(form, arrays, wanted, f"{where}, n={arrays[0].size}")
            assert (arena[~inside] == 0xA5).all(), where


@gpu_compilers
def test_a_table_has_the_number_of_each_first_element(compiler, monkeypatch):
    form, scalars = form_of("bfloat16, randomly")
    arrays = given(form, 1003, ordinary=True)
    expected = launched(form, copies(arrays), scalars)
    correct = gpu_table.rows_and_owners

    def with_starts(updates, *rest):
        return correct([updates[0], updates[1]._replace(start=500)], *rest)

    monkeypatch.setattr(gpu_table, "rows_and_owners", with_starts)
    own = [a[:500] for a in arrays], [a[500:] for a in arrays]
    gpu_code.run_table(compiler, form, "sm_90", own, scalars, gpu_code.memory_of(arrays), False, STEP_KEY, [KEY, KEY])
    assert_same(form, arrays, expected)


@gpu_compilers
def test_a_skipped_step_changes_nothing_but_the_gradient(compiler):
    form, scalars = form_of("everything")
    form = form._replace(skips=True)
    arrays = given(form, 1003)
    before = copies(arrays)
    before[1][:] = 0
    gpu_code.run_table(compiler, form, "sm_90", [arrays], scalars, gpu_code.memory_of(arrays), True, STEP_KEY, [KEY], skip=1)
    assert_same(form, arrays, before)


# Machine code

THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_120": 1536}  # of a multiprocessor; each has 65,536 registers
IN_FLIGHT = 32 * 1024  # bytes that a multiprocessor has to wait for at once for its share of an H100's memory


# one of each kind of access, those of the most arrays, and those that are computed in float64
ON_SM_90 = (
    "bfloat16", "float16 grads", "all bfloat16, randomly", "float16, randomly", "remainder", "bfloat16 copy",
    "ema in float64", "float64 params, float16 grads", "everything",
)  # fmt: skip
IN_SHORT = ("bfloat16", "all bfloat16, randomly", "everything")
MACHINE_CODE = [pytest.param(name, "sm_90", marks=[pytest.mark.exhaustive] * (name not in IN_SHORT)) for name in ON_SM_90]
MACHINE_CODE += [(name, arch) for name in IN_SHORT[1:] for arch in ("sm_80", "sm_120")]


@pytest.mark.in_short()
@gpu_compilers
@pytest.mark.parametrize("name, arch", MACHINE_CODE)
def test_a_thread_moves_16_bytes_at_a_time_and_enough_are_on_their_way(compiler, name, arch):
    form, _ = form_of(name)
    found, lanes = gpu_code.memory_accesses(gpu_code.machine_code(compiler, form, arch)), lanes_of(form)
    for kind, moved in (
        ("LDG", [o for o in operands_of_form(form) if o.loads]),
        ("STG", [o for o in operands_of_form(form) if o.stores]),
    ):
        of_16 = sum(n for op, n in found.items() if op.startswith(f"{kind}.E.128"))
        single = sum(n for op, n in found.items() if op.startswith(f"{kind}.E") and ".128" not in op)
        assert of_16 == sum(o.itemsize * lanes // 16 for o in moved), found
        short = sum(o.itemsize * lanes < 16 for o in moved)  # a vector of flags
        assert single == len(moved) + short, found  # the head and the tail: one element a thread
    assert all(op.startswith(("LDG.E", "STG.E")) for op in found), found
    registers, local_bytes = gpu_code.resources(compiler, form, arch)
    assert local_bytes == 0
    blocks = min(65536 // (-(-registers // 8) * 8 * gpu_code.BLOCK), THREADS[arch] // gpu_code.BLOCK)
    loaded = sum(o.itemsize * lanes for o in operands_of_form(form) if o.loads)
    assert blocks * gpu_code.BLOCK * loaded >= IN_FLIGHT, registers


def conversions(form):
    """Return the instructions that convert between floats, each of which is documented, and no others."""
    found = set()
    for operand in operands_of_form(form):
        random = operand.random_bits_from is not None
        if operand.format == "float16":
            found |= {"cvt.f32.f16"} if operand.loads else set()
            found |= {"cvt.rn.f16.f32"} if operand.stores and operand.name != "grad" and not random else set()
        if form.dtype == np.float64 and operand.itemsize < 8:
            found |= {"cvt.f64.f32"} if operand.loads else set()
            found |= {"cvt.rn.f32.f64"} if operand.stores and operand.name != "grad" else set()
        if form.dtype == np.float32 and operand.format == "float64":  # a copy
            found |= {"cvt.f64.f32"}
    return found


@pytest.mark.in_short()
@gpu_compilers
@pytest.mark.parametrize("name", NAMES)
def test_the_ptx_has_the_contracts_operations_and_the_documented_conversions(compiler, name):
    form, _ = form_of(name)
    kernel = gpu_code.loaded(gpu_code.ptx(compiler, form, "sm_90"))
    assert not any("ftz" in opcode or "approx" in opcode for opcode in kernel.opcodes)
    # once for each lane of the vector path, once for the scalar path
    times = lanes_of(form) + 1
    wanted = {op: times * n for op, n in gpu_code.contract_operations(form).items()}
    assert gpu_code.rounded_operations(kernel) == wanted
    floats = {"f16", "f32", "f64", "bf16"}
    converts = {op for op in kernel.opcodes if op.startswith("cvt") and floats & set(op.split("."))}
    flags = {"cvt.rn.f32.u32", "cvt.rn.f32.u16"} if form.arrays.where == "array" else set()  # as a compiler likes
    assert converts - flags == conversions(form)
    if form.dtype == np.float32 and "float64" not in form.arrays:
        assert not any("f64" in op for op in kernel.opcodes)
