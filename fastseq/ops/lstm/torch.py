"""The ``torch`` backend of ``lstm``: oneDNN on CPU, cuDNN on CUDA, differentiated by torch.

``torch._VF.lstm`` is the function that ``torch.nn.LSTM`` calls. It is bound at import, so replacing ``torch.nn.LSTM``
at run time cannot make fastseq call itself.
"""

import functools

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.ops.common import layout
from fastseq.ops.lstm.spec import LSTMCall, Stack

PLAIN_HAS_BACKWARD = True
_vf_lstm = torch._VF.lstm


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMCall``) and the way out, or None."""
    if call.return_cell_states:
        return (
            "lstm: the torch backend cannot return the cell states of every step (oneDNN and cuDNN keep them); "
            "use backend='native' or 'reference', or return_cell_states=False."
        )
    if call.lengths and call.device == "meta":
        return "lstm: the torch backend packs, and tensors on meta have no lengths to pack by; use backend='reference'."
    if call.compiling and call.lengths:
        return (
            "lstm: the torch backend cannot be traced with lengths (it packs, and packing depends on their values); "
            "use backend='native' or 'reference' under torch.compile and torch.export."
        )
    if call.vmapped:
        return (
            "lstm: the torch backend cannot run under torch.func.vmap (torch has no batching rule for its LSTM); "
            "use backend='native' or 'reference'."
        )
    may_be_fused = call.fused or call.lengths  # torch runs equal lengths as a padded batch
    recorded = call.requires_grad
    if call.autocast and call.device == "cpu" and may_be_fused and not runs_under_autocast(call.dtype, recorded):
        return (
            f"lstm: under autocast torch calls oneDNN's LSTM in {str(call.dtype).removeprefix('torch.')}, which oneDNN "
            "does not have on this processor; use backend='native' or 'reference'."
        )
    return None


def runs_under_autocast(dtype: torch.dtype, grad_mode: bool = False) -> bool:
    """True if oneDNN has an LSTM in ``dtype`` on this CPU; under autocast torch calls it without a check.

    On processors with AVX-512 FP16 it has one in float16, for inference only; torch asks the grad mode.
    """
    return _autocast_result("cpu", dtype, torch.float32, grad_mode) is not None


def autocast_compute_dtype(device: str, input: torch.dtype) -> torch.dtype:
    """The dtype in which nn.LSTM multiplies under autocast, for an input of dtype ``input``.

    It is autocast's dtype, with one exception: torch casts the operands of cuDNN to float16 even if autocast is set to
    bfloat16 (ATen/cudnn/AutocastRNN.cpp).
    """
    autocast = torch.get_autocast_dtype(device)
    return (_autocast_result(device, autocast, input, False) or autocast) if device == "cuda" else autocast


def fused_under_autocast(stack: Stack, dtype: torch.dtype) -> bool:
    """True if nn.LSTM, which multiplies in ``dtype``, runs the call under autocast by oneDNN or cuDNN, not op by op."""
    if stack.input.device.type != "cpu":
        return True
    if stack.proj_size or stack.lengths is not None:
        return False
    if torch.compiler.is_compiling():
        if stack.batch_sizes is not None:
            return False
    elif stack.input.numel() == 0 or (stack.batch_sizes is not None and stack.batch_sizes[0] != stack.batch_sizes[-1]):
        return False  # equal lengths run as a padded batch
    return _autocast_result("cpu", dtype, stack.input.dtype, torch.is_grad_enabled()) != torch.float32


def autocast_result_dtypes(call: LSTMCall, c0: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of nn.LSTM's output, h_n and c_n under autocast, for a c_0 of dtype ``c0``.

    oneDNN and cuDNN return the dtype in which they compute, ``call.dtype``. Op by op, the products are in
    ``call.dtype``, the cell state and h in the wider of it and ``c0``; a projection is a product.
    """
    c_n = call.dtype if call.fused else torch.promote_types(call.dtype, c0)
    h_n = call.dtype if call.proj_size else c_n
    return h_n, h_n, c_n


def _autocast_result(device: str, autocast: torch.dtype, input: torch.dtype, grad_mode: bool) -> torch.dtype | None:
    """The output dtype of the smallest nn.LSTM under autocast, with states in float32, or None if it raises.

    Op by op it is float32. The answer depends on the processor and the versions of torch and cuDNN.
    """
    return _run_smallest(device, autocast, input, grad_mode)


_autocast_result._dynamo_marked_constant = (
    True  # TorchDynamo calls it instead of tracing it; it traces cached functions
)


@functools.cache
def _run_smallest(device: str, autocast: torch.dtype, input: torch.dtype, grad_mode: bool) -> torch.dtype | None:
    """One call per process and combination; see ``_autocast_result``."""
    shapes = ((1, 1, 1), (1, 1, 1), (4, 1), (4, 1))
    x, state, *weights = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
    try:
        with torch.set_grad_enabled(grad_mode), torch.autocast(device, autocast):
            return _vf_lstm(x.to(input), (state, state), weights, False, 1, 0.0, True, False, False)[0].dtype
    except RuntimeError:
        return None


def run(stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions in one call of oneDNN or cuDNN -> output in the layout of the input, h_n, c_n.

    Under autocast the tensors are not cast before: torch casts them itself.
    """
    if stack.reverse:
        return _reversed(stack)
    hx, weights = (stack.h0.contiguous(), stack.c0.contiguous()), stack.weights  # cuDNN refuses strided states
    training, dropout = stack.training, stack.dropout
    if not training and stack.input.device.type != "cpu" and torch.is_grad_enabled():
        training, dropout = True, 0.0  # cuDNN has no backward in inference mode; the numbers are the same
    options = (stack.bias, stack.num_layers, dropout, training, stack.bidirectional)
    if stack.batch_sizes is not None:
        return _vf_lstm(stack.input, stack.batch_sizes, hx, weights, *options)
    if stack.lengths is None or stack.lengths.numel() == 0:
        return _vf_lstm(stack.input, hx, weights, *options, stack.batch_first)
    return _packed(stack, hx, options)


def plain(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """A padded call on CPU tensors, with arguments and results of ``torch._VF.lstm``."""
    return _vf_lstm(*arguments)


def _packed(stack: Stack, hx: tuple[Tensor, Tensor], options: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch with lengths, packed for the call, which copies the lengths to the host."""
    lengths, batch_first = stack.lengths, stack.batch_first
    # Packing refuses empty sequences: they run one step on zeros, then their results become 0 and the initial state.
    empty = lengths == 0
    rows = empty[:, None, None] if batch_first else empty[:, None]
    input = torch.where(rows, 0, stack.input)
    packed = pack_padded_sequence(input, lengths.clamp(min=1).cpu(), batch_first, enforce_sorted=False)
    hx = tuple(h.index_select(1, packed.sorted_indices) for h in hx)
    data, h_n, c_n = _vf_lstm(packed.data, packed.batch_sizes, hx, stack.weights, *options)
    steps = input.size(1 if batch_first else 0)
    output, _ = pad_packed_sequence(packed._replace(data=data), batch_first, total_length=steps)
    h_n, c_n = (h.index_select(1, packed.unsorted_indices) for h in (h_n, c_n))
    h0, c0 = (h.index_select(1, packed.unsorted_indices) for h in hx)
    output = torch.where(rows, 0, output)
    return output, torch.where(empty[:, None], h0, h_n), torch.where(empty[:, None], c0, c_n)


def _reversed(stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
    """A single direction from the last step to the first: input and output are flipped in time."""
    input, lengths, batch_sizes = stack.input, stack.lengths, stack.batch_sizes
    if batch_sizes is not None:
        input, lengths = layout.pad(input, batch_sizes)
    forwards = stack._replace(input=layout.flip(input, lengths), lengths=lengths, batch_sizes=None, reverse=False)
    output, h_n, c_n = run(forwards)
    output = layout.flip(output, lengths)
    return output if batch_sizes is None else layout.pack(output, batch_sizes), h_n, c_n
