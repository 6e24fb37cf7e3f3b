"""The two graphs of an exported model: the encoder, and one step of the decoder, for any batch and length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.ops.attention.api import Keys
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput
from fastseq.seq2seq.model import Seq2Seq


class Axes(NamedTuple):
    """An input or output: its name, and the names of its dimensions that differ from call to call."""

    name: str
    sizes: dict[int, str]


def encoder_inputs(config: Seq2SeqConfig) -> list[Axes]:
    """source (B, S) tokens, (B, S, K) a token and its tags, or (B, S, F) features; lengths (B,)."""
    tags = {} if config.tag_vocab_size is None else {2: "K"}
    return [Axes("source", {0: "B", 1: "S"} | tags), Axes("lengths", {0: "B"})]


def encoder_outputs(config: Seq2SeqConfig) -> list[Axes]:
    """memory (B, M, D), memory_lengths (B,), h and c (L, B, H), and keys (B, M, A) where the scores project them.

    M is S, or less with ``time_reduction``.
    """
    outputs = [Axes("memory", {0: "B", 1: "M"}), Axes("memory_lengths", {0: "B"}), Axes("h", {1: "B"})]
    outputs.append(Axes("c", {1: "B"}))
    return [*outputs, Axes("keys", {0: "B", 1: "M"})] if has_keys(config) else outputs


def step_inputs(config: Seq2SeqConfig) -> list[Axes]:
    """tokens (N,), h and c (L, N, H), feed (N, H) with input feeding, coverage (N, M) with that option; with attention
    memory, memory_lengths, keys."""
    inputs = [Axes("tokens", {0: "N"}), Axes("h", {1: "N"}), Axes("c", {1: "N"})]
    if config.input_feeding:
        inputs.append(Axes("feed", {0: "N"}))
    if config.coverage:
        inputs.append(Axes("coverage", {0: "N", 1: "M"}))
    if config.attention != "none":
        inputs += [Axes("memory", {0: "N", 1: "M"}), Axes("memory_lengths", {0: "N"})]
    return [*inputs, Axes("keys", {0: "N", 1: "M"})] if has_keys(config) else inputs


def step_outputs(config: Seq2SeqConfig) -> list[Axes]:
    """logits (N, V), next_h and next_c (L, N, H), next_feed (N, H) with feeding, attention (N, M) with attention.

    The next coverage is coverage + attention.
    """
    outputs = [Axes("logits", {0: "N"}), Axes("next_h", {1: "N"}), Axes("next_c", {1: "N"})]
    if config.input_feeding:
        outputs.append(Axes("next_feed", {0: "N"}))
    return [*outputs, Axes("attention", {0: "N", 1: "M"})] if config.attention != "none" else outputs


def has_keys(config: Seq2SeqConfig) -> bool:
    """False where the attention reads the memory itself."""
    return config.attention not in ("none", "dot")


class Encode(nn.Module):
    """:func:`encoder_inputs` -> :func:`encoder_outputs`."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        enc = self.model.encode(source, lengths, single_steps=False)
        outputs = (enc.memory, enc.lengths, enc.h, enc.c)
        return (*outputs, enc.keys.projected) if has_keys(self.model.config) else outputs


class Step(nn.Module):
    """:func:`step_inputs` -> :func:`step_outputs`."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        config, rest = self.model.config, list(rest)
        feed = rest.pop(0) if config.input_feeding else None
        coverage = rest.pop(0) if config.coverage else None
        enc = encoded(config, h, c, rest)
        logits, state, weights = self.model.decode_step(tokens, DecoderState(h, c, feed, coverage=coverage), enc)
        optional = (state.feed, weights)
        return logits, state.h, state.c, *(tensor for tensor in optional if tensor is not None)


def encoded(config: Seq2SeqConfig, h: Tensor, c: Tensor, rest: list[Tensor]) -> EncoderOutput:
    """The encoder output of a step's inputs; without attention a step reads none of it."""
    if config.attention == "none":
        return EncoderOutput(h[0, :, None], None, torch.ones_like(h[0, :, 0], dtype=torch.int64), h, c)
    memory, lengths = rest[:2]
    return EncoderOutput(memory, Keys(rest[2] if has_keys(config) else memory), lengths, h, c)


def examples(
    model: Seq2Seq, batch: int, positions: int, seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Random inputs of both graphs, for ``batch`` sources of ``positions`` positions, not all of full length."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.source_features is None:
        source = torch.randint(config.src_vocab_size, (batch, positions), generator=generator)
        if config.tag_vocab_size is not None:
            tags = torch.randint(config.tag_vocab_size, (batch, positions, batch + 1), generator=generator)
            source = torch.cat([source[..., None], tags], -1)
    else:
        source = torch.randn(batch, positions, config.source_features, generator=generator)
    lengths = torch.randint(1, positions + 1, (batch,), generator=generator)
    lengths[0] = positions
    with torch.no_grad():
        memory, memory_lengths, h, c, *keys = Encode(model)(source, lengths)
    step = [torch.randint(config.tgt_vocab_size, (batch,), generator=generator), h, c]
    if config.input_feeding:
        step.append(torch.randn(batch, config.hidden_size, generator=generator))
    if config.coverage:
        step.append(torch.rand(memory.shape[:2], generator=generator))
    if config.attention != "none":
        step += [memory, memory_lengths, *keys]
    return (source, lengths), tuple(step)
