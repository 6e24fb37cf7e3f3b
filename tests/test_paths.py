"""Files that CONTRIBUTING.md and DESIGN.md name exist: in code spans, code blocks and links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = (ROOT, ROOT / "fastseq", ROOT / "csrc", ROOT / "tests")  # names may omit these
SUFFIXES = "py|md|h|cpp|cu|cuh|json|patch|yml|toml"
PATH = re.compile(rf"[\w.*<>-]+(?:/[\w.*<>-]+)*(?:/|\.(?:{SUFFIXES})\b)")
MOST_LINES = {"CONTRIBUTING.md": 120, "README.md": 130}


def named(text: str) -> set[str]:
    """Paths in a text, with ``*`` for ``<op>`` and other placeholders."""
    return {re.sub(r"<\w+>", "*", name) for name in PATH.findall(text) if not name.startswith(".venv/")}


def code_and_links(text: str) -> str:
    """The code blocks, code spans and link targets of a page."""
    fenced = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", rest), *re.findall(r"\]\(([^)#:]+)\)", rest)])


def exists(name: str) -> bool:
    """True for a file or folder below one of PLACES, or, without a slash, anywhere in the repository."""
    if any(next(place.glob(name.rstrip("/")), None) for place in PLACES):
        return True
    places = (ROOT / folder for folder in ("fastseq", "csrc", "tests", "benchmarks", "docs"))
    return any(next(place.rglob(name.rstrip("/")), None) for place in places)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "DESIGN.md"])
def test_every_path_named_exists(page):
    names = named(code_and_links((ROOT / page).read_text()))
    assert len(names) > 30
    assert sorted(name for name in names if not exists(name)) == []


def test_a_path_that_is_gone_is_noticed():
    text = "`fastseq/ops/<op>/api.py` and `csrc/cpu/nothing.h`\n```\nkernels/*-inl.h\ntests/gone.py\n```\n"
    text += "[x](docs/gone.md)"
    names = named(code_and_links(text))
    assert {name for name in names if not exists(name)} == {"csrc/cpu/nothing.h", "tests/gone.py", "docs/gone.md"}


@pytest.mark.parametrize("page", MOST_LINES)
def test_pages_stay_short(page):
    assert len((ROOT / page).read_text().splitlines()) <= MOST_LINES[page]
