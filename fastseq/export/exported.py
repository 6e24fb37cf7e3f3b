"""An exported model, run by its graphs alone, under the search of fastseq."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastseq.export.graphs import encoded, has_keys
from fastseq.seq2seq import generation
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput

Graph = Callable[..., Sequence[Tensor]]


class ExportedModel(nn.Module):
    """Encoder and step of another runtime, with the protocol of :func:`fastseq.Seq2Seq.generate`, on the CPU.

    Args:
        config: of the model that was exported.
        encoder: :func:`fastseq.export.graphs.encoder_inputs` -> ``encoder_outputs``.
        step: ``step_inputs`` -> ``step_outputs``.
    """

    rows_share_sources = False

    def __init__(self, config: Seq2SeqConfig, encoder: Graph, step: Graph) -> None:
        super().__init__()
        self.config = config
        self._encoder, self._step = encoder, step
        self.device_marker = nn.Parameter(torch.empty(0), requires_grad=False)  # callers ask a parameter for the device

    def encode(self, src: Tensor, src_lengths: Tensor | None = None) -> EncoderOutput:
        """As :meth:`fastseq.Seq2Seq.encode`."""
        if src_lengths is None:
            src_lengths = torch.full((src.size(0),), src.size(1))
        memory, lengths, h, c, *keys = self._encoder(src, src_lengths)
        if self.config.attention == "none":
            return EncoderOutput(memory, None, lengths, h, c)
        return encoded(self.config, h, c, [memory, lengths, *keys])

    def start(self, enc: EncoderOutput) -> DecoderState:
        """As :meth:`fastseq.Seq2Seq.start`."""
        feed = torch.zeros_like(enc.h[0]) if self.config.input_feeding else None
        coverage = enc.memory.new_zeros(enc.memory.shape[:2]) if self.config.coverage else None
        return DecoderState(enc.h, enc.c, feed, coverage=coverage)

    def decode_step(
        self, tokens: Tensor, state: DecoderState, enc: EncoderOutput, *, need_weights: bool = True
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """As :meth:`fastseq.Seq2Seq.decode_step`, with as many sentences as rows."""
        inputs = [tokens, state.h, state.c]
        if state.feed is not None:
            inputs.append(state.feed)
        if state.coverage is not None:
            inputs.append(state.coverage)
        if self.config.attention != "none":
            inputs += [enc.memory, enc.lengths]
        if has_keys(self.config):
            inputs.append(enc.keys.projected)
        logits, h, c, *rest = self._step(*inputs)
        feed = rest.pop(0) if self.config.input_feeding else None
        coverage = None if state.coverage is None else state.coverage + rest[0]
        return logits, DecoderState(h, c, feed, coverage=coverage), rest[0] if rest else None

    generate = generation.generate
