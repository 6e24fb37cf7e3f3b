"""Markdown pages: their code blocks, headings and links.

A comment directly above a code block changes what the tests do with it:

    <!-- not run: REASON -->    a block that needs a GPU, another machine or minutes
    <!-- run -->                run the `fastseq` lines of a shell block, which are otherwise parsed only
    <!-- file: NAME -->         write the block to this file; later blocks of the page read it
    <!-- before: CODE -->       Python that runs before the block and that readers do not see; it may span lines
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?P<indent>[ >]*)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*)[^`]*")
COMMENT = re.compile(r"<!--\s*(not run|run|file|before)\b:?(.*?)-->\s*", re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?)(?: *\{(?:[^}]*\s)?#([\w.-]+)[^}]*\})? *#*$", re.MULTILINE)
API = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)  # an entry of mkdocstrings; its anchor is the name
LINK = re.compile(
    r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)|^\[[^\]]+\]: *(\S+)|(?:href|src)=\"([^\"]+)\"", re.M
)


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language and text, the line of its first line, and the comment above it."""

    language: str
    text: str
    line: int
    comment: tuple[str, str] | None  # "not run", "run", "file" or "before", and the rest


def blocks(text: str) -> list[Block]:
    """The fenced code blocks of a page, in order; a fence that is never closed is a ValueError."""
    lines, found, start = text.splitlines(), [], 0
    while start < len(lines):
        opening = FENCE.fullmatch(lines[start])
        if not opening:
            start += 1
            continue
        indent, fence = opening["indent"], opening["fence"]
        end = next((k for k in range(start + 1, len(lines)) if lines[k].strip(" >") == fence), None)
        if end is None:
            raise ValueError(f"line {start + 1}: the code block is not closed")
        body = "\n".join(line.removeprefix(indent) for line in lines[start + 1 : end])
        above = COMMENT.fullmatch("<!--" + "\n".join(lines[:start]).rpartition("<!--")[2])
        comment = (above[1], above[2].strip()) if above else None
        found.append(Block(opening["language"], body, start + 2, comment))
        start = end + 1
    return found


def without_code(text: str) -> str:
    """The page without code blocks, code spans and comments."""
    for block in blocks(text):
        text = text.replace(block.text, "")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def links(text: str) -> list[str]:
    """Targets of all links and images, code excluded."""
    return ["".join(groups) for groups in LINK.findall(without_code(text))]


def anchors(text: str) -> set[str]:
    """Names that a link into the page may end in: headings as GitHub spells them, {#names}, API entries."""
    prose = text
    for block in blocks(text):
        prose = prose.replace(block.text, "")
    names: set[str] = set(API.findall(prose))
    for heading, explicit in HEADING.findall(prose):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = slug = re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-")
        while name in names:
            name = f"{slug}-{int(name.removeprefix(slug + '-')) + 1 if name != slug else 1}"
        names |= {name, explicit} - {""}
    return names


def pages() -> list[Path]:
    """Every Markdown page of the project that users read."""
    places = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    return sorted(path for place in places for path in ROOT.glob(place))
