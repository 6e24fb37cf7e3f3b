"""`fastseq data templates DIR`: sentences with invented names and numbers, and their retelling in a fixed form.

A source tells one of eight facts in one of three ways; its target tells the same fact in the one way of that kind, so
that names and numbers must be put in other places:

    kelora vashti paid tumo 4512 dollars for 83 shares    tumo sold 83 shares to kelora vashti for 4512 dollars

Names are one or two words of two or three syllables. Each name word and each number belongs to one of the three files,
so that a name or number of the test is in no training pair. train.tsv, valid.tsv and test.tsv are drawn from a fixed
seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastseq.errors import SuggestingParser

SIZES = {"train": 12_000, "valid": 1_000, "test": 2_000}  # pairs
SYLLABLES = [first + vowel for first in (*"bdfgklmnprstvz", "sh", "th") for vowel in "aeiou"]
OPENINGS = ("", "", "", "yesterday ", "we hear that ", "according to the paper ", "as expected , ")
FACTS = (  # ways to tell it, its fixed form; a and b are names, m and n numbers
    (
        "{a} sold {n} shares to {b} for {m} dollars",
        "{b} paid {a} {m} dollars for {n} shares",
        "for {m} dollars {b} got {n} shares from {a}",
        "{a} sold {n} shares to {b} for {m} dollars",
    ),
    (
        "{a} won against {b} by {n} points to {m}",
        "{b} lost to {a} , {m} points to {n}",
        "with {n} points against {m} {a} was better than {b}",
        "{a} beat {b} {n} to {m}",
    ),
    (
        "the train from {a} to {b} leaves at {n} from platform {m}",
        "take platform {m} at {n} for the train to {b} , it starts in {a}",
        "{b} can be reached from {a} by the train of {n} on platform {m}",
        "train {n} : {a} to {b} , platform {m}",
    ),
    (
        "please send {n} boxes to {a} in {b} , order {m}",
        "{a} who lives in {b} ordered {n} boxes under number {m}",
        "order {m} of {n} boxes goes to {b} , to the house of {a}",
        "order {m} : {n} boxes for {a} , {b}",
    ),
    (
        "{a} was born in {b} in {n} and lived {m} years",
        "after a life of {m} years {a} , a child of {b} , born {n} , has died",
        "in {n} {b} saw the birth of {a} , who died {m} years later",
        "{a} , born {n} in {b} , died at {m}",
    ),
    (
        "{b} charged the account {n} of {a} with {m} dollars",
        "{m} dollars went from account {n} , held by {a} , to {b}",
        "{a} gave {b} {m} dollars from account {n}",
        "account {n} ( {a} ) : {m} dollars to {b}",
    ),
    (
        "{a} and {b} share room {n} on floor {m}",
        "on floor {m} in room {n} you will find {a} with {b}",
        "room {n} , floor {m} , belongs to {a} and to {b}",
        "floor {m} room {n} : {a} , {b}",
    ),
    (
        "{a} moved from street {n} to street {m} next to {b}",
        "now living beside {b} in street {m} , {a} has left street {n}",
        "street {n} has lost {a} to street {m} , where {b} lives too",
        "{a} : street {n} to street {m} , near {b}",
    ),
)


def part_of(word: str) -> str:
    """The file for which a word of a name, or a number, is used: eight of ten for training."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(word.encode()) % 10, "train")


def pairs(part: str, n: int, seed: int) -> Iterator[tuple[str, str]]:
    """`n` pairs of source and target with names and numbers of one file."""
    draw = random.Random(seed)

    def word(make) -> str:
        return next(word for word in iter(make, None) if part_of(word) == part)

    def name() -> str:
        def joined() -> str:
            return "".join(draw.choices(SYLLABLES, k=draw.randint(2, 3)))

        return " ".join(word(joined) for _ in range(draw.randint(1, 2)))

    def number() -> str:
        return word(lambda: str(draw.randint(10, 99_999)))

    for _ in range(n):
        *ways, form = draw.choice(FACTS)
        slots = {"a": name(), "b": name(), "n": number(), "m": number()}
        yield draw.choice(OPENINGS) + draw.choice(ways).format(**slots), form.format(**slots)


def write_pairs(directory: Path) -> dict[str, int]:
    """Write the three files into `directory`, made if missing; return the number of pairs of each."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate(SIZES.items()):
        lines = [f"{source}\t{target}\n" for source, target in pairs(name, n, seed)]
        (directory / f"{name}.tsv").write_text("".join(lines))
    return SIZES


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data templates`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data templates",
        description="Write pairs (train.tsv, valid.tsv, test.tsv) with names and numbers that no other file has: a "
        "fact in one of three ways, a tab, the same fact in a fixed form.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    directory = parser.parse_args(argv).directory
    for name, n in write_pairs(directory).items():
        print(f"{directory / name}.tsv: {n:,} pairs")
