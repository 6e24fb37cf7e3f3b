"""``fastseq.ops.lstm`` itself: gradients of first and second order, and layouts, for every backend and form."""

import pytest
import torch
from backends import serving_lstm

from fastseq import ops

BACKENDS = serving_lstm()
FORMS = {
    "full": {},
    "lengths": {"lengths": torch.tensor([4, 0, 2])},
    "packed": {"batch_sizes": torch.tensor([3, 2, 1, 1])},
}


def arguments(form: str, projection: int = 0):
    """float64 leaves: input (4, 3, 2) or packed (7, 2); h0, c0 (3, 3); the weights."""
    width = projection or 3
    shapes = [(7, 2) if form == "packed" else (4, 3, 2), (3, width), (3, 3), (12, 2), (12, width), (12,), (12,)]
    shapes += [(projection, 3)] if projection else []
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def call(tensors, form: str, **options):
    x, h0, c0, *weights = tensors
    options |= {"weight_hr": weights[4]} if len(weights) > 4 else {}
    output, states, *cells = ops.lstm(x, (h0, c0), *weights[:4], **FORMS[form], **options)
    return output, *states, *cells


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("extra", ["plain", "cell_states", "projection"])
def test_gradients_of_first_and_second_order(backend, form, reverse, extra):
    options = {"proj_size": 2 if extra == "projection" else 0, "return_cell_states": extra == "cell_states"}
    if backend not in serving_lstm(**options):
        pytest.skip(f"the {backend} backend refuses {extra}, which test_dispatch.py checks")
    tensors = arguments(form, projection=2 if extra == "projection" else 0)

    def run(*given):
        return call(given, form, reverse=reverse, return_cell_states=extra == "cell_states", backend=backend)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_some_inputs_need_no_gradient(backend, form):
    tensors = [t.detach() for t in arguments(form)]
    expected = None
    for wanted in range(len(tensors)):
        given = [t.requires_grad_(k == wanted) for k, t in enumerate(tensors)]
        output, h_n, c_n = call(given, form, backend=backend)
        (output.sum() + h_n.sum() + c_n.square().sum()).backward()
        assert [t.grad is not None for t in given] == [k == wanted for k in range(len(given))]
        given[wanted].grad = None
        if expected is not None:
            torch.testing.assert_close((output, h_n, c_n), expected)
        expected = (output.detach(), h_n.detach(), c_n.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_lengths(backend, reverse):
    x, *rest = arguments("full")
    lengths, batch_sizes = torch.tensor([4, 2, 1]), FORMS["packed"]["batch_sizes"]
    hx, weights = rest[:2], rest[2:]
    padded, states = ops.lstm(x, hx, *weights, lengths=lengths, reverse=reverse, backend=backend)
    valid = torch.arange(4)[:, None] < lengths
    packed, packed_states = ops.lstm(x[valid], hx, *weights, batch_sizes=batch_sizes, reverse=reverse, backend=backend)
    torch.testing.assert_close(packed, padded[valid])
    torch.testing.assert_close(packed_states, states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_strided_inputs_and_gradients(backend):
    x, h0, c0, *weights = (t.detach() for t in arguments("full"))
    expanded = x[:, :1].expand(4, 3, 2), h0[:1].expand(3, 3), c0.t().contiguous().t(), *(w.clone() for w in weights)
    results = []
    for given in (expanded, [t.contiguous() for t in expanded]):
        given = [t.requires_grad_() for t in given]
        output, _, _ = call(given, "full", backend=backend)
        grad = torch.ones(3, dtype=torch.float64).expand(4, 3, 3)  # stride 0, as from .sum()
        results.append([output, *torch.autograd.grad(output, given, grad, allow_unused=True)])
    torch.testing.assert_close(*results)
