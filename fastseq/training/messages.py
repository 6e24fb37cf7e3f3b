"""One sentence for each error of jsonargparse: the option, the value that it needs, the value that it got."""

from __future__ import annotations

import argparse
import re

from jsonargparse import ArgumentParser

from fastseq.errors import did_you_mean

LONGEST = 400  # characters of a sentence
_REWRITES = (
    (r"; use sys.set_int_max_str_digits\(\) to increase the limit", ""),
    (r" - Expected a <class 'NoneType'>(?:\. Got value: .*?)?(?= - | Given value type|$)", ""),
    (r"Does not validate against any of the Union subtypes.*?Errors: - ", ""),
    (r" Given value type: .*? Given value: ", "; got "),
    (r'^Parser key "(.*?)":', r"--\1:"),
    (r"Not of type [\w-]+: (?:(\S+) )?does not conform to restriction (v\S+(?: and v[^\s;]+)*)", r"must be \2; got \1"),
    (r"Expected a typing\.Literal\[(.*?)\]\. Got value: ", r"expected one of \1; got "),
    (r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1; got "),
    (r"Expected a <class '(\w+)'>", r"expected \1"),
    (r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"(expected [^;]*?) - expected ", r"\1 or "),
    (r"Not of type [\w-]+: invalid literal for (\w+)\(\) with base 10: ", r"expected \1; got "),
    (r"Not of type [\w-]+: could not convert string to float: ", "expected float; got "),
    (r"Not of type [\w-]+: (Exceeds the limit)", r"\1"),
    (r"(Exceeds the limit .*?)(?: - |; got ).*", r"\1"),
    (r"Unexpected config: .*|Unexpected config:$", "it holds no options: expected lines such as 'seed: 1'"),
    (r"; got [^;]*(?=; got [^;]*$)", ""),
)


def sentence(error: argparse.ArgumentError, parser: ArgumentParser) -> str:
    """The error in one line of at most `LONGEST` characters, with the near match of a misspelt option."""
    text = " ".join(str(error).split())
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"\bv([<>]=?)(-?[\d.]+)", r"\1 \2", text)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return text + _near_match(text, list(parser.get_defaults().keys()))


def _near_match(text: str, names: list[str]) -> str:
    if given := re.match(r"unrecognized arguments: --([\w.]+)", text):
        return did_you_mean(given[1], names, "--")
    if given := re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", text):
        group = f"{given[1]}." if given[1] else ""
        return did_you_mean(given[2], [name.removeprefix(group) for name in names if name.startswith(group)])
    return ""
