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


class Norms(NamedTuple):
    """The parameters of the layer normalisations of one layer and direction."""

    ih: Tensor  # (4H,) gain of LN(W_ih x)
    hh: Tensor  # (4H,) gain of LN(W_hh h)
    c: Tensor  # (H,) gain of LN(c)
    c_bias: Tensor  # (H,)
    bias: Tensor | None  # (4H,) b_ih + b_hh

    def input_gates(self, product: Tensor) -> Tensor:
        """W_ih x (..., 4H) -> its part of the pre-activations."""
        return F.layer_norm(product, self.ih.shape, self.ih, self.bias, EPSILON)


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
                weights, hx = stack.weights_of(k + d), (stack.h0[k + d], stack.c0[k + d])
                bias = None if weights.bias_ih is None else weights.bias_ih + weights.bias_hh
                norms = self.norms(k + d, bias)
                gates = F.linear(x, weights.ih, bias) if norms is None else norms.input_gates(F.linear(x, weights.ih))
                masks = self._zoneout(variant, gates.shape[:2], gates.device)
                masks |= {"hidden_mask": self.hidden_mask(hx[1]), "norms": None if norms is None else norms[1:4]}
                result = lstm_variant(gates, hx, weights.hh, **masks, reverse=d == 1, **options)
                outputs.append(result[0])
                states.append(result[1])
                cells += result[2:]
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        h_n, c_n = map(torch.stack, zip(*states, strict=True))
        return x, h_n, c_n, torch.cat(cells, -1) if cell_states else None

    def norms(self, k: int, bias: Tensor | None) -> Norms | None:
        """The normalisations of the k-th layer and direction, with its bias (4H,); None without ``layer_norm``."""
        if not self.layer_norm:
            return None
        suffix = list(self._suffixes())[k]
        return Norms(*(getattr(self, name + suffix) for name in NORMS), bias)

    def hidden_mask(self, state: Tensor) -> Tensor | None:
        """Draw the mask of recurrent dropout for a sequence of states (B, H); None if it is off."""
        if not (self.training and self.recurrent_dropout):
            return None
        ones = torch.ones(state.shape, dtype=accumulate_dtype(state.dtype), device=state.device)
        return F.dropout(ones, self.recurrent_dropout)

    def _zoneout(
        self, variant: VariantOptions, rows: tuple[int, int], device: torch.device
    ) -> dict[str, Tensor | float]:
        """Draw the masks of T steps of B sequences, ``rows``, before the first step; in eval mode the rates."""
        rates = {"zoneout_hidden": variant.zoneout_hidden, "zoneout_cell": variant.zoneout_cell}
        if not self.training:
            return rates
        shape = (*rows, self.hidden_size)
        return {
            name: torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(rate) if rate else 0.0
            for name, rate in rates.items()
        }

    def step(
        self,
        gates: Tensor,
        state: tuple[Tensor, Tensor],
        weight_hh: Tensor,
        norms: Norms | None,
        hidden_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One step of one layer, with the options of the module -> h and c (B, H).

        Args:
            gates: (B, 4H), W_ih x and the bias; with ``norms`` W_ih x alone.
            state: h and c, (B, H).
            weight_hh: (4H, H). norms, hidden_mask: of :meth:`norms` and :meth:`hidden_mask`.
        """
        gates = gates.unsqueeze(0) if norms is None else norms.input_gates(gates).unsqueeze(0)
        masks = self._zoneout(self._variant, gates.shape[:2], gates.device)
        masks |= {"hidden_mask": hidden_mask, "norms": None if norms is None else norms[1:4]}
        return lstm_variant(gates, state, weight_hh, **masks, backend=self.backend)[1]
