"""Execute compiled GPU code on the host: PTX becomes LLVM IR, and LLVM's JIT runs it, thread after thread.

    kernel = Kernel(ptx_text)
    kernel.run(grid, block, parameters, memory=[(start, end), ...])

It runs the PTX of NVRTC (CuPy) and of NVVM (Numba CUDA) for every architecture, with no GPU, driver or C++ compiler. It is
stricter than a GPU: an access outside `memory` or off its natural alignment is an error, as is every instruction or modifier
that it does not know, a generic (not global) access, and a float `add`, `sub` or `mul` without `.rn`, which ptxas could still
fuse. `.ftz` is modelled. It shows what the PTX computes, not what ptxas and the chip make of it.
"""

import ctypes
import re
from collections import Counter

import llvmlite.binding as llvm
from llvmlite import ir

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

I1, I8, I32, I64 = (ir.IntType(n) for n in (1, 8, 32, 64))
FLOATS = {"f32": ir.FloatType(), "f64": ir.DoubleType()}
SPECIAL = ("tid.x", "ntid.x", "ctaid.x", "nctaid.x")
MAX_RANGES = 8


class Refused(Exception):
    """The PTX holds something that this translator does not know, or that the arithmetic contract forbids."""


def width(kind):
    """Return the bits of a PTX type: 32 for "f32", "u32", "b32"."""
    return 1 if kind == "pred" else int(kind[1:])


class Kernel:
    """The one `.entry` of a PTX text.

    name, opcodes (a Counter), parameter_sizes (bytes of each). After `run`: loaded_bytes and stored_bytes.
    """

    def __init__(self, ptx):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
        entries = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)\}", text, re.S)
        if len(entries) != 1 or ".func" in text:
            raise Refused("expected exactly one .entry and no .func")
        self.name, parameters, _, body = entries[0]
        declared = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", parameters)
        self.parameter_sizes = [width(kind) // 8 * int(count or 1) for kind, _, count in declared]
        translation = _Translation([name for _, name, _ in declared], body)
        self.opcodes = translation.opcodes
        self._engine = _compile(translation.module)
        self._launch = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int32] * 4)(
            self._engine.get_function_address("launch")
        )

    def run(self, grid, block, parameters, memory, first_block=0, last_block=None):
        """Run blocks first_block ... last_block - 1 (all by default) of a grid. parameters: bytes of each."""
        sizes = [len(p) for p in parameters]
        if sizes != self.parameter_sizes:
            raise ValueError(f"parameters have {sizes} bytes, {self.name} takes {self.parameter_sizes}")
        buffers = [ctypes.create_string_buffer(p, len(p)) for p in parameters]
        addresses = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        ranges = [*memory, *[(0, 0)] * (MAX_RANGES - len(memory))]
        bounds = (ctypes.c_int64 * (2 * MAX_RANGES))(*(edge for pair in ranges for edge in pair))
        counters = {name: self._counter(name) for name in ("misaligned", "outside", "loaded", "stored")}
        for counter in counters.values():
            counter.value = 0
        last_block = grid if last_block is None else last_block
        self._launch(addresses, bounds, grid, block, first_block, last_block)
        self.loaded_bytes, self.stored_bytes = counters["loaded"].value, counters["stored"].value
        if counters["misaligned"].value:
            raise MemoryError(f"{counters['misaligned'].value} misaligned accesses")
        if counters["outside"].value:
            raise MemoryError(f"{counters['outside'].value} accesses outside the arrays")

    def _counter(self, name):
        return ctypes.c_int64.from_address(self._engine.get_global_value_address(name))


def _compile(module):
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=0
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


class _Translation:
    """One kernel as an LLVM module. Every register is a stack slot of integer bits; LLVM makes them registers again."""

    def __init__(self, parameter_names, body):
        self.parameter_names = parameter_names
        self.opcodes = Counter()
        self.module = ir.Module()
        self.counters = {}
        for name in ("misaligned", "outside", "loaded", "stored"):
            self.counters[name] = ir.GlobalVariable(self.module, I64, name)
            self.counters[name].initializer = I64(0)
        pointers = I64.as_pointer()
        self.thread = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [pointers, pointers, *[I32] * 4]), "thread")
        self.thread.linkage = "internal"
        self.special = dict(zip(SPECIAL, self.thread.args[2:], strict=True))
        self.entry = ir.IRBuilder(self.thread.append_basic_block("entry"))
        self.b = ir.IRBuilder(self.thread.append_basic_block("body"))
        first, self.labels, self.scopes = self.b.block, {}, [{}]
        for statement in _statements(body):
            self.statement(statement)
        if not self.b.block.is_terminated:
            self.b.ret_void()
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
            if not self.b.block.is_terminated:
                self.b.branch(block)
            self.b.position_at_end(block)
        elif text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".pragma", ".loc", ".file")):
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
                self.scopes[-1][register] = self.entry.alloca(ir.IntType(width(kind)))

    def guarded(self, text):
        guard, opcode, operands = re.fullmatch(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
        self.opcodes[opcode] += 1
        operands = [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", operands)] if operands else []
        if guard is None:
            self.instruction(opcode, operands)
            return
        condition = self.read(guard.lstrip("!"), I1)
        if guard.startswith("!"):
            condition = self.b.not_(condition)
        then, after = (self.thread.append_basic_block() for _ in range(2))
        self.b.cbranch(condition, then, after)
        self.b.position_at_end(then)
        self.instruction(opcode, operands)
        if not self.b.block.is_terminated:
            self.b.branch(after)
        self.b.position_at_end(after)

    def label(self, name):
        if name not in self.labels:
            self.labels[name] = self.thread.append_basic_block()
        return self.labels[name]

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
        elif re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", operand):
            return kind(int(operand.rstrip("U"), 0) % (1 << kind.width))
        elif re.fullmatch(r"0[fF][\da-fA-F]{8}|0[dD][\da-fA-F]{16}", operand):
            return kind(int(operand[2:], 16))
        else:
            value = self.b.load(self.slot(operand))
        return self.resized(value, kind)

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
        return self.b.bitcast(self.flushed(bits) if ftz else bits, FLOATS[kind])

    def write_float(self, register, value, kind, ftz):
        bits = self.b.bitcast(value, ir.IntType(width(kind)))
        self.write(register, self.flushed(bits) if ftz else bits)

    def flushed(self, bits):
        subnormal = self.b.icmp_unsigned("==", self.b.and_(bits, I32(0x7F800000)), I32(0))
        return self.b.select(subnormal, self.b.and_(bits, I32(0x80000000)), bits)

    # Instructions

    def instruction(self, opcode, operands):
        operation, *modifiers = opcode.split(".")
        kind = modifiers[-1] if modifiers else ""
        if operation in ("ret", "exit"):
            self.b.ret_void()
        elif operation == "bra":
            self.b.branch(self.label(operands[0]))
        elif operation in ("ld", "st"):
            self.memory(opcode, operation, modifiers, operands)
        elif operation in ("mov", "cvta"):
            self.write(operands[0], self.read(operands[1], ir.IntType(width(kind))))
        elif operation == "selp":
            bits = ir.IntType(width(kind))
            chosen = self.b.select(self.read(operands[3], I1), *(self.read(x, bits) for x in operands[1:3]))
            self.write(operands[0], chosen)
        elif operation == "setp":
            self.compare(opcode, modifiers, operands)
        elif kind in FLOATS:
            self.float_arithmetic(opcode, operation, modifiers, operands)
        else:
            self.integer_arithmetic(opcode, operation, modifiers, operands)

    def memory(self, opcode, operation, modifiers, operands):
        kind, known = modifiers[-1], {"param", "global", "v2", "v4", "nc"}
        if not set(modifiers[:-1]) <= known or not {"param", "global"} & set(modifiers):
            raise Refused(f"{opcode}: not a plain access of global memory or of a parameter")
        lanes = next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1)
        registers, address = operands if operation == "ld" else reversed(operands)
        registers = [r.strip() for r in registers.strip("{}").split(",")]
        bits = ir.IntType(width(kind))
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", address).groups()
        if "param" in modifiers:
            at = self.b.load(self.b.gep(self.thread.args[0], [I32(self.parameter_names.index(base))]))
        else:
            at = self.read(base, I64)
        at = self.b.add(at, I64(int(offset or 0)))
        if "global" in modifiers:
            self.check_access(operation, at, lanes * bits.width // 8)
        for k, register in enumerate(registers):
            pointer = self.b.inttoptr(self.b.add(at, I64(k * bits.width // 8)), bits.as_pointer())
            if operation == "ld":
                self.write(register, self.b.load(pointer, align=1), signed=kind[0] == "s")
            else:
                self.b.store(self.read(register, bits), pointer, align=1)

    def check_access(self, operation, at, n_bytes):
        inside = I1(0)
        for k in range(MAX_RANGES):
            start, end = (self.b.load(self.b.gep(self.thread.args[1], [I32(2 * k + j)])) for j in range(2))
            within = self.b.and_(
                self.b.icmp_unsigned(">=", at, start), self.b.icmp_unsigned("<=", self.b.add(at, I64(n_bytes)), end)
            )
            inside = self.b.or_(inside, within)
        self.count("outside", self.b.zext(self.b.not_(inside), I64))
        off = self.b.icmp_unsigned("!=", self.b.and_(at, I64(n_bytes - 1)), I64(0))
        self.count("misaligned", self.b.zext(off, I64))
        self.count("loaded" if operation == "ld" else "stored", I64(n_bytes))

    def count(self, name, amount):
        self.b.store(self.b.add(self.b.load(self.counters[name]), amount), self.counters[name])

    def compare(self, opcode, modifiers, operands):
        comparison, kind = modifiers[0], modifiers[-1]
        if len(operands) != 3 or modifiers[1:-1] not in ([], ["ftz"]):
            raise Refused(opcode)
        if kind in FLOATS:
            x, y = (self.read_float(o, kind, "ftz" in modifiers) for o in operands[1:])
            ordered = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
            if comparison in ordered:
                result = self.b.fcmp_ordered(ordered[comparison], x, y)
            elif comparison.endswith("u") and comparison[:-1] in ordered:
                result = self.b.fcmp_unordered(ordered[comparison[:-1]], x, y)
            else:
                raise Refused(opcode)
        else:
            x, y = (self.read(o, ir.IntType(width(kind))) for o in operands[1:])
            symbol = {
                "lt": "<",
                "le": "<=",
                "gt": ">",
                "ge": ">=",
                "eq": "==",
                "ne": "!=",
                "lo": "<",
                "ls": "<=",
                "hi": ">",
                "hs": ">=",
            }
            compare = self.b.icmp_signed if kind[0] == "s" else self.b.icmp_unsigned
            result = compare(symbol[comparison], x, y)
        self.write(operands[0], result)

    def float_arithmetic(self, opcode, operation, modifiers, operands):
        kind, ftz, b = modifiers[-1], "ftz" in modifiers, self.b
        if opcode in ("cvt.rn.f32.f64", "cvt.f64.f32"):
            x = self.read_float(operands[1], kind, False)
            self.write_float(
                operands[0],
                b.fptrunc(x, FLOATS["f32"]) if kind == "f64" else b.fpext(x, FLOATS["f64"]),
                modifiers[-2],
                False,
            )
            return
        rounded = {"fma", "add", "sub", "mul", "div", "sqrt", "rcp"}
        expected = {"rn"} if operation in rounded else set()
        if set(modifiers[:-1]) - {"ftz"} != expected or operation not in rounded | {"neg", "abs"}:
            raise Refused(f"{opcode}: each operation must be one that the contract knows, rounded to nearest even by .rn")
        x = [self.read_float(o, kind, ftz) for o in operands[1:]]
        result = {
            "fma": lambda: b.fma(*x),
            "add": lambda: b.fadd(*x),
            "sub": lambda: b.fsub(*x),
            "mul": lambda: b.fmul(*x),
            "div": lambda: b.fdiv(*x),
            "rcp": lambda: b.fdiv(x[0].type(1.0), *x),
            "sqrt": lambda: b.call(self.module.declare_intrinsic("llvm.sqrt", [x[0].type]), x),
            "neg": lambda: b.fneg(*x),
            "abs": lambda: b.call(self.module.declare_intrinsic("llvm.fabs", [x[0].type]), x),
        }[operation]()
        self.write_float(operands[0], result, kind, ftz)

    def integer_arithmetic(self, opcode, operation, modifiers, operands):
        kind, b = modifiers[-1], self.b
        signed = kind[0] == "s"
        if operation == "bfi":  # the low bits of x into y, from a position on
            bits = ir.IntType(width(kind))
            x, y, at, n = (self.read(o, bits) for o in operands[1:])
            mask = b.shl(b.sub(b.shl(bits(1), n), bits(1)), at)
            self.write(operands[0], b.or_(b.and_(b.shl(x, at), mask), b.and_(y, b.not_(mask))))
            return
        if operation == "cvt":
            if len(modifiers) != 2 or modifiers[0] in FLOATS:
                raise Refused(opcode)
            value = self.resized(self.read(operands[1], ir.IntType(width(kind))), ir.IntType(width(modifiers[0])), signed)
            self.write(operands[0], value, signed=modifiers[0][0] == "s")
            return
        if not set(modifiers[:-1]) <= {"lo", "wide"}:
            raise Refused(opcode)
        bits = ir.IntType(width(kind))
        if operation in ("mul", "mad") and "wide" in modifiers:
            wide = ir.IntType(2 * bits.width)
            x, y = (self.resized(self.read(o, bits), wide, signed) for o in operands[1:3])
            rest = [self.read(o, wide) for o in operands[3:]]
        else:
            x, y = (self.read(o, bits) for o in (operands[1:3] if len(operands) > 2 else operands[1:2] * 2))
            rest = [self.read(o, bits) for o in operands[3:]]
        less = b.icmp_signed if signed else b.icmp_unsigned
        # a shift by the width or more gives 0 in PTX (or the sign), and nothing defined in LLVM
        too_far = b.icmp_unsigned(">=", y, bits(bits.width)) if operation in ("shl", "shr") else None
        operations = {
            "add": lambda: b.add(x, y),
            "sub": lambda: b.sub(x, y),
            "mul": lambda: b.mul(x, y),
            "mad": lambda: b.add(b.mul(x, y), rest[0]),
            "div": lambda: b.sdiv(x, y) if signed else b.udiv(x, y),
            "rem": lambda: b.srem(x, y) if signed else b.urem(x, y),
            "min": lambda: b.select(less("<", x, y), x, y),
            "max": lambda: b.select(less(">", x, y), x, y),
            "and": lambda: b.and_(x, y),
            "or": lambda: b.or_(x, y),
            "xor": lambda: b.xor(x, y),
            "not": lambda: b.not_(x),
            "neg": lambda: b.neg(x),
            "popc": lambda: b.call(self.module.declare_intrinsic("llvm.ctpop", [bits]), [x]),
            "shl": lambda: b.select(too_far, bits(0), b.shl(x, y)),
            "shr": lambda: (
                b.ashr(x, b.select(too_far, bits(bits.width - 1), y)) if signed else b.select(too_far, bits(0), b.lshr(x, y))
            ),
        }
        if operation not in operations:
            raise Refused(opcode)
        self.write(operands[0], operations[operation]())

    # The grid

    def _launch_loop(self):
        """launch(parameters, ranges, grid, block, first_block, last_block): every thread in turn."""
        pointers = I64.as_pointer()
        launch = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [pointers, pointers, *[I32] * 4]), "launch")
        parameters, ranges, grid, block, first, last = launch.args
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

        def run_block(blk):
            loop(I32(0), block, lambda tid: b.call(self.thread, [parameters, ranges, tid, block, blk, grid]))

        loop(first, last, run_block)
        b.ret_void()


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
