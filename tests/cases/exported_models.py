"""A model whose predictions differ from source to source, and texts, for the tests of the exports."""

import random

import torch

import fastseq
from fastseq.convert.vocabulary import Vocabulary
from fastseq.training.trained import TrainedModel

LETTERS = "abcdefghijklmnop"


def trained(**options):
    """A model of large random weights: its predictions differ from source to source."""
    torch.manual_seed(0)
    sizes = dict(src_vocab_size=20, tgt_vocab_size=20, embedding_dim=6, hidden_size=16)
    model = fastseq.Seq2Seq(fastseq.Seq2SeqConfig(**(sizes | options)))
    for p in model.parameters():
        p.data *= 2.5
    words = Vocabulary(list(LETTERS))
    return TrainedModel(model, words.tokenizer("char"), words.tokenizer("char"))


def sources(count):
    generator = random.Random(0)
    return ["".join(generator.choices(LETTERS + "?", k=generator.randint(0, 12))) for _ in range(count)]


def texts(model, lines, **search):
    return [[hypothesis.text for hypothesis in row] for row in model.predict(lines, max_new_tokens=12, **search)]
