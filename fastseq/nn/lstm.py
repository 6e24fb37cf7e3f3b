"""Drop-in LSTM: parameters, arguments and results of ``torch.nn.LSTM``, computed by the best backend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq.dispatch import check_name
from fastseq.nn.narrow import check_call, narrow_weights
from fastseq.nn.quantization import Unquantized
from fastseq.nn.variants import VariantOptions, Variants
from fastseq.ops.common.autocast import autocast_enabled
from fastseq.ops.common.checks import check_lengths, check_pair
from fastseq.ops.lstm.api import Stack, check_batch_sizes, run, run_narrow, run_plain

States = tuple[Tensor, Tensor]
Lengths = Tensor | Sequence[int]


class LSTM(Variants, Unquantized, nn.RNNBase):
    """A drop-in replacement for ``torch.nn.LSTM``: same arguments, parameters, initialisation, results and gradients.

    Derives from ``nn.RNNBase`` and not from ``nn.LSTM``, which ``torch.compile`` refuses. Weights may be tied, replaced
    or re-parametrised between calls: they are looked up by name in every forward.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as in ``torch.nn.LSTM``.
        backend: "auto", "reference", "torch", "native" or "triton"; see :func:`fastseq.explain`.
        recurrent_dropout: p, in training: h_{t-1} is multiplied by one mask for all steps, drawn for each sequence,
            layer and direction, before its product with W_hh. As in Keras (Gal & Ghahramani 2016).
        zoneout_hidden, zoneout_cell: probability that a unit of h, or of c, keeps its value over a step. Drawn for each
            step in training, the expectation in eval mode (Krueger et al. 2017).
        layer_norm: normalise W_ih x, W_hh h and the cell state inside tanh, over the units (Ba et al. 2016, as in
            haste). Adds the parameters ``norm_ih_l0``, ``norm_hh_l0`` (4H,), ``norm_c_l0`` and ``norm_c_bias_l0`` (H,)
            of each layer and direction.

    The last four are what oneDNN and cuDNN lack; rates may be changed between calls, like ``dropout``. Without them the
    module is a plain LSTM, with its kernels and its state_dict. The page of ``ops.lstm_variant`` has the equations.

    ``lstm.weight_dtype = torch.bfloat16`` or ``torch.int8`` (default None) makes calls read rounded copies of the
    weights: half or a quarter of the bytes, for one to four sequences. Products and states stay float32; int8 has one
    scale for each row. Such calls are float32 on the CPU, without gradients; others raise a RuntimeError. The copies
    are renewed after a weight is replaced or changed in place, but not after a change through ``.data``.

    Raises:
        ValueError, TypeError: as ``torch.nn.LSTM`` does; and ValueError for an unknown backend.
    """

    def __init__(  # noqa: PLR0917  the signature of nn.LSTM
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recurrent_dropout: float = 0.0,
        zoneout_hidden: float = 0.0,
        zoneout_cell: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self.backend = check_name(backend)
        self.recurrent_dropout, self.zoneout_hidden, self.zoneout_cell = recurrent_dropout, zoneout_hidden, zoneout_cell
        if layer_norm:
            self._add_norms(device, dtype)

    backend = "auto"  # for modules that were pickled without one
    weight_dtype: torch.dtype | None = None

    # The checks of nn.LSTM, with its messages.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As ``nn.RNNBase``, except for the dtype, which ``forward`` checks against the weight it looked up."""
        if not input.is_floating_point():
            raise RuntimeError(f"LSTM: input must be floating point, got {input.dtype}")
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"LSTM: input must have {expected} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"LSTM: expected input.size(-1) to be input_size {self.input_size}, got {input.size(-1)}"
            )

    def extra_repr(self) -> str:
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + backend + (self.variant and f", {self.variant}")

    def reset_parameters(self) -> None:
        """As ``nn.RNNBase``; gains of the layer normalisations become 1, shifts 0."""
        super().reset_parameters()
        if self.layer_norm:
            self._reset_norms()

    def freeze_bias_hh(self) -> Self:
        """Train a single bias: ``bias_ih`` becomes the sum of both, ``bias_hh`` becomes 0 and gets no gradient.

        The results stay. nn.LSTM adds two biases, which get the same gradient, so each update moves their sum twice as
        far as the one bias of Keras or of Hochreiter & Schmidhuber 1997. Names and shapes of the state_dict stay, so
        checkpoints load in both directions; call this again after :meth:`reset_parameters`.

        Returns:
            The module itself.

        Raises:
            ValueError: the LSTM has no biases, or computes them (torch.nn.utils.parametrize).
        """
        if not self.bias:
            raise ValueError("LSTM: freeze_bias_hh needs bias=True; this LSTM has no biases")
        names = [name for name in self._flat_weights_names if name.startswith("bias_hh")]
        for name in names:
            pair = [self._parameters.get(n) for n in (name.replace("bias_hh", "bias_ih"), name)]
            if None in pair:
                raise ValueError(f"LSTM: freeze_bias_hh sets {name}, which is parametrised; remove that first")
            bias_ih, bias_hh = pair
            with torch.no_grad():
                bias_ih += bias_hh
                bias_hh.zero_()
            bias_hh.requires_grad_(False).grad = None
        return self

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, States, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None, *, return_cell_states: Literal[False] = False
    ) -> tuple[PackedSequence, States]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None, *, return_cell_states: Literal[True]
    ) -> tuple[PackedSequence, States, PackedSequence]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers over the sequence.

        Args:
            input: (T, B, I); (B, T, I) with ``batch_first``; (T, I) unbatched; or a PackedSequence, sorted or not.
            hx: h_0 (L*D, B, P) and c_0 (L*D, B, H), zeros by default; without the batch dimension for unbatched input.
            lengths: (B,) integers in 0..T, in any order, on any device: the results of packing without packing.
                Outputs past the length are 0; final states come from the last valid step; a row of length 0 returns its
                initial state. On CUDA, and in a traced graph, they are clamped to 0..T, not checked.
            return_cell_states: also return the last layer's cell state after every step, laid out like the output.

        Returns:
            output (..., D*P), h_n (L*D, B, P) and c_n (L*D, B, H), and with ``return_cell_states`` cell_states
            (..., D*H). The dtype is the input's; under autocast, that of ``nn.LSTM``'s results.

        Raises:
            RuntimeError, ValueError: as ``torch.nn.LSTM``; ValueError for invalid ``lengths``; RuntimeError if the
                requested backend cannot serve this call.
        """
        weights = self.current_weights()
        variant = None if self._variant is None else self.active_variant()
        if lengths is None and not return_cell_states and self.weight_dtype is None and variant is None:
            options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
            sizes = (self.input_size, self.hidden_size, self.proj_size)
            results = run_plain(input, hx, weights, options, sizes, self.backend)
            if results is not None:
                return results[0], results[1:]
        packed, zero_h0 = isinstance(input, PackedSequence), hx is None
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            hx = self._packed_state(data, batch_sizes, hx, sorted_indices, weights[0])
            batched = True
        else:
            data, hx, batched = self._padded_state(input, hx, weights[0])
            batch_sizes = None
        if lengths is not None:
            if packed or not batched:
                kind = "a PackedSequence, which has lengths" if packed else "unbatched input"
                raise ValueError(f"lengths does not go with {kind}; give a batched, padded tensor")
            steps, batch = (data.size(1), data.size(0)) if self.batch_first else (data.size(0), data.size(1))
            lengths = check_lengths(lengths, steps, batch, data.device)

        stack = self._stack(data, hx, weights, batch_sizes, lengths)._replace(zero_h0=zero_h0)
        output, h_n, c_n, cell_states = self._run(stack, return_cell_states, variant)

        if packed:
            order = (batch_sizes, sorted_indices, unsorted_indices)
            output = PackedSequence(output, *order)
            cell_states = PackedSequence(cell_states, *order) if return_cell_states else None
            h_n, c_n = self.permute_hidden((h_n, c_n), unsorted_indices)
        elif not batched:
            batch_dim = 0 if self.batch_first else 1
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            cell_states = cell_states.squeeze(batch_dim) if return_cell_states else None
        return (output, (h_n, c_n), cell_states) if return_cell_states else (output, (h_n, c_n))

    if TYPE_CHECKING:  # nn.Module declares __call__ without types
        __call__ = forward

    def _run(
        self, stack: Stack, cell_states: bool, variant: VariantOptions | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if variant is not None:
            if self.weight_dtype is not None:
                raise RuntimeError(f"LSTM: weight_dtype={self.weight_dtype} has no {self.variant}; set it to None")
            return self._run_variant(stack, variant, cell_states)
        if self.weight_dtype is None:
            return run(stack, cell_states, self.backend)
        check_call(self, stack.input, stack.h0, stack.c0, *stack.weights)
        if self.proj_size:
            raise RuntimeError(
                f"LSTM: weight_dtype={self.weight_dtype} has no projection, got proj_size={self.proj_size}; "
                "set weight_dtype to None"
            )
        matrices = tuple(w for w in stack.weights if w.dim() == 2)
        return run_narrow(stack, narrow_weights(self, matrices, self.weight_dtype), cell_states)

    def _zeros(self, data: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        h = torch.zeros(rows, batch, self.proj_size or self.hidden_size, dtype=data.dtype, device=data.device)
        c = torch.zeros(rows, batch, self.hidden_size, dtype=data.dtype, device=data.device)
        return h, c

    def _packed_state(self, data: Tensor, batch_sizes: Tensor, hx, sorted_indices: Tensor | None, weight: Tensor):
        """Check packed data (N, I) -> hx in the order of the packed sequences."""
        if batch_sizes.numel() == 0:
            raise IndexError("LSTM: the PackedSequence is empty; give at least one time step")
        check_batch_sizes(batch_sizes, data.size(0))
        if hx is None:
            hx = self._zeros(data, int(batch_sizes[0]))
        else:
            check_pair(hx)
            if hx[0].dim() != 3 or hx[1].dim() != 3:
                raise IndexError(
                    f"For packed input, hx and cx should be 3-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = self.permute_hidden(hx, sorted_indices)
        if data.dtype != weight.dtype and not autocast_enabled(data.device.type):
            raise RuntimeError(_other_dtype(data.dtype, weight.dtype))
        self.check_input(data, batch_sizes)
        self.check_hidden_size(
            hx[0], self.get_expected_hidden_size(data, batch_sizes), "Expected hidden[0] size {}, got {}"
        )
        self.check_hidden_size(
            hx[1], self.get_expected_cell_size(data, batch_sizes), "Expected hidden[1] size {}, got {}"
        )
        _check_placement(data, hx, weight)
        return hx

    def _padded_state(self, input: Tensor, hx, weight: Tensor):
        """Check a padded input -> 3-D input, hx, True if the input had a batch dimension."""
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zeros(input, input.size(batch_dim))
        else:
            expected, kind = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
            if hx[0].dim() != expected or hx[1].dim() != expected:
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {expected}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            check_pair(hx)
            hx = tuple(hx) if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if input.dtype != weight.dtype and not autocast_enabled(input.device.type):
            raise ValueError(_other_dtype(input.dtype, weight.dtype))
        self.check_forward_args(input, hx, None)
        if input.size(1 - batch_dim) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        _check_placement(input, hx, weight)
        return input, hx, batched

    def current_weights(self) -> tuple[Tensor, ...]:
        """The current weights in the order of ``_flat_weights``; each parametrisation is evaluated once."""
        parameters = self._parameters  # getattr, which computed weights need, takes ten times as long
        return tuple(
            parameters[name] if name in parameters else getattr(self, name) for name in self._flat_weights_names
        )

    def _stack(self, data: Tensor, hx, weights, batch_sizes: Tensor | None, lengths: Tensor | None) -> Stack:
        """The record that ``ops.lstm.api.run`` takes."""
        return Stack(
            data,
            *hx,
            weights,
            lengths,
            batch_sizes,
            num_layers=self.num_layers,
            bias=self.bias,
            proj_size=self.proj_size,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
        )


def _check_placement(data: Tensor, hx, weight: Tensor) -> None:
    """RuntimeError unless all are on one device and, without autocast, of one dtype."""
    for name, tensor in (("parameter", weight), ("hidden", hx[0]), ("cell", hx[1])):
        if tensor.device != data.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, "
                f"found input tensor at {data.device} and {name} tensor at {tensor.device}"
            )
        if tensor.dtype != data.dtype and not autocast_enabled(data.device.type):
            raise RuntimeError(
                f"LSTM: the {name} tensor is {tensor.dtype}, the input {data.dtype}; convert one of them"
            )


def _other_dtype(input: torch.dtype, weight: torch.dtype) -> str:
    """The sentence of nn.LSTM, which users' tests match."""
    return (
        f"RNN input dtype ({input}) does not match weight dtype ({weight}). "
        f"Convert input: input.to({weight}), or convert model: model.to({input})"
    )
