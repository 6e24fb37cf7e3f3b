"""Noise on the characters of a text: the natural and synthetic errors of Belinkov and Bisk 2018."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each row half a key to the right of the one above


def _neighbours() -> dict[str, str]:
    places = {key: (row, column + row / 2) for row, keys in enumerate(_ROWS) for column, key in enumerate(keys)}
    return {
        key: "".join(k for k, (r, c) in places.items() if k != key and abs(r - row) <= 1 and abs(c - column) <= 1)
        for key, (row, column) in places.items()
    }


NEIGHBOURS = _neighbours()


def noisy(text: str, kind: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    """The text with noise in each word; words are separated by white space, and none of them becomes empty.

    Args:
        kind: "swap": two neighbouring characters change places, the first and the last one stay. "middle": all
            characters but the first and the last one, in random order. "drop": a character is missing. "keyboard": a
            letter becomes a neighbour on a QWERTY keyboard. "substitute": a character becomes another one of
            ``alphabet``.
        rate: probability of each character, of "swap" each pair, of "middle" each word.
        source: of the random numbers.
        alphabet: characters that may be put in.
    """
    change = _CHANGES[kind]
    return re.sub(r"\S+", lambda match: change(match[0], rate, source, alphabet), text)


def _swap(word: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    letters, i = list(word), 1
    while i + 2 < len(letters):
        if source.random() < rate:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
            i += 1
        i += 1
    return "".join(letters)


def _middle(word: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    if source.random() >= rate:
        return word
    return word[:1] + "".join(source.sample(word[1:-1], len(word[1:-1]))) + word[1:][-1:]


def _drop(word: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    return "".join(c for c in word if source.random() >= rate) or word[0]


def _keyboard(word: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    return "".join(_typed(c, source) if source.random() < rate else c for c in word)


def _typed(character: str, source: random.Random) -> str:
    near = NEIGHBOURS.get(character.lower())
    if near is None:
        return character
    key = source.choice(near)
    return key.upper() if character.isupper() else key


def _substitute(word: str, rate: float, source: random.Random, alphabet: Sequence[str]) -> str:
    return "".join(_other(c, source, alphabet) if source.random() < rate else c for c in word)


def _other(character: str, source: random.Random, alphabet: Sequence[str]) -> str:
    choices = [c for c in alphabet if c != character]
    return source.choice(choices) if choices else character


_CHANGES = {"swap": _swap, "middle": _middle, "drop": _drop, "keyboard": _keyboard, "substitute": _substitute}
KINDS = tuple(_CHANGES)
