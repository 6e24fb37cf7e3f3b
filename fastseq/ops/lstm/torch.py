"""The LSTM as torch's vendor kernels compute it (oneDNN on CPU, cuDNN on CUDA), differentiated by torch.

``torch._VF.lstm`` is what ``torch.nn.LSTM`` itself calls; it is bound here at import, so that replacing
``torch.nn.LSTM`` at run time cannot make fastseq call itself.
"""

import functools

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.ops.common import layout

_vf_lstm = torch._VF.lstm


def unsupported(call) -> str | None:
    if call.return_cell_states:
        return (
            "lstm: the torch backend cannot return the cell states of every step (the vendor's kernels keep them); "
            "use backend='native' or 'reference', or return_cell_states=False."
        )
    if call.lengths and call.device == "meta":
        return "lstm: the torch backend packs, and tensors on meta have no lengths to pack by; use backend='reference'."
    if call.compiling and call.lengths:
        return (
            "lstm: the torch backend cannot be traced with lengths (it packs, and packing depends on their values); "
            "use backend='native' or 'reference' under torch.compile and torch.export."
        )
    fused = not (call.packed or call.lengths or call.proj_size)  # the others run op by op, in every dtype
    if call.autocast and call.device == "cpu" and fused and not runs_under_autocast(call.dtype):
        return (
            f"lstm: under autocast torch calls oneDNN's LSTM in {str(call.dtype).removeprefix('torch.')}, which oneDNN "
            "does not have on this processor; use backend='native' or 'reference'."
        )
    return None


@functools.cache
def runs_under_autocast(dtype: torch.dtype) -> bool:
    """True if nn.LSTM runs on this CPU under autocast to ``dtype``.

    Found by one call of the smallest LSTM per process and dtype: torch does not check what oneDNN supports.
    """
    input, state = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    weights = [torch.zeros(4, 1), torch.zeros(4, 1)]
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            _vf_lstm(input, (state, state), weights, False, 1, 0.0, True, False, False)
    except RuntimeError:
        return False
    return True


runs_under_autocast._dynamo_marked_constant = True  # TorchDynamo calls it instead of tracing it, as in _native


def stack(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions in one call of the vendor's kernel.

    input: (T, B, I), (B, T, I) with ``batch_first``, or packed (N, I) with ``batch_sizes`` (T,). hx: h0 (L*D, B, P), c0
        (L*D, B, H).
    weights: as in ``nn.LSTM._flat_weights``. lengths (B,): the batch is packed on the way, which copies them to the
        host.
    Returns output in the layout of the input, h_n, c_n.
    """
    hx = tuple(h.contiguous() for h in hx)  # cuDNN refuses others
    if not training and input.device.type != "cpu" and torch.is_grad_enabled():
        training, dropout = True, 0.0  # cuDNN differentiates nothing that it computed for inference; the same numbers
    options = (bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is not None:
        return _vf_lstm(input, batch_sizes, hx, weights, *options)
    if lengths is None or lengths.numel() == 0:
        return _vf_lstm(input, hx, weights, *options, batch_first)
    # Packing refuses empty sequences: they run one step on zeros, and then get zeros and their initial state back.
    empty = lengths == 0
    input = torch.where(empty[:, None, None] if batch_first else empty[:, None], 0, input)
    steps = input.size(1 if batch_first else 0)
    packed = pack_padded_sequence(input, lengths.clamp(min=1).cpu(), batch_first, enforce_sorted=False)
    hx = tuple(h.index_select(1, packed.sorted_indices) for h in hx)
    data, h_n, c_n = _vf_lstm(packed.data, packed.batch_sizes, hx, weights, *options)
    output, _ = pad_packed_sequence(packed._replace(data=data), batch_first, total_length=steps)
    h_n, c_n = (h.index_select(1, packed.unsorted_indices) for h in (h_n, c_n))
    h0, c0 = (h.index_select(1, packed.unsorted_indices) for h in hx)
    output = torch.where(empty[:, None, None] if batch_first else empty[:, None], 0, output)
    return output, torch.where(empty[:, None], h0, h_n), torch.where(empty[:, None], c0, c_n)


def run(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, batch_sizes, reverse
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction: output in the layout of the input, h_n (B, P), c_n (B, H)."""
    padded = input
    if batch_sizes is not None:
        padded, lengths = layout.pad(input, batch_sizes)
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if w is not None]
    padded = layout.flip(padded, lengths) if reverse else padded
    output, h_n, c_n = stack(padded, (h0[None], c0[None]), weights, lengths=lengths, bias=bias_ih is not None)
    output = layout.flip(output, lengths) if reverse else output
    return output if batch_sizes is None else layout.pack(output, batch_sizes), h_n[0], c_n[0]
