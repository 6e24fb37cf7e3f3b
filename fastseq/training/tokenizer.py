"""Text to token ids and back, by the `tokenizers` library."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fastseq.errors import UserError
from fastseq.training.files import read_text, write_text

Kind = Literal["char", "whitespace", "bpe"]

PAD, BOS, EOS, UNK = range(4)
RESERVED = ("<pad>", "<bos>", "<eos>", "<unk>")
MOST_TOKENS = 10_000_000
MAX_BYTES = 256 << 20  # of a tokenizer's file
MAX_PADDING = 1 << 16  # tokens to which `encode` fills a text up
_RESERVED_WORD = re.compile("|".join(RESERVED))
_UNUSUAL = re.compile("|".join((*RESERVED, "[\x1c-\x1f]")))  # Python's split() takes these four as white space


def _untrained(kind: Kind) -> Tokenizer:
    if kind == "char":
        tokenizer = Tokenizer(models.WordLevel(unk_token=RESERVED[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == "whitespace":
        tokenizer = Tokenizer(models.WordLevel(unk_token=RESERVED[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=RESERVED[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


class TextTokenizer:
    """Characters, white-space separated tokens, or BPE (Sennrich et al. 2016); ids 0 to 3 are pad, bos, eos and unk.

    Text never yields a reserved id other than unk: a literal `<pad>` in the data is an unknown token.
    """

    def __init__(self, kind: Kind, tokenizer: Tokenizer) -> None:
        self.kind = kind
        self._tokenizer = tokenizer

    @property
    def closed(self) -> bool:
        """True if the model reads eos after a source; False for ports of models that were trained without."""
        return self._tokenizer.post_processor is None

    @classmethod
    def of_words(
        cls, kind: Kind, words: Sequence[str], *, closed: bool = True, padding: tuple[int, str] | None = None
    ) -> Self:
        """A tokenizer with these tokens, for ports: they get the ids from 4 on, in their order.

        Args:
            kind: "char" or "whitespace".
            words: the tokens, without the reserved ones.
            closed: see the property.
            padding: (length, token): `encode` fills each shorter text up, for models that read the padding.
        """
        tokenizer = _untrained(kind)
        vocabulary = {word: i for i, word in enumerate((*RESERVED, *words))}
        tokenizer.model = models.WordLevel(vocabulary, unk_token=RESERVED[UNK])
        _reserve(tokenizer)
        if not closed:
            tokenizer.post_processor = _open()
        if padding is not None:
            _pad(tokenizer, *padding)
        return cls(kind, tokenizer)

    @classmethod
    def train(cls, kind: Kind, lines: Iterable[str], vocab_size: int) -> Self:
        """A tokenizer whose vocabulary comes from `lines`: at most `vocab_size` ids, the 4 reserved ones included."""
        tokenizer = _untrained(kind)
        options = {"special_tokens": list(RESERVED), "vocab_size": vocab_size, "show_progress": False}
        if kind == "bpe":  # without a limit, every character of the data gets an id, however many there are
            trainer = trainers.BpeTrainer(**options, limit_alphabet=max(vocab_size - len(RESERVED), 1))
        else:
            trainer = trainers.WordLevelTrainer(**options)
        # A reserved word in the data would get a second id: it is no word to learn, and encode() reads it as unk.
        tokenizer.train_from_iterator((_RESERVED_WORD.sub(" ", line) for line in lines), trainer)
        return cls(kind, tokenizer)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the JSON file written by `save`; raises UserError for a missing or damaged one."""
        try:
            stored = json.loads(read_text(path, MAX_BYTES))
            kind = _kind(stored)
            return cls(kind, _rebuilt(kind, stored))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: give the folder of a run made by `fastseq train`") from error
        except (OSError, UserError):
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            reason = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{path} is not a tokenizer written by `fastseq train`: {reason}") from error

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON in the format of the `tokenizers` library."""
        write_text(path, self._tokenizer.to_str(pretty=True))

    def to_json(self) -> str:
        """The tokenizer in the format of the `tokenizers` library."""
        return self._tokenizer.to_str()

    def __eq__(self, other: object) -> bool:
        """True if both turn every text into the same ids."""
        return isinstance(other, TextTokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.kind, len(self)))

    def grown(self, lines: Iterable[str], vocab_size: int) -> Self:
        """This tokenizer with further tokens of `lines`, the frequent ones first: at most `vocab_size` ids in all.

        All tokens keep their ids. A BPE tokenizer keeps its merges and gains single characters alone.
        """
        if self.kind == "bpe":
            fresh = TextTokenizer.train("char", (line.replace(" ", "▁") for line in lines), MOST_TOKENS)
        else:
            fresh = TextTokenizer.train(self.kind, lines, MOST_TOKENS)
        stored = json.loads(self._tokenizer.to_str())
        known, words = stored["model"]["vocab"], fresh._tokenizer.get_vocab()
        new = [word for word in sorted(words, key=words.__getitem__) if word not in known]
        for word in new[: max(0, vocab_size - len(known))]:
            known[word] = len(known)
        return type(self)(self.kind, _rebuilt(self.kind, stored))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Token ids of each line, without bos and eos; tokens outside the vocabulary become unk."""
        encodings = self._tokenizer.encode_batch(list(lines), add_special_tokens=False)
        if self._tokenizer.padding is not None:
            rows = (zip(encoding.ids, encoding.attention_mask, strict=True) for encoding in encodings)
            return [[token if token > UNK or not text else UNK for token, text in row] for row in rows]
        return [[token if token > UNK else UNK for token in encoding.ids] for encoding in encodings]

    def encode_flat(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `encode`: all ids behind each other (sum of lengths,) int32, and the lengths (N,).

        Characters and words are looked up without the tokenizers library, many times faster, unless a reserved word or
        a separator on which Python and that library disagree is among them, or the tokenizer pads.
        """
        slow = self.kind == "bpe" or self._tokenizer.padding is not None or not lines
        if slow or _UNUSUAL.search(text := "".join(lines)):
            rows = self.encode(lines)
        elif self.kind == "char":
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            return self._ids_of_characters[codes], np.array([len(line) for line in lines])
        else:
            ids = self._ids_of_words
            rows = [[ids.get(word, UNK) for word in line.split()] for line in lines]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    @functools.cached_property
    def _ids_of_words(self) -> dict[str, int]:
        """Id of each token of the vocabulary."""
        return self._tokenizer.get_vocab()

    @functools.cached_property
    def _ids_of_characters(self) -> np.ndarray:
        """Id of each code point, unk for one outside the vocabulary."""
        table = np.full(sys.maxunicode + 1, UNK, np.int32)
        for word, token in self._ids_of_words.items():
            if len(word) == 1:
                table[ord(word)] = token
        return table

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids: everything before the first eos, without pad and bos."""
        texts = []
        for row in rows:
            ids = list(row)
            ids = ids[: ids.index(EOS)] if EOS in ids else ids
            texts.append([token for token in ids if token not in (PAD, BOS)])
        return self._tokenizer.decode_batch(texts, skip_special_tokens=False)

    def tokens(self, ids: Sequence[int], copied: Sequence[str] = ()) -> list[str]:
        """Name of each id, for the axes of a picture; `copied`: of the ids from the size of the vocabulary on."""
        size = len(self)
        return [self._tokenizer.id_to_token(token) if token < size else copied[token - size] for token in ids]

    def text(self, ids: Sequence[int], copied: Sequence[str]) -> str:
        """As `decode` of one row, with names for the ids from the size of the vocabulary on."""
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return self.join(self.tokens([token for token in ids if token not in (PAD, BOS)], copied))

    def pieces(self, lines: Sequence[str]) -> list[list[str]]:
        """The text of each token of each line, as it stands in the line; unknown tokens keep theirs."""
        encodings = self._tokenizer.encode_batch(list(lines), add_special_tokens=False)
        return [
            [line[start:stop].strip() or line[start:stop] for start, stop in encoding.offsets]
            for line, encoding in zip(lines, encodings, strict=True)
        ]

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens given by name."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def units(self, text: str) -> list[str]:
        """The tokens of the token error rate: characters for "char", else white-space separated words."""
        return list(text) if self.kind == "char" else text.split()


def _kind(tokenizer_json: dict) -> Kind:
    kinds: dict[str, Kind] = {"Split": "char", "WhitespaceSplit": "whitespace", "Metaspace": "bpe"}
    return kinds[tokenizer_json["pre_tokenizer"]["type"]]


def _rebuilt(kind: Kind, stored: dict) -> Tokenizer:
    """The tokenizer with the vocabulary and merges of `stored`. Raises ValueError unless `train` makes the rest.

    Nothing else of the file is used: a regular expression or a normalizer of a stranger never runs.
    """
    tokenizer = _untrained(kind)
    if stored["post_processor"] is not None:
        tokenizer.post_processor = _open()
    if stored["padding"] is not None:
        _pad(
            tokenizer, stored["padding"]["strategy"]["Fixed"], stored["padding"]["pad_token"], stored["model"]["vocab"]
        )
    expected = json.loads(tokenizer.to_str())
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        if not _agree(stored[name], expected[name]):
            raise ValueError(f"{name} is not the one of a {kind} tokenizer")
    model = stored["model"]
    if model["type"] != expected["model"]["type"]:
        raise ValueError(f"the model is not {expected['model']['type']}")
    vocabulary = model["vocab"]
    if not all(type(token) is int for token in vocabulary.values()):
        raise ValueError("a token id is no integer")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the {len(vocabulary)} token ids are not 0 to {len(vocabulary) - 1}")
    if [vocabulary.get(word) for word in RESERVED] != [PAD, BOS, EOS, UNK]:
        raise ValueError(f"the first ids do not belong to {', '.join(RESERVED)}")
    if kind == "bpe":
        tokenizer.model = models.BPE(vocabulary, [tuple(pair) for pair in model["merges"]], unk_token=RESERVED[UNK])
    else:
        tokenizer.model = models.WordLevel(vocabulary, unk_token=RESERVED[UNK])
    _reserve(tokenizer)
    return tokenizer


def _reserve(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in RESERVED])


def _open() -> processors.TemplateProcessing:
    """The mark of a tokenizer that is not closed: a text is its tokens alone."""
    return processors.TemplateProcessing(single="$A", special_tokens=[])


def _pad(tokenizer: Tokenizer, length: int, token: str, vocabulary: dict[str, int] | None = None) -> None:
    """Let the tokenizer fill texts up to ``length`` tokens; raises ValueError for another length or token."""
    identity = tokenizer.token_to_id(token) if vocabulary is None else vocabulary.get(token)
    if type(length) is not int or not 1 <= length <= MAX_PADDING or type(identity) is not int:
        raise ValueError(f"padding to {length!r} with {token!r}; expected 1 to {MAX_PADDING} and a known token")
    tokenizer.enable_padding(length=length, pad_id=identity, pad_token=token)


def _agree(stored: object, expected: object) -> bool:
    """True if equal, apart from fields that only one version of the tokenizers library writes."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        return stored.get("type") == expected.get("type") and all(
            stored[key] == expected[key] for key in stored.keys() & expected.keys()
        )
    return stored == expected
