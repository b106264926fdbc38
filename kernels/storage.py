"""How the arrays of an update lie in memory: their formats, and how numbers of a format become numbers to compute with and back.

An update has *operands*, the arrays that its kernel touches, and *values*, the numbers of one element that its rule takes and
gives. Most operands hold one value each. `param` and `remainder` hold one between them, `param_copy` holds param once more.

A loop knows neither: it asks for `load(at, i)`, the values of an element, and `store(at, i, values, ...)`, which
`for_numba` and `for_cuda_c` write from a Form. `at` are the addresses of the operands, in the order of `operands`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpuadam.kernels.layout import VECTOR_BYTES
from gpuadam.kernels.primitives import CONVERSIONS, conversions_for_cuda_c, nvvm_rn

# name: bytes of an element
FORMATS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}

# The state format "8bit": m and v are codes of a byte, and neighbours in C order share their scales.
GROUP = 32
GROUP_LANES = 8  # elements of a group that a thread of a GPU takes; 16 would take too many registers

# What a rule takes, in its order; it gives all but grad.
VALUES = ("param", "grad", "m", "v", "max_v", "ema")


# Where a rule's results have the state. Of 8-bit state it gives the root of v in max_v's place.
STATE = {"m": 1, "v": 2, "max_v": 3}


class Operand(NamedTuple):
    """An array that a kernel touches."""

    name: str
    format: str
    loads: bool = True
    stores: bool = True
    of_groups: bool = False  # it has an element for each group, not for each of param's

    @property
    def itemsize(self):
        return FORMATS[self.format]


class Arrays(NamedTuple):
    """The formats of an update's arrays; an empty one means that there is no such array."""

    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"  # of m, v and max_v; or "8bit"
    amsgrad: bool = False
    remainder: bool = False  # param is bfloat16, and with 16 bits more in another array an exact float32
    param_copy: str = ""  # the new param, rounded, is stored here too
    ema: str = ""  # the running mean of param
    stochastic: bool = False  # a narrow param is rounded randomly

    @property
    def compute(self):
        """The type that is computed with: float64 if one of the arrays is, else float32."""
        return np.dtype("float64" if "float64" in self else "float32")

    @property
    def grouped(self):
        """Whether there are groups of neighbours in C order that share scales."""
        return self.state == "8bit"

    @property
    def random(self):
        """Whether a number is rounded randomly, by its place in C order. Narrow state always is: it would not move otherwise."""
        return self.grouped or any(is_random(self, operand) for operand in operands(self))


@functools.lru_cache(maxsize=256)
def operands(arrays, zero_grad=False):
    """Return the Operands of an update, in the order in which kernels take them."""
    found = [
        Operand("param", arrays.param),
        Operand("grad", arrays.grad, stores=zero_grad),
        Operand("m", "uint8" if arrays.grouped else arrays.state),
        Operand("v", "uint8" if arrays.grouped else arrays.state),
    ]
    if arrays.amsgrad:
        found.append(Operand("max_v", arrays.state))
    if arrays.remainder:
        found.append(Operand("remainder", "int16"))
    if arrays.param_copy:
        found.append(Operand("param_copy", arrays.param_copy, loads=False))
    if arrays.ema:
        found.append(Operand("ema", arrays.ema))
    if arrays.grouped:
        found += [Operand("m_scale", "float32", of_groups=True), Operand("v_scale", "float32", of_groups=True)]
    return tuple(found)


def of_form(form):
    return operands(form.arrays, form.zero_grad)


def widened(array, format):
    """Return an array of NumPy or CuPy as one that they can widen: a bfloat16's bits are the upper half of a float32's."""
    return (array.view("uint16").astype("uint32") << 16).view("float32") if format == "bfloat16" else array


def lanes(form):
    """Return how many elements a thread of a GPU takes at once: 16 bytes of the narrowest array, but 8 codes of 8-bit state."""
    if form.arrays.grouped:
        return GROUP_LANES
    return VECTOR_BYTES // min(operand.itemsize for operand in of_form(form))


def bytes_moved(form):
    """Return the bytes that an update reads and writes of each element."""
    n_bytes = [o.itemsize * (o.loads + o.stores) / (GROUP if o.of_groups else 1) for o in of_form(form)]
    return sum(n_bytes)


# Numba


class ForNumba(NamedTuple):
    """Functions for loops in Python, over `at`, a tuple of addresses, and i, the number of an element from there."""

    load: Callable  # (at, i) -> the values of element i; of several lanes, a tuple of those
    # (at, i, values, start, high, key): start + i is the element's number in its parameter, by which it is rounded randomly, and
    # high the upper half of that, which a loop may know to be the same for many
    store: Callable
    zero_grad: Callable  # (at, i): store zero gradients and nothing else
    moved: Callable  # (at, i) -> addresses of element i
    stepped: Callable  # (at, strides, k) -> addresses k strides further


def for_numba(form, intrinsic, lanes=1, addrspace=0):
    """Return ForNumba. intrinsic: Numba's, or that of its CUDA target.

    addrspace: 1 on the CUDA target, where a pointer of no address space makes generic loads. Accesses are of 16 bytes if lanes
    are as many.
    """
    from llvmlite import ir
    from numba import types

    found = of_form(form)
    real = types.float64 if form.dtype.itemsize == 8 else types.float32
    emit = _Emitter(form, lanes, addrspace)
    addresses = types.UniTuple(types.int64, len(found))
    one = types.UniTuple(real, len(VALUES))
    values = one if lanes == 1 else types.UniTuple(one, lanes)

    @intrinsic
    def load(typingctx, at, i):
        def codegen(context, builder, signature, args):
            by_lane = emit.load(builder, *args)
            made = [context.make_tuple(builder, one, lane) for lane in by_lane]
            return made[0] if lanes == 1 else context.make_tuple(builder, values, made)

        return values(addresses, types.int64), codegen

    @intrinsic
    def store(typingctx, at, i, values, start, high, key):
        def codegen(context, builder, signature, args):
            at, i, given, start, high, key = args
            by_lane = [given] if lanes == 1 else [builder.extract_value(given, k) for k in range(lanes)]
            n = len(VALUES) - 1
            by_lane = [[builder.extract_value(lane, k) for k in range(n)] for lane in by_lane]
            emit.store(builder, at, i, by_lane, emit.random_bits(builder, start, i, high, key))
            return context.get_dummy_value()

        return types.void(addresses, types.int64, values, types.int64, types.int64, types.int64), codegen

    @intrinsic
    def zero_grad(typingctx, at, i):
        def codegen(context, builder, signature, args):
            emit.zero_grad(builder, *args)
            return context.get_dummy_value()

        return types.void(addresses, types.int64), codegen

    @intrinsic
    def moved(typingctx, at, i):
        def codegen(context, builder, signature, args):
            steps = [ir.Constant(ir.IntType(64), operand.itemsize) for operand in found]
            return _moved(context, builder, addresses, args[0], steps, args[1])

        return addresses(addresses, types.int64), codegen

    @intrinsic
    def stepped(typingctx, at, strides, k):
        def codegen(context, builder, signature, args):
            steps = [builder.extract_value(args[1], j) for j in range(len(found))]
            return _moved(context, builder, addresses, args[0], steps, args[2])

        return addresses(addresses, addresses, types.int64), codegen

    return ForNumba(load, store, zero_grad, moved, stepped)


class ForGroups(NamedTuple):
    """Functions for loops over groups, whose state is of 8 bits. A group's codes are known when all of it has been updated."""

    units: Callable  # (at, group) -> what one is worth of m and of the root of v
    load: Callable  # (at, i, units) -> the values of element i, or of lanes
    store: Callable  # (at, i, values, start, high, key): all but the state
    magnitudes: Callable  # (values, n) -> the largest |m| and root of the first n lanes, as the bits of floats
    codec: Callable  # (largest m, largest root) -> what `encode` needs; and `scales` stores the group's
    scales: Callable  # (at, group, largest m, largest root)
    encode: Callable  # (at, i, values, codec, start, high, key): the state
    keep: Callable  # (scratch, j, values): for `encode`, later. scratch: the address of 3 x GROUP float32
    kept: Callable  # (scratch, j) -> values of which only the state is there


def for_groups(form, intrinsic, lanes=1, addrspace=0):
    """Return ForGroups, as `for_numba`."""
    from numba import types

    addresses = types.UniTuple(types.int64, len(of_form(form)))
    f32, i32, i64 = types.float32, types.int32, types.int64
    one, result = types.UniTuple(f32, len(VALUES)), types.UniTuple(f32, len(VALUES) - 1)
    values, results = (one, result) if lanes == 1 else (types.UniTuple(one, lanes), types.UniTuple(result, lanes))
    units_type, codec_type = types.UniTuple(f32, 2), types.Tuple((f32, f32, i32, i32))
    emit = _Emitter(form, lanes, addrspace)

    def function(name, result, arguments, generate):
        """Return an intrinsic of some arguments; generate gives its LLVM value, a list of those of a tuple, or None."""

        def codegen(context, builder, signature, args):
            made = generate(builder, *args)
            if made is None:
                return context.get_dummy_value()
            if isinstance(made, list) and isinstance(made[0], list):
                made = [context.make_tuple(builder, result[0], lane) for lane in made]
            return context.make_tuple(builder, result, made) if isinstance(made, list) else made

        letters = ", ".join("abcdefghijk"[: len(arguments)])
        namespace: dict[str, Any] = {"signature": result(*arguments), "codegen": codegen}
        exec(
            f"def {name}(typingctx, {letters}):\n    return signature, codegen", namespace
        )  # an intrinsic has no *arguments
        return intrinsic(namespace[name])

    def of_lanes(b, given):
        by_lane = [given] if lanes == 1 else [b.extract_value(given, k) for k in range(lanes)]
        return [[b.extract_value(lane, k) for k in range(len(VALUES) - 1)] for lane in by_lane]

    def load(b, at, i, units):
        by_lane = emit.load(b, at, i, [b.extract_value(units, k) for k in range(2)])
        return by_lane[0] if lanes == 1 else by_lane

    def store(b, at, i, given, start, high, key):
        emit.store(b, at, i, of_lanes(b, given), emit.random_bits(b, start, i, high, key))

    def encode(b, at, i, given, codec, start, high, key):
        codec = [b.extract_value(codec, k) for k in range(4)]
        emit.encode(b, at, i, of_lanes(b, given), codec, emit.random_bits(b, start, i, high, key))

    def magnitudes(b, given, n):
        return emit.magnitudes(b, of_lanes(b, given), n)

    def keep(b, scratch, j, given):
        emit.keep(b, scratch, j, of_lanes(b, given)[0])

    return ForGroups(
        function("units", units_type, (addresses, i64), emit.units),
        function("load", values, (addresses, i64, units_type), load),
        function("store", types.void, (addresses, i64, results, i64, i64, i64), store),
        function("magnitudes", types.UniTuple(i32, 2), (results, i64), magnitudes),
        function("codec", codec_type, (i32, i32), emit.codec),
        function("scales", types.void, (addresses, i64, i32, i32), emit.scales),
        function("encode", types.void, (addresses, i64, results, codec_type, i64, i64, i64), encode),
        function("keep", types.void, (i64, i64, result), keep),
        function("kept", result, (i64, i64), emit.kept),
    )


def _moved(context, builder, addresses, at, steps, k):
    places = [builder.add(builder.extract_value(at, j), builder.mul(step, k)) for j, step in enumerate(steps)]
    return context.make_tuple(builder, addresses, places)


def tuple_at(intrinsic, n, addrspace=0):
    """Return a function that loads n int64 from an address, as a tuple."""
    from numba import types

    result = types.UniTuple(types.int64, n)

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], _pointer(_int(64), addrspace))
            loaded = [builder.load(builder.gep(pointer, [_int(64)(k)]), align=8) for k in range(n)]
            return context.make_tuple(builder, result, loaded)

        return result(types.int64), codegen

    return load


def to_reals(form, intrinsic):
    """Return a function that makes a tuple of float64 one of the compute type."""
    from numba import types

    real = types.float64 if form.dtype.itemsize == 8 else types.float32

    @intrinsic
    def reals(typingctx, scalars):
        result = types.UniTuple(real, len(scalars))

        def codegen(context, builder, signature, args):
            numbers = [builder.extract_value(args[0], k) for k in range(len(result))]
            if real is types.float32:
                numbers = [builder.fptrunc(x, _float(4)) if str(x.type) == "double" else x for x in numbers]
            return context.make_tuple(builder, result, numbers)

        return result(scalars), codegen

    return reals


class _Emitter:
    """LLVM for the accesses of a form's operands."""

    def __init__(self, form, lanes, addrspace):
        self.form, self.lanes, self.addrspace = form, lanes, addrspace
        self.operands = of_form(form)
        self.number = {operand.name: k for k, operand in enumerate(self.operands)}
        self.real = _float(form.dtype.itemsize)

    def load(self, b, at, i, units=None):
        """Return the values of each lane. units: of a group of 8-bit state."""
        raw = {o.name: self._load(b, o, at, i) for o in self.operands if o.loads and not o.of_groups}
        return [self._values(b, {name: of_lane[k] for name, of_lane in raw.items()}, units) for k in range(self.lanes)]

    def _values(self, b, raw, units):
        values = {}
        for operand in self.operands:
            if operand.name == "param" and self.form.arrays.remainder:
                values["param"] = self._wide(b, self._convert(b, "from_parts", raw["param"], raw["remainder"]))
            elif units and operand.name in ("m", "v"):
                unit = units[operand.name == "v"]
                values[operand.name] = self._convert(b, f"from_{operand.name}_code", raw[operand.name], unit)
            elif operand.name in VALUES:
                values[operand.name] = self._decode(b, operand.format, raw[operand.name])
        # what a form does not have, its rule does not look at
        return [values.get(name, values["v" if name == "max_v" else "param"]) for name in VALUES]

    def random_bits(self, b, start, i, high, key):
        """Return the random bits of each lane."""
        if not self.form.arrays.random:
            return [None] * self.lanes
        u32, shift, random = _int(32), i.type(32), CONVERSIONS["random"][2]
        key = [b.trunc(key, u32), b.trunc(b.lshr(key, shift), u32)]
        # the sum of halves, and not half of the sum, so that a vector holds as many as of floats
        found = [random(b, None, b.add(b.trunc(start, u32), b.trunc(i, u32)), b.trunc(high, u32), *key)]
        for k in range(1, self.lanes):
            own = b.add(b.add(start, i), i.type(k))
            found.append(random(b, None, b.trunc(own, u32), b.trunc(b.lshr(own, shift), u32), *key))
        return found

    def store(self, b, at, i, by_lane, random):
        names = [name for name in VALUES if name != "grad"]
        for operand in self.operands:
            if operand.name == "grad" and operand.stores:
                self.zero_grad(b, at, i)
            elif operand.stores and not self._is_coded(operand):
                encoded = [
                    self._encode(b, operand, dict(zip(names, lane, strict=True)), h)
                    for lane, h in zip(by_lane, random, strict=True)
                ]
                self._store(b, operand, at, i, encoded)

    def _is_coded(self, operand):
        """Whether an operand is stored by `encode` and `scales`."""
        return self.form.arrays.grouped and operand.name in ("m", "v", "m_scale", "v_scale")

    def units(self, b, at, group):
        found = []
        for name in ("m", "v"):
            operand = self.operands[self.number[f"{name}_scale"]]
            scale = b.load(self._pointer(b, operand, at, group, _float(4), 0), align=4)
            self._apart(b, operand, scale)
            found.append(self._convert(b, f"{name}_unit", scale))
        return found

    def magnitudes(self, b, by_lane, n):
        """Return the bits of the largest |m| and root of v among the first n lanes. A rule gives the root in max_v's place."""
        largest = [_int(32)(0)] * 2
        for k, lane in enumerate(by_lane):
            for j, value in enumerate((lane[STATE["m"]], lane[STATE["max_v"]])):
                bits = self._convert(b, "magnitude", value)
                if self.lanes > 1:
                    bits = b.select(b.icmp_signed("<", n.type(k), n), bits, bits.type(0))
                largest[j] = b.select(b.icmp_signed(">", bits, largest[j]), bits, largest[j])
        return largest

    def codec(self, b, m, root):
        inverses = [self._convert(b, "m_inverse", m), self._convert(b, "v_inverse", root)]
        return [*inverses, self._convert(b, "m_mask", m, root), self._convert(b, "v_mask", m, root)]

    def scales(self, b, at, group, m, root):
        for name in ("m_scale", "v_scale"):
            operand = self.operands[self.number[name]]
            place = self._pointer(b, operand, at, group, _float(4), 0)
            self._apart(b, operand, b.store(self._convert(b, name, m, root), place, align=4))

    def encode(self, b, at, i, by_lane, codec, random):
        m_inverse, v_inverse, m_mask, v_mask = codec
        codes: dict[str, list] = {"m": [], "v": []}
        for lane, h in zip(by_lane, random, strict=True):
            m, v, root = (lane[STATE[name]] for name in ("m", "v", "max_v"))
            codes["m"].append(b.trunc(self._convert(b, "to_m_code", m, m_inverse, m_mask, h), _int(8)))
            codes["v"].append(b.trunc(self._convert(b, "to_v_code", v, root, v_inverse, v_mask, h), _int(8)))
        for name, of_lanes in codes.items():
            self._store(b, self.operands[self.number[name]], at, i, of_lanes)

    def keep(self, b, scratch, j, lane):
        for k, name in enumerate(STATE):
            place = self._scratch(b, scratch, k, j)
            self._alone(b, b.store(lane[STATE[name]], place, align=4), "scratch")

    def kept(self, b, scratch, j):
        found = [_float(4)(0.0)] * (len(VALUES) - 1)
        for k, place in enumerate(STATE.values()):
            found[place] = b.load(self._scratch(b, scratch, k, j), align=4)
            self._alone(b, found[place], "scratch")
        return found

    def _scratch(self, b, scratch, k, j):
        base = b.inttoptr(scratch, _pointer(_float(4), self.addrspace))
        return b.gep(base, [b.add(j, j.type(k * GROUP)) if k else j])

    def zero_grad(self, b, at, i):
        grad = self.operands[self.number["grad"]]
        self._store(b, grad, at, i, [_memory_type(grad.format)(0)] * self.lanes)

    def _encode(self, b, operand, values, h):
        form = self.form
        if form.arrays.remainder and operand.name in ("param", "remainder"):
            x = self._narrow(b, values["param"])
            return b.trunc(self._convert(b, "high_part" if operand.name == "param" else "low_part", x), _int(16))
        value = values["param" if operand.name == "param_copy" else operand.name]
        if operand.format == "float64":
            return value
        value = self._narrow(b, value)
        if operand.format == "float32":
            return value
        if is_random(form.arrays, operand):
            bits = self._convert(b, f"to_{operand.format}_randomly", value, _own_bits(b, operand.name, h))
        else:
            bits = self._convert(b, f"to_{operand.format}", value)
        return b.trunc(bits, _int(16))

    def _decode(self, b, format, raw):
        if format in ("bfloat16", "float16"):
            raw = self._convert(b, f"from_{format}", raw)
        return self._wide(b, raw)

    def _convert(self, b, name, *operands):
        widened = [b.zext(x, _int(32)) if str(x.type) in ("i8", "i16") else x for x in operands]
        return CONVERSIONS[name][2](b, nvvm_rn(b) if self.addrspace == 1 else None, *widened)

    def _wide(self, b, x):
        return b.fpext(x, self.real) if x.type != self.real else x

    def _narrow(self, b, x):
        return b.fptrunc(x, _float(4)) if x.type != _float(4) else x

    def _pieces(self, operand):
        """Return how many accesses an operand takes, and the lanes of each."""
        width = min(VECTOR_BYTES // operand.itemsize, self.lanes)
        return self.lanes // width, width

    def _pointer(self, b, operand, at, i, kind, first):
        # by gep, not by sums of integers: LLVM's vectoriser follows no pointer that is made of an integer in the loop
        element = _memory_type(operand.format)
        base = b.inttoptr(b.extract_value(at, self.number[operand.name]), _pointer(element, self.addrspace))
        place = b.gep(base, [b.add(i, i.type(first)) if first else i])
        return place if kind is element else b.bitcast(place, _pointer(kind, self.addrspace))

    def _load(self, b, operand, at, i):
        element, (pieces, width), packed = _memory_type(operand.format), self._pieces(operand), self._packed(operand)
        kind = _vector(element, width) if packed == 1 else _vector(_int(32), width // packed)
        found = []
        for piece in range(pieces):
            loaded = b.load(self._pointer(b, operand, at, i, kind, piece * width), align=width * operand.itemsize)
            self._apart(b, operand, loaded)
            if width == 1:
                found.append(loaded)
                continue
            for k in range(width):
                lane = b.extract_element(loaded, _int(32)(k // packed))
                if packed > 1:
                    lane = b.trunc(b.lshr(lane, lane.type(element.width * (k % packed))), element)
                found.append(lane)
        return found

    def _store(self, b, operand, at, i, values):
        from llvmlite import ir

        element, (pieces, width), packed = _memory_type(operand.format), self._pieces(operand), self._packed(operand)
        kind = _vector(element, width) if packed == 1 else _vector(_int(32), width // packed)
        for piece in range(pieces):
            own = values[piece * width : (piece + 1) * width]
            if packed > 1:
                words = [b.shl(b.zext(x, _int(32)), _int(32)(element.width * (k % packed))) for k, x in enumerate(own)]
                own = [functools.reduce(b.or_, words[k : k + packed]) for k in range(0, width, packed)]
            stored = own[0]
            if width > 1:
                stored = ir.Constant(kind, ir.Undefined)
                for k, value in enumerate(own):
                    stored = b.insert_element(stored, value, _int(32)(k))
            place = self._pointer(b, operand, at, i, kind, piece * width)
            self._apart(b, operand, b.store(stored, place, align=width * operand.itemsize))

    def _packed(self, operand):
        """Return how many elements an access takes as one word: NVVM splits vectors of more than four."""
        return 4 // operand.itemsize if self._pieces(operand)[1] > 4 else 1

    def _apart(self, b, operand, instruction):
        """Tell LLVM that operands do not overlap, which was checked: else it compares all their addresses before each loop."""
        self._alone(b, instruction, operand.name)

    def _alone(self, b, instruction, name):
        if self.addrspace == 0:
            scopes = _scopes(b.module, (*(o.name for o in self.operands), "scratch"))
            instruction.set_metadata("alias.scope", b.module.add_metadata([scopes[name]]))
            others = [scope for other, scope in scopes.items() if other != name]
            instruction.set_metadata("noalias", b.module.add_metadata(others))


def _vector(element, width):
    from llvmlite import ir

    return element if width == 1 else ir.VectorType(element, width)


def _scopes(module, names):
    domain = module.add_metadata(["gpuadam: the arrays of an update"])
    return {name: module.add_metadata([f"gpuadam: {name}", domain]) for name in names}


def is_random(arrays, operand):
    """Whether an operand is rounded randomly."""
    if operand.format not in ("bfloat16", "float16"):
        return False
    return operand.name in ("m", "v", "max_v") or (operand.name == "param" and arrays.stochastic)


# Where in an element's 32 random bits are the 16 by which an operand is rounded. The upper half of each, which matters most, is
# the upper half of no other.
RANDOM_BITS_FROM = {"param": 0, "m": 16, "v": 8, "max_v": 24}


def _own_bits(b, name, h):
    """Return random bits of which the lowest 16 are those of an operand."""
    first = RANDOM_BITS_FROM[name]
    if first == 0:
        return h
    shifted = b.lshr(h, h.type(first))
    return b.or_(shifted, b.shl(h, h.type(32 - first))) if first > 16 else shifted


def _memory_type(format):
    return _float(FORMATS[format]) if format in ("float32", "float64") else _int(8 * FORMATS[format])


def _float(n_bytes):
    from llvmlite import ir

    return ir.FloatType() if n_bytes == 4 else ir.DoubleType()


def _int(width):
    from llvmlite import ir

    return ir.IntType(width)


def _pointer(element, addrspace):
    from llvmlite import ir

    return ir.PointerType(element, addrspace=addrspace)


# CUDA C


C_TYPES = {
    "float64": "double",
    "float32": "float",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int16": "bits16",
    "uint8": "unsigned char",
}

IN_CUDA_C = r"""
struct alignas(2) bfloat16 { unsigned short bits; };
struct alignas(2) float16 { unsigned short bits; };
struct alignas(2) bits16 { unsigned short bits; };
template <int LANES, class S> struct alignas(LANES * sizeof(S) < 16 ? LANES * sizeof(S) : 16) Vector { S lane[LANES]; };
template <int LANES, class S> __device__ __forceinline__ Vector<LANES, S>& vector_at(S* p) {
    return *reinterpret_cast<Vector<LANES, S>*>(p);
}
template <int LANES, class S> __device__ __forceinline__ const Vector<LANES, S>& vector_at(const S* p) {
    return *reinterpret_cast<const Vector<LANES, S>*>(p);
}
// in one instruction, which the compiler makes several of if it is left to it
template <int LANES, class S> __device__ __forceinline__ void store(S* p, const Vector<LANES, S>& v) { vector_at<LANES>(p) = v; }
template <class S> __device__ __forceinline__ unsigned word(const S& low, const S& high) { return low.bits | high.bits << 16; }
template <class S> __device__ __forceinline__ void store_words(S* p, const Vector<8, S>& v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(word(v.lane[0], v.lane[1])), "r"(word(v.lane[2], v.lane[3])), "r"(word(v.lane[4], v.lane[5])),
                 "r"(word(v.lane[6], v.lane[7]))
                 : "memory");
}
__device__ __forceinline__ void store(bfloat16* p, const Vector<8, bfloat16>& v) { store_words(p, v); }
__device__ __forceinline__ void store(float16* p, const Vector<8, float16>& v) { store_words(p, v); }
__device__ __forceinline__ void store(bits16* p, const Vector<8, bits16>& v) { store_words(p, v); }
template <class S, class U> __device__ __forceinline__ S* as(U* p) { return reinterpret_cast<S*>(p); }
template <class S, class U> __device__ __forceinline__ const S* as(const U* p) { return reinterpret_cast<const S*>(p); }
__device__ __forceinline__ void widen(double& r, float x) { r = widened_(x); }
__device__ __forceinline__ void widen(double& r, double x) { r = x; }
__device__ __forceinline__ void widen(float& r, float x) { r = x; }
__device__ __forceinline__ float narrow(double x) { return narrowed_(x); }
__device__ __forceinline__ float narrow(float x) { return x; }
__device__ __forceinline__ T decoded(double x) { T r; widen(r, x); return r; }
__device__ __forceinline__ T decoded(float x) { T r; widen(r, x); return r; }
__device__ __forceinline__ T decoded(bfloat16 x) { return decoded(from_bfloat16_(x.bits)); }
__device__ __forceinline__ T decoded(float16 x) { return decoded(from_float16_(x.bits)); }
__device__ __forceinline__ T decoded(bfloat16 x, bits16 rest) { return decoded(from_parts_(x.bits, rest.bits)); }
__device__ __forceinline__ void encode(double& r, T x) { r = x; }
__device__ __forceinline__ void encode(float& r, T x) { r = narrow(x); }
__device__ __forceinline__ void encode(bfloat16& r, T x) { r.bits = to_bfloat16_(narrow(x)); }
__device__ __forceinline__ void encode(float16& r, T x) { r.bits = to_float16_(narrow(x)); }
__device__ __forceinline__ void encode_randomly(bfloat16& r, T x, unsigned h) { r.bits = to_bfloat16_randomly_(narrow(x), h); }
__device__ __forceinline__ void encode_randomly(float16& r, T x, unsigned h) { r.bits = to_float16_randomly_(narrow(x), h); }
__device__ __forceinline__ unsigned rotated(unsigned h, int n) { return h >> n | h << (32 - n); }
"""


def for_cuda_c(form, scalars):
    """Return the CUDA C that a rule needs before it, and what comes after it: `update_lanes` or, of groups, `update_group`.

    `update_lanes<N>(operands..., index, key, skip, scalars...)` applies the rule to N neighbours. The operands are pointers to
    the first of them. Everything is loaded before the first store, because the compiler must take it that the arrays might
    overlap, and would load again. index is the number of the first element in its parameter.
    """
    found = of_form(form)
    kinds = {operand.name: C_TYPES[operand.format] for operand in found}
    declared = [f"{'' if o.stores else 'const '}{kinds[o.name]}* {o.name}" for o in found]
    numbers = "long long index, long long key, long long skip, " + ", ".join(f"T {name}" for name in scalars)
    # a step that is turned off leaves all but the gradient as it is
    zero = f"store(grad, Vector<N, {kinds['grad']}>{{}});" if form.zero_grad else ""
    if form.arrays.grouped:
        return conversions_for_cuda_c() + IN_CUDA_C, _update_group(form, found, kinds, declared, numbers, scalars)
    lines = [f"template <int N> __device__ __forceinline__ void update_lanes({', '.join(declared)}, {numbers}) {{"]
    if form.skips:
        lines += ["if (skip) {", zero, "return;", "}"]
    for o in found:
        if o.loads:
            lines.append(f"const Vector<N, {kinds[o.name]}> {o.name}_was = vector_at<N>({o.name});")
        if o.stores:
            lines.append(f"Vector<N, {kinds[o.name]}> {o.name}_is{' = {}' if o.name == 'grad' else ''};")
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {", *_updated(form, found, scalars)]
    lines += [*_encoded(form, found), "}"]
    lines += [f"store({o.name}, {o.name}_is);" for o in found if o.stores]
    return conversions_for_cuda_c() + IN_CUDA_C, "\n".join([*lines, "}\n"])


def _updated(form, found, scalars):
    """Return the lines that decode lane k and apply the rule, to variables named value_k."""
    given = {operand.name: f"{operand.name}_was.lane[k]" for operand in found}
    if form.arrays.remainder:
        given["param"] += ", remainder_was.lane[k]"
    lines = []
    for name in VALUES:
        source = name if name in given else "v" if name == "max_v" else "param"
        if form.arrays.grouped and source in ("m", "v"):
            lines.append(f"T {name}_k = from_{source}_code_({given[source]}, {source}_unit);")
        else:
            lines.append(f"T {name}_k = decoded({given[source]});")
    lines.append(f"update({', '.join(f'{name}_k' for name in VALUES)}, {', '.join(scalars)});")
    if form.arrays.random:
        lines.append("const long long number = index + k;")
        lines.append("const unsigned h = random_(number, number >> 32, key, key >> 32);")
    return lines


def _encoded(form, found):
    """Return the lines that put the variables named value_k into lane k of what will be stored, but for 8-bit state."""
    lines = []
    for o in found:
        if form.arrays.grouped and (o.of_groups or o.name in ("m", "v")):
            continue
        if o.name in ("param", "remainder") and form.arrays.remainder:
            lines.append(f"{o.name}_is.lane[k].bits = {'high' if o.name == 'param' else 'low'}_part_(narrow(param_k));")
        elif o.stores and o.name != "grad":
            value = "param" if o.name == "param_copy" else o.name
            random, first = is_random(form.arrays, o), RANDOM_BITS_FROM.get(o.name)
            bits = "" if not random else f", rotated(h, {first})" if first else ", h"
            lines.append(f"encode{'_randomly' if random else ''}({o.name}_is.lane[k], {value}_k{bits});")
    return lines


def _update_group(form, found, kinds, declared, numbers, scalars):
    """Return `update_group(operands..., at, size, whole, index, key, skip, scalars...)`.

    It applies the rule to GROUP_LANES neighbours, from `at` on, of `size`; all threads of a warp call it. whole: all of them are
    there, and can be loaded as vectors. Else lanes after the last load the last element, and store nothing.
    """
    each = [o for o in found if not o.of_groups]
    N = GROUP_LANES
    single = ["for (int k = 0; k < N; ++k) {", "if (at + k < size) {"]
    arguments = [*declared, "long long at", "long long size", "bool whole", numbers]
    lines = [
        f"__device__ __forceinline__ void update_group({', '.join(arguments)}) {{",
        f"constexpr int N = {N};",
        "const long long last = size - 1;",
    ]
    if form.skips:
        zero = ["#pragma unroll", *single, "grad[at + k] = {};", "}", "}"] if form.zero_grad else []
        lines += ["if (skip) {", *zero, "return;", "}"]
    for o in each:
        kind = f"Vector<N, {kinds[o.name]}>"
        lines += [f"{kind} {o.name}_was;"] if o.loads else []
        lines += [f"{kind} {o.name}_is{' = {}' if o.name == 'grad' else ''};"] if o.stores else []
    loads = [o.name for o in each if o.loads]
    lines += ["if (whole) {", *(f"{name}_was = vector_at<N>({name} + at);" for name in loads), "} else {"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {"]
    lines += [f"{name}_was.lane[k] = {name}[min(at + k, last)];" for name in loads]
    lines += ["}", "}", f"const long long group = min(at, last) / {GROUP};"]
    lines += [f"const float {x}_unit = {x}_unit_({x}_scale[group]);" for x in "mv"]
    lines += ["float new_m[N], new_v[N], new_root[N];", "unsigned bits[N], largest_m = 0, largest_root = 0;"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {", *_updated(form, found, scalars), *_encoded(form, found)]
    lines += ["new_m[k] = m_k;", "new_v[k] = v_k;", "new_root[k] = max_v_k;", "bits[k] = h;"]
    lines += ["largest_m = max(largest_m, at + k < size ? magnitude_(m_k) : 0u);"]
    lines += ["largest_root = max(largest_root, at + k < size ? magnitude_(max_v_k) : 0u);", "}"]
    lines += ["#pragma unroll", f"for (int other = 1; other < {GROUP} / N; other *= 2) {{"]
    lines += [f"{x} = max({x}, __shfl_xor_sync(0xffffffffu, {x}, other));" for x in ("largest_m", "largest_root")]
    lines += ["}", "const float m_inverse = m_inverse_(largest_m), v_inverse = v_inverse_(largest_root);"]
    lines += [f"const unsigned {x}_mask = {x}_mask_(largest_m, largest_root);" for x in "mv"]
    lines += ["#pragma unroll", "for (int k = 0; k < N; ++k) {"]
    lines += ["m_is.lane[k] = to_m_code_(new_m[k], m_inverse, m_mask, bits[k]);"]
    lines += ["v_is.lane[k] = to_v_code_(new_v[k], new_root[k], v_inverse, v_mask, bits[k]);", "}"]
    lines += [f"if (at < size && at % {GROUP} == 0) {{"]
    lines += [f"{x}_scale[group] = {x}_scale_(largest_m, largest_root);" for x in "mv"]
    stores = [o.name for o in each if o.stores]
    lines += ["}", "if (whole) {", *(f"store({name} + at, {name}_is);" for name in stores), "} else {", "#pragma unroll"]
    lines += [*single, *(f"{name}[at + k] = {name}_is.lane[k];" for name in stores), "}", "}", "}", "}\n"]
    return "\n".join(lines)
