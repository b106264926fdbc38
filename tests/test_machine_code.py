"""The machine code of both GPU backends: bytes moved once and 16 at a time, nothing spilled, the contract's operations."""

import importlib
from collections import Counter

import pytest
from cases import DTYPES, FORMS, KEY_FORMS, OTHER_ALGORITHMS, few, form_and_scalars

gpu_code = pytest.importorskip("gpu_code", exc_type=ImportError)

from gpuadam.kernels import limit, numba_cuda_kernels  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", few(FORMS, *dict.fromkeys((*KEY_FORMS, *OTHER_ALGORITHMS, *list(FORMS)[::3]))))
def test_the_ptx_has_the_contracts_operations_and_no_others(compiler, arch, name, dtype):
    form, _ = form_and_scalars(name, dtype)
    kernel = gpu_code.loaded(gpu_code.ptx(compiler, form, arch))
    assert gpu_code.foreign_operations(kernel, form) == []
    # once for each lane of the vector path, once for the scalar path
    times = 16 // form.dtype.itemsize + 1
    assert gpu_code.rounded_operations(kernel) == {op: times * n for op, n in gpu_code.contract_operations(form).items()}


def test_numba_compiles_a_kernel_as_it_is_looked_at_here(monkeypatch):
    """Where it finds nvJitLink, it would optimise a second time while it links."""
    monkeypatch.setattr(importlib.import_module("numba.cuda.decorators"), "_have_nvjitlink", lambda: True)
    assert gpu_code.cuda.jit(lambda x: None).targetoptions["lto"]
    assert not numba_cuda_kernels.compiled(lambda: lambda x: None).targetoptions["lto"]


@pytest.mark.in_short()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", (*KEY_FORMS, *OTHER_ALGORITHMS))
def test_loads_and_stores_are_16_bytes_and_no_more_than_the_byte_model(compiler, arch, name, dtype):
    form, _ = form_and_scalars(name, dtype)
    accesses = gpu_code.memory_accesses(gpu_code.machine_code(compiler, form, arch))
    n_arrays = 5 if form.amsgrad else 4
    vector = Counter({op: n for op, n in accesses.items() if ".128" in op})
    scalar = accesses - vector
    assert sum(n for op, n in vector.items() if op.startswith("LDG.E.128")) == n_arrays, accesses
    assert sum(n for op, n in vector.items() if op.startswith("STG.E.128")) == n_arrays - 1, accesses
    assert sum(vector.values()) == 2 * n_arrays - 1, accesses
    # the head and the tail: one element a thread
    assert sum(n for op, n in scalar.items() if op.startswith("LDG.E")) == n_arrays, accesses
    assert sum(scalar.values()) == 2 * n_arrays - 1, accesses


@pytest.mark.in_short()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", (*KEY_FORMS, *OTHER_ALGORITHMS))
def test_a_thread_takes_no_local_memory_and_at_most_64_registers(compiler, arch, name, dtype):
    form, _ = form_and_scalars(name, dtype)
    resources = gpu_code.resources(compiler, form, arch)
    assert resources.local_bytes == 0
    assert resources.registers <= 64


def test_strided_kernels_are_free_of_local_memory_and_generic_accesses(compiler, arch):
    form, _ = form_and_scalars("amsgrad", "float32")
    for ndim in (1, 3):
        accesses = gpu_code.memory_accesses(gpu_code.machine_code(compiler, form, arch, ndim))
        assert all(op.startswith(("LDG", "STG")) for op in accesses), accesses
        assert gpu_code.resources(compiler, form, arch, ndim).local_bytes == 0


def test_the_limit_kernel_moves_the_same_bytes(compiler, arch):
    form, _ = form_and_scalars("adam", "float32")
    own, limits = (
        gpu_code.memory_accesses(gpu_code.machine_code(compiler, form, arch, rule=rule)) for rule in (gpu_code.adam, limit)
    )
    assert own == limits
