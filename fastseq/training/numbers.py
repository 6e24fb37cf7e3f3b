"""`fastseq data numbers DIR`: written-out numbers and dates in four languages, and what they mean in digits.

The package num2words spells the numbers out, babel the dates, in English, German, French and Spanish. Nothing is
downloaded. A source is a number from 0 to 999,999 in words, or a day of the years 1900 to 2099 in the full, long or
medium format of its language; the target is the number in digits, or the date as YEAR-MONTH-DAY:

siebenhundertvierundzwanzigtausenddreihundertachtzehn<TAB>724318
mardi 3 mars 2015<TAB>2015-03-03

No source occurs twice, so that no test source is in the training file; half of the lines are dates.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from random import Random

from fastseq.errors import SuggestingParser, UserError

LANGUAGES = {"en": "en_GB", "de": "de", "fr": "fr", "es": "es"}  # of num2words: locale of babel
FORMATS = ("full", "long", "medium")
LONGEST = 6  # digits of a number
FIRST, DAYS = datetime.date(1900, 1, 1), 73_049  # up to 2099-12-31
SIZES = {"train": 40_000, "valid": 1_000, "test": 2_000}  # lines


def writers() -> tuple[Callable[..., str], Callable[..., str]]:
    """num2words.num2words and babel.dates.format_date; raises UserError for a package that is missing."""
    try:
        from babel.dates import format_date
        from num2words import num2words
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name}, which writes numbers and dates out, is missing; bring both with: "
            "pip install num2words babel"
        ) from error
    return num2words, format_date


def number_pair(random: Random, spell: Callable[..., str]) -> tuple[str, str]:
    """A number in words, and in digits; each number of digits is as frequent as the others."""
    digits = random.randint(1, LONGEST)
    number = random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    return spell(number, lang=random.choice(list(LANGUAGES))), str(number)


def date_pair(random: Random, write: Callable[..., str]) -> tuple[str, str]:
    """A date as its language writes it, and as YEAR-MONTH-DAY."""
    day = FIRST + datetime.timedelta(random.randrange(DAYS))
    return write(day, random.choice(FORMATS), locale=random.choice(list(LANGUAGES.values()))), day.isoformat()


def distinct_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs, numbers and dates in turn, whose sources all differ."""
    random, makers = Random(seed), list(zip((number_pair, date_pair), writers(), strict=True))
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        make, writer = makers[len(pairs) % 2]
        source, target = make(random, writer)
        pairs.setdefault(source, target)
    return list(pairs.items())


def write_numbers(directory: Path) -> dict[str, int]:
    """Write the three files into `directory`, made if missing; return the lines of each."""
    pairs = iter(distinct_pairs(sum(SIZES.values()), seed=0))
    directory.mkdir(parents=True, exist_ok=True)
    for name, n in SIZES.items():
        lines = (f"{source}\t{target}\n" for source, target in (next(pairs) for _ in range(n)))
        (directory / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return SIZES


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data numbers`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data numbers",
        description="Write train.tsv, valid.tsv and test.tsv: numbers and dates in words, in four languages, a tab, "
        "the same in digits.",
        epilog="The packages num2words and babel write them (pip install num2words babel); nothing is downloaded.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    directory = parser.parse_args(argv).directory
    for name, n in write_numbers(directory).items():
        print(f"{directory / name}.tsv: {n:,} lines")
