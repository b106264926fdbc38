"""Loads and stores of an element for loops in Python: LLVM, which Numba compiles for the CPU and for GPUs.

Numbers are converted between their formats and the compute type by the rows of `conversions.py`. 8-bit state needs further
functions, because the codes of a group are not known until all of its elements have been updated. `change_of` and `element_of`
are for the sums of `change_sums.py`.
"""

import functools
from types import SimpleNamespace

from llvmlite import ir
from numba import from_dtype, types

from gpuadam.kernels import adam, llvm, norm_order, primitives
from gpuadam.kernels.conversions import CONVERSIONS, random_bits_of, random_words
from gpuadam.kernels.layout import aligned_to
from gpuadam.kernels.llvm import F32, F64, U8, U16, U32, U64
from gpuadam.kernels.numba_memory import RAW, fetch, llvm_type, load_at, tuple_at, widened
from gpuadam.kernels.operands import FORMATS, GROUP, KINDS, OF_CODES, RESULTS, VALUES, decodings, operands_of_form

# 8-bit state on the CPU: how many groups are updated before the first is encoded, so that the processor works on several and does
# not wait for the largest of each. What is kept of them, in bytes: m and the root of each element, and the largest of each group.
BLOCK = 8
KEPT = 4 * 2 * BLOCK * (GROUP + 1)


def functions(form, intrinsic, lanes=1, addrspace=0):
    """Return the functions of a Form, for Python that Numba compiles. They are the public methods of `_Emitter`, less b.

    intrinsic: Numba's, or that of its CUDA target. addrspace: 1 on the CUDA target. With several lanes, values and results are a
    tuple with an entry for each lane, and an access takes up to 16 bytes.
    """

    def of_lanes(kind):
        return kind if lanes == 1 else types.UniTuple(kind, lanes)

    void, i32, i64, real = types.void, types.int32, types.int64, from_dtype(form.dtype)
    vector = real if form.arrays.numbers == 1 else types.UniTuple(real, form.arrays.numbers)
    addresses = types.UniTuple(i64, len(operands_of_form(form)))
    values, results = (
        of_lanes(types.Tuple([real if KINDS[name].shared else vector for name in names])) for names in (VALUES, RESULTS)
    )
    units, codec = types.UniTuple(real, 2), types.Tuple((real, real, i32, i32))
    signatures = {
        "load": values(addresses, i64),
        "store": void(addresses, i64, results, i64, i64, i64),
        "zero_grad": void(addresses, i64),
        "moved": addresses(addresses, i64),
        "stepped": addresses(addresses, addresses, i64),
    }
    of_groups = {
        "load": values(addresses, i64, units),
        "units": units(addresses, i64),
        "magnitudes": types.UniTuple(i32, 2)(results, i64),
        "codec": codec(i32, i32),
        "scales": void(addresses, i64, i32, i32),
        "encode": void(addresses, i64, results, codec, i64, i64, i64),
        "keep": void(i64, i64, results),
        "kept": results(i64, i64),
        "keep_largest": void(i64, i64, i32, i32),
        "kept_largest": types.UniTuple(i32, 2)(i64, i64),
    }
    emit, signatures = _Emitter(form, lanes, addrspace), signatures | (of_groups if form.arrays.grouped else {})
    emitted = {name: llvm.function(intrinsic, name, getattr(emit, name), kind) for name, kind in signatures.items()}
    return SimpleNamespace(**emitted)


def update_of(rule, form, intrinsic, lanes=1, contracts=False):
    """Return a rule as a function from the values that a load returns, and the scalars, to the results that a store takes.

    contracts: as in `primitives.for_numba`. The rule is followed once, when the code of a loop is made: Numba compiles none of
    it, which takes a third less time.
    """

    def update(b, values, scalars):
        follow = rule.in_python(form, primitives.emitting(b, contracts))
        results = [list(follow(*of_lane, scalars)) for of_lane in (values if lanes > 1 else [values])]
        return results if lanes > 1 else results[0]

    def signature(values, scalars):
        of_lane = values.types[0] if lanes > 1 else values
        results = types.Tuple([of_lane.types[VALUES.index(name)] for name in RESULTS])
        return (types.UniTuple(results, lanes) if lanes > 1 else results)(values, scalars)

    return llvm.function(intrinsic, "update", update, signature, 2)


def change_of(form, compiled, intrinsic, on_gpu=False):
    """Return a function to the change of number k of an element, a float64: change_of(values, k, is_there, scalars).

    It is 0 if the element is not there, whatever the values are. compiled: compiles the function.
    """
    update, sub = update_of(adam, form, intrinsic, contracts=on_gpu), primitives.for_numba(intrinsic, contracts=on_gpu).sub
    as_float64 = widened(intrinsic, form.dtype.name, on_gpu)
    CHANGE, SEVERAL = form.arrays.change != "", form.arrays.numbers > 1

    @compiled
    def number(x, k):
        """Return number k of a value. It may be one alone."""
        return x[k] if SEVERAL else x

    @compiled
    def change_of(values, k, is_there, s):
        new, old = as_float64(number(update(values, s)[0], k)), as_float64(number(values[0], k))
        change = new if CHANGE else sub(new, old)
        return change if is_there else 0.0

    return change_of


def element_of(form, compiled, intrinsic, addrspace=0):
    """Return a function to the addresses of element i, in C order, of arrays of any strides: element_of(at, table, row, i).

    at: the addresses of the arrays. table, row: those of a table of `norm_order.py` and of the arrays' row there. The other
    arguments are those of `change_of` and `functions`.
    """
    N, stepped = len(operands_of_form(form)), functions(form, intrinsic, addrspace=addrspace).stepped
    int64_at, strides_at = load_at(intrinsic, types.int64, addrspace), tuple_at(intrinsic, N, addrspace=addrspace)

    @compiled
    def element_of(at, table, row, i):
        d = int64_at(row + 8 * norm_order.NDIM) - 1
        while d >= 0:
            dimension, rest = table + 8 * (int64_at(row + 8 * norm_order.DIMS) + d * (N + 1)), types.int64(0)
            if d > 0:
                rest = types.int64(types.uint64(i) // types.uint64(int64_at(dimension)))
            at = stepped(at, strides_at(dimension + 8), i - rest * int64_at(dimension))
            i = rest
            d -= 1
        return at

    return element_of


def choose_vectors(intrinsic, wide):
    """Return a function without instructions. If `wide`, LLVM takes vectors of 512 bits in the function that calls it."""

    def choose(b):
        if wide:  # llvmlite does not know attributes that have a value; it writes what it finds among a function's
            set.add(b.function.attributes, '"prefer-vector-width"="512"')

    return llvm.function(intrinsic, "choose_vectors", choose, types.void())


def fetch_of(form, intrinsic, n):
    """Return a function that asks for the memory of the elements i ... i + n - 1, which need not be there: fetch(at, i)."""

    def emit(b, at, i):
        for operand, address in zip(operands, at, strict=True):
            if (operand.loads or operand.stores) and not operand.of_groups:
                fetch(b, b.add(address, b.mul(U64(operand.itemsize), i)), n * operand.itemsize)

    operands = operands_of_form(form)
    return llvm.function(intrinsic, "fetch", emit, types.void(types.UniTuple(types.int64, len(operands)), types.int64))


def scalars_at(form, intrinsic):
    """Return a function from the address of a step's scalars, of float64, to a tuple of the compute type."""
    return tuple_at(intrinsic, len(adam.scalar_names(form)), from_dtype(form.dtype), stored=types.float64)


class _Emitter:
    """LLVM for the accesses of a form's operands.

    b: llvmlite's builder. at: the addresses of the operands, in their order. i: the number of an element from there, the first of
    several lanes. start + i: its number in its parameter, by which it is rounded randomly. high: the upper half of this number,
    which a loop may know to be the same for many elements. key: of the step and the parameter. results: of a rule.
    """

    def __init__(self, form, lanes, addrspace):
        self.form, self.lanes, self.addrspace = form, lanes, addrspace
        self.operands = {operand.name: operand for operand in operands_of_form(form)}
        self.real = llvm.FLOATS[form.dtype.itemsize]

    def load(self, b, at, i, units=None):
        """Return the values of element i. units: what `units` returned, for 8-bit state."""
        stored = {o.name: self._load(b, o, at, i) for o in self.operands.values() if o.loads and not o.of_groups}
        if units:
            stored |= {name: [unit] * self.lanes for name, unit in zip(("m_unit", "v_unit"), units, strict=True)}

        def decoded(source, k):
            row, names = source
            vectors = [stored[name][k] for name in names]
            if isinstance(vectors[0], list):
                return [number(row, *numbers) for numbers in zip(*vectors, strict=True)]
            return number(row, *vectors)

        def number(row, *parts):
            x = self._convert(b, row, *parts)
            return b.fpext(x, self.real) if x.type != self.real else x

        sources, lanes = decodings(self.form).values(), []
        for k in range(self.lanes):
            values = {source: decoded(source, k) for source in dict.fromkeys(sources)}  # some values are made of the same
            lanes.append([values[source] for source in sources])
        return lanes[0] if self.lanes == 1 else lanes

    def store(self, b, at, i, results, start, high, key):
        """Store results, but for 8-bit state."""
        random = self._random_bits(b, start, i, high, key)
        for operand in self.operands.values():
            if operand.name == "grad" and operand.stores:
                self.zero_grad(b, at, i)
            elif operand.value:
                lanes = zip(self._of_lanes(results), random, strict=True)
                self._store(b, operand, at, i, [self._encoded(b, operand, lane, h) for lane, h in lanes])

    def zero_grad(self, b, at, i):
        """Store a zero gradient and nothing else."""
        grad = self.operands["grad"]
        zero = _memory_type(grad)(0)
        self._store(b, grad, at, i, [zero if grad.numbers == 1 else [zero] * grad.numbers] * self.lanes)

    def moved(self, b, at, i):
        """Return the addresses of element i."""
        return self.stepped(b, at, [U64(operand.itemsize) for operand in self.operands.values()], i)

    def stepped(self, b, at, strides, k):
        """Return the addresses k strides on."""
        return [b.add(address, b.mul(stride, k)) for address, stride in zip(at, strides, strict=True)]

    def units(self, b, at, group):
        """Return the values of a 1 among the codes of a group: of m, and of the root of v."""
        units = []
        for name in ("m", "v"):
            scale = b.load(self._scale(b, f"{name}_scale", at, group), align=4)
            units.append(self._convert(b, f"{name}_unit", self._alone(b, scale, f"{name}_scale")))
        return units

    def magnitudes(self, b, results, n):
        """Return the largest |m| and root of v of the first n lanes, as the bits of floats."""
        largest = [U32(0)] * 2
        for k, lane in enumerate(self._of_lanes(results)):
            for j, place in enumerate(OF_CODES):
                bits = self._convert(b, "magnitude", lane[place])
                if self.lanes > 1:
                    bits = b.select(b.icmp_signed("<", U64(k), n), bits, U32(0))
                largest[j] = b.select(b.icmp_signed(">", bits, largest[j]), bits, largest[j])
        return largest

    def codec(self, b, m, root):
        """Return the numbers by which `encode` makes codes. m, root: the largest of a group."""
        inverses = [self._convert(b, "m_inverse", m), self._convert(b, "v_inverse", root)]
        return [*inverses, self._convert(b, "m_mask", m, root), self._convert(b, "v_mask", m, root)]

    def scales(self, b, at, group, m, root):
        """Store the scales of a group."""
        for name in ("m_scale", "v_scale"):
            scale = self._convert(b, name, m, root)
            self._alone(b, b.store(scale, self._scale(b, name, at, group), align=4), name)

    def encode(self, b, at, i, results, codec, start, high, key):
        """Store 8-bit state."""
        m_inverse, v_inverse, m_mask, v_mask = codec
        m_codes, v_codes = [], []
        for lane, h in zip(self._of_lanes(results), self._random_bits(b, start, i, high, key), strict=True):
            m, root = (lane[place] for place in OF_CODES)
            m_codes.append(b.trunc(self._convert(b, "to_m_code", m, m_inverse, m_mask, *h), U8))
            v_codes.append(b.trunc(self._convert(b, "to_v_code", root, v_inverse, v_mask, *h), U8))
        self._store(b, self.operands["m"], at, i, m_codes)
        self._store(b, self.operands["v"], at, i, v_codes)

    def keep(self, b, memory, j, results):
        """Keep what codes are made of, of element j of a block of groups. memory: the address of KEPT bytes."""
        for place, at in zip(OF_CODES, self._kept(b, memory, F32, 0, BLOCK * GROUP, j), strict=True):
            self._alone(b, b.store(results[place], at, align=4), "memory")

    def kept(self, b, memory, j):
        """Return the results of element j. Those of which no code is made are zeros."""
        results = [F32(0.0)] * len(RESULTS)
        for place, at in zip(OF_CODES, self._kept(b, memory, F32, 0, BLOCK * GROUP, j), strict=True):
            results[place] = self._alone(b, b.load(at, align=4), "memory")
        return results

    def keep_largest(self, b, memory, k, m, root):
        """Keep the largest of group k of a block."""
        for x, at in zip((m, root), self._kept(b, memory, U32, 2 * BLOCK * GROUP, BLOCK, k), strict=True):
            self._alone(b, b.store(x, at, align=4), "memory")

    def kept_largest(self, b, memory, k):
        """Return the largest of group k."""
        return [
            self._alone(b, b.load(at, align=4), "memory") for at in self._kept(b, memory, U32, 2 * BLOCK * GROUP, BLOCK, k)
        ]

    def _kept(self, b, memory, kind, first, apart, k):
        """Return where number k of m is, and of the root. first: of m's numbers. apart: by how many the root's are behind."""
        start = llvm.pointer(b, memory, kind, self.addrspace)
        return [b.gep(start, [b.add(k, U64(at))]) for at in (first, first + apart)]

    def _scale(self, b, name, at, group):
        return self._pointer(b, self.operands[name], at, group, F32, 0)

    def _of_lanes(self, results):
        return [results] if self.lanes == 1 else results

    def _encoded(self, b, operand, results, bits):
        """Return what an operand is to hold of a lane. bits: random ones, of each number of the lane."""
        x = results[RESULTS.index(operand.value)]
        if isinstance(x, list):
            return [self._encoded_number(b, operand, number, h) for number, h in zip(x, bits, strict=True)]
        return self._encoded_number(b, operand, x, bits[0])

    def _encoded_number(self, b, operand, x, h):
        x = b.fptrunc(x, F32) if x.type == F64 and operand.format != "float64" else x
        if not operand.encoding:
            return x
        random = [] if operand.random_bits_from is None else [_rotated(b, h, operand.random_bits_from)]
        return b.trunc(self._convert(b, operand.encoding, x, *random), U16)

    def _random_bits(self, b, start, i, high, key):
        """Return the 32 random bits of each number of each lane."""
        numbers = self.form.arrays.numbers
        if not self.form.arrays.random:
            return [[None] * numbers] * self.lanes
        key_words = [b.trunc(key, U32), b.trunc(b.lshr(key, U64(32)), U32)]
        if self.form.arrays.grouped and self.addrspace == 0:  # `start` is a multiple of GROUP, and i is below it
            word, key = random_words(b, b.trunc(start, U32), b.trunc(high, U32), *key_words)
            return [[random_bits_of(b, b.xor(word, b.trunc(i, U32)), key)]]
        bits, first = [], b.add(start, i)
        if numbers > 1:
            first = b.mul(first, U64(numbers))
        for k in range(self.lanes * numbers):
            if k == 0 and numbers == 1:  # the sum of halves, and not half of the sum: a vector holds as many as of floats
                low, upper = b.add(b.trunc(start, U32), b.trunc(i, U32)), b.trunc(high, U32)
            else:
                number = b.add(first, U64(k))
                low, upper = b.trunc(number, U32), b.trunc(b.lshr(number, U64(32)), U32)
            bits.append(self._convert(b, "random", low, upper, *key_words))
        return [bits[k : k + numbers] for k in range(0, len(bits), numbers)]

    def _convert(self, b, row, *operands):
        if not row:
            (number,) = operands
            return number
        widened = [b.zext(x, U32) if x.type in (U8, U16) else x for x in operands]
        return CONVERSIONS[row].llvm(b, llvm.nvvm_rn(b) if self.addrspace == 1 else None, *widened)

    def _accesses(self, operand):
        """Return how many numbers an access of an operand takes, how many are packed into a word, and the access's type.

        An element that is alone is accessed number by number: that is all it needs to be aligned to.
        """
        element, size = _memory_type(operand), FORMATS[operand.format]
        width = 1 if self.lanes == 1 else aligned_to(self.lanes * operand.itemsize) // size
        packed = 4 // size if width > 4 else 1  # NVVM splits vectors of more than four
        return width, packed, llvm.vector(U32 if packed > 1 else element, width // packed)

    def _load(self, b, operand, at, i):
        """Return what an operand holds of each lane, a list where an element has several numbers."""
        (width, packed, kind), element, numbers = self._accesses(operand), _memory_type(operand), []
        for first in range(0, self.lanes * operand.numbers, width):
            place = self._pointer(b, operand, at, i, kind, first)
            loaded = self._alone(b, b.load(place, align=width * FORMATS[operand.format]), operand.name)
            for k in range(width):
                number = loaded if width == 1 else b.extract_element(loaded, U32(k // packed))
                if packed > 1:
                    number = b.trunc(b.lshr(number, U32(element.width * (k % packed))), element)
                numbers.append(number)
        n = operand.numbers
        return numbers if n == 1 else [numbers[k : k + n] for k in range(0, len(numbers), n)]

    def _store(self, b, operand, at, i, lanes):
        (width, packed, kind), element = self._accesses(operand), _memory_type(operand)
        numbers = lanes if operand.numbers == 1 else [number for lane in lanes for number in lane]
        for first in range(0, len(numbers), width):
            parts = numbers[first : first + width]
            if packed > 1:
                words = [b.shl(b.zext(x, U32), U32(element.width * (k % packed))) for k, x in enumerate(parts)]
                parts = [functools.reduce(b.or_, words[k : k + packed]) for k in range(0, width, packed)]
            stored = parts[0]
            if width > 1:
                stored = ir.Constant(kind, ir.Undefined)
                for k, part in enumerate(parts):
                    stored = b.insert_element(stored, part, U32(k))
            place = self._pointer(b, operand, at, i, kind, first)
            self._alone(b, b.store(stored, place, align=width * FORMATS[operand.format]), operand.name)

    def _pointer(self, b, operand, at, i, kind, first):
        # by gep, not by sums of integers: LLVM's vectoriser follows no pointer that is made of an integer in the loop
        element = _memory_type(operand)
        address = at[list(self.operands).index(operand.name)]
        start = llvm.pointer(b, address, element, self.addrspace)
        i = b.mul(i, U64(operand.numbers)) if operand.numbers > 1 else i
        place = b.gep(start, [b.add(i, U64(first)) if first else i])
        return place if kind == element else b.bitcast(place, ir.PointerType(kind, addrspace=self.addrspace))

    def _alone(self, b, instruction, name):
        """Tell LLVM that operands do not overlap, which was checked: else it compares all their addresses before each loop."""
        if self.addrspace == 0:
            domain = b.module.add_metadata(["gpuadam: the arrays of an update"])
            scopes = {other: b.module.add_metadata([f"gpuadam: {other}", domain]) for other in (*self.operands, "memory")}
            instruction.set_metadata("alias.scope", b.module.add_metadata([scopes.pop(name)]))
            instruction.set_metadata("noalias", b.module.add_metadata(list(scopes.values())))
        return instruction


def _rotated(b, h, first):
    """Return random bits of which the lowest 16 are those from `first` on."""
    if first == 0:
        return h
    shifted = b.lshr(h, U32(first))
    return b.or_(shifted, b.shl(h, U32(32 - first))) if first > 16 else shifted


def _memory_type(operand):
    return llvm_type(RAW[operand.format])
