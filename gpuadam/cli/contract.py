"""Steps whose bits are known. By the arithmetic contract they are the same on every backend, architecture and compiler.

Each contract is three steps on 1,024 elements, among them subnormals, infinities and NaN. The two with narrow formats fix the
random bits of rounding too.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from .. import backends, hyperparameters
from ..kernels.operands import GROUP, Arrays, operands_of, widened
from ..kernels.scalars import step_key


class Contract(NamedTuple):
    """The formats of the arrays, and the sha256 of all arrays after the steps, in which every NaN counts as the same NaN.

    options: of `adam_step`, beside those that all contracts have.
    """

    arrays: Arrays
    bits: str
    options: tuple[tuple[str, object], ...] = ()


CONTRACTS = {
    "float32": Contract(Arrays(amsgrad=True), "4a4c65af484148159ed70413351decca443e03fc1168c79a4c4e969173aab242"),
    "all bfloat16": Contract(
        Arrays("bfloat16", "bfloat16", "bfloat16", stochastic=True),
        "538c8b89a1d660c717a3dc7cd580c40131ecaba400afdf97339c641fc9311687",
    ),
    "bounds": Contract(
        Arrays(ema="float32"),
        "a779d122327ad4ce63a84a5e3f8a93a1c5d4f6c86c30898c13bcb5e0f49a211c",
        (("clip_value", 2.0), ("bounds", (-1e-3, 8.0))),
    ),
    "components": Contract(
        Arrays(numbers=2, low="float32"), "4657f964f631b932bce6afe43bd89cd326672091975d38a0126c5af3440094fe"
    ),
    "8-bit state": Contract(Arrays(state="8bit"), "fd5cb12bc6504cdc0ee018c5aed8b85a3e5efa035b1a5f998f95bbae4eabeb1d"),
}
ODD = (2654435761, 2246822519, 3266489917, 668265263, 374761393)
NAN = {"float32": 0x7FC00000, "bfloat16": 0x7FC0}
INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80}


def digest_on(name, contract):
    """Do the steps on a backend and return the sha256 of what they leave."""
    kernels = backends.load(name)
    arrays, operands = [kernels.from_host(a) for a in arrays_of(contract)], operands_of(contract.arrays)
    views = [kernels.view("", a).in_vectors(o.numbers) for a, o in zip(arrays, operands, strict=True)]
    for form, scalars, key in steps_of(contract):
        kernels.launch(form, views, scalars, key=key)
    return digest_of(contract, [kernels.to_host(a) for a in arrays])


def steps_of(contract):
    """Return (Form, Scalars, key for random rounding) of the three steps."""
    h = hyperparameters.checked(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True, maximize=True, grad_scale=0.7,
        **dict(contract.options),
    )  # fmt: skip
    return [(*hyperparameters.form_and_scalars(h, step, contract.arrays), step_key(0, step)) for step in (1, 2, 3)]


def arrays_of(contract, n=1024):
    """Return the arrays before the first step, in the order of the operands, the same on every machine. bfloat16 is in uint16.

    They hold every kind of number, but 8-bit state is zero. Most gradients beside 8-bit state are from 2**-15 to 2, because one
    that is infinite, or has an infinite square, makes all of its group NaN. The numbers of an element are in a last dimension.
    """
    arrays = []
    for k, operand in enumerate(operands_of(contract.arrays)):
        if contract.arrays.grouped and operand.name not in ("param", "grad"):
            arrays.append(np.zeros(n // GROUP if operand.of_groups else n, operand.format))
            continue
        # multiples of odd constants run through all bit patterns evenly (Knuth's multiplicative hashing)
        bits = np.arange(1, n * operand.numbers + 1, dtype="u4") * np.uint32(ODD[k])
        if operand.name in ("v", "max_v"):
            bits >>= np.uint32(1)
        if contract.arrays.grouped and operand.name == "grad":
            bits[n // 4 :] = bits[n // 4 :] & np.uint32(0x87FFFFFF) | np.uint32(0x38000000)
        if operand.format == "bfloat16":
            bits = (bits >> np.uint32(16)).astype("u2")
        bits[k * 8 : k * 8 + 4] = [0, INFINITY[operand.format], 1, NAN[operand.format]]
        numbers = bits if operand.format == "bfloat16" else bits.view(operand.format)
        arrays.append(numbers.reshape(n, operand.numbers) if operand.numbers > 1 else numbers)
    return arrays


def digest_of(contract, arrays):
    """Return the sha256 of arrays in the order of the operands. Every NaN counts as the same NaN."""
    digest = hashlib.sha256()
    for operand, array in zip(operands_of(contract.arrays), arrays, strict=True):
        bits = array.view(f"u{array.itemsize}")
        if operand.format in NAN:
            bits = np.where(np.isnan(widened(array, operand.format)), bits.dtype.type(NAN[operand.format]), bits)
        digest.update(bits.astype(f"<u{array.itemsize}").tobytes())
    return digest.hexdigest()
