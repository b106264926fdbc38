"""Execute compiled GPU code on the host: PTX becomes LLVM IR, and LLVM's JIT runs it, thread after thread.

    kernel = Kernel(ptx_text)
    kernel.run(grid, block, parameters, memory=[(start, end), ...])

It runs the PTX of NVRTC (CuPy) and of NVVM (Numba CUDA) for every architecture, with no GPU, driver or C++ compiler. It is
stricter than a GPU: an access outside `memory` or off its natural alignment is an error, as is every instruction or modifier
that it does not know, a generic (neither global nor shared) access, and a float `add`, `sub` or `mul` without `.rn`, which
ptxas could still fuse. `.ftz` is modelled. It shows what the PTX computes, not what ptxas and the chip make of it.

The threads of a kernel with warp shuffles, votes or barriers stop there, and go on once those they wait for have come. It is
an error if one does not come: a lane that its mask names and that has exited, waits elsewhere, or is not in the block.
"""

import ctypes
import functools
import hashlib
import re
from collections import Counter
from typing import NamedTuple

import kept
import llvmlite
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
FLOATS = {"f32": ir.FloatType(), "f64": ir.DoubleType()}
INTEGERS = [f"{sign}{n}" for sign in "su" for n in (8, 16, 32, 64)]
WIDTHS = {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64} | {f"{x}{n}": n for x in "bsu" for n in (8, 16, 32, 64)}
SPECIAL = ("tid.x", "ntid.x", "ctaid.x", "nctaid.x")
WARP = 32
ROUNDINGS = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}  # to an integer, and LLVM's names
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COUNTERS = ("misaligned", "outside", "outside_shared", "by_zero", "loaded", "stored", "outside_at", "stops", "loops")
MOST_LOOPS = 1 << 30  # branches back in one run: a kernel that takes more never ends
GRAIN = 256  # bytes that an entry of a map of allocations stands for
SHARED_GAP = 32  # bytes
THREADS_TOGETHER = 8192  # as many as the caches hold the registers of

# The instructions at which threads wait for each other: what they do, and how
MEETINGS = (
    {f"shfl.sync.{mode}.b32": ("shfl", mode) for mode in ("up", "down", "bfly", "idx")}
    | {f"vote.sync.{mode}.pred": ("vote", mode) for mode in ("all", "any", "uni")}
    | {"vote.sync.ballot.b32": ("vote", "ballot")}
    | {f"redux.sync.{mode}.{kind}": ("redux", mode) for mode in ("add", "min", "max") for kind in ("u32", "s32")}
    | {f"redux.sync.{mode}.b32": ("redux", mode) for mode in ("and", "or", "xor")}
    | {"activemask.b32": ("activemask", ""), "bar.warp.sync": ("bar.warp", "")}
    | {f"{bar}.sync": ("bar", "") for bar in ("bar", "bar.cta", "barrier", "barrier.cta")}
    | {f"{bar}.sync.aligned": ("bar", "") for bar in ("barrier", "barrier.cta")}
)
BROUGHT = {"shfl": ("value", "b", "c", "mask"), "vote": ("value", "mask"), "redux": ("value", "mask"), "bar.warp": ("mask",)}

# A thread, as the compiled code and `_meet` both see it. at: 0 at its start, the number of the point where it waits, EXITED or
# ABSENT (the block ends within this warp). The rest is what it brings to the point, and what it gets there.
LANE_FIELDS = ("at", "ready", "b", "c", "mask", "value", "result", "flag")
LANE = np.dtype([(name, "i4" if name in ("at", "ready", "b", "c") else "u4") for name in LANE_FIELDS])
EXITED, ABSENT = -1, -2
ONE_OF = np.uint32(1) << np.arange(WARP, dtype=np.uint32)  # the bit of each lane


class Refused(Exception):
    """The PTX holds something that this translator does not know, or that the arithmetic contract forbids."""


class Incomplete(Exception):
    """Threads wait at a shuffle, a vote or a barrier for others that do not come."""


class Endless(Exception):
    """A kernel that loops for ever."""


class OutsideError(MemoryError):
    """Accesses outside the memory of a kernel. address: that of the first of them."""

    def __init__(self, text, address):
        super().__init__(text)
        self.address = address


class Guarded(NamedTuple):
    """A range of memory that holds allocations. map: the address of a uint16 for each GRAIN bytes: how many of them there are."""

    start: int
    end: int
    map: int


def width(kind):
    """Return the bits of a PTX type: 32 for "f32", "u32", "b32"."""
    if kind not in WIDTHS:
        raise Refused(f"type {kind!r}")
    return WIDTHS[kind]


def loaded(ptx, name=None, strict=True):
    """Return the Kernel of a text. Equal code for several architectures is translated once."""
    return _loaded(re.sub(r"\.(version|target)[^\n]*|//[^\n]*", "", ptx), name, strict)


@functools.cache
def _loaded(ptx, name, strict):
    return Kernel(ptx, name, strict)


class Kernel:
    """One `.entry` of a PTX text: that of a name, or the only one.

    strict: refuse float operations that ptxas could contract. Code of other libraries has them; they are then rounded one by one.

    name, opcodes (a Counter), parameter_sizes (bytes of each). After `run`: loaded_bytes and stored_bytes of global memory.
    """

    def __init__(self, ptx, name=None, strict=True):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
        if name is not None:
            text = _only(text, name)
        entries = re.findall(r"^(.*?)\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)\}", text, re.S)
        if len(entries) != 1 or ".func" in text or text.count(".entry") != 1:
            raise Refused("expected exactly one .entry and no .func")
        before, self.name, parameters, _, body = entries[0]
        parameters = re.sub(r"\.align\s+\d+|\.ptr\b|\.global\b", "", parameters)
        declared = re.findall(r"\.param\s+\.(\w+)\s+(\w+)(?:\[(\d+)\])?", parameters)
        self.parameter_sizes = [width(kind) // 8 * int(count or 1) for kind, _, count in declared]
        shared = [" ".join(x.split()) for x in re.findall(r"(?<!\w)\.shared\b[^;]*", before + body)]
        translation = _Translation([name for _, name, _ in declared], shared, body, strict)
        self.opcodes = translation.opcodes
        self._points, self._shared_bytes = translation.points, translation.shared_bytes
        self._frame_words = translation.frame_words
        self._engine = _compile(translation.module)
        n_pointers = 5 if translation.suspends else 2
        self._launch = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * n_pointers, *[ctypes.c_int32] * 5)(
            self._engine.get_function_address("launch")
        )
        self._suspends = translation.suspends

    def run(self, grid, block, parameters, memory, first_block=0, last_block=None, backwards=False):
        """Run blocks first_block ... last_block - 1 (all by default) of a grid. parameters: bytes of each.

        backwards: run the last thread of a block first. A kernel that lacks a barrier may give something else then.
        Raises Incomplete if threads wait in vain, Endless if they loop without end; at the end, MemoryError if accesses were off.
        Those outside are not done.
        """
        sizes = [len(p) for p in parameters]
        if sizes != self.parameter_sizes:
            raise ValueError(f"parameters have {sizes} bytes, {self.name} takes {self.parameter_sizes}")
        buffers = [ctypes.create_string_buffer(p, len(p)) for p in parameters]
        addresses = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        ranges = [edge if type(edge) is Guarded else Guarded(*edge, 0) for edge in memory]
        edges = [x for edge in ranges if edge.start < edge.end for x in edge]
        bounds = (ctypes.c_int64 * (len(edges) + 3))(*edges, 0, 0, 0)
        counters = {name: self._counter(name) for name in COUNTERS}
        for counter in counters.values():
            counter.value = 0
        # on allocations an access outside ends its thread, as it ends a kernel on a GPU: what it read might be a loop's end
        counters["stops"].value = any(edge.map for edge in ranges)
        last_block = grid if last_block is None else last_block
        if self._suspends:
            self._run_together(addresses, bounds, grid, block, first_block, last_block, backwards)
        else:
            self._launch(addresses, bounds, grid, block, first_block, last_block, backwards)
        self.loaded_bytes, self.stored_bytes = counters["loaded"].value, counters["stored"].value
        if counters["loops"].value > MOST_LOOPS:
            raise Endless(f"{self.name} does not end")
        if counters["misaligned"].value:
            raise MemoryError(f"{counters['misaligned'].value} misaligned accesses")
        if counters["outside"].value:
            text = f"{counters['outside'].value} accesses outside the arrays"
            raise OutsideError(text, counters["outside_at"].value)
        if counters["outside_shared"].value:
            raise MemoryError(f"{counters['outside_shared'].value} accesses outside the variables of shared memory")
        if counters["by_zero"].value:
            raise ZeroDivisionError(f"{counters['by_zero'].value} integer divisions by zero")

    def _run_together(self, addresses, bounds, grid, block, first_block, last_block, backwards):
        """Run every thread to where it waits, let those go on whose partners have come, and so on to the end."""
        warps = -(-block // WARP)
        together = max(1, min(THREADS_TOGETHER // (warps * WARP), last_block - first_block))
        lanes = np.zeros((together, warps * WARP), LANE)
        frames = np.zeros((lanes.size, self._frame_words), "i8")
        shared = np.empty((together, self._shared_bytes), "u1")
        pointers = [a.ctypes.data for a in (lanes, frames, shared)]
        for first in range(first_block, last_block, together):
            last = min(first + together, last_block)
            present = lanes[: last - first]
            present["at"], present["ready"] = ABSENT, 0
            present["at"][:, :block], present["ready"][:, :block] = 0, 1
            shared[...] = 0xFF  # NaN, so that what nobody wrote is noticed
            while True:
                self._launch(addresses, bounds, *pointers, grid, block, first, last, backwards)
                if (present["at"] < 0).all():
                    break
                _meet(present, self._points, first)

    def _counter(self, name):
        return ctypes.c_int64.from_address(self._engine.get_global_value_address(name))


def _only(text, name):
    """Return a PTX text without the kernels of other names."""
    starts = [m.start() for m in re.finditer(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+\w+", text)]
    ends = []
    for start in starts:
        depth = 0
        for m in re.finditer(r"[{}]", text[text.index("{", start) :]):
            depth += 1 if m[0] == "{" else -1
            if not depth:
                ends.append(text.index("{", start) + m.end())
                break
    for start, end in reversed(list(zip(starts, ends, strict=True))):
        if re.match(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)", text[start:])[1] != name:
            text = text[:start] + text[end:]
    return text


# Where threads wait for each other


class Point(NamedTuple):
    """An instruction at which threads wait for each other."""

    operation: str
    mode: str
    opcode: str
    text: str


def _meet(threads, points, first_block):
    """Exchange values between the lanes whose partners have all come, and let these go on.

    threads: LANE array of blocks and their threads. Raises Incomplete if no thread can go on.
    """
    warps = threads.reshape(-1, WARP)
    present = np.bincount(np.maximum(warps["at"], 0).ravel())
    for number in np.flatnonzero(present[1:]) + 1:
        point = points[number - 1]
        if point.operation == "bar":
            here = threads["at"] == number
            threads["ready"] |= here & (here == (threads["at"] >= 0)).all(1, keepdims=True)
        else:
            _exchange(warps, warps["at"] == number, point, first_block, threads.shape[1])
    if not threads["ready"].any():
        raise Incomplete(_who_waits(threads, points, first_block))


def _exchange(warps, here, point, first_block, block):
    """Give the lanes `here` (bools) of a point that are complete what it gives them, and mark them ready."""
    if point.operation == "activemask":
        warps["result"] = np.where(here, _bits(here)[:, None], warps["result"])
        warps["ready"] |= here
        return
    mask = warps["mask"]
    first = np.where(here, mask, 0).max(1, keepdims=True)
    if (here <= (mask == first)).all():
        partners = _bits(here)[:, None]
    else:  # several masks in one warp: a lane's partners gave the same one
        partners = _bits((mask[:, :, None] == mask[:, None, :]) & here[:, None, :])
    warp, lane = np.nonzero(here & (mask & ~partners == 0) & (mask & ONE_OF != 0))
    mask, value = mask[warp, lane], warps["value"]
    if point.operation == "shfl":
        source, flag = _source(point.mode, lane, warps["b"][warp, lane], warps["c"][warp, lane])
        unnamed = (mask & ONE_OF[source]) == 0
        if unnamed.any():
            k = np.flatnonzero(unnamed)[0]
            who = _name(warp[k] * WARP + lane[k], first_block, block)
            raise Incomplete(f"{who} reads lane {source[k]} in `{point.text}`, whose mask {mask[k]:#x} does not name it")
        warps["result"][warp, lane], warps["flag"][warp, lane] = value[warp, source], flag
    elif point.operation == "vote":
        votes = _bits(here & (value != 0))[warp] & mask
        warps["result"][warp, lane] = {
            "all": votes == mask,
            "any": votes != 0,
            "uni": (votes == mask) | (votes == 0),
            "ballot": votes,
        }[point.mode]
    elif point.operation == "redux":
        values = value[warp].view("i4" if point.opcode.endswith("s32") else "u4")
        # a lane that is not named counts as 0, or once more as the lane itself where twice is as good as once
        instead = 0 if point.mode in ("add", "xor") else values[np.arange(lane.size), lane][:, None]
        named = np.where((mask[:, None] & ONE_OF) != 0, values, instead)
        functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
        result = functions.get(point.mode, np.bitwise_xor).reduce(named, 1, dtype=values.dtype)
        warps["result"][warp, lane] = result.view("u4")
    warps["ready"][warp, lane] = 1


def _bits(lanes):
    """Return the bools of the last axis, 32 lanes, as the bits of a number."""
    return (lanes * ONE_OF).sum(-1, dtype=np.uint32)


def _source(mode, lane, b, c):
    """Return the lane that each lane reads in a shuffle, and whether that is within its segment. PTX ISA, `shfl.sync`."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    lowest = lane & segment
    highest = lowest | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    within = source >= highest if mode == "up" else source <= highest
    return np.where(within, source, lane), within


def _who_waits(threads, points, first_block):
    """Say for whom the first waiting thread waits."""
    block, thread = np.argwhere(threads["at"] > 0)[0]
    number = threads["at"][block, thread]
    point, mask = points[number - 1], int(threads["mask"][block, thread])
    who = _name(block * threads.shape[1] + thread, first_block, threads.shape[1])
    if point.operation == "bar":
        others, given = np.flatnonzero(threads["at"][block] >= 0), ""
    else:
        if not mask >> thread % WARP & 1:
            return f"{who} is not in the mask {mask:#x} of its `{point.text}`"
        others, given = [thread - thread % WARP + k for k in range(WARP) if mask >> k & 1], f" with the mask {mask:#x}"
    other = next(k for k in others if threads["at"][block, k] != number or (given and threads["mask"][block, k] != mask))
    at = threads["at"][block, other]
    states = {
        EXITED: "has exited",
        ABSENT: "is not in the block",
        number: f"has the mask {threads['mask'][block, other]:#x}",
    }
    where = states.get(at) or f"waits at `{points[at - 1].text}`"
    return f"{who} waits at `{point.text}`{given} for thread {other}, which {where}"


def _name(index, first_block, block):
    return f"thread {index % block} of block {first_block + index // block}"


# PTX to LLVM IR


def _compile(module):
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=0
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    text = str(module)
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    engine = llvm.create_mcjit_compiler(parsed, machine)
    # the engine holds on to its key, not to megabytes of text
    digest = hashlib.sha256(text.encode()).hexdigest()
    key = (digest, llvmlite.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    engine.set_object_cache(lambda _, code: kept.put("llvm", key, code), lambda _: kept.get("llvm", key))
    engine.finalize_object()
    return engine


class _Translation:
    """One kernel as an LLVM module. Every register is a slot of integer bits.

    The slots of a kernel that never waits are on the stack. A thread that waits returns, so the slots of the others are in a
    frame of its own, and so is where to go on.
    """

    def __init__(self, parameter_names, shared, body, strict=True):
        self.parameter_names, self.strict = parameter_names, strict
        self.opcodes = Counter()
        self.module = ir.Module()
        self.counters = {}
        for name in COUNTERS:
            self.counters[name] = ir.GlobalVariable(self.module, I64, name)
            self.counters[name].initializer = I64(0)
        self.inside = self._inside_function()
        self.suspends = bool(shared) or any(opcode in body for opcode in MEETINGS)
        self.points, self.resumed, self.frame_words = [], [], 0
        self.symbols, self.shared_bytes = {}, 0
        self.shared_ranges = self.declare_shared(shared)
        words, pointers = I32.as_pointer(), I64.as_pointer()
        state = [words, pointers, I8.as_pointer()] if self.suspends else []
        self.thread = ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), [pointers, pointers, *state, *[I32] * 4]), "thread"
        )
        self.thread.linkage = "internal"
        self.parameters, self.ranges, *state = self.thread.args[:-4]
        self.lane, self.frame, self.shared = state or [None] * 3
        self.special = dict(zip(SPECIAL, self.thread.args[-4:], strict=True))
        self.entry = ir.IRBuilder(self.thread.append_basic_block("entry"))
        self.clock = None
        self.special["laneid"] = self.entry.and_(self.special["tid.x"], I32(WARP - 1))
        self.b = ir.IRBuilder(self.thread.append_basic_block("body"))
        first, self.labels, self.passed, self.scopes = self.b.block, {}, set(), [{}]
        for statement in _statements(body):
            self.statement(statement)
        if not self.b.block.is_terminated:
            self.exit()
        if self.suspends:
            switch = self.entry.switch(self.entry.load(self.field("at", self.entry)), first)
            for number, block in enumerate(self.resumed, 1):
                switch.add_case(I32(number), block)
        else:
            self.entry.branch(first)
        self._launch_loop()

    # Statements

    def statement(self, text):
        if text == "{":
            self.scopes.append({})
        elif text == "}":
            self.scopes.pop()
        elif text.endswith(":"):
            block = self.label(text[:-1])
            self.passed.add(text[:-1])
            if not self.b.block.is_terminated:
                self.b.branch(block)
            self.b.position_at_end(block)
        elif text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".pragma", ".loc", ".file", ".shared")):
            pass
        elif text.startswith("."):
            raise Refused(text)
        else:
            self.guarded(text)

    def declare(self, text):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in names.split(","):
            stem, count = re.fullmatch(r"\s*([%\w$]+?)(?:<(\d+)>)?\s*", name).groups()
            for register in [stem] if count is None else [f"{stem}{k}" for k in range(int(count))]:
                self.scopes[-1][register] = self.new_slot(ir.IntType(width(kind)))

    def new_slot(self, bits):
        if not self.suspends:
            return self.entry.alloca(bits)
        self.frame_words += 1
        return self.entry.bitcast(self.entry.gep(self.frame, [I32(self.frame_words - 1)]), bits.as_pointer())

    def declare_shared(self, declarations):
        """Lay out the variables of shared memory. An address there is an offset, as on a GPU. Returns the table of ranges."""
        edges = []
        for text in declarations:
            declared = re.fullmatch(r"\.shared (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?", text)
            if not declared or declared[3] in self.symbols:
                raise Refused(text)
            align, kind, name, count = declared.groups()
            size, align = width(kind) // 8 * int(count or 1), int(align or width(kind) // 8)
            # a gap before each variable, so that what runs over the end of another is noticed
            start = -(-(self.shared_bytes + SHARED_GAP) // align) * align
            self.symbols[name], self.shared_bytes = start, start + size
            edges += [start, start + size, 0]
        table = ir.GlobalVariable(self.module, ir.ArrayType(I64, len(edges) + 3), "shared_ranges")
        table.initializer = ir.Constant(table.value_type, [*edges, 0, 0, 0])
        return table.bitcast(I64.as_pointer())

    def guarded(self, text):
        guard, opcode, operands = re.fullmatch(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
        self.opcodes[opcode] += 1
        operands = [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", operands)] if operands else []
        if guard is None:
            self.instruction(opcode, operands, text)
            return
        then, after = (self.thread.append_basic_block() for _ in range(2))
        self.b.cbranch(self.condition(guard), then, after)
        self.b.position_at_end(then)
        self.instruction(opcode, operands, text)
        if not self.b.block.is_terminated:
            self.b.branch(after)
        self.b.position_at_end(after)

    def label(self, name):
        if name not in self.labels:
            self.labels[name] = self.thread.append_basic_block()
        return self.labels[name]

    def exit(self):
        if self.suspends:
            self.b.store(I32(EXITED), self.field("at"))
        self.b.ret_void()

    # Operands

    def slot(self, register):
        for scope in reversed(self.scopes):
            if register in scope:
                return scope[register]
        raise Refused(f"operand {register}")

    def read(self, operand, kind):
        """Return an operand as an integer of `kind`: a register (its low bits), a special register or a constant."""
        if operand.startswith("%") and operand[1:] in self.special:
            value = self.special[operand[1:]]
        elif operand == "%clock64":
            value = self.ticked()
        elif operand == "WARP_SZ":
            return kind(WARP)
        elif operand in self.symbols:
            return kind(self.symbols[operand])
        elif re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", operand):
            return kind(int(operand.rstrip("U"), 0) % (1 << kind.width))
        elif re.fullmatch(r"0[fF][\da-fA-F]{8}|0[dD][\da-fA-F]{16}", operand):
            return kind(int(operand[2:], 16))
        else:
            value = self.b.load(self.slot(operand))
        return self.resized(value, kind)

    def ticked(self):
        """Return the time, which goes on by a second or so between two looks: a thread that waits for it waits no longer."""
        if self.clock is None:
            self.clock = ir.GlobalVariable(self.module, I64, "clock")
            self.clock.initializer = I64(0)
        now = self.b.add(self.b.load(self.clock), I64(1 << 31))
        self.b.store(now, self.clock)
        return now

    def condition(self, operand):
        """Return a predicate, or the opposite of a "!predicate"."""
        value = self.read(operand.lstrip("!"), I1)
        return self.b.not_(value) if operand.startswith("!") else value

    def resized(self, value, kind, signed=False):
        if value.type.width > kind.width:
            return self.b.trunc(value, kind)
        if value.type.width < kind.width:
            return self.b.sext(value, kind) if signed else self.b.zext(value, kind)
        return value

    def write(self, register, value, signed=False):
        if register != "_":
            slot = self.slot(register)
            self.b.store(self.resized(value, slot.type.pointee, signed), slot)

    def read_float(self, operand, kind, ftz):
        bits = self.read(operand, ir.IntType(width(kind)))
        if kind in ("f16", "bf16"):
            bits = self.widened(bits, kind)
            kind = "f32"
        return self.b.bitcast(self.flushed(bits) if ftz else bits, FLOATS[kind])

    def write_float(self, register, value, kind, ftz):
        bits = self.b.bitcast(value, ir.IntType(width(kind)))
        self.write(register, self.flushed(bits) if ftz else bits)

    def flushed(self, bits):
        subnormal = self.b.icmp_unsigned("==", self.b.and_(bits, I32(0x7F800000)), I32(0))
        return self.b.select(subnormal, self.b.and_(bits, I32(0x80000000)), bits)

    def intrinsic(self, name, result, *arguments):
        kinds = [x.type for x in arguments]
        overloads = kinds[:1] if result == kinds[0] else [result, kinds[0]]
        return self.b.call(self.module.declare_intrinsic(name, overloads, ir.FunctionType(result, kinds)), arguments)

    # Instructions

    def instruction(self, opcode, operands, text):
        operation, *modifiers = opcode.split(".")
        kind = modifiers[-1] if modifiers else ""
        if operation in ("ret", "exit"):
            self.exit()
        elif operation == "bra":
            label = self.label(operands[0])
            if operands[0] in self.passed:
                self.count("loops", I64(1))
                endless = self.b.icmp_unsigned(">", self.b.load(self.counters["loops"]), I64(MOST_LOOPS))
                with self.b.if_then(endless, likely=False):
                    self.exit()
            self.b.branch(label)
        elif operation in ("ld", "st"):
            self.memory(opcode, operation, modifiers, operands)
        elif operation == "mov":
            self.move(opcode, modifiers, operands)
        elif opcode in ("cvta.to.global.u64", "cvta.global.u64"):
            self.write(operands[0], self.read(operands[1], I64))
        elif opcode in MEETINGS:
            self.meet(opcode, operands, text)
        elif operation == "selp":
            bits = ir.IntType(width(kind))
            chosen = self.b.select(self.condition(operands[3]), *(self.read(x, bits) for x in operands[1:3]))
            self.write(operands[0], chosen)
        elif operation == "setp":
            self.set_predicate(opcode, modifiers, operands)
        elif operation == "set":
            self.set_number(opcode, modifiers, operands)
        elif operation == "cvt":
            self.convert(opcode, modifiers, operands)
        elif kind in FLOATS or kind in ("f16", "bf16"):
            self.float_arithmetic(opcode, operation, modifiers, operands)
        else:
            self.integer_arithmetic(opcode, operation, modifiers, operands)

    def move(self, opcode, modifiers, operands):
        if len(modifiers) != 1:
            raise Refused(opcode)
        bits = ir.IntType(width(modifiers[0]))
        if operands[0].startswith("{"):  # unpack, the lowest bits first
            value, parts = self.read(operands[1], bits), _listed(operands[0])
            part = ir.IntType(bits.width // len(parts))
            for k, register in enumerate(parts):
                self.write(register, self.b.trunc(self.b.lshr(value, bits(k * part.width)), part))
        elif operands[1].startswith("{"):
            parts = _listed(operands[1])
            part, value = ir.IntType(bits.width // len(parts)), bits(0)
            for k, register in enumerate(parts):
                value = self.b.or_(value, self.b.shl(self.resized(self.read(register, part), bits), bits(k * part.width)))
            self.write(operands[0], value)
        else:
            self.write(operands[0], self.read(operands[1], bits))

    # Memory

    def memory(self, opcode, operation, modifiers, operands):
        kind, known = modifiers[-1], {"param", "global", "shared", "v2", "v4", "nc", "cs"}  # cs: a hint to the caches
        space = {"param", "global", "shared"} & set(modifiers)
        if not set(modifiers[:-1]) <= known or len(space) != 1 or (operation == "st" and "param" in space):
            raise Refused(f"{opcode}: not a plain access of global or shared memory or of a parameter")
        lanes = next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1)
        registers, address = operands if operation == "ld" else reversed(operands)
        registers = _listed(registers)
        bits = ir.IntType(width(kind))
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", address).groups()
        if "param" in space:
            if base not in self.parameter_names:
                raise Refused(f"{opcode} {address}: not the name of a parameter")
            at = self.b.load(self.b.gep(self.parameters, [I32(self.parameter_names.index(base))]))
        else:
            at = self.read(base, I64)
        at = self.b.add(at, I64(int(offset or 0)))
        if "param" not in space:
            at = self.checked(operation, at, lanes * bits.width // 8, "shared" in space)
        for k, register in enumerate(registers):
            pointer = self.b.inttoptr(self.b.add(at, I64(k * bits.width // 8)), bits.as_pointer())
            if operation == "ld":
                self.write(register, self.b.load(pointer, align=1), signed=kind[0] == "s")
            else:
                self.b.store(self.read(register, bits), pointer, align=1)

    def checked(self, operation, at, n_bytes, shared):
        """Count an access. Return its address on the host: of `nowhere` if the kernel may not touch it."""
        b, ranges = self.b, self.shared_ranges if shared else self.ranges
        inside = b.call(self.inside, [ranges, at, I64(n_bytes)])
        self.count("outside_shared" if shared else "outside", b.zext(b.not_(inside), I64))
        if not shared:
            first = b.load(self.counters["outside_at"])
            here = b.or_(inside, b.icmp_unsigned("!=", first, I64(0)))
            b.store(b.select(here, first, at), self.counters["outside_at"])
            stops = b.and_(b.not_(inside), b.icmp_unsigned("!=", b.load(self.counters["stops"]), I64(0)))
            with b.if_then(stops, likely=False):
                self.exit()
        off = b.icmp_unsigned("!=", b.and_(at, I64(n_bytes - 1)), I64(0))
        self.count("misaligned", b.zext(off, I64))
        if shared:
            at = b.add(at, b.ptrtoint(self.shared, I64))
        else:
            self.count("loaded" if operation == "ld" else "stored", I64(n_bytes))
        return b.select(inside, at, b.ptrtoint(self.nowhere(operation), I64))

    def nowhere(self, operation):
        """Return 32 bytes that are zeros to a load, and take what is stored."""
        name = f"nowhere_{operation}"
        if name not in self.module.globals:
            room = ir.GlobalVariable(self.module, ir.ArrayType(I64, 4), name)
            room.initializer = ir.Constant(room.value_type, [0] * 4)
        return self.module.globals[name]

    def _inside_function(self):
        """inside(ranges, at, n_bytes): whether one of the ranges, which one of zeros ends, holds these bytes.

        Of a range with a map of its allocations, whether the map has them. They are aligned, so that one entry holds them all.
        """
        pointers = I64.as_pointer()
        function = ir.Function(self.module, ir.FunctionType(I1, [pointers, I64, I64]), "inside")
        function.linkage = "internal"
        ranges, at, n_bytes = function.args
        start_block, head, body, found, mapped, yes, lost = (function.append_basic_block() for _ in range(7))
        ir.IRBuilder(start_block).branch(head)
        b = ir.IRBuilder(head)
        k = b.phi(I32)
        k.add_incoming(I32(0), start_block)
        start, end, map = (b.load(b.gep(ranges, [b.add(k, I32(j))])) for j in range(3))
        b.cbranch(b.icmp_unsigned("==", end, I64(0)), lost, body)
        b.position_at_end(body)
        size = b.sub(end, start)
        # no sum of an address, which could wrap; an address before the start is far behind it
        within = b.and_(b.icmp_unsigned("<=", n_bytes, size), b.icmp_unsigned("<=", b.sub(at, start), b.sub(size, n_bytes)))
        k.add_incoming(b.add(k, I32(3)), body)
        b.cbranch(within, found, head)
        b.position_at_end(found)
        past = b.sub(at, start)
        b.cbranch(b.icmp_unsigned("!=", map, I64(0)), mapped, yes)
        ir.IRBuilder(yes).ret(I1(1))
        b.position_at_end(mapped)
        shift = I64(GRAIN.bit_length() - 1)
        entry = b.inttoptr(b.add(map, b.shl(b.lshr(past, shift), I64(1))), I16.as_pointer())
        last = b.add(b.and_(past, I64(GRAIN - 1)), n_bytes)
        b.ret(b.icmp_unsigned("<=", last, b.zext(b.load(entry), I64)))
        ir.IRBuilder(lost).ret(I1(0))
        return function

    def count(self, name, amount):
        self.b.store(self.b.add(self.b.load(self.counters[name]), amount), self.counters[name])

    # Waiting for other threads

    def meet(self, opcode, operands, text):
        """Leave in LANE what a thread brings to a point, return, and go on from here with what `_meet` put there."""
        operation, mode = MEETINGS[opcode]
        if operation == "bar" and operands != ["0"]:
            raise Refused(f"{text}: not the barrier 0 of all threads of a block")
        results, given = ([], operands) if operation in ("bar", "bar.warp") else (operands[0].split("|"), operands[1:])
        for name, operand in zip(BROUGHT.get(operation, ()), given, strict=False):
            value = self.condition(operand) if operation == "vote" and name == "value" else self.read(operand, I32)
            self.b.store(self.resized(value, I32), self.field(name))
        self.points.append(Point(operation, mode, opcode, text))
        self.b.store(I32(len(self.points)), self.field("at"))
        self.b.ret_void()
        self.resumed.append(self.thread.append_basic_block())
        self.b.position_at_end(self.resumed[-1])
        for register, name in zip(results, ("result", "flag"), strict=False):
            self.write(register.strip(), self.b.load(self.field(name)))

    def field(self, name, builder=None):
        return (builder or self.b).gep(self.lane, [I32(LANE_FIELDS.index(name))])

    # Comparisons

    def compared(self, opcode, comparison, kind, ftz, operands):
        b = self.b
        if kind in FLOATS:
            x, y = (self.read_float(o, kind, ftz) for o in operands)
            if comparison in COMPARISONS:
                return b.fcmp_ordered(COMPARISONS[comparison], x, y)
            if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
                return b.fcmp_unordered(COMPARISONS[comparison[:-1]], x, y)
            if comparison in ("nan", "num"):
                return b.fcmp_unordered("uno", x, y) if comparison == "nan" else b.fcmp_ordered("ord", x, y)
            raise Refused(opcode)
        x, y = (self.read(o, _integer(kind, opcode)) for o in operands)
        if comparison in UNSIGNED_COMPARISONS:
            return b.icmp_unsigned(UNSIGNED_COMPARISONS[comparison], x, y)
        if comparison not in COMPARISONS:
            raise Refused(opcode)
        return (b.icmp_signed if kind[0] == "s" else b.icmp_unsigned)(COMPARISONS[comparison], x, y)

    def set_predicate(self, opcode, modifiers, operands):
        """setp: also two predicates (p|q, the second of the opposite), and the result combined with a third."""
        comparison, *rest, kind = modifiers
        combine = next((m for m in rest if m in ("and", "or", "xor")), None)
        if [m for m in rest if m != combine] not in ([], ["ftz"]) or len(operands) != (4 if combine else 3):
            raise Refused(opcode)
        result = self.compared(opcode, comparison, kind, "ftz" in rest, operands[1:3])
        results = [result, self.b.not_(result)]
        if combine:
            other = self.condition(operands[3])
            operation = {"and": self.b.and_, "or": self.b.or_, "xor": self.b.xor}[combine]
            results = [operation(r, other) for r in results]
        for register, result in zip(operands[0].split("|"), results, strict=False):
            self.write(register.strip(), result)

    def set_number(self, opcode, modifiers, operands):
        """set: all bits, or 1.0, for true."""
        comparison, *rest, to, kind = modifiers
        if rest not in ([], ["ftz"]) or to not in ("u32", "s32", "f32") or len(operands) != 3:
            raise Refused(opcode)
        result = self.compared(opcode, comparison, kind, bool(rest), operands[1:])
        self.write(operands[0], self.b.select(result, I32(0x3F800000 if to == "f32" else -1), I32(0)))

    # Conversions

    def convert(self, opcode, modifiers, operands):
        *rounding, to, source = modifiers
        plain = [m for m in rounding if m != "ftz"]
        if plain != rounding and source != "f32" and (self.strict or to != "f32"):
            raise Refused(opcode)
        if "sat" in rounding and not self.strict and (to, source) == ("f32", "f32"):
            x = self.read_float(operands[1], source, True)
            zero, one = x.type(0.0), x.type(1.0)
            x = self.b.select(self.b.fcmp_ordered(">", x, zero), x, zero)  # NaN becomes 0
            self.write_float(operands[0], self.b.select(self.b.fcmp_ordered("<", x, one), x, one), to, True)
            return
        if to in INTEGERS and source in INTEGERS and not rounding:
            value = self.read(operands[1], _integer(source, opcode))
            value = self.resized(value, _integer(to, opcode), signed=source[0] == "s")
            self.write(operands[0], value, signed=to[0] == "s")
        elif to in FLOATS and source in INTEGERS and plain == ["rn"]:
            value = self.read(operands[1], _integer(source, opcode))
            converted = (self.b.sitofp if source[0] == "s" else self.b.uitofp)(value, FLOATS[to])
            self.write_float(operands[0], converted, to, False)
        elif to in INTEGERS and source in FLOATS and len(plain) == 1 and plain[0] in ROUNDINGS:
            self.write(
                operands[0], self.float_to_integer(operands[1], plain[0], to, source, "ftz" in rounding), to[0] == "s"
            )
        elif to == source and to in FLOATS and len(plain) == 1 and plain[0] in ROUNDINGS:
            x = self.read_float(operands[1], source, "ftz" in rounding)
            self.write_float(operands[0], self.intrinsic(f"llvm.{ROUNDINGS[plain[0]]}", x.type, x), to, False)
        elif (to, source, *plain) in (("f32", "f64", "rn"), ("f64", "f32")):
            x = self.read_float(operands[1], source, "ftz" in rounding and source == "f32")
            converted = self.b.fptrunc(x, FLOATS[to]) if to == "f32" else self.b.fpext(x, FLOATS[to])
            self.write_float(operands[0], converted, to, "ftz" in rounding and to == "f32")
        elif opcode in ("cvt.f32.f16", "cvt.f32.bf16", "cvt.ftz.f32.f16"):  # no half is subnormal as a float32
            self.write(operands[0], self.widened(self.read(operands[1], I16), source))
        elif opcode in ("cvt.rn.f16.f32", "cvt.rn.bf16.f32"):
            self.write(operands[0], self.narrowed(self.read(operands[1], I32), to))
        elif opcode in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):  # the first into the high half
            high, low = (self.resized(self.narrowed(self.read(x, I32), to[:-2]), I32) for x in operands[1:])
            self.write(operands[0], self.b.or_(self.b.shl(high, I32(16)), low))
        else:
            raise Refused(opcode)

    def float_to_integer(self, operand, rounding, to, source, ftz):
        """Return the nearest integer in that direction, the least or greatest of the type beyond it. PTX ISA, `cvt`."""
        b, bits = self.b, _integer(to, to)
        x = self.read_float(operand, source, ftz)
        rounded = self.intrinsic(f"llvm.{ROUNDINGS[rounding]}", x.type, x)
        result = self.intrinsic(f"llvm.fpto{to[0]}i.sat", bits, rounded)  # NaN becomes 0
        if source == "f64" or bits.width == 64:
            result = b.select(b.fcmp_unordered("uno", x, x), bits(1 << bits.width - 1), result)
        return result

    def widened(self, x, kind):
        """Return the bits of a 16-bit float as those of a float32. LLVM's own half needs F16C, and its bfloat flushes."""
        b = self.b
        x = b.zext(x, I32)
        if kind == "bf16":
            return b.shl(x, I32(16))
        exponent, fraction = b.and_(x, I32(0x7C00)), b.and_(x, I32(0x3FF))
        magnitude = b.shl(b.and_(x, I32(0x7FFF)), I32(13))
        subnormal = b.bitcast(b.fmul(b.uitofp(fraction, FLOATS["f32"]), FLOATS["f32"](2.0**-24)), I32)  # exact
        value = b.select(
            b.icmp_unsigned("==", exponent, I32(0)),
            subnormal,
            b.add(magnitude, b.select(b.icmp_unsigned("==", exponent, I32(0x7C00)), I32(224 << 23), I32(112 << 23))),
        )
        return b.or_(value, b.shl(b.and_(x, I32(0x8000)), I32(16)))

    def narrowed(self, x, kind):
        """Return the bits of a float32 as those of a 16-bit float, to nearest even. Every NaN becomes 0x7FFF: PTX ISA, `cvt`."""
        b = self.b

        def halved(value, shift):
            """Divide by 2**shift, shift in 1 ... 31, to nearest even."""
            quotient = b.lshr(value, shift)
            below_half = b.sub(b.shl(I32(1), b.sub(shift, I32(1))), I32(1))
            carry = b.add(b.add(value, below_half), b.and_(quotient, I32(1)))
            return b.lshr(carry, shift)

        magnitude = b.and_(x, I32(0x7FFFFFFF))
        sign = b.and_(b.lshr(x, I32(16)), I32(0x8000))
        if kind == "bf16":
            value = halved(magnitude, I32(16))
        else:
            normal = halved(b.sub(magnitude, I32(112 << 23)), I32(13))
            # below 2**-14 a half counts in steps of 2**-24; what a shift by 31 makes of much smaller numbers is 0, as it should
            shift = b.sub(I32(126), b.lshr(magnitude, I32(23)))
            shift = b.select(b.icmp_unsigned("<", shift, I32(31)), shift, I32(31))
            steps = halved(b.or_(b.and_(magnitude, I32(0x7FFFFF)), I32(0x800000)), shift)
            value = b.select(b.icmp_unsigned("<", magnitude, I32(113 << 23)), steps, normal)
            value = b.select(b.icmp_unsigned(">=", magnitude, I32(0x477FF000)), I32(0x7C00), value)
        is_nan = b.icmp_unsigned(">", magnitude, I32(0x7F800000))
        return b.trunc(b.select(is_nan, I32(0x7FFF), b.or_(value, sign)), I16)

    # Arithmetic

    def float_arithmetic(self, opcode, operation, modifiers, operands):
        kind, ftz, b = modifiers[-1], "ftz" in modifiers, self.b
        kinds = [kind] * len(operands[1:])
        if modifiers in (["rn", "f32", "f16"], ["rn", "f32", "bf16"]) and operation in ("add", "sub", "fma"):
            # all but the last widened, which is exact
            modifiers, kind, kinds[-1] = ["rn", "f32"], "f32", "f32"
        rounded = {"fma", "add", "sub", "mul", "div", "sqrt", "rcp"}
        expected = {"rn"} if operation in rounded else set()
        known = kind in FLOATS and operation in rounded | {"neg", "abs"}
        if not self.strict and operation in ("add", "sub", "mul", "div", "sqrt", "rcp") and "rn" not in modifiers:
            # bare ones, rounded by themselves; approximate ones, as exactly as can be
            modifiers = ["rn", *(m for m in modifiers if m not in ("full", "approx"))]
        if set(modifiers[:-1]) - {"ftz"} != expected or not known:
            raise Refused(f"{opcode}: each operation must be one that the contract knows, rounded to nearest even by .rn")
        x = [self.read_float(o, k, ftz) for o, k in zip(operands[1:], kinds, strict=True)]
        result = {
            "fma": lambda: b.fma(*x),
            "add": lambda: b.fadd(*x),
            "sub": lambda: b.fsub(*x),
            "mul": lambda: b.fmul(*x),
            "div": lambda: b.fdiv(*x),
            "rcp": lambda: b.fdiv(x[0].type(1.0), *x),
            "sqrt": lambda: self.intrinsic("llvm.sqrt", x[0].type, *x),
            "neg": lambda: b.fneg(*x),
            "abs": lambda: self.intrinsic("llvm.fabs", x[0].type, *x),
        }[operation]()
        self.write_float(operands[0], result, kind, ftz)

    def integer_arithmetic(self, opcode, operation, modifiers, operands):
        b = self.b
        if opcode == "prmt.b32":
            self.write(operands[0], self.permuted(*(self.read(o, I32) for o in operands[1:])))
            return
        if opcode == "lop3.b32":
            self.write(operands[0], self.looked_up(int(operands[4], 0), *(self.read(o, I32) for o in operands[1:4])))
            return
        if re.fullmatch(r"shf\.[lr]\.(wrap|clamp)\.b32", opcode):
            self.write(operands[0], self.funnel_shifted(*modifiers[:2], *(self.read(o, I32) for o in operands[1:])))
            return
        if opcode.startswith("bfind.shiftamt."):
            operation, modifiers = "bfind.shiftamt", modifiers[1:]
        *forms, kind = modifiers or [""]
        if len(forms) != (operation in ("mul", "mad")) or not set(forms) <= {"lo", "hi", "wide"}:
            raise Refused(opcode)
        bits, signed = _integer(kind, opcode), kind[0] == "s"
        x = self.read(operands[1], bits)
        if operation in ("mul", "mad"):
            double = ir.IntType(2 * bits.width)
            product = b.mul(*(self.resized(self.read(o, bits), double, signed) for o in operands[1:3]))
            if forms == ["hi"]:
                product = b.lshr(product, double(bits.width))
            result = product if forms == ["wide"] else b.trunc(product, bits)
            self.write(operands[0], b.add(result, self.read(operands[3], result.type)) if operation == "mad" else result)
            return
        if operation in ("bfe", "bfi"):
            self.write(operands[0], self.bit_field(operation, bits, signed, operands[1:]))
            return
        # the amount of a shift has 32 bits, whatever is shifted
        y = self.read(operands[2], I32 if operation in ("shl", "shr") else bits) if len(operands) > 2 else None
        less = b.icmp_signed if signed else b.icmp_unsigned
        operations = {
            "add": lambda: b.add(x, y),
            "sub": lambda: b.sub(x, y),
            "div": lambda: self.quotient("div", x, y, signed),
            "rem": lambda: self.quotient("rem", x, y, signed),
            "min": lambda: b.select(less("<", x, y), x, y),
            "max": lambda: b.select(less(">", x, y), x, y),
            "and": lambda: b.and_(x, y),
            "or": lambda: b.or_(x, y),
            "xor": lambda: b.xor(x, y),
            "not": lambda: b.not_(x),
            "neg": lambda: b.neg(x),
            "abs": lambda: b.select(b.icmp_signed("<", x, bits(0)), b.neg(x), x),
            "popc": lambda: self.intrinsic("llvm.ctpop", bits, x),
            "clz": lambda: self.leading_zeros(x),
            "brev": lambda: self.intrinsic("llvm.bitreverse", bits, x),
            "bfind": lambda: self.highest_bit(x, signed, from_top=False),
            "bfind.shiftamt": lambda: self.highest_bit(x, signed, from_top=True),
            "shl": lambda: self.shifted_left(x, y),
            "shr": lambda: self.shifted_right(x, y, signed),
        }
        if operation not in operations:
            raise Refused(opcode)
        self.write(operands[0], operations[operation]())

    def shifted_left(self, x, amount):
        """A shift by the width or more gives 0 in PTX, and nothing defined in LLVM."""
        too_far = self.b.icmp_unsigned(">=", amount, amount.type(x.type.width))
        return self.b.select(too_far, x.type(0), self.b.shl(x, self.resized(amount, x.type)))

    def shifted_right(self, x, amount, signed):
        too_far = self.b.icmp_unsigned(">=", amount, amount.type(x.type.width))
        if signed:
            amount = self.b.select(too_far, amount.type(x.type.width - 1), amount)
            return self.b.ashr(x, self.resized(amount, x.type))
        return self.b.select(too_far, x.type(0), self.b.lshr(x, self.resized(amount, x.type)))

    def quotient(self, operation, x, y, signed):
        """Divide, where the host would trap: by 0, which is counted, and the least integer by -1, which overflows."""
        b, bits = self.b, x.type
        zero, minus_one = b.icmp_unsigned("==", y, bits(0)), b.icmp_unsigned("==", y, bits(-1))
        self.count("by_zero", b.zext(zero, I64))
        if not signed:
            y = b.select(zero, bits(1), y)
            return b.udiv(x, y) if operation == "div" else b.urem(x, y)
        y = b.select(b.or_(zero, minus_one), bits(1), y)
        by_minus_one, otherwise = (b.neg(x), b.sdiv(x, y)) if operation == "div" else (bits(0), b.srem(x, y))
        return b.select(minus_one, by_minus_one, otherwise)

    def leading_zeros(self, x):
        kinds = [x.type, I1]
        return self.b.call(self.module.declare_intrinsic("llvm.ctlz", [x.type], ir.FunctionType(x.type, kinds)), [x, I1(0)])

    def highest_bit(self, x, signed, from_top):
        """Return the place of the highest bit that is not the sign, counted from the top or from 0; -1 if there is none."""
        b, bits = self.b, x.type
        if signed:
            x = b.xor(x, b.ashr(x, bits(bits.width - 1)))
        zeros = self.leading_zeros(x)
        place = zeros if from_top else b.sub(bits(bits.width - 1), zeros)
        return self.resized(b.select(b.icmp_unsigned("==", x, bits(0)), bits(-1), place), I32)

    def bit_field(self, operation, bits, signed, operands):
        """bfe: take out n bits from a position on, the sign extended. bfi: put them into another number. PTX ISA."""
        b = self.b
        x = self.read(operands[0], bits)
        at, n = (b.and_(self.read(o, I32), I32(0xFF)) for o in operands[-2:])
        mask = b.not_(self.shifted_left(bits(-1), n))
        if operation == "bfi":
            into, mask = self.read(operands[1], bits), self.shifted_left(mask, at)
            return b.or_(b.and_(self.shifted_left(x, at), mask), b.and_(into, b.not_(mask)))
        field = b.and_(self.shifted_right(x, at, signed), mask)
        if not signed:
            return field
        # the sign is bit n - 1 of the field: nothing of it is left above the whole width or of an empty field
        above = b.select(b.icmp_unsigned("<", n, I32(bits.width)), b.sub(I32(bits.width), n), I32(0))
        return self.shifted_right(self.shifted_left(field, above), above, True)

    def permuted(self, x, y, selector):
        """prmt: byte k is the byte of the eight in (y, x) that nibble k selects; its top bit asks for the sign alone."""
        b, result = self.b, I32(0)
        both = b.or_(b.shl(b.zext(y, I64), I64(32)), b.zext(x, I64))
        for k in range(4):
            nibble = b.lshr(selector, I32(4 * k))
            at = b.zext(b.shl(b.and_(nibble, I32(7)), I32(3)), I64)
            byte = b.trunc(b.lshr(both, at), I8)
            sign = b.icmp_unsigned("!=", b.and_(nibble, I32(8)), I32(0))
            byte = b.select(sign, b.ashr(byte, I8(7)), byte)
            result = b.or_(result, b.shl(b.zext(byte, I32), I32(8 * k)))
        return result

    def looked_up(self, table, x, y, z):
        """lop3: bit 4 x + 2 y + z of the table, for each bit of the three."""
        b, result = self.b, I32(0)
        for k in range(8):
            if table >> k & 1:
                terms = [v if k >> place & 1 else b.not_(v) for v, place in ((x, 2), (y, 1), (z, 0))]
                result = b.or_(result, b.and_(b.and_(*terms[:2]), terms[2]))
        return result

    def funnel_shifted(self, direction, mode, low, high, amount):
        b = self.b
        both = b.or_(b.shl(b.zext(high, I64), I64(32)), b.zext(low, I64))
        most = b.select(b.icmp_unsigned("<", amount, I32(32)), amount, I32(32))
        amount = b.and_(amount, I32(31)) if mode == "wrap" else most
        amount = b.zext(amount, I64)
        if direction == "l":
            return b.trunc(b.lshr(b.shl(both, amount), I64(32)), I32)
        return b.trunc(b.lshr(both, amount), I32)

    # The grid

    def _launch_loop(self):
        """launch(parameters, ranges, grid, block, first_block, last_block, backwards): every thread in turn.

        With pointers to LANE, frames and shared memory after the first two: every thread that is ready, up to where it waits.
        """
        words, pointers = I32.as_pointer(), I64.as_pointer()
        state = [words, pointers, I8.as_pointer()] if self.suspends else []
        launch = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [pointers, pointers, *state, *[I32] * 5]), "launch")
        parameters, ranges, *state = launch.args[:-5]
        grid, block, first, last, backwards = launch.args[-5:]
        b = ir.IRBuilder(launch.append_basic_block())

        def loop(start, end, body):
            before, head, inside, after = b.block, *(launch.append_basic_block() for _ in range(3))
            b.branch(head)
            b.position_at_end(head)
            k = b.phi(I32)
            k.add_incoming(start, before)
            b.cbranch(b.icmp_signed("<", k, end), inside, after)
            b.position_at_end(inside)
            body(k)
            k.add_incoming(b.add(k, I32(1)), b.block)
            b.branch(head)
            b.position_at_end(after)

        def run_thread(k, blk):
            tid = b.select(b.icmp_unsigned("!=", backwards, I32(0)), b.sub(b.sub(block, I32(1)), k), k)
            if not self.suspends:
                b.call(self.thread, [parameters, ranges, tid, block, blk, grid])
                return
            lanes, frames, shared = state
            in_block = b.and_(b.add(block, I32(WARP - 1)), I32(-WARP))
            number = b.add(b.mul(b.sub(blk, first), in_block), tid)
            lane = b.gep(lanes, [b.mul(number, I32(len(LANE_FIELDS)))])
            ready = b.gep(lane, [I32(LANE_FIELDS.index("ready"))])
            with b.if_then(b.icmp_unsigned("!=", b.load(ready), I32(0))):
                b.store(I32(0), ready)
                frame = b.gep(frames, [b.mul(b.sext(number, I64), I64(self.frame_words))])
                own = b.gep(shared, [b.mul(b.sub(blk, first), I32(self.shared_bytes))])
                b.call(self.thread, [parameters, ranges, lane, frame, own, tid, block, blk, grid])

        loop(first, last, lambda blk: loop(I32(0), block, lambda k: run_thread(k, blk)))
        b.ret_void()


def _integer(kind, opcode):
    if kind not in WIDTHS or "f" in kind:
        raise Refused(opcode)
    return ir.IntType(WIDTHS[kind])


def _listed(operand):
    """Return the registers of "{a, b}", or the one."""
    return [r.strip() for r in operand.strip("{}").split(",")]


def _statements(body):
    """Split a kernel's body into statements, labels ("name:") and the braces of scopes."""
    position = 0
    while match := re.compile(r"\s*([{}]|[$\w]+:(?!:)|[^;{}]*(?:\{[^}]*\}[^;]*)?;)").match(body, position):
        position = match.end()
        statement = " ".join(match[1].rstrip(";").split())
        if statement:
            yield statement
    if body[position:].strip():
        raise Refused(f"cannot read {body[position : position + 60]!r}")
