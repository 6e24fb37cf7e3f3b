"""Pretrained embeddings: vectors of tokens from a text file of word2vec or GloVe, or from a .npy matrix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.corpus import Corpus
from fastseq.training.features import Features
from fastseq.training.progress import say
from fastseq.training.reading import decoded_lines
from fastseq.training.tagged import text_side
from fastseq.training.tokenizer import PAD, TextTokenizer


def load_embeddings(model: Seq2Seq, config: Namespace, corpus: Corpus) -> None:
    """Copy the vectors of --model.src_embeddings and tgt_embeddings into the model, and say how many tokens have one.

    Raises UserError for a file of another width, a damaged one, and one that knows no token of the vocabulary.
    """
    source, target = config.model.src_embeddings, config.model.tgt_embeddings
    if source is not None and isinstance(corpus.source_tokenizer, Features):
        raise UserError(
            "--model.src_embeddings is for tokens, and --model.source_features reads features; leave it out"
        )
    if source is not None and target is not None and model.config.share_all_embeddings:
        raise UserError("model.share_all_embeddings has one matrix: give --model.src_embeddings or tgt_embeddings")
    if source is not None:
        _fill(model.encoder.embedding.weight, Path(source), text_side(corpus.source_tokenizer), "source")
    if target is not None:
        _fill(model.decoder.embedding.weight, Path(target), corpus.target_tokenizer, "target")


def _fill(weight: Tensor, path: Path, tokenizer: TextTokenizer, side: str) -> None:
    """weight (V, D): set the rows of the tokens that have a vector; padding stays zero."""
    rows = _matrix(path, weight) if path.suffix == ".npy" else _rows(path, weight, tokenizer)
    number = 0
    with torch.no_grad():
        for token, vector in rows:
            if token != PAD:
                weight[token] = vector
                number += 1
    if not number:
        raise UserError(f"{path} has no vector for any token of the {side} vocabulary; give one of the same tokens")
    say(f"{path}: {number:,} of {len(weight):,} tokens of the {side} vocabulary have a vector")


def _matrix(path: Path, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a matrix (V, D), in the order of the token ids."""
    try:
        matrix = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array: {str(error)[:200]}") from error
    if not isinstance(matrix, np.ndarray) or matrix.shape != tuple(weight.shape) or matrix.dtype.kind != "f":
        found = f"{matrix.shape} of {matrix.dtype}" if isinstance(matrix, np.ndarray) else "an archive"
        raise UserError(
            f"{path} holds {found}; expected floating-point numbers {tuple(weight.shape)}, a row for each token id, as "
            "wide as --model.embedding_dim"
        )
    vectors = torch.from_numpy(np.array(matrix, dtype=np.float32))
    if not vectors.isfinite().all():
        row = int((~vectors.isfinite()).any(1).nonzero()[0, 0])
        raise UserError(f"{path}, row {row}: a number is not finite; mend or remove the vector")
    yield from enumerate(vectors)


def _rows(path: Path, weight: Tensor, tokenizer: TextTokenizer) -> Iterator[tuple[int, Tensor]]:
    """Token and vector of each line `word number number ...` whose word is a token; a first line `N D` is passed over.

    Reads line by line: the memory does not grow with the file.
    """
    ids = {word: token for token, word in enumerate(tokenizer.tokens(range(len(tokenizer))))}
    size = weight.size(1)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected lines of a word and its numbers"
        ) from error
    with file:
        for number, line in decoded_lines(file, str(path)):
            fields = line.rstrip(" ").rsplit(" ", size)
            if number == 1:
                if len(line.split()) == 2 and all(field.isdecimal() for field in line.split()):
                    _check_width(path, int(line.split()[1]), size)
                    continue
                _check_width(path, len(line.split()) - 1, size)
            if len(fields) != size + 1:
                raise UserError(f"{path}, line {number}: expected a word and {size} numbers, separated by spaces")
            if fields[0] in ids:
                yield ids[fields[0]], _vector(fields[1:], f"{path}, line {number}")


def _check_width(path: Path, found: int, size: int) -> None:
    if found != size:
        raise UserError(
            f"{path} has vectors of {found} numbers, the model has --model.embedding_dim {size}; give "
            f"--model.embedding_dim {found}, or other vectors"
        )


def _vector(fields: list[str], where: str) -> Tensor:
    try:
        vector = torch.tensor([float(field) for field in fields])
    except ValueError as error:
        raise UserError(f"{where}: {str(error)[:100]}") from error
    if not vector.isfinite().all():
        raise UserError(f"{where}: a number is not finite; mend or remove the line")
    return vector
