"""The ``triton`` backend of ``lstm_variant``, on any GPU that Triton supports.

A step is one product with W_hh by torch and one launch, where plain torch launches 15 to 40 kernels. A call never
synchronises with the device, so a CUDA graph can capture it. docs/ops/lstm_variant.md
"""

import torch
from torch import Tensor

from fastseq.ops.common import layout
from fastseq.ops.common.triton.runtime import chip_of, power_of_two, ready, why_not
from fastseq.ops.lstm_variant.spec import EPSILON, Grads, Recurrence, Result, Variant, Want

SKIPS_PADDING = True  # steps past a sequence's length are not read
MOST_UNITS = 2048  # a program holds a row of every gate in registers


def unsupported(call) -> str | None:
    """Why this backend cannot serve the call (an ``LSTMVariantCall``) and the way out, or None."""
    if call.hidden_size > MOST_UNITS:
        return (
            f"lstm_variant: the triton backend has a hidden size of at most {MOST_UNITS} (got {call.hidden_size}); "
            "use backend='reference'."
        )
    return why_not("lstm_variant", call)


def forward(given: Recurrence, variant: Variant, want: Want) -> Result:
    """Saved: activations (T, B, 4H) and cell states (T, B, H) in float32, operands (T, B, H), products (T, B, 4H).

    Operands and products: of W_hh. Products are saved with norms only.
    """
    from fastseq.ops.lstm_variant.triton_kernels import lstm_variant_forward_kernel

    gates, h0, c0, weight_hh, *norms = map(ready, given)
    mask, *masks = _masks(variant)
    (T, B, _), H, acc = gates.shape, c0.size(1), torch.float32
    every, kept = want.backward, want.backward and norms[0] is not None  # all steps' operands, products
    operands, products = (
        gates.new_empty(T if every else 1, B, H),
        gates.new_empty(T if kept else 1, B, 4 * H),
    )
    output = gates.new_empty(T, B, H)
    activations = gates.new_empty(T, B, 4 * H, dtype=acc) if want.backward else None
    cells = gates.new_empty(T, B, H, dtype=acc) if want.backward or want.cell_states else None
    h, c = h0.to(acc, copy=True), c0.to(acc, copy=True)
    steps = range(T)[::-1] if variant.reverse else range(T)
    operands[steps[0] * every] = h if mask is None else h * mask
    rates, options = (variant.rate_h, variant.rate_c), _options(gates, H)
    with torch.cuda.device_of(gates):
        for t, following in zip(steps, (*steps[1:], -1), strict=True):
            torch.mm(operands[t * every], weight_hh.t(), out=products[t * kept])
            pointers = (gates, products, *norms, mask, *masks, h, c, operands, output, activations, cells)
            rows = (t, t * kept, following if every or following < 0 else 0, B)
            lstm_variant_forward_kernel[(B,)](*pointers, *rates, *rows, **options)
    saved = (activations, cells, operands, products) if want.backward else ()
    wanted = cells.to(gates.dtype, copy=True) if want.cell_states else None  # a copy: backward reads cells
    return Result(output, h.to(gates.dtype), c.to(gates.dtype), wanted, saved)


def backward(
    given: Recurrence, variant: Variant, saved: tuple[Tensor, ...], grads: Grads, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Backpropagation through time, then the gradient of W_hh over all steps in one product of torch.

    The gradients of ``Recurrence``, None if not needed.
    """
    from fastseq.ops.lstm_variant.triton_kernels import lstm_variant_backward_kernel

    activations, cells, operands, products = saved
    weight_hh, *norms = map(ready, given[3:])
    mask, keep_h, keep_c, lengths = _masks(variant)
    (T, B, H), c0, normed = cells.shape, given.c0, norms[0] is not None
    grad_gates = weight_hh.new_empty(T, B, 4 * H)
    grad_products = torch.empty_like(grad_gates) if normed else grad_gates
    grad_norms = cells.new_zeros(B, 6 * H) if normed else None
    dh, dc = (
        torch.zeros_like(c0, dtype=cells.dtype) if g is None else g.to(cells.dtype, copy=True).contiguous()
        for g in (grads.h_n, grads.c_n)
    )
    grad_operand = weight_hh.new_zeros(B, H)
    before = layout.previous_states(cells, c0.to(cells.dtype), lengths, None, variant.reverse)
    incoming = (ready(grads.output), ready(grads.cell_states), activations, ready(before))
    pointers = (*incoming, products if normed else None, *norms, mask, keep_h, keep_c, lengths, grad_operand, dh, dc)
    results = (grad_gates, grad_products if normed else None, grad_norms)
    rates, options = (variant.rate_h, variant.rate_c), _options(weight_hh, H)
    with torch.cuda.device_of(weight_hh):
        for t in range(T) if variant.reverse else reversed(range(T)):
            lstm_variant_backward_kernel[(B,)](*pointers, *results, *rates, t, B, **options)
            torch.mm(grad_products[t], weight_hh, out=grad_operand)
    grad_h0 = dh + (grad_operand if mask is None else grad_operand * mask)
    of_weight = grad_products.flatten(0, 1).t() @ operands.flatten(0, 1) if needs[3] else None
    of_norms = grad_norms.sum(0).split((4 * H, H, H)) if normed else (None,) * 3
    every = (grad_gates, grad_h0, dc, of_weight, *of_norms)
    dtype = weight_hh.dtype
    return tuple(g.to(dtype) if need else None for g, need in zip(every, needs, strict=True))


def _masks(variant: Variant) -> tuple[Tensor | None, ...]:
    """hidden_mask (B, H), keep_h and keep_c (T, B, H) as uint8, lengths (B,) int64."""
    keeps = (m if m is None else ready(m).view(torch.uint8) for m in (variant.keep_h, variant.keep_c))
    return ready(variant.hidden_mask), *keeps, ready(variant.lengths)


def _options(t: Tensor, hidden: int) -> dict:
    """The keyword arguments that both kernels share: four units a thread."""
    block, lanes = power_of_two(hidden), chip_of(t).lanes
    warps = max(block // (4 * lanes), 1)
    return {"H": hidden, "BLOCK_H": block, "EPSILON": EPSILON, "num_warps": warps}
