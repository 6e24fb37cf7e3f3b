"""Adversarial training: the loss where each source's embeddings move towards a higher loss (Miyato et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastseq.seq2seq.model import Seq2Seq


def adversarial_loss(model: Seq2Seq, source: Tensor, loss: Callable[..., Tensor], length: float, form: str) -> Tensor:
    """The mean of the loss with and without a perturbation r of the source vectors x (S, E) of each sentence.

    r = length * unit * g / |g|, where g (S, E) is the gradient of the loss with respect to x, and unit the mean length
    of a source vector: relative to it, because the model could make a fixed r small by long embeddings.

    "perturbation": loss(x + r), where r is a constant for the gradient of the parameters (equations 5 and 6).
    "penalty": loss(x) + r . g = loss(x) + length * unit * |g|, the first-order approximation of the same loss; its
    gradient needs the second derivatives of the loss (double backpropagation, Drucker & LeCun 1992).

    Args:
        source: (B, S) tokens, or (B, S, F) features.
        loss: the sum of the losses of the batch, given ``source_vectors`` (B, S, E).
        length: of r, in units.
        form: "perturbation" or "penalty".
    """
    vectors = model.source_vectors(source)
    if not vectors.requires_grad:  # frozen embeddings, features
        vectors = vectors.detach().requires_grad_()
    radius = length * vector_length(model)
    clean = loss(source_vectors=vectors)
    if form == "penalty":
        (gradient,) = torch.autograd.grad(clean, vectors, create_graph=True)
        return clean + radius / 2 * gradient.flatten(1).norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(clean, vectors, retain_graph=True)
    norms = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)  # (B,); 0 without labels
    return (clean + loss(source_vectors=vectors + radius * gradient / norms[:, None, None])) / 2


def vector_length(model: Seq2Seq) -> float:
    """The mean length of a source embedding, pad left out; sqrt(F) for features, whose deviations are 1."""
    if model.encoder.embedding is None:
        return model.config.source_features**0.5
    norms = model.encoder.embedding.weight.detach().float().norm(dim=1)
    kept = torch.arange(len(norms), device=norms.device) != model.config.pad_id
    return float(norms[kept].mean())
