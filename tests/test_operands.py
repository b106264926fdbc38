"""The operands of an update, and how their values are made and stored."""

import itertools

import pytest

from gpuadam.kernels.adam import Form
from gpuadam.kernels.conversions import CONVERSIONS
from gpuadam.kernels.operands import KINDS, RESULTS, VALUES, Arrays, decodings, operands_of

FORMATS = [
    Arrays(*formats, remainder=formats[0] == "bfloat16" and not stochastic, stochastic=stochastic, **options)
    for formats in itertools.product(
        ("float32", "bfloat16", "float16"), ("float32", "float16"), ("float32", "bfloat16", "8bit")
    )
    for stochastic in (False, True)
    for options in ({}, {"param_copy": "float16", "ema": "float32"}, {"amsgrad": formats[2] != "8bit"})
]


@pytest.mark.parametrize("zero_grad", [False, True])
def test_operands_are_in_the_order_of_their_kinds_and_have_one_of_their_formats(zero_grad):
    for arrays in [*FORMATS, Arrays("float64", "float64", "float64", amsgrad=True)]:
        operands = operands_of(arrays, zero_grad)
        names = [operand.name for operand in operands]
        assert names == [name for name in KINDS if name in names] and names[:4] == ["param", "grad", "m", "v"]
        for operand in operands:
            assert operand.format in KINDS[operand.name].formats and operand.of_groups == KINDS[operand.name].of_groups
            assert operand.stores == (operand.name != "grad" or zero_grad)


def test_all_that_is_decoded_and_encoded_is_a_conversion_of_as_many_numbers():
    for arrays in FORMATS:
        operands = {operand.name: operand for operand in operands_of(arrays)}
        for value, (row, names) in decodings(Form(arrays)).items():
            assert value in VALUES and len(names) == (len(CONVERSIONS[row].operands) if row else 1)
            assert all(name in operands and operands[name].loads for name in names if not name.endswith("_unit"))
        for operand in operands.values():
            random = operand.random_bits_from is not None
            assert operand.value in ("", *RESULTS)
            assert not operand.encoding or len(CONVERSIONS[operand.encoding].operands) == 1 + random
            assert random == operand.encoding.endswith("_randomly")


def test_no_two_operands_are_rounded_by_the_same_upper_bytes():
    arrays = Arrays("bfloat16", "bfloat16", "bfloat16", amsgrad=True, stochastic=True)
    upper = [(operand.random_bits_from + 8) % 32 for operand in operands_of(arrays) if operand.random_bits_from is not None]
    assert sorted(upper) == [0, 8, 16, 24]
