"""Inputs for the attention tests, and the float64 formula as a loop over the attended positions."""

import torch

B, T, S, A, D = 3, 4, 5, 6, 7
SCORES = ("dot", "general", "additive", "normed_additive")
PADDINGS = ("none", "lengths", "mask", "step_mask")
# name: (arguments to change in a valid call with B 2, T 3, S 5, A 4, D 6; the message of the refusal)
REFUSED_CALLS = {
    "rank": (dict(query=torch.zeros(3, 4)), r"query must have the shape \(B, T, A\), got \(3, 4\)"),
    "batch": (dict(keys=torch.zeros(3, 5, 4)), r"keys must have the shape \(2, 5, 4\), got \(3, 5, 4\)"),
    "size": (dict(query=torch.zeros(2, 3, 5)), r"query must have the shape \(2, 3, 4\), got \(2, 3, 5\)"),
    "positions": (dict(values=torch.zeros(2, 4, 6)), r"values must have the shape \(2, 5, 6\), got \(2, 4, 6\)"),
    "dtype": (dict(values=torch.zeros(2, 5, 6).double()), "values must have the dtype Float, got Double"),
    "weight": (dict(weight=torch.zeros(5)), r"weight must have the shape \(4,\)"),
    "lengths": (dict(lengths=torch.zeros(2).int()), "lengths must have the dtype Long"),
    "mask": (dict(mask=torch.ones(2, 2, 5).bool()), r"mask must have the shape \(2, 3, 5\), got \(2, 2, 5\)"),
    "mask dtype": (dict(mask=torch.ones(2, 1, 5)), "mask must have the dtype Bool"),
    "both": (dict(lengths=torch.ones(2).long(), mask=torch.ones(2, 1, 5).bool()), "exclude each other; pass one"),
}


def make_inputs(score, *, b=B, t=T, s=S, a=A, d=D, dtype=torch.float64, spread=1.0, coverage=False):
    """query, keys, values and the tensors of the score, all leaves that require gradients."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    tensors = {"query": draw(b, t, a + 1 if score == "general" else a), "keys": draw(b, s, a), "values": draw(b, s, d)}
    if score == "general":
        tensors["weight"] = draw(a + 1, a)
    if "additive" in score:
        tensors |= {"weight": draw(a), "bias": draw(a)}
    if score == "normed_additive":
        tensors["gain"] = draw()
    if coverage:
        tensors |= {"coverage": draw(b, t, s), "coverage_weight": draw(a)}
    return tensors


def make_padding(kind, *, b=B, t=T, s=S):
    """lengths or mask of the op; the first sentence has no positions (with a step mask: at its second step only)."""
    if kind == "none":
        return {}
    lengths = torch.tensor([0, s, max(1, s - 2)]).repeat(b)[:b] if b > 1 else torch.tensor([s - 2])
    if kind == "lengths":
        return {"lengths": lengths}
    mask = torch.arange(s) >= (s - lengths.unsqueeze(1))  # padding on the left, which lengths cannot express
    if kind == "mask":
        return {"mask": mask}
    step_mask = torch.rand(b, t, s, generator=torch.Generator().manual_seed(1)) < 0.6
    step_mask[0, min(1, t - 1)] = False
    step_mask[-1, :, 0] = False  # a position that no step attends to
    return {"mask": step_mask}


def allowed_positions(padding, b=B, t=T, s=S):
    if "lengths" in padding:
        return (torch.arange(s) < padding["lengths"][:, None])[:, None].expand(b, t, s)
    mask = padding.get("mask", torch.ones(b, s, dtype=torch.bool))
    return mask if mask.dim() == 3 else mask[:, None].expand(b, t, s)


def formula(query, keys, values, *, score, allowed, weight=None, bias=None, gain=None, scale=1.0, **coverage):
    """Row by row, over the attended positions only -> context, weights."""
    context = query.new_zeros(*query.shape[:2], values.size(2))
    weights = query.new_zeros(allowed.shape)
    for b, t in allowed.any(-1).nonzero().tolist():
        where = allowed[b, t].nonzero().squeeze(1)
        k, q = keys[b, where], query[b, t]
        if score in ("dot", "general"):
            s = k @ (q if score == "dot" else q @ weight)
        else:
            v = weight if gain is None else gain * weight / weight.square().sum().sqrt()
            if coverage:
                k = k + coverage["coverage"][b, t, where, None] * coverage["coverage_weight"]
            s = torch.tanh(q + k + (0 if bias is None else bias)) @ v
        p = torch.softmax(scale * s, 0)
        weights = weights.index_put((torch.tensor(b), torch.tensor(t), where), p)
        context = context.index_put((torch.tensor(b), torch.tensor(t)), p @ values[b, where])
    return context, weights


def gradients(outputs, tensors):
    """Gradients of a loss in which every output element has its own factor."""
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs
    )
    return torch.autograd.grad(loss, list(tensors.values()))
