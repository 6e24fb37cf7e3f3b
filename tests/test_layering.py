"""Arrows point one way: cli -> training -> generation -> nn -> ops/<op>/api -> function -> backends -> _native."""

import ast
from pathlib import Path

import pytest

import fastseq

ROOT = Path(fastseq.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
OUTSIDE = {"bench", "parity", "testing"}  # these may use testing.py
IMPORT_TRITON = {"triton_kernels", "math", "compile"}  # themselves imported where a kernel is launched


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Names of the modules a file imports, anywhere in it; ``from a import b`` gives a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            }
    return found


def family(name: str) -> str:
    """The command that a module of this package belongs to: "bench" for fastseq.bench and fastseq.bench.roofline."""
    return ".".join(name.split(".")[1:2]).partition("_")[0]


def rank(name: str) -> int | None:
    """Height of a module of this package; None for what any layer may import."""
    parts = name.split(".")
    if parts[1:2] in (["cli"], ["__main__"]):
        return 7
    if parts[1:2] in (["training"], ["info"], ["warmup"]) or family(name) in OUTSIDE:
        return 6
    if parts[1:2] == ["seq2seq"]:
        return 5
    if parts[1:2] == ["nn"]:
        return 4
    if parts[1:2] == ["ops"]:
        ranks = {"api": 3, "function": 2}
        if parts[2:3] == ["common"]:
            return 1
        return ranks.get(parts[-1], 1 if len(parts) == 4 else 3)
    return None


def test_the_package_has_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = module_name(path)
    height = rank(own)
    for name in imports(path):
        if name == "triton" or name.startswith("triton."):
            assert path.stem in IMPORT_TRITON, f"{own} imports triton; only {IMPORT_TRITON} may"
        if not name.startswith("fastseq."):
            continue
        if name.startswith("fastseq.testing"):
            assert family(own) in OUTSIDE, f"{own} imports testing.py"
        other = rank(name)
        if height is not None and other is not None:
            lazy = own == "fastseq.seq2seq.model" and name.startswith(
                "fastseq.seq2seq.generation"
            )  # model.generate, at call time
            assert other <= height or lazy, f"{own} imports {name}, which lies above it"


@pytest.mark.parametrize("path", sorted(ROOT.glob("ops/*/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_do_not_know_each_other(path):
    backends = {"reference", "torch", "native", "triton"}
    if path.stem not in backends:
        return
    for name in imports(path):
        last = name.split(".")[-1]
        assert not (name.startswith("fastseq.ops") and last in backends), f"{path.name} imports {name}"
    if path.stem == "reference":
        ours = {name for name in imports(path) if name.split(".")[0] != "torch"}
        assert ours <= {"fastseq.ops.common.layout"}, f"{path} may import torch only"
