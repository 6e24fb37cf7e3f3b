"""The ``native`` backend of ``lstm_variant``: compiled operators for CPU tensors; csrc checks the arguments."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.common.checks import native_objection
from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.common.layout import contiguous
from fastseq.ops.lstm_variant.spec import Grads, Recurrence, Result, Variant, Want

SKIPS_PADDING = True  # steps past a sequence's length are not read


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMVariantCall``) and the way out, or None."""
    if call.device == "cuda":
        return "lstm_variant: the native backend has no CUDA kernel for it; use backend='triton' or 'reference'."
    return native_objection("lstm_variant", call, ())


def forward(given: Recurrence, variant: Variant, want: Want) -> Result:
    """Saved: cell states (T, B, H), activations (T, B, 4H), operands of W_hh (T, B, H), and the norms' tensors."""
    gates, h0, c0, *weights = map(contiguous, given)
    output, h_n, c_n, cell_states, *saved = _native.operators.lstm_variant_forward.default(
        gates, h0.unsqueeze(0), c0.unsqueeze(0), *weights, *_variant(variant), want.backward, want.cell_states
    )
    wanted = cell_states.to(output.dtype, copy=True) if want.cell_states else None  # backward reads the saved ones
    saved = (cell_states, *saved) if want.backward else ()
    return Result(output, h_n.squeeze(0), c_n.squeeze(0), wanted, saved)


def backward(
    given: Recurrence, variant: Variant, saved: tuple[Tensor, ...], grads: Grads, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Backpropagation through time in one operator, then the gradient of W_hh over all steps in one product of torch.

    The gradients of ``Recurrence``, None if not needed.
    """
    cell_states, activations, operands, normal, statistics = saved
    grad_output, grad_h_n, grad_c_n, grad_cell_states = map(contiguous, grads)
    states = (None if g is None else g.unsqueeze(0) for g in (grad_h_n, grad_c_n))
    inputs = (given.c0.unsqueeze(0), given.weight_hh, *given[4:])
    grad_gates, grad_products, grad_h0, grad_c0, grad_norms = _native.operators.lstm_variant_backward.default(
        *(grad_output, *states, grad_cell_states),
        *map(contiguous, inputs),
        *_variant(variant),
        *(cell_states, activations),
        *((None, None) if given.norm_hh is None else (normal, statistics)),
    )
    H = given.c0.size(1)
    weight_hh, norms = None, (None,) * 3
    if needs[3]:
        products = grad_gates if given.norm_hh is None else grad_products
        weight_hh = products.flatten(0, 1).t() @ operands.flatten(0, 1)
    if given.norm_hh is not None:
        norms = grad_norms.to(given.gates.dtype).split((4 * H, H, H))
    every = (grad_gates, grad_h0.squeeze(0), grad_c0.squeeze(0), weight_hh, *norms)
    return tuple(g if need else None for g, need in zip(every, needs, strict=True))


def _variant(variant: Variant) -> tuple:
    """The fields as the operators take them: contiguous, lengths int64 on the CPU."""
    hidden_mask, keep_h, keep_c, rate_h, rate_c, lengths, reverse = variant
    lengths = None if lengths is None else lengths.to("cpu", torch.int64).contiguous()
    return *map(contiguous, (hidden_mask, keep_h, keep_c)), rate_h, rate_c, lengths, reverse


def _fake_forward(*arguments):
    """As the schema: gates, h0, c0, W_hh, 3 norms, 3 masks, 2 rates, lengths, reverse, 2 needs."""
    gates, _, c0, _, norm_hh = arguments[:5]
    need_backward, need_cell_states = arguments[-2:]
    (T, B, _), H, acc = gates.shape, c0.shape[-1], accumulate_dtype(gates.dtype)
    norms = need_backward and norm_hh is not None
    return (
        gates.new_empty(T, B, H),
        torch.empty_like(c0),
        torch.empty_like(c0),
        gates.new_empty((T, B, H) if need_backward or need_cell_states else (0,), dtype=acc),
        gates.new_empty((T, B, 4 * H) if need_backward else (0,)),
        gates.new_empty((T, B, H) if need_backward else (0,)),
        gates.new_empty((T, B, 4 * H) if norms else (0,)),
        gates.new_empty((T, B, 3) if norms else (0,), dtype=acc),
    )


def _fake_backward(*arguments):
    """As the schema: 4 gradients, c0, W_hh, 3 norms, 3 masks, 2 rates, lengths, reverse, 4 saved tensors."""
    c0, norms, activations = arguments[4], arguments[6] is not None, arguments[-3]
    return (
        torch.empty_like(activations),
        activations.new_empty(activations.shape if norms else (0,)),
        torch.empty_like(c0),
        torch.empty_like(c0),
        c0.new_empty(6 * c0.shape[-1] if norms else 0, dtype=accumulate_dtype(c0.dtype)),
    )


if _native.available():
    torch.library.register_fake("fastseq::lstm_variant_forward", _fake_forward)
    torch.library.register_fake("fastseq::lstm_variant_backward", _fake_backward)
