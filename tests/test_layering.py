"""The allowed imports between the rooms of the package, one line per room; DESIGN.md draws them."""

import ast
from pathlib import Path

import pytest

import fastseq
from fastseq.dispatch import BACKENDS

ROOT = Path(fastseq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_ROOT_MODULES = 9

# Room -> the rooms that it may import besides itself. A module belongs to the room with the longest matching name;
# "OP" stands for each folder of ops/ except common; "fastseq" for the package itself, which has the version.
ARROWS = {
    "_native": "",
    "errors": "",
    "dispatch": "",
    "ops.common": "_native",
    "ops.OP.spec": "",
    "ops.OP.reference": "ops.OP.spec ops.common",
    "ops.OP.torch": "ops.OP.spec ops.common",
    "ops.OP.native": "ops.OP.spec ops.common _native ops.OP.native_cuda",
    "ops.OP.native_cuda": "ops.OP.spec ops.common _native",
    "ops.OP.triton": "ops.OP.spec ops.common ops.OP.triton_kernels",
    "ops.OP.triton_kernels": "ops.common",
    "ops.OP.directions": "ops.OP.spec",
    "ops.OP.projection": "ops.OP.spec ops.OP.directions ops.common",
    "ops.OP.function": "ops.OP.spec ops.OP.directions ops.OP.projection ops.OP.reference ops.OP.native ops.common "
    "dispatch",
    "ops.OP.wavefront": "ops.OP.spec ops.OP.directions ops.OP.reference ops.OP.native_cuda ops.common _native dispatch",
    "ops.OP.rules": "ops.OP.spec ops.OP.torch ops.OP.native ops.OP.predicates ops.common _native dispatch",
    "ops.OP.predicates": "ops.OP.spec ops.OP.native ops.OP.native_cuda _native",
    "ops.OP.api": "ops.OP.spec ops.OP.rules ops.OP.function ops.OP.wavefront ops.common _native dispatch",
    "ops.OP": "ops.OP.api ops.OP.rules tune.record dispatch",
    "tune.record": "_native",
    "tune": "tune.record bench nn console dispatch errors",
    "ops": "ops.OP ops.common",
    "nn": "ops ops.OP ops.OP.api ops.OP.rules ops.common dispatch",  # rules: the calls that skip them
    "seq2seq": "nn ops ops.OP ops.OP.api ops.common dispatch",
    "info": "ops.OP.spec tune.record _native dispatch",
    "console": "fastseq tune.record _native errors",
    "testing": "seq2seq nn ops ops.OP dispatch",
    "bench": "testing console seq2seq nn ops ops.OP dispatch _native errors",
    "parity": "testing console seq2seq nn ops ops.OP dispatch errors",
    "warmup": "console seq2seq nn ops ops.common dispatch errors",
    "training": "fastseq seq2seq nn ops dispatch errors",
    "hf": "fastseq training seq2seq errors",
    "convert": "training seq2seq errors",
    "export": "training seq2seq ops.OP.api errors",
    "cli": "fastseq errors",  # each command's module is imported by name
    "": "_native dispatch info ops ops.OP nn seq2seq training",  # fastseq/__init__.py
    "__main__": "cli",
}
IMPORT_TRITON = {"triton_kernels", "math", "compile"}  # themselves imported where a kernel is launched


def module_name(path: Path) -> str:
    """fastseq/ops/lstm/api.py -> "ops.lstm.api"; a package's __init__.py is the package, the root is ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}
OPS = {name.split(".")[1] for name in MODULES if name.startswith("ops.")} - {"common"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: fastseq's without the prefix, others as "triton", "torch"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole.removeprefix("fastseq.") in MODULES else node.module)
    return {name.removeprefix("fastseq.") if name.startswith("fastseq.") else name for name in names}


def room(name: str) -> str:
    """The room of a module of the package, with OP for the name of an op."""
    parts = name.split(".")
    if parts[0] == "ops" and parts[1:2] and parts[1] in OPS:
        parts[1] = "OP"
    while parts and ".".join(parts) not in ARROWS:
        parts.pop()
    return ".".join(parts)


def test_the_root_is_small():
    assert len(list(ROOT.glob("*.py"))) <= MOST_ROOT_MODULES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    importer = module_name(path)
    allowed = {room(importer), *ARROWS[room(importer)].split()}
    for name in imports(path):
        if name.split(".")[0] == "triton":
            assert path.stem in IMPORT_TRITON, f"{importer} imports triton; only {IMPORT_TRITON} may"
        if name not in MODULES and name != "fastseq":
            continue
        target = "fastseq" if name == "fastseq" else room(name)
        assert target in allowed, f"{importer} imports {name}, not in {ARROWS[room(importer)]!r}"
        one_op = importer.split(".")[:2], name.split(".")[:2]
        if room(importer).startswith("ops.OP") and target.startswith("ops.OP"):
            assert one_op[0] == one_op[1], f"{importer} imports {name} of another op"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_backend_names_are_compared_in_dispatch_and_rules_alone(path):
    """Elsewhere code tests attributes of the backend: ``run``, ``step``, ``SINGLE_DIRECTION``, ..."""
    if path.name in ("dispatch.py", "rules.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Match):
            sides = [value for value in ast.walk(node) if isinstance(value, ast.Constant)]
        values = [value for side in sides for value in getattr(side, "elts", [side])]
        named = {v.value for v in values if isinstance(v, ast.Constant)} & set(BACKENDS[1:])
        assert not named, f"{path}:{node.lineno} compares with the backend name {named}"
