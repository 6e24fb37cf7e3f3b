"""`fastseq data inflection DIR`: nouns of Turkish, inflected by rule, with the features of the form as tags.

The stems are invented; the endings follow the rules of Turkish nouns (Göksel and Kerslake 2005, chapters 3, 6 and 8):
plural, five possessors, seven cases; vowel harmony of two and four vowels; d and t by assimilation; the joining sounds
y, s and n; p, ç, t, k before a vowel become b, c, d, ğ in stems of several syllables. Tags are the ones of UniMorph:

dorak<TAB>N;ABL;PL;PSS1S<TAB>doraklarımdan

Each stem is in one of the three files only, so that every test stem is new to the model.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

from fastseq.errors import SuggestingParser

VOWELS = "aıoueiöü"
BACK, ROUND, VOICELESS = set("aıou"), set("ouöü"), set("fstkçşhp")
ONSETS, CODAS = "bcçdfghjklmnprsştvyz", "klmnprsşzçtğ"
SOFTENED = {"p": "b", "ç": "c", "t": "d", "k": "ğ"}
# Capitals: A is a or e; I is ı, i, u or ü; D is d or t; a sound in brackets joins, a vowel after a consonant only, a
# consonant after a vowel only.
POSSESSORS = {"": "", "PSS1S": "(I)m", "PSS2S": "(I)n", "PSS3S": "(s)I", "PSS1P": "(I)mIz", "PSS2P": "(I)nIz"}
CASES = {"NOM": "", "ACC": "(y)I", "DAT": "(y)A", "GEN": "(n)In", "LOC": "DA", "ABL": "DAn", "INS": "(y)lA"}
NUMBERS = {"SG": "", "PL": "lAr"}
FORMS = list(itertools.product(CASES, NUMBERS, POSSESSORS))
SIZES = {"train": 4_000, "valid": 200, "test": 400}  # stems
FORMS_OF_STEM = 5  # drawn for each


def stem(random: Random) -> str:
    """An invented stem of one to three syllables, whose vowels are all back or all front."""
    back = random.choice((True, False))
    vowels = [v for v in VOWELS if (v in BACK) == back]
    syllables = [random.choice(ONSETS) + random.choice(vowels) for _ in range(random.randint(1, 3))]
    return "".join(syllables) + (random.choice(CODAS) if random.random() < 0.7 or len(syllables) == 1 else "")


def attached(word: str, ending: str) -> str:
    """The word with an ending such as (y)I in the form that its last sounds ask for."""
    if ending.startswith("("):
        joining, ending = ending[1], ending[3:]
        if (joining in "IA") != (word[-1] in VOWELS):
            ending = joining + ending
    for sound in ending:
        last = next(letter for letter in reversed(word) if letter in VOWELS)
        if sound == "A":
            sound = "a" if last in BACK else "e"
        elif sound == "I":
            sound = ("u" if last in ROUND else "ı") if last in BACK else ("ü" if last in ROUND else "i")
        elif sound == "D":
            sound = "t" if word[-1] in VOICELESS else "d"
        word += sound
    return word


def inflected(noun: str, case: str, number: str, possessor: str) -> str:
    """The form of a noun."""
    endings = [NUMBERS[number], POSSESSORS[possessor], CASES[case]]
    if possessor == "PSS3S" and case not in ("NOM", "INS"):  # the n that follows a possessor of the third person
        endings[2] = "n" + endings[2].rpartition(")")[2]
    word = noun
    for ending in filter(None, endings):
        longer = attached(word, ending)
        softens = word == noun and sum(letter in VOWELS for letter in noun) > 1 and longer[len(word)] in VOWELS
        if softens and word[-1] in SOFTENED:
            longer = word[:-1] + SOFTENED[word[-1]] + longer[len(word) :]
        word = longer
    return word


def rows(stems: list[str], random: Random) -> list[tuple[str, str, str]]:
    """Stem, tags and form, for some forms of each stem."""
    found = []
    for noun in stems:
        for case, number, possessor in random.sample(FORMS, FORMS_OF_STEM):
            tags = ";".join(filter(None, ("N", case, number, possessor)))
            found.append((noun, tags, inflected(noun, case, number, possessor)))
    return found


def write_inflections(directory: Path) -> dict[str, int]:
    """Write the three files into `directory`, made if missing; return the lines of each."""
    random, stems = Random(0), dict[str, None]()
    while len(stems) < sum(SIZES.values()):
        stems[stem(random)] = None
    remaining = iter(stems)
    directory.mkdir(parents=True, exist_ok=True)
    lines = {}
    for name, n in SIZES.items():
        found = rows(list(itertools.islice(remaining, n)), random)
        (directory / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in found), encoding="utf-8")
        lines[name] = len(found)
    return lines


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data inflection`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data inflection",
        description="Write train.tsv, valid.tsv and test.tsv: invented Turkish stems, a tab, the features of a form, a "
        "tab, the form.",
        epilog="Everything comes from rules in this package; nothing is downloaded. Train with --config inflection.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    directory = parser.parse_args(argv).directory
    for name, n in write_inflections(directory).items():
        print(f"{directory / name}.tsv: {n:,} lines")
