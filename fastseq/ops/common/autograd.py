"""Autograd: when an op needs its Function; the derivatives and vmap rules shared by all Functions."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

peek_transform = torch._C._functorch.peek_interpreter_stack  # in eager mode: None outside torch.func's transforms


def needs_function(implementation: ModuleType, *tensors: Tensor | None) -> bool:
    """True if a call must go through its autograd Function, because a derivative can be requested.

    False in a traced graph on a backend with ``PLAIN_TORCH``, which the compiler differentiates. True under a transform
    of torch.func: the Function has the vmap rule.
    """
    if is_compiling():
        if getattr(implementation, "PLAIN_TORCH", False):
            return False
    elif peek_transform() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed() -> bool:
    """True within a transform of torch.func (grad, vjp, vmap, ...), or a backward with batched gradients."""
    return not is_compiling() and peek_transform() is not None


def untracked() -> bool:
    """True if no gradient, trace, forward-mode level or transform is active, so that no Function is needed."""
    return not (torch.is_grad_enabled() or is_compiling() or forward_mode() or peek_transform())


def recompute(grads: Sequence[Tensor | None]) -> bool:
    """True if a backward must use ``differentiable_backward``: its result is differentiated, or batched by vmap."""
    if torch.is_grad_enabled() or transformed():
        return True
    if is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)  # is_grads_batched


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """saved * factor (), for the last use of a saved tensor in a backward: in its memory unless the graph is kept."""
    if is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return saved * factor
    return saved.mul_(factor).detach()  # a new tensor, whose memory becomes .grad without a copy


def vmapped() -> bool:
    """True within torch.func.vmap, at any depth."""
    if not transformed():
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def forward_mode() -> bool:
    """True inside a forward-mode level; only the reference has these derivatives."""
    return forward_ad._current_level >= 0


def one_by_one(apply: Callable[..., Sequence[Tensor | None]], in_dims: Sequence[int | None], args: Sequence, size: int):
    """The vmap rule of a Function as a loop: apply it to each sample, stack the results at dim 0 -> results, dims."""
    samples = []
    for k in range(size):
        given = (a if dim is None else a.select(dim, k) for a, dim in zip(args, in_dims, strict=True))
        samples.append(apply(*given))
    results = tuple(None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*samples, strict=True))
    return results, tuple(None if result is None else 0 for result in results)


def fold(t: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """Fold samples at ``dim`` (None: one for all) into the batch at ``axis`` -> (..., size * B, ...)."""
    t = t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:]) if dim is None else t.movedim(dim, axis)
    return t.flatten(axis, axis + 1)


def distinct(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Clone repeated gradients: users change gradients in place, so no two may share storage."""
    result = []
    for k, grad in enumerate(grads):
        repeated = grad is not None and any(grad is earlier for earlier in grads[:k])  # torch 2.11 cannot trace id()
        result.append(grad.clone() if repeated else grad)
    return tuple(result)


def differentiable_backward(
    forward: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backward under create_graph=True or a transform: recompute a forward that torch can differentiate again.

    Args:
        forward: maps ``tensors`` to the results, in plain torch.
        tensors: the inputs of the call.
        grads: the gradient of each result, or None.
        needs: for each input, whether its gradient is wanted.

    Returns:
        The gradient of each input; None where it is not wanted, or nothing depends on the input.
    """
    given = [k for k, grad in enumerate(grads) if grad is not None]
    wanted = [k for k, need in enumerate(needs) if need]
    if not given or not wanted:
        return (None,) * len(needs)

    def outputs_of(*of_wanted: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(wanted, of_wanted, strict=True))
        outputs = forward(*(replaced.get(k, t) for k, t in enumerate(tensors)))
        return tuple(outputs[k] for k in given)

    cotangents, inputs = tuple(grads[k] for k in given), [tensors[k] for k in wanted]
    if transformed():
        result = torch.func.vjp(outputs_of, *inputs)[1](cotangents)
    else:
        create_graph = torch.is_grad_enabled()  # off: batched gradients, which are not differentiated again
        with torch.enable_grad():
            # Views, because one input may be or depend on another; new leaves in the pull-back of a finished vjp.
            views = (t.view_as(t) for t in inputs)
            aliases = [view if view.requires_grad else view.detach().requires_grad_() for view in views]
            outputs = outputs_of(*aliases)
        result = torch.autograd.grad(outputs, aliases, cotangents, create_graph=create_graph, allow_unused=True)
    by_input = dict(zip(wanted, result, strict=True))
    return tuple(by_input.get(k) for k in range(len(needs)))
