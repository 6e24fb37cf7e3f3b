"""Output layer and cross-entropy in plain torch: the definition of the op, with an explicit backward.

Label smoothing of Szegedy et al. 2016, as in ``torch.nn.functional.cross_entropy``: the target distribution is
q = (1 - s) onehot(target) + s / V. Logits, softmax and sums are in float32 at least.
"""

import torch
from torch import Tensor

from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.linear_cross_entropy.spec import InputGrads, Inputs, Result, Want

PLAIN_TORCH = True  # a compiler differentiates it by itself


def unsupported(call) -> str | None:
    """None: the reference serves every call."""
    return None


def forward(inputs: Inputs, want: Want) -> Result:
    """Differentiable. Saved: log-probabilities (N, V) in float32 at least."""
    acc = accumulate_dtype(inputs.input.dtype)
    logits = inputs.input.to(acc) @ inputs.weight.to(acc).mT
    if inputs.bias is not None:
        logits = logits + inputs.bias.to(acc)
    log_p = logits.log_softmax(-1)
    valid = inputs.target != inputs.ignore_index
    s, V = inputs.label_smoothing, logits.size(-1)
    of_target = log_p.gather(-1, inputs.target.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    losses = -(1 - s) * of_target
    if s > 0:
        losses = losses - s / V * log_p.sum(-1)
    losses = losses.where(valid, 0)
    return Result(losses if want.per_row else losses.sum(), (log_p,) if any(want.grads) else ())


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grad: Tensor, want: Want, needs: InputGrads) -> InputGrads:
    """With p = softmax(logits), d loss_n / d logits_n = p_n - q_n. grad: (N,), or () for the sum."""
    (log_p,) = saved
    acc, valid = log_p.dtype, inputs.target != inputs.ignore_index
    s, V = inputs.label_smoothing, log_p.size(-1)
    onehot = torch.zeros_like(log_p).scatter(-1, inputs.target.where(valid, 0).unsqueeze(-1), 1.0)
    grad_logits = log_p.exp() - (1 - s) * onehot - s / V
    grad_logits = (grad.to(acc).unsqueeze(-1) * grad_logits).where(valid.unsqueeze(-1), 0)  # (N, V)
    grads = (
        grad_logits @ inputs.weight.to(acc) if needs.input else None,
        grad_logits.mT @ inputs.input.to(acc) if needs.weight else None,
        grad_logits.sum(0) if needs.bias else None,
    )
    tensors = inputs.differentiable()
    return InputGrads(*(g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)))
