"""Steps of a decoder with input feeding in plain torch: the definition of the op (Luong et al. 2015, section 3.3)."""

import torch
from torch import Tensor

from fastseq.ops.decoder.spec import Result, Sequence


def forward(s: Sequence) -> Result:
    """Differentiable; saves nothing."""
    h, c, feed = list(s.h0.unbind(0)), list(s.c0.unbind(0)), s.feed
    allowed = _allowed(s)
    keys, memory = (_without_padding(x, allowed) for x in (s.keys, s.memory))
    vectors, attention = [], []
    for t, gates in enumerate(s.gates.unbind(0)):
        x = feed
        for k in range(s.layers()):
            if k > 0:
                gates = s.biases[2 * k - 2] + s.biases[2 * k - 1]
                x = h[k - 1] if s.masks is None else h[k - 1] * s.masks[k - 1, t]
            pre = gates + x @ s.matrices[2 * k].t() + h[k] @ s.matrices[2 * k + 1].t()
            i, f, g, o = pre.chunk(4, -1)
            c[k] = f.sigmoid() * c[k] + i.sigmoid() * g.tanh()
            h[k] = o.sigmoid() * c[k].tanh()
        weights = _attention_weights(s, h[-1], keys, allowed)
        context = (weights @ memory).flatten(0, 1)
        feed = torch.tanh(torch.cat((context, h[-1]), -1) @ s.combine.t())
        vectors.append(feed)
        attention.append(weights.flatten(0, 1))
    return Result(torch.stack(vectors), torch.stack(attention), torch.stack(h), torch.stack(c), ())


def _attention_weights(s: Sequence, h: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
    """(B, K, P) of the rows h (N, H)."""
    if s.query is None:
        scores = s.scale * h.unflatten(0, (keys.shape[0], s.rows_each())) @ keys.mT
    else:
        query = h @ s.query.t()
        query = query if s.query_bias is None else query + s.query_bias
        query = query.unflatten(0, (keys.shape[0], s.rows_each()))
        scores = (query.unsqueeze(2) + keys.unsqueeze(1)).tanh() @ (s.scale * s.score)
    if allowed is None:
        return scores.softmax(-1)
    scores = scores.where(allowed, torch.finfo(scores.dtype).min)  # finite: an empty row stays free of NaN
    return scores.softmax(-1).where(allowed, 0)


def _allowed(s: Sequence) -> Tensor | None:
    """(B, 1, P) bool, or None for all positions."""
    if s.lengths is None:
        return None
    return (torch.arange(s.keys.shape[1], device=s.keys.device) < s.lengths.unsqueeze(1)).unsqueeze(1)


def _without_padding(x: Tensor, allowed: Tensor | None) -> Tensor:
    return x if allowed is None else x.masked_fill(~allowed.mT, 0)
