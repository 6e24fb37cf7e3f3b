"""The losses of labels from the results of a decoder's steps."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.ops.common.dtypes import accumulate_dtype
from fastseq.ops.linear_cross_entropy import linear_cross_entropy
from fastseq.seq2seq.copying import gate_of, negative_log_probability
from fastseq.seq2seq.encoder import EncoderOutput
from fastseq.seq2seq.steps import Steps


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling the module runs the forward of ``kind`` and nothing else."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def cross_entropy(output: nn.Module, vectors: Tensor, labels: Tensor, **options) -> Tensor:
    """The cross-entropy of labels (B, T) from the output layer's inputs (B, T, H); options of linear_cross_entropy."""
    if is_plain(output, nn.Linear):
        return linear_cross_entropy(vectors, output.weight, labels, output.bias, **options)
    logits = output(vectors)  # a layer that a user put there, or one that changes its weight in a hook
    loss = F.cross_entropy(logits.flatten(0, 1).to(accumulate_dtype(logits.dtype)), labels.flatten(), **options)
    return loss.view(labels.shape) if options["reduction"] == "none" else loss


def copy_loss(
    output: nn.Module,
    steps: Steps,
    enc: EncoderOutput,
    labels: Tensor,
    size: int,
    *,
    unk_id: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """As :func:`cross_entropy`, for labels (B, T) of the extended vocabulary: see ``fastseq.seq2seq.copying``.

    ``size`` is V. The smoothing spreads over the V tokens that can be generated, by their softmax alone.
    """
    generated = labels.where(labels < size, unk_id)  # the others: unk, whose probability is not read
    options = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": 0.0}
    losses = cross_entropy(output, steps.vectors, generated, **options)
    gate = gate_of(steps.gate, enc.lengths)
    total = negative_log_probability(losses, gate, steps.attention, enc.copies, labels, size)
    if label_smoothing:
        even = _mean_loss(output, steps.vectors, generated, losses)
        total = (1 - label_smoothing) * total + label_smoothing * even
    total = total.masked_fill(labels == ignore_index, 0.0)
    if reduction == "none":
        return total
    return total.sum() if reduction == "sum" else total.sum() / (labels != ignore_index).sum()


def _mean_loss(output: nn.Module, vectors: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """The mean over the vocabulary of -log softmax, (B, T), from the losses of labels (B, T), without the logits."""
    if not is_plain(output, nn.Linear):
        return -output(vectors).log_softmax(-1, dtype=losses.dtype).mean(-1)
    difference = F.embedding(labels, output.weight) - output.weight.mean(0)
    return losses + (vectors * difference).sum(-1) + output.bias[labels] - output.bias.mean()
