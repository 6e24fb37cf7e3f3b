"""Parser of PTX: registers, variables and instructions of a kernel, with every name resolved to its declaration.

Supports the part of the PTX ISA grammar that nvcc and the inline assembly use; anything else is an error with its line.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxError(Exception):
    """Unsupported PTX, or an error in a kernel."""


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    text: str


class Symbol(NamedTuple):
    """The address of a variable, or a label."""

    name: str


class Address(NamedTuple):
    """``[base + offset]``; a base of None is an absolute address."""

    base: Register | Symbol | None
    offset: int


class Vector(NamedTuple):
    elements: tuple


class Pair(NamedTuple):
    """``d|p``: two results."""

    first: Register
    second: Register


class Not(NamedTuple):
    """``!p``."""

    predicate: Register


SINK = Register("_")  # an unused result


@dataclass
class Instruction:
    line: int
    text: str
    guard: Register | Not | None  # @p or @!p
    name: str  # fma
    modifiers: tuple[str, ...]  # rn, f32
    operands: list


@dataclass
class Variable:
    name: str
    space: str  # param, shared, global, const or local; parameters of a call are local
    align: int
    size: int  # bytes; 0: the launch sets the size
    data: bytes | None = None


@dataclass
class Entry:
    """One kernel."""

    name: str
    line: int
    params: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name -> type, as declared
    variables: dict[str, Variable] = field(default_factory=dict)  # of the kernel and of its module
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of an instruction
    instructions: list[Instruction] = field(default_factory=list)
    cluster: tuple[int, ...] = ()  # .reqnctapercluster
    max_threads: int = 1024  # .maxntid or .reqntid


SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}

_BLANK = re.compile(r"\s*")
_NAME = r"[A-Za-z_$%][\w$]*"
_VARIABLE = re.compile(
    rf"(?:\.(?:visible|extern|weak)\s+)*\.(global|const|shared|param|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    rf"(?:\.ptr\b(?:\s*\.(?:global|const|shared|align\s+\d+))*\s+)?({_NAME})((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,{\[]+)\s*(?:,|$)")


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.DOTALL)


def parse(text: str, only: str | None = None) -> dict[str, Entry]:
    """Parse the kernels of a module, by mangled name. only: the name of one kernel, to save time."""
    return _Parser(text).module(only)


def find(entries: dict[str, Entry], *parts: str) -> Entry:
    """Return the only kernel whose mangled name contains every part."""
    found = [name for name in entries if all(part in name for part in parts)]
    if len(found) != 1:
        raise PtxError(f"{len(found)} kernels have {' and '.join(parts)} in their names: {found or list(entries)}")
    return entries[found[0]]


class _Parser:
    def __init__(self, text: str):
        # Replaces comments by spaces, which keeps line numbers.
        keep_lines = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", keep_lines, text, flags=re.DOTALL)
        self.at = 0
        self.scopes = 0
        self.counted = 0, 1  # cache of line(): position and its line

    def line(self) -> int:
        at, line = self.counted
        self.counted = self.at, line + self.text.count("\n", at, self.at)
        return self.counted[1]

    def fail(self, what: str):
        raise PtxError(f"PTX line {self.line()}: {what}")

    def blank(self) -> None:
        self.at = _BLANK.match(self.text, self.at).end()

    def match(self, pattern: str) -> re.Match | None:
        self.blank()
        found = _compiled(pattern).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def module(self, only: str | None) -> dict[str, Entry]:
        entries, variables = {}, {}
        while self.blank() or self.at < len(self.text):
            if self.match(r"\.(version|target|address_size)[^\n]*"):
                continue
            if header := self.match(rf"(?:\.(?:visible|weak)\s+)?\.entry\s+({_NAME})\s*(?:\(([^)]*)\))?"):
                if only not in (None, header[1]):
                    self.skip_body()
                    continue
                entry = self.entry(header[1], header[2] or "")
                entry.variables = variables | entry.variables
                entries[entry.name] = entry
            elif statement := self.match(r"(?:\.\w+\s+)*\.(?:global|const|shared)\b[^;]*;"):
                variable = self.variable(statement[0][:-1])
                variables[variable.name] = variable
            elif self.match(r"(?:\.\w+\s+)*\.func\b[^;{]*;"):  # declaration; the call itself is refused
                continue
            else:
                self.fail(f"not understood: {self.text[self.at : self.at + 60].splitlines()[0]!r}")
        return entries

    def skip_body(self) -> None:
        depth = 0
        for brace in re.compile(r"[{}]").finditer(self.text, self.at):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                self.at = brace.end()
                return
        self.fail("no end of a kernel")

    def variable(self, text: str) -> Variable:
        match = _VARIABLE.match(text.strip())
        if not match:
            self.fail(f"not understood: {text.strip()!r}")
        space, align, kind, name, counts, values = match.groups()
        size = SIZES[kind]
        for count in re.findall(r"\[(\d*)\]", counts):
            size *= int(count or 0)
        data = None
        if values:
            numbers = [int(v, 0) for v in re.findall(r"-?\w+", values)]  # addresses and floats are errors
            data = b"".join((n % (1 << 8 * SIZES[kind])).to_bytes(SIZES[kind], "little") for n in numbers)
            data = data.ljust(size, b"\0")
        elif space in ("global", "const"):
            data = bytes(size)
        return Variable(name, space, int(align or SIZES[kind]), size, data)

    def entry(self, name: str, params: str) -> Entry:
        entry = Entry(name, self.line())
        entry.params = [self.variable(p) for p in params.split(",") if p.strip()]
        while directive := self.match(r"\.(maxntid|reqntid|reqnctapercluster|\w+)\b([\s\d,]*)(?=[.{])"):
            sizes = tuple(int(n) for n in re.findall(r"\d+", directive[2]))
            if directive[1] in ("maxntid", "reqntid"):
                entry.max_threads = sizes[0] * (*sizes, 1, 1)[1] * (*sizes, 1, 1)[2]
            elif directive[1] == "reqnctapercluster":
                entry.cluster = sizes
        if not self.match(r"\{"):
            self.fail(f"no body of {name}")
        self.body(entry, [{}])
        return entry

    def body(self, entry: Entry, scopes: list[dict[str, str]]) -> None:
        """Parse statements up to the closing brace. scopes: declared name -> name that is unique in the kernel."""
        pending = []  # labels may be used before they are declared
        while not self.match(r"\}"):
            if self.at >= len(self.text):
                self.fail(f"no end of {entry.name}")
            if self.match(r"\{"):
                self.body(entry, [*scopes, {}])
            elif label := self.match(rf"({_NAME})\s*:(?!:)"):
                entry.labels[self.declare(label[1], scopes)] = len(entry.instructions)
            else:
                start = self.line()
                statement = self.match(r"[^;]*;")[0][:-1].strip()
                if statement.startswith("."):
                    self.directive(statement, entry, scopes)
                elif statement:
                    pending.append((len(entry.instructions), start, statement))
                    entry.instructions.append(None)
        for index, line, statement in pending:
            entry.instructions[index] = _instruction(line, statement, scopes, entry)

    def declare(self, name: str, scopes: list[dict[str, str]]) -> str:
        if len(scopes) == 1:
            scopes[-1][name] = name
        else:
            self.scopes += 1
            scopes[-1][name] = f"{name}'{self.scopes}"
        return scopes[-1][name]

    def directive(self, text: str, entry: Entry, scopes: list[dict[str, str]]) -> None:
        if re.match(r"\.(loc|pragma|file)\b", text):
            return
        if text.startswith((".shared", ".local", ".param")):
            variable = self.variable(text)
            variable.space = "shared" if variable.space == "shared" else "local"
            entry.variables[variable.name] = variable
            return
        if not (match := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL)):
            self.fail(f"not supported: {text!r}")
        for name in match[2].split(","):
            if many := re.match(r"\s*(\S+)<(\d+)>", name):
                names = [f"{many[1]}{i}" for i in range(int(many[2]))]
            else:
                names = [name.strip()]
            for each in names:
                entry.registers[self.declare(each, scopes)] = match[1]


def _instruction(line: int, text: str, scopes: list[dict[str, str]], entry: Entry) -> Instruction:
    text = " ".join(text.split())
    guard, opcode, rest = re.match(r"(?:@(!?[\w%$]+)\s+)?(\S+)\s*(.*)$", text).groups()
    name, *modifiers = opcode.split(".")
    operands, at = [], 0
    while at < len(rest):
        match = _OPERAND.match(rest, at)
        if not match:
            raise PtxError(f"PTX line {line}: operands not understood: {text}")
        operands.append(_operand(match[1], scopes, entry, line))
        at = match.end()
    return Instruction(line, text, guard and _operand(guard, scopes, entry, line), name, tuple(modifiers), operands)


def _operand(text: str, scopes: list[dict[str, str]], entry: Entry, line: int):
    def operand(part):
        return _operand(part, scopes, entry, line)

    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(operand(part) for part in text[1:-1].split(",")))
    if text.startswith("["):
        base, sign, offset = re.match(r"\[\s*([^+\s\]]+?)\s*(?:([+-])\s*(-?\w+))?\s*\]$", text).groups()
        number = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Address(None, int(base, 0)) if base[0].isdigit() else Address(operand(base), number)
    if text.startswith("!"):
        return Not(operand(text[1:]))
    if "|" in text:
        return Pair(*(operand(part) for part in text.split("|")))
    if re.match(r"-?\d", text):
        return Immediate(text)
    if text == "_":
        return SINK
    for scope in reversed(scopes):
        if text in scope:
            unique = scope[text]
            return Register(unique) if unique in entry.registers else Symbol(unique)
    if text.startswith("%"):
        return Register(text)  # a special register: %tid.x
    return Symbol(text)
