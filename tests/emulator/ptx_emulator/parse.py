"""From PTX text to a kernel: parameters, variables, registers, instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy import int64 as i8
from numpy import uint8 as u1

from .errors import PTXError
from .instruction import Instruction, Operand
from .types import RAW, TYPES

_SPECIAL = re.compile(
    r"^%(tid|ntid|ctaid|nctaid)\.[xyz]$|^%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|globaltimer"
    r"|globaltimer_lo|lanemask_\w\w)$"
)
_LOC = re.compile(r"^\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*"
    r"(?:\[(\d*)\])?\s*(?:=\s*(.*?))?\s*;?$",
    re.S,
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)((?:\s+\.\w+|\s+\d+)*)\s+([\w$]+)\s*(?:\[(\d+)\])?")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_ADDRESS = re.compile(r"^\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$")


@dataclass(frozen=True)
class Parameter:
    """type: PTX's name; size: bytes."""

    name: str
    type: str
    size: int
    is_pointer: bool


@dataclass
class Kernel:
    """A parsed entry.

    labels: (scope, name) -> index of an instruction; register_sizes: bytes by register number, 0 for predicates;
    shared, locals: variable -> offset, dynamic shared memory behind the static; constants: variable -> bytes.
    """

    name: str = ""
    files: dict[int, str] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    register_sizes: list[int] = field(default_factory=list)
    register_names: list[str] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    locals: dict[str, int] = field(default_factory=dict)
    local_size: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    threads: int | None = None
    max_registers: int | None = None
    tables: dict[str, list[str]] = field(default_factory=dict)

    def where(self, instruction: Instruction) -> str:
        """An instruction's position in the PTX and in the source."""
        position = f"PTX line {instruction.line}: {instruction.text}"
        if instruction.loc and instruction.loc[1]:
            file, line, column = instruction.loc
            position += f"  [{self.files.get(file, '?').split('/')[-1]}:{line}:{column}]"
        return position

    def add_register(self, name: str, size: int) -> int:
        self.register_sizes.append(size)
        self.register_names.append(name)
        return len(self.register_sizes) - 1

    def declare(self, declaration: str) -> None:
        """A variable of shared, local, global or constant memory."""
        space, align, type_name, name, count, values = _VARIABLE.match(declaration).groups()
        element = TYPES[type_name].size
        size = element * (1 if count is None else int(count or 0))
        align = int(align or element)
        if space == "shared":
            if not size:
                self.shared[name] = None  # dynamic: placed at the end
                return
            self.shared[name] = _round_up(self.static_shared, align)
            self.static_shared = self.shared[name] + size
        elif space == "local":
            self.locals[name] = _round_up(self.local_size, align)
            self.local_size = self.locals[name] + size
        else:
            numbers = [int(x, 0) for x in re.findall(r"-?\b(?:0x[0-9a-fA-F]+|\d+)\b", values or "")]
            array = np.zeros(size // element, RAW[element])
            array[: len(numbers)] = np.array(numbers, dtype=i8).astype(array.dtype)
            self.constants[name] = array.view(u1)


def parse(ptx: str) -> Kernel:
    """The one entry of a PTX module; raises PTXError where there is none, or several, or something unknown in it."""
    lines = ptx.split("\n")
    entries = [(i, found[1]) for i, line in enumerate(lines) if (found := re.search(r"\.entry\s+([\w$]+)", line))]
    if len(entries) != 1:
        raise PTXError(f"PTX text: expected one .entry, got {[name for _, name in entries]}")
    start, name = entries[0]
    kernel = Kernel(name)
    kernel.files = {int(number): path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
    for line in lines[:start]:
        declaration = line.split("//")[0].strip()
        if _VARIABLE.match(declaration):
            kernel.declare(declaration)
    body = next(i for i in range(start, len(lines)) if lines[i].strip().startswith("{"))
    head = "\n".join(line.split("//")[0] for line in lines[start:body])
    for type_name, modifiers, parameter, count in _PARAMETER.findall(head):
        size = TYPES[type_name].size * int(count or 1)
        kernel.parameters.append(Parameter(parameter, type_name, size, ".ptr" in modifiers))
    if threads := _THREADS.search(head):
        kernel.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
    if registers := re.search(r"\.maxnreg\s+(\d+)", head):
        kernel.max_registers = int(registers[1])
    _Body(kernel, lines, body).parse()
    for variable, offset in kernel.shared.items():
        if offset is None:
            kernel.shared[variable] = _round_up(kernel.static_shared, 16)
    return kernel


class _Scope:
    """Names between a pair of braces. families: prefix -> size, of declarations such as %r<100>."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.registers: dict[str, int] = {}
        self.families: dict[str, int] = {}


class _Body:
    """The statements of one kernel's body, read into the kernel."""

    def __init__(self, kernel: Kernel, lines: list[str], start: int) -> None:
        self.kernel, self.lines, self.start = kernel, lines, start
        self.scopes = [_Scope(0)]
        self.scope_count = 0
        self.last_label = ""

    def parse(self) -> None:
        pending, line, loc, in_asm = "", 0, None, False
        for number in range(self.start, len(self.lines)):
            raw = self.lines[number]
            if "//" in raw:
                in_asm = "// begin inline asm" in raw or (in_asm and "// end inline asm" not in raw)
                raw = raw.split("//")[0]
            text = raw.strip()
            if text.startswith(".loc") and (found := _LOC.match(text)):
                if not in_asm:  # inside inline assembly the lines count up wrongly
                    loc = tuple(map(int, found.groups()))
                continue
            if not pending.strip():
                line = number + 1
            pending = self._consume(f"{pending} {text}", line, loc)
            if len(self.scopes) == 1 and self.scope_count:
                return
        raise PTXError("kernel body: expected a closing brace, got the end of the text")

    def _consume(self, text: str, line: int, loc: tuple | None) -> str:
        """Read the complete statements of a text; returns what is left of it."""
        while text := text.lstrip():
            if text[0] == "{":
                self.scope_count += 1
                self.scopes.append(_Scope(self.scope_count))
                text = text[1:]
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:]
                if len(self.scopes) == 1:
                    return ""
            elif label := re.match(r"([$\w]+)\s*:(?!:)", text):
                self.kernel.labels[self.scopes[-1].number, label[1]] = len(self.kernel.instructions)
                self.last_label = label[1]
                text = text[label.end() :]
            elif (end := text.find(";")) >= 0:
                self._statement(text[:end].strip(), line, loc)
                text = text[end + 1 :]
            else:
                return text
        return ""

    def _statement(self, statement: str, line: int, loc: tuple | None) -> None:
        if statement.startswith(".reg"):
            self._declare_registers(statement)
        elif statement.startswith((".local", ".shared")):
            self.kernel.declare(statement)
        elif statement.startswith(".branchtargets"):
            self.kernel.tables[self.last_label] = [one.strip() for one in statement[len(".branchtargets") :].split(",")]
        elif statement and statement[0] != ".":  # not .pragma, not .param of a call
            self._instruction(statement, line, loc)

    def _declare_registers(self, statement: str) -> None:
        type_name, names = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", statement, re.S).groups()
        size = TYPES[type_name].size
        for name in map(str.strip, names.split(",")):
            if family := re.match(r"([%\w$]+)<(\d+)>", name):
                self.scopes[-1].families[family[1]] = size
            else:
                self.scopes[-1].registers[name] = self.kernel.add_register(name, size)

    def _instruction(self, statement: str, line: int, loc: tuple | None) -> None:
        found = _STATEMENT.match(statement)
        if not found:
            raise PTXError(f"line {line}: expected a PTX instruction, got {statement!r}")
        negated, predicate, opcode, rest = found.groups()
        instruction = Instruction(opcode, " ".join(statement.split()), line, loc)
        if predicate:
            instruction.predicate, instruction.predicate_negated = self._register(predicate, line), negated == "!"
        if instruction.base == "bra":
            instruction.target = [(scope.number, rest.strip()) for scope in reversed(self.scopes)]
        elif rest.strip() and instruction.base != "call":
            instruction.operands = [self._operand(part, line) for part in _split(rest)]
        instruction.complete(len(self.kernel.instructions))
        self.kernel.instructions.append(instruction)

    def _register(self, name: str, line: int) -> int:
        for scope in reversed(self.scopes):
            if name in scope.registers:
                return scope.registers[name]
        if numbered := re.match(r"^(.*?)(\d+)$", name):
            for scope in reversed(self.scopes):
                if numbered[1] in scope.families:
                    number = self.kernel.add_register(name, scope.families[numbered[1]])
                    scope.registers[name] = number
                    return number
        raise PTXError(f"line {line}: unknown register {name}")

    def _operand(self, text: str, line: int) -> Operand:
        text = text.strip()
        known = self.scopes[-1].registers.get(text)
        if known is not None:
            return Operand("register", known)
        if text[0] == "{":
            return Operand("vector", [self._operand(part, line) for part in _split(text[1:-1])])
        if text[0] == "[":
            return self._address(text, line)
        if "|" in text:
            return Operand("pair", [self._operand(part, line) for part in text.split("|")])
        if text == "_":
            return Operand("sink")
        if text[0] == "!":
            return Operand("register", self._register(text[1:], line), negated=True)
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", text):
            return Operand("float32", int(text[2:], 16))
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", text):
            return Operand("float64", int(text[2:], 16))
        if re.match(r"^-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Operand("integer", int(text.rstrip("U"), 0))
        if _SPECIAL.match(text):
            return Operand("special", text)
        try:
            return Operand("register", self._register(text, line))
        except PTXError:
            if text[0] == "%":
                raise
            return Operand("symbol", text)

    def _address(self, text: str, line: int) -> Operand:
        if "{" in text:
            address, coordinates = _split(text[1:-1])
            return Operand("tensor", [self._operand(f"[{address}]", line), *self._operand(coordinates, line).value])
        found = _ADDRESS.match(text)
        if not found:
            raise PTXError(f"line {line}: expected an address, got {text}")
        base, sign, offset = found.groups()
        value = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Operand("memory", self._operand(base, line), value)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    if not any(bracket in text for bracket in "{[("):
        return text.split(",")
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [*parts, current] if current.strip() else parts


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
