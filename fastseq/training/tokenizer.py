"""Text to token ids and back, by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastseq.errors import UserError

Kind = Literal["char", "whitespace", "bpe"]

PAD, BOS, EOS, UNK = range(4)
RESERVED = ("<pad>", "<bos>", "<eos>", "<unk>")
_RESERVED_WORD = re.compile("|".join(RESERVED))


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
        """Read the JSON file written by `save`; raises UserError when it is missing or is none."""
        try:
            text = path.read_text(encoding="utf-8")
            return cls(_kind(json.loads(text)), Tokenizer.from_str(text))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: give the folder of a run made by `fastseq train`") from error
        except OSError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(f"{path} is not a tokenizer written by `fastseq train`: {error}") from error

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON in the format of the `tokenizers` library."""
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Token ids of each line, without bos and eos; tokens outside the vocabulary become unk."""
        encodings = self._tokenizer.encode_batch(list(lines), add_special_tokens=False)
        return [[token if token > UNK else UNK for token in encoding.ids] for encoding in encodings]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids: everything before the first eos, without pad and bos."""
        texts = []
        for row in rows:
            ids = list(row)
            ids = ids[: ids.index(EOS)] if EOS in ids else ids
            texts.append([token for token in ids if token not in (PAD, BOS)])
        return self._tokenizer.decode_batch(texts, skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Name of each id, for the axes of a picture."""
        return [self._tokenizer.id_to_token(token) for token in ids]

    def units(self, text: str) -> list[str]:
        """What the token error rate counts: characters for "char", else white-space separated words."""
        return list(text) if self.kind == "char" else text.split()


def _kind(tokenizer_json: dict) -> Kind:
    kinds: dict[str, Kind] = {"Split": "char", "WhitespaceSplit": "whitespace", "Metaspace": "bpe"}
    return kinds[tokenizer_json["pre_tokenizer"]["type"]]
