"""Other Adams for CuPy arrays that benchmarks measure beside gpuadam, as far as no GPU is needed."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers

from gpuadam import backends

OF_CUPY = ("CUB's transform", "thinc", "one element a thread", "plain CuPy")
SHAPES = [(7,), (3, 5)]


def test_libraries_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "cuda" else None)
    present, absent = peers.chosen(SimpleNamespace(name="cupy", memory="CUDA"), OF_CUPY)
    assert not present
    assert absent["thinc"] == "thinc is not installed"
    assert "pip install 'cuda-cccl[cu13]'" in absent["CUB's transform"]


def test_on_another_backend_they_name_the_one_whose_arrays_they_take():
    present, absent = peers.chosen(SimpleNamespace(name="numba-cuda", memory="CUDA"), OF_CUPY)
    assert not present
    assert set(absent) == set(OF_CUPY)
    assert all("backend cupy" in why for why in absent.values())


def by_hand(param, grad, m, v):
    """Return (param, m, v) after the update that chainer and thinc have, in float64."""
    m = m + (1 - peers.BETAS[0]) * (grad - m)
    v = v + (1 - peers.BETAS[1]) * (grad * grad - v)
    return param - peers.LR * m / (np.sqrt(v) + peers.EPS), m, v


def test_the_function_of_an_element_is_that_update():
    element = tuple(np.float32([0.5, -0.25, 0.125, 0.75]))
    found, expected = peers.numbers_of_an_element()(element), by_hand(*map(float, element))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture
def arrays(cp, monkeypatch):
    """The arrays of the contender that is built last, on CuPy."""
    made, own_arrays = [], peers.own_arrays
    monkeypatch.setattr(peers, "own_arrays", lambda *given: made.append(own_arrays(*given)) or made[-1])
    return lambda: [[array.get() for array in row] for row in made[-1]]


def unary_transform_of(asked):
    """Return a module with as much of cuda.compute as is used, which keeps what it was asked."""

    class ZipIterator:
        def __init__(self, *arrays):
            self.arrays = arrays

    def make_unary_transform(*, d_in, d_out, op, compute_capability=None):
        def transform(*, d_in, d_out, op, num_items, stream=None):
            asked.append((num_items, stream))
            columns = [array.get() for array in d_in.arrays]
            rows = [op(element) for element in zip(*columns, strict=True)]
            assert len(rows) == num_items
            for array, column in zip(d_out.arrays, zip(*rows, strict=True), strict=True):
                array.set(np.float32(column))

        return transform

    module = ModuleType("cuda.compute")
    module.ZipIterator, module.make_unary_transform = ZipIterator, make_unary_transform
    return module


@pytest.mark.gpu
def test_cubs_transform_updates_each_array_on_the_current_stream(cp, arrays, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "cuda.compute", unary_transform_of(asked))
    contender = peers.cub_transform(backends.load("cupy"), SHAPES)
    before = arrays()
    contender.step()
    for (param, grad, m, v), was in zip(arrays(), before, strict=True):
        for one, other in zip((param, m, v), by_hand(*was), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        assert (grad == was[1]).all()
    assert [n for n, _ in asked] == [7, 15] and all(stream.ptr == cp.cuda.get_current_stream().ptr for _, stream in asked)


def test_cuda_compute_has_the_arguments_that_are_given():
    (row,) = (peer for peer in peers.PEERS if peer.name == "CUB's transform")
    if problem := row.problem("CUDA"):
        pytest.skip(problem)
    compute = importlib.import_module("cuda.compute")
    assert {"d_in", "d_out", "op"} <= set(inspect.signature(compute.make_unary_transform).parameters)
    assert {"d_in", "d_out", "op", "num_items", "stream"} <= set(inspect.signature(compute.unary_transform).parameters)


@pytest.mark.gpu
def test_one_element_a_thread_is_the_update_by_hand(arrays):
    contender = peers.one_element_a_thread(backends.load("cupy"), SHAPES)
    before = arrays()
    contender.step()
    for (param, _, m, v), was in zip(arrays(), before, strict=True):
        for one, other in zip((param, m, v), by_hand(*was), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.gpu
def test_plain_cupy_has_gpuadams_numbers(arrays):
    kernels = backends.load("cupy")
    theirs = peers.plain("cupy")(kernels, SHAPES)
    for _ in range(3):
        theirs.step()
    expected = arrays()
    ours = peers.adam_step(kernels, SHAPES)
    for _ in range(3):
        ours.step()
    for found, wanted in zip(arrays(), expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)
