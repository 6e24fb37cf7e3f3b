"""Attribution of each target token's log-probability to the source positions, by gradients."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq


class Attributions(NamedTuple):
    """The share of each source position s in log p(target token t), summed over the E numbers of its vector."""

    log_probs: Tensor  # (B, T) natural logarithms, 0 at pad
    gradient_x_input: Tensor  # (B, T, S)
    integrated_gradients: Tensor  # (B, T, S)
    residual: Tensor  # (B, T) sum over s of integrated_gradients, minus log p(x) - log p(0); 0 where exact


def attribute(
    model: Seq2Seq, src: Tensor, src_lengths: Tensor | None, tgt_in: Tensor, labels: Tensor, steps: int
) -> Attributions:
    """Gradient x input, and integrated gradients (Sundararajan et al. 2017, equation 1) with a baseline of zeros.

    x (S, E) are the vectors that the encoder reads: embeddings, or features, whose zero is the mean of the training
    data. Integrated gradients are x times the mean gradient on the line from 0 to x, by Gauss-Legendre quadrature; all
    sentences and points of the line are one batch, with a backward for each target step.

    Args:
        src, src_lengths, tgt_in, labels: as in :meth:`Seq2Seq.loss`.
        steps: points of the quadrature, at least 1.
    """

    def log_probs(vectors: Tensor, repeats: int) -> Tensor:
        given = (None if x is None else x.repeat_interleave(repeats, 0) for x in (src, src_lengths, tgt_in, labels))
        return -model.loss(*given, reduction="none", source_vectors=vectors)

    x = model.source_vectors(src).detach()  # (B, S, E)
    at_x, gradients = _gradients(log_probs, x, 1)
    simple = torch.stack([(gradient * x).sum(-1) for gradient in gradients], 1)
    points, weights = (torch.from_numpy(v).to(x) for v in np.polynomial.legendre.leggauss(steps))
    line = x[:, None] * ((points + 1) / 2)[:, None, None]  # (B, steps, S, E)
    _, gradients = _gradients(log_probs, line.flatten(0, 1), steps)
    means = (torch.einsum("bnse,n->bse", g.unflatten(0, (-1, steps)), weights / 2) for g in gradients)
    integrated = torch.stack([(mean * x).sum(-1) for mean in means], 1)
    with torch.no_grad():
        at_zero = log_probs(torch.zeros_like(x), 1)
    return Attributions(at_x, simple, integrated, integrated.sum(-1) - (at_x - at_zero))


def _gradients(
    log_probs: Callable[[Tensor, int], Tensor], vectors: Tensor, repeats: int
) -> tuple[Tensor, Iterator[Tensor]]:
    """The log-probabilities (N, T) at vectors (N, S, E), and the gradient (N, S, E) of each of the T columns."""
    vectors = vectors.detach().requires_grad_()
    with torch.enable_grad():
        values = log_probs(vectors, repeats)
    columns = values.unbind(1)
    return values.detach(), (torch.autograd.grad(c.sum(), vectors, retain_graph=True)[0] for c in columns)
