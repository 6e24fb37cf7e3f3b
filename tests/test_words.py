"""English of comments, docstrings, headings and pages: turns that CONTRIBUTING.md bans, and terms with a fixed name."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("fastseq", "csrc", "tests", "benchmarks", "docs", "examples", "build_support")
PAGES = ("setup.py", "README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".patch")
TURNS = re.compile(
    r"\b(those of|what is there|on the way|by hand|whoever|so far what|in no matter what|nobody|luck(?:y|ily)?"
    r"|to listen|crowded|a thread that is (?:away|late)|few rows|chains? of sums|vendor(?:'s|s)?|peers?)\b",
    re.IGNORECASE,
)
NAMES = re.compile(r"\b(\w*by_hand\w*|\w*_?(?:whoever|nobody|vendor|crowded)\w*|Tensor16|TensorFloat|PlainFloat)\b")
BEGINS_WITH_WHAT = re.compile(r"\W*What\b")
COMMENT = re.compile(r"//[^\n]*(?:\n[ \t]*//[^\n]*)*|/\*.*?\*/", re.DOTALL)
STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')


@functools.cache
def tokens(source: str) -> list[tokenize.TokenInfo]:
    """Comments and string literals of a Python source."""
    every = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token for token in every if token.type in (tokenize.COMMENT, tokenize.STRING)]


def python_texts(source: str) -> list[str]:
    """Docstrings and comments; comments on adjacent lines are one text."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
    last = -1
    for token in tokens(source):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#! ")
            if token.start[0] == last + 1 and not token.line[: token.start[1]].strip():
                texts[-1] += " " + text
            else:
                texts.append(text)
            last = token.start[0]
    return texts


def cpp_texts(source: str) -> list[str]:
    """Comments, without their slashes; ``//`` lines below each other are one text."""
    return [re.sub(r"\s*//\s*", " ", text).strip(" /*") for text in COMMENT.findall(STRING.sub('""', source))]


def page_texts(source: str) -> list[str]:
    """Paragraphs and headings, without code."""
    source = re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE)
    return [text.lstrip("# ") for text in re.sub(r"`[^`]*`", "", source).split("\n\n")]


def texts(path: Path) -> list[str]:
    """The texts of a file that people read."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_texts(source)
    if path.suffix in (".md", ".patch"):
        return page_texts(source if path.suffix == ".md" else source.partition("---")[0])
    return cpp_texts(source)


def strings(path: Path) -> list[str]:
    """The string literals of a source file: messages, help texts, test ids."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [token.string for token in tokens(source) if token.type == tokenize.STRING]
    return [] if path.suffix in (".md", ".patch") else STRING.findall(source)


FILES = [ROOT / page for page in PAGES]
FILES += [p for place in PLACES for p in sorted((ROOT / place).rglob("*")) if p.suffix in SUFFIXES]
FILES = [path for path in FILES if path != Path(__file__) and "results" not in path.parts]


def hits(text: str) -> list[str]:
    """Banned turns of one text."""
    first = ["What ..."] if BEGINS_WITH_WHAT.match(text) else []
    return first + [match[0] for match in TURNS.finditer(" ".join(text.split()))]


def where(path: Path, hit: str, text: str) -> str:
    return f"{path.relative_to(ROOT)}: {hit}: {' '.join(text.split())[:90]}"


def test_no_text_has_a_banned_turn():
    found = [where(path, hit, text) for path in FILES for text in texts(path) for hit in hits(text)]
    assert not found, "\n".join(found)


def test_no_message_and_no_name_has_a_banned_turn():
    found = [where(path, m[0], text) for path in FILES for text in strings(path) for m in TURNS.finditer(text)]
    found += [where(path, m[0], "") for path in FILES for m in NAMES.finditer(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (python_texts, '"""What it does."""\n'),
        (python_texts, "x = 1  # those of the\n"),
        (python_texts, "# found on\n# the way\n"),
        (cpp_texts, 'f("//");  // What is left\n'),
        (cpp_texts, "// on the\n// way\n"),
        (page_texts, "# What changes\n"),
        (page_texts, "done by\nhand\n"),
    ],
)
def test_a_banned_turn_is_found(kind, source):
    assert sum(len(hits(text)) for text in kind(source)) == 1
    assert not [hit for text in kind(re.sub("What|way|hand|those", "it", source)) for hit in hits(text)]
