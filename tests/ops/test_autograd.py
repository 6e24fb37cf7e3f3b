"""The differentiable backward that the autograd Functions of all ops share."""

import torch

from fastseq.ops.common.autograd import differentiable_backward


def test_an_input_that_depends_on_another_gets_no_gradient_through_it():
    """a b with b = tanh(a): the gradient at a is b alone, as an autograd Function must return it."""
    a = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    b = a.tanh()
    grad_a, grad_b = differentiable_backward(lambda x, y: (x * y,), (a, b), (torch.ones_like(a),), (True, True))
    torch.testing.assert_close((grad_a, grad_b), (b, a), rtol=0, atol=0)


def test_inputs_and_results_without_a_gradient_are_none():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def forward(x, y, nothing):
        return x * 2, None, y * 3

    assert differentiable_backward(forward, (a, b, None), (None, None, None), (True, True, False)) == (None, None, None)
    grads = (torch.ones(2), None, None)
    grad_a, grad_b, grad_c = differentiable_backward(forward, (a, b, None), grads, (True, True, False))
    assert grad_a.tolist() == [2.0, 2.0]
    assert grad_b is None and grad_c is None
