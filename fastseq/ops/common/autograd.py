"""Autograd: when an op needs its Function, and the differentiable backward that all Functions share."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_function(implementation: ModuleType, *tensors: Tensor | None) -> bool:
    """True if a call must go through its autograd Function, because a derivative can be asked for.

    False in a traced graph on a backend with ``PLAIN_TORCH``, which the compiler differentiates by itself. In forward
    mode the Function raises, where a bare kernel would drop the tangents.
    """
    if torch.compiler.is_compiling() and getattr(implementation, "PLAIN_TORCH", False):
        return False
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Clone a gradient that stands for two inputs: users change gradients in place, so no two may share storage."""
    seen, own = set(), []
    for grad in grads:
        own.append(grad.clone() if grad is not None and id(grad) in seen else grad)
        seen.add(id(grad))
    return tuple(own)


def differentiable_backward(
    forward: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backward under create_graph=True: recompute the forward, which torch can differentiate any number of times.

    Args:
        forward: maps ``tensors`` to the results, in plain torch.
        tensors: the inputs of the call.
        grads: the gradient of each result, or None.
        needs: for each input, whether its gradient is wanted.

    Returns:
        The gradient of each input; None where it is not wanted, or nothing depends on the input.
    """
    aliases = [t if t is None else t.view_as(t) for t in tensors]  # one input may be, or depend on, another
    outputs = forward(*aliases)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    if not pairs:
        return (None,) * len(needs)
    outputs, grad_outputs = zip(*pairs, strict=True)
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if need else None for need in needs)
