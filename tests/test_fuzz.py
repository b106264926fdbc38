"""The fuzzer (`fuzz.py`) can fail: it finds mistakes that are planted, and names a small case."""

from unittest import mock

import libraries
import numpy as np
import pytest

libraries.imported("hypothesis")

import fuzz  # noqa: E402
from random_cases import Round  # noqa: E402

from gpuadam import clipping, hyperparameters, step_counts  # noqa: E402

form_and_scalars, clipped = hyperparameters.form_and_scalars, clipping.clipped


def weight_of_v_in_float32(h, step, arrays):
    form, scalars = form_and_scalars(h, step, arrays)
    return form, scalars._replace(w2=float(np.float32(1) - np.float32(h.fixed.beta2)))


def scale_counts_twice(grad_scale, norm, max_norm):
    return clipped(grad_scale, norm * grad_scale, max_norm)


def counts_of_no_parameter_are_set(self, parameters, counts):
    pass


ROUND = Round(formats=(("float32", "float32", None), ("bfloat16", "float16", None)), scaled=True)
MISTAKES = {
    "1 - beta2 is formed in float32": (hyperparameters, "form_and_scalars", weight_of_v_in_float32),
    "clipping takes grad_scale twice": (clipping, "clipped", scale_counts_twice),
    "counts are not loaded": (step_counts.HostCount, "set", counts_of_no_parameter_are_set),
}


@pytest.mark.exhaustive
def test_where_there_is_no_mistake_none_is_found(tmp_path):
    assert fuzz.failure(ROUND, 0, tmp_path) is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, tmp_path):
    with mock.patch.object(*MISTAKES[mistake]):
        _, error = fuzz.failure(ROUND, 0, tmp_path)
    assert "AssertionError" in error


def test_a_seed_gives_the_same_round_and_the_same_case(tmp_path):
    with mock.patch.object(clipping, "clipped", scale_counts_twice):
        first, again = (fuzz.failure(ROUND, 5, tmp_path)[0] for _ in range(2))
    assert repr(first) == repr(again)
