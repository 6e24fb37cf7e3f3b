"""A valid call of every operator, and the tensors among its arguments."""

import pytest
import torch
from torch import Tensor


def lstm_arguments(T, B, I, H) -> tuple:  # noqa: E741
    """input, h0, c0 and weights of one direction with biases."""
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
    return torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H), weights


def lstm_forward(T=4, B=3, I=5, H=7, packed=False) -> tuple:  # noqa: E741
    input, *rest = lstm_arguments(T, B, I, H)
    lengths, batch_sizes = (None, torch.full((T,), B)) if packed else (torch.full((B,), T), None)
    return input.flatten(0, 1) if packed else input, *rest, lengths, batch_sizes, False, True, True


def lstm_backward(T=4, B=3, I=5, H=7, packed=False) -> tuple:  # noqa: E741
    input, h0, c0, weights, lengths, batch_sizes, reverse, *needs = lstm_forward(T, B, I, H, packed)
    rows = input.shape[:-1]
    grads = torch.randn(*rows, H), torch.randn(1, B, H), torch.randn(1, B, H), torch.randn(*rows, H)
    saved = torch.randn(*rows, 4 * H), torch.randn(*rows, H)
    return *grads, input, h0, c0, weights, *saved, lengths, batch_sizes, reverse, *needs


def lstm_cell_forward(B=3, H=7) -> tuple:
    return torch.randn(B, 4 * H), torch.randn(B, H)


def lstm_cell_backward(B=3, H=7) -> tuple:
    return torch.randn(B, 4 * H), *torch.randn(4, B, H).unbind()


def lstm_step(B=3, I=5, H=7) -> tuple:  # noqa: E741
    input, h, c, weights = lstm_arguments(1, B, I, H)
    return input[0], h[0], c[0], *weights


def lstm_recurrence_forward(T=4, B=3, H=8) -> tuple:
    gates, states = torch.randn(T, B, 4 * H), torch.randn(2, 1, B, H).unbind()
    return gates, *states, torch.randn(1, 4 * H, H), torch.full((B,), T), False, False, True, True


def lstm_recurrence_backward(T=4, B=3, H=8) -> tuple:
    per_step, states = torch.randn(3, T, B, H).unbind(), torch.randn(3, 1, B, H).unbind()
    activations, weight_hh, lengths = torch.randn(T, B, 4 * H), torch.randn(1, 4 * H, H), torch.full((B,), T)
    grads = per_step[0], states[0], states[1], per_step[1]
    return *grads, activations, per_step[2], states[2], weight_hh, lengths, False, False


def attention_forward(B=2, T=3, S=5, A=4, D=6, masked=False, prepared=None) -> tuple:
    padding = (None, torch.ones(B, T, S, dtype=torch.bool)) if masked else (torch.full((B,), S), None)
    vectors = torch.randn(A), torch.randn(A)
    return torch.randn(B, T, A), torch.randn(B, S, A), torch.randn(B, S, D), *vectors, *padding, prepared, 1.0, True


def attention_backward(B=2, T=3, S=5, A=4, D=6, masked=False, prepared=None) -> tuple:
    *inputs, scale, _ = attention_forward(B, T, S, A, D, masked, prepared)
    return torch.randn(B, T, D), torch.randn(B, T, S), *inputs, torch.rand(B, T, S), scale, True, True


def attention_prepare(B=2, S=5, A=4) -> tuple:
    return torch.randn(B, S, A), torch.full((B,), S)


def linear_cross_entropy_forward(N=5, V=7, H=4) -> tuple:
    tensors = torch.randn(N, H), torch.randn(V, H), torch.randn(V), torch.randint(V, (N,))
    return *tensors, -100, 0.1, True, True, True


def linear_cross_entropy_backward(N=5, V=7, H=4) -> tuple:
    return torch.randn(N), torch.rand(2, N), *linear_cross_entropy_forward(N, V, H)


def candidates(B=2, K=3, V=5) -> tuple:
    return torch.randn(B * K, V), torch.randn(B, K), torch.zeros(B * K, 2, dtype=torch.int64), 0, 4


BOTH = (lstm_cell_forward, lstm_cell_backward, lstm_step, attention_forward, attention_backward, attention_prepare)
LOSS = (linear_cross_entropy_forward, linear_cross_entropy_backward)
CPU = (lstm_forward, lstm_backward, *LOSS, *BOTH, candidates)
CUDA = (lstm_recurrence_forward, lstm_recurrence_backward, *BOTH)


def variants(call, prepared) -> list[tuple]:
    """List arguments of ``call`` so that each optional tensor is present in one of them.

    prepared: of the keys (2, 5, 4) of attention.
    """
    if call in (lstm_forward, lstm_backward):
        return [call(), call(packed=True)]
    if call in (attention_forward, attention_backward):
        return [call(prepared=prepared), call(masked=True)]
    return [call()]


def tensors_of(operator, arguments: tuple) -> dict[str, Tensor]:
    """Name the tensors that are present, by the operator's schema: "input", "weights[1]", ..."""
    named = {}
    for argument, value in zip(operator._schema.arguments, arguments, strict=True):
        if isinstance(value, Tensor):
            named[argument.name] = value
        elif isinstance(value, list):
            named |= {f"{argument.name}[{i}]": t for i, t in enumerate(value)}
    return named


def tensor_names(operator) -> set[str]:
    """Return the names of all tensor arguments in the schema; a list counts as one."""
    return {argument.name for argument in operator._schema.arguments if "Tensor" in str(argument.type)}


def check_damaged(operator, call, damage, prepared=None) -> set[str]:
    """Replace every tensor of every variant by ``damage(tensor)``, one at a time: the operator must refuse it by name.

    -> the arguments that were tried.
    """
    tried = set()
    for arguments in variants(call, prepared):
        operator(*arguments)
        for label in tensors_of(operator, arguments):
            changed = [list(value) if isinstance(value, list) else value for value in arguments]
            name, _, rest = label.partition("[")
            i = [argument.name for argument in operator._schema.arguments].index(name)
            if rest:
                k = int(rest.rstrip("]"))
                changed[i][k] = damage(changed[i][k])
                name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[k]
            else:
                changed[i] = damage(changed[i])
            with pytest.raises(RuntimeError, match=f"{call.__name__}: {name} .*storage of"):
                operator(*changed)
            tried.add(label.partition("[")[0])
    return tried
