"""The ``torch`` backend of ``linear_cross_entropy``: F.linear and F.cross_entropy, differentiated by torch."""

import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.linear_cross_entropy.spec import Inputs


def unsupported(call) -> str | None:
    """None: torch serves every call."""
    return None


def run(inputs: Inputs, per_row: bool) -> Tensor:
    """Losses (N,) or their sum (), in float32 at least. Logits (N, V) have the dtype of the input."""
    logits = F.linear(*inputs.differentiable())
    return F.cross_entropy(
        logits.to(accumulate_dtype(logits.dtype)),
        inputs.target,
        ignore_index=inputs.ignore_index,
        label_smoothing=inputs.label_smoothing,
        reduction="none" if per_row else "sum",
    )
