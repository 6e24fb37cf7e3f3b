"""One decoding step: both products and the cell in one compiled call."""

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.lstm_cell import native


def lstm_step(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of ``torch.nn.LSTMCell`` for inference, by the compiled kernel of the tensors' device.

    A step of one sequence waits for its weights. With ``weight_ih`` and ``weight_hh`` in bfloat16 beside float32 for
    everything else, half as many bytes come from memory; sums and states stay float32, and the weights are all that is
    rounded (relative error up to 2 ** -9 each).

    Args:
        input: (B, I).
        hx: h and c, (B, H) each.
        weight_ih: (4H, I). weight_hh: (4H, H). Gate order i, f, g, o.
        bias_ih: (4H,), or (B, 4H) for a part of the gates that differs from row to row. bias_hh: (4H,).

    Returns:
        The next h and c, (B, H).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; a gradient is asked for; the compiled library is missing.
    """
    if not _native.available():
        raise RuntimeError(f"lstm_step: {_native.why_not()}")
    tensors = (input, *hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("lstm_step: has no gradient; call it under torch.no_grad(), or use fastseq.LSTMCell")
    return native.step(*tensors)
