"""Recurrent dropout, zoneout and layer normalisation of ``fastseq.LSTM``: options, parameters and the layers' loop."""

import numbers
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import pack, pad, zero_padding
from fastseq.ops.lstm.api import Stack
from fastseq.ops.lstm_variant.api import EPSILON, lstm_variant

NORMS = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")  # (4H,), (4H,), (H,), (H,), with the suffix of the weights


class VariantOptions(NamedTuple):
    """The options that nn.LSTM lacks; all off by default."""

    recurrent_dropout: float = 0.0
    zoneout_hidden: float = 0.0
    zoneout_cell: float = 0.0
    layer_norm: bool = False


def _rate(name: str) -> property:
    """The property of a rate in 0..1; 0 removes the option."""

    def get(self) -> float:
        return 0.0 if self._variant is None else getattr(self._variant, name)

    def set_(self, rate: float) -> None:
        if not isinstance(rate, numbers.Real) or isinstance(rate, bool) or not 0 <= rate <= 1:
            raise ValueError(f"LSTM: {name} must be a number in 0..1, got {rate!r}")
        self._set(**{name: float(rate)})

    return property(get, set_)


class Variants(nn.Module):
    """The part of :class:`fastseq.LSTM` that a plain LSTM does not have."""

    _variant: VariantOptions | None = None  # None: a plain LSTM

    recurrent_dropout = _rate("recurrent_dropout")
    zoneout_hidden = _rate("zoneout_hidden")
    zoneout_cell = _rate("zoneout_cell")

    @property
    def layer_norm(self) -> bool:
        """True if the LSTM was made with layer normalisation."""
        return self._variant is not None and self._variant.layer_norm

    @property
    def variant(self) -> str:
        """The options that are on, "recurrent_dropout=0.3, layer_norm=True"; "" for a plain LSTM."""
        options = (self._variant or VariantOptions())._asdict()
        return ", ".join(f"{name}={value}" for name, value in options.items() if value)

    def _set(self, **options) -> None:
        variant = (self._variant or VariantOptions())._replace(**options)
        if any(variant) and self.proj_size:
            given = ", ".join(name for name, value in variant._asdict().items() if value)
            raise ValueError(f"LSTM: {given} cannot be combined with a projection (proj_size={self.proj_size})")
        self._variant = variant if any(variant) else None

    def _suffixes(self) -> Iterator[str]:
        """The endings of the parameters' names, in the order of the layers and directions."""
        for k in range(self.num_layers):
            yield from (f"_l{k}", f"_l{k}_reverse")[: 1 + self.bidirectional]

    def _add_norms(self, device, dtype) -> None:
        self._set(layer_norm=True)
        for suffix in self._suffixes():
            for name, size in zip(NORMS, (4, 4, 1, 1), strict=True):
                values = torch.empty(size * self.hidden_size, device=device, dtype=dtype)
                self.register_parameter(name + suffix, nn.Parameter(values))
        self._reset_norms()

    @torch.no_grad()
    def _reset_norms(self) -> None:
        """Gains of 1 and shifts of 0."""
        for suffix in self._suffixes():
            for name in NORMS:
                getattr(self, name + suffix).fill_(0.0 if name == "norm_c_bias" else 1.0)

    def active_variant(self) -> VariantOptions | None:
        """The options that change a call in the current mode, or None: recurrent dropout acts in training alone."""
        variant = self._variant
        if variant is not None and not self.training:
            variant = variant._replace(recurrent_dropout=0.0)
        return variant if variant is not None and any(variant) else None

    def _run_variant(
        self, stack: Stack, variant: VariantOptions, cell_states: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All layers; arguments and results of ``ops.lstm.api.run``."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"LSTM: torch.jit.trace would unroll {self.variant} for the traced length alone; use torch.export"
            )
        input, lengths = stack.input, stack.lengths
        if stack.batch_sizes is not None:
            input, lengths = pad(input, stack.batch_sizes)
        elif stack.batch_first:
            input = input.transpose(0, 1)
        if stack.batch_sizes is None and lengths is not None:
            input = zero_padding(input, lengths)  # NaN in the padding must reach no weight gradient
        output, h_n, c_n, cells = self._layers(stack, variant, input, lengths, cell_states)
        if stack.batch_sizes is not None:
            output, cells = (t if t is None else pack(t, stack.batch_sizes) for t in (output, cells))
        elif stack.batch_first:
            output, cells = (t if t is None else t.transpose(0, 1) for t in (output, cells))
        return output, h_n, c_n, cells

    def _layers(self, stack: Stack, variant: VariantOptions, x: Tensor, lengths: Tensor | None, cell_states: bool):
        """x (T, B, I) -> output (T, B, D * H), h_n and c_n (L * D, B, H), cell states (T, B, D * H) or None."""
        suffixes, directions = list(self._suffixes()), 2 if self.bidirectional else 1
        states, cells = [], []
        for k in range(0, len(suffixes), directions):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            wanted = cell_states and k + directions == len(suffixes)
            options = {"lengths": lengths, "return_cell_states": wanted, "backend": self.backend}
            outputs = []
            for d in range(directions):
                gates, weight_hh, norms = self._input_gates(x, stack, k + d, suffixes[k + d], variant)
                hx = stack.h0[k + d], stack.c0[k + d]
                masks = self._masks(variant, gates, hx[1])
                result = lstm_variant(gates, hx, weight_hh, **masks, norms=norms, reverse=d == 1, **options)
                outputs.append(result[0])
                states.append(result[1])
                cells += result[2:]
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        h_n, c_n = map(torch.stack, zip(*states, strict=True))
        return x, h_n, c_n, torch.cat(cells, -1) if cell_states else None

    def _input_gates(self, x: Tensor, stack: Stack, k: int, suffix: str, variant: VariantOptions):
        """The input's part of the gates (T, B, 4H) of the k-th layer and direction, W_hh, and the norms or None."""
        weights = stack.weights_of(k)
        bias = None if weights.bias_ih is None else weights.bias_ih + weights.bias_hh
        if not variant.layer_norm:
            return F.linear(x, weights.ih, bias), weights.hh, None
        norm_ih, *norms = (getattr(self, name + suffix) for name in NORMS)
        return F.layer_norm(F.linear(x, weights.ih), norm_ih.shape, norm_ih, bias, EPSILON), weights.hh, tuple(norms)

    def _masks(self, variant: VariantOptions, gates: Tensor, state: Tensor) -> dict[str, Tensor | float | None]:
        """Draw the masks of one layer and direction before its first step, so that they depend on no backend."""
        masks = {"zoneout_hidden": variant.zoneout_hidden, "zoneout_cell": variant.zoneout_cell}
        if self.training:
            shape = (*gates.shape[:2], state.size(-1))
            for name, rate in masks.items():
                if rate:
                    masks[name] = torch.empty(shape, dtype=torch.bool, device=gates.device).bernoulli_(rate)
        if variant.recurrent_dropout:
            ones = torch.ones(state.shape, dtype=accumulate_dtype(state.dtype), device=state.device)
            masks["hidden_mask"] = F.dropout(ones, variant.recurrent_dropout)
        return masks
