"""The ``triton`` backend of ``attention``, for any GPU that Triton supports.

Forward is one kernel, an online softmax (Milakov & Gimelshein 2018) over blocks of keys. It saves the scores (B, T, S)
for the weights and the backward. Nothing of size (B, T, S, A) is stored. docs/kernels/triton.md
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.ops.attention.spec import Grads, InputGrads, Inputs, Result, Want
from fastseq.ops.common.triton.runtime import chip_of, dot_precision, power_of_two, ready, why_not


def unsupported(call) -> str | None:
    """Return the refusal of an ``AttentionCall``, a sentence with the way out, or None."""
    return why_not("attention", call)


def forward(inputs: Inputs, want: Want) -> Result:
    """Run the kernel. Saved, float32: scores (B, T, S), their maxima (B, T), sums of their exponentials (B, T)."""
    from fastseq.ops.attention.triton_kernels import attention_forward_kernel

    query, lengths, mask = inputs.query, inputs.lengths, inputs.mask
    B, T, A = query.shape
    S, D = inputs.values.shape[1:]
    context = query.new_empty(B, T, D)
    scores = query.new_empty(B, T, S, dtype=torch.float32)
    peaks, totals = scores.new_empty(B, T), scores.new_empty(B, T)
    blocks = _blocks(inputs)
    with torch.cuda.device_of(query):
        attention_forward_kernel[(B * -(-T // blocks["BLOCK_T"]), -(-D // blocks["BLOCK_D"]))](
            *map(ready, inputs.differentiable()),
            ready(None if lengths is None else lengths.to(torch.int64)),
            None if mask is None else ready(mask).view(torch.uint8),
            context,
            scores,
            peaks,
            totals,
            inputs.scale,
            T,
            S,
            A=A,
            D=D,
            MASK_PER_STEP=mask is not None and mask.size(1) > 1,
            PRECISION=dot_precision(query.dtype, chip_of(query)),
            **blocks,
        )
    weights = None
    if want.weights:
        weights = (torch.exp(scores - peaks.unsqueeze(-1)) / totals.unsqueeze(-1)).to(query.dtype)
    return Result(context, weights, (scores, peaks, totals) if want.backward else ())


def backward(inputs: Inputs, saved: tuple[Tensor, ...], grads: Grads, needs: InputGrads) -> InputGrads:
    """Compute the gradient of the scores by a kernel, the others by matmul (dot) or two kernels (additive)."""
    p, grad_scores = _grad_scores(inputs, saved, grads)
    grad_values = p.mT @ grads.context if needs.values else None
    if inputs.weight is not None:
        return _additive_backward(inputs, grad_scores, needs)._replace(values=grad_values)
    keys = inputs.keys
    if inputs.lengths is not None or inputs.mask is not None:  # 0 * NaN is NaN, so zero the padding
        keys = keys.masked_fill(_padding(saved[0]), 0)
    grad_query = grad_scores @ keys if needs.query else None
    return InputGrads(grad_query, grad_scores.mT @ inputs.query if needs.keys else None, grad_values, None, None)


def _grad_scores(inputs: Inputs, saved: tuple[Tensor, ...], grads: Grads) -> tuple[Tensor, Tensor]:
    """Return the weights and the gradient of the unscaled scores, (B, T, S).

    Both have the dtype of the values; the gradient is float32 for the additive score.
    """
    from fastseq.ops.attention.triton_kernels import attention_grad_scores_kernel

    values, (scores, peaks, totals) = inputs.values, saved
    B, T, S = scores.shape
    D = values.size(2)
    p = values.new_empty(B, T, S)
    grad_scores = torch.empty_like(p if inputs.weight is None else scores)
    with torch.cuda.device_of(values):
        attention_grad_scores_kernel[(B * -(-T // 16),)](
            *map(ready, (values, *grads)),
            scores,
            peaks,
            totals,
            p,
            grad_scores,
            inputs.scale,
            T,
            S,
            D=D,
            BLOCK_T=16,
            BLOCK_S=32,
            BLOCK_D=min(32, max(16, power_of_two(D))),
            num_warps=128 // chip_of(values).lanes,
            PRECISION=dot_precision(values.dtype, chip_of(values)),
        )
    return p, grad_scores


def _additive_backward(inputs: Inputs, grad_scores: Tensor, needs: InputGrads) -> InputGrads:
    """Compute the gradients of query, keys, weight, bias and coverage, with sums over rows in float32."""
    query, keys, _, *parameters = map(ready, inputs.differentiable())
    weight, _, coverage, coverage_weight = parameters
    grad_query = grad_keys = grad_weight = grad_bias = None
    covered = None, None
    with torch.cuda.device_of(query):
        if needs.query or needs.weight or needs.bias or needs.coverage or needs.coverage_weight:
            wide = torch.empty_like(query, dtype=torch.float32)
            weight_rows = torch.empty_like(wide)  # (B, T, A); always passed, so that only one variant is compiled
            parts, coverage_rows = _coverage_outputs(query, coverage)
            _one_side(query, keys, parameters, grad_scores, (wide, weight_rows, parts, coverage_rows))
            grad_query = wide.to(query.dtype) if needs.query else None
            grad_weight = weight_rows.sum((0, 1)).to(weight.dtype) if needs.weight else None
            grad_bias = wide.sum((0, 1)).to(weight.dtype) if needs.bias else None
            if coverage is not None:
                covered = parts.sum(0).to(coverage.dtype), coverage_rows.sum((0, 1)).to(coverage_weight.dtype)
        if needs.keys:
            grad_keys = torch.empty_like(keys)
            _one_side(keys, query, parameters, grad_scores, (grad_keys, None, None, None), transposed=True)
    grad_coverage, grad_coverage_weight = (g if need else None for g, need in zip(covered, needs[5:], strict=True))
    return InputGrads(grad_query, grad_keys, None, grad_weight, grad_bias, grad_coverage, grad_coverage_weight)


def _coverage_outputs(query: Tensor, coverage: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Outputs for the gradients of coverage, (blocks of A, B, T, S), and of its weight, (B, T, A); None without."""
    if coverage is None:
        return None, None
    blocks = -(-query.size(2) // _block_a(query))
    rows = torch.empty_like(query, dtype=torch.float32)
    return torch.empty(blocks, *coverage.shape, dtype=torch.float32, device=query.device), rows


def _block_a(side: Tensor) -> int:
    return min(128, power_of_two(side.size(2)))


def _one_side(
    side: Tensor,  # (B, R, A) query or keys: the tensor that gets the gradient
    other: Tensor,  # (B, O, A) keys or query
    parameters: Sequence[Tensor | None],  # weight (A,), bias (A,), coverage (B, T, S), coverage_weight (A,)
    grad_scores: Tensor,  # (B, R, O), or (B, O, R) if transposed
    out: tuple[Tensor | None, ...],  # (B, R, A) gradient of `side`, rows of the weight's; then _coverage_outputs
    transposed: bool = False,
) -> None:
    from fastseq.ops.attention.triton_kernels import attention_additive_backward_kernel

    B, R, A = side.shape
    block_a = _block_a(side)
    attention_additive_backward_kernel[(B * R, -(-A // block_a))](
        side,
        other,
        *parameters,
        grad_scores,
        *out,
        grad_scores.numel(),
        R,
        other.size(1),
        A=A,
        TRANSPOSED=transposed,
        BLOCK_O=16,
        BLOCK_A=block_a,
        num_warps=4,
    )


def _padding(scores: Tensor) -> Tensor:
    """Return (B, S, 1) bool: positions that no step attends to."""
    return (scores == -torch.inf).all(1).unsqueeze(-1)


def _blocks(inputs: Inputs) -> dict[str, int]:
    """Return the block sizes of the forward kernel, independent of T and S. Not tuned on a GPU yet."""
    A, D = inputs.query.size(2), inputs.values.size(2)
    if inputs.weight is None:
        wide = inputs.query.dtype == torch.float32
        return {
            "BLOCK_T": 16,
            "BLOCK_S": 32,
            "BLOCK_A": min(32 if wide else 64, max(16, power_of_two(A))),
            "BLOCK_D": min(128 if wide else 256, max(16, power_of_two(D))),
            "num_warps": 4,
        }
    warps = 8 if D > 512 else 4
    return {
        "BLOCK_T": 1,
        "BLOCK_S": 16,
        "BLOCK_A": min(32 * warps, power_of_two(A)),
        "BLOCK_D": min(1024, power_of_two(D)),
        "num_warps": warps,
    }
