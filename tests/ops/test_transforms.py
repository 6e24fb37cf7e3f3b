"""torch.func and batched gradients: each transform of an op against the same transform of plain torch, in float64."""

import pytest
import torch
from backends import serving_attention, serving_lstm
from seq2seq_cases import make_batch, make_model
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import fastseq
from fastseq import ops

BACKENDS = serving_lstm(dtype=torch.float64)
VMAPPED = serving_lstm(dtype=torch.float64, vmapped=True)
SAMPLES = 4


def pair(backend: str, **options):
    """Our module and torch's, with the same weights in float64."""
    ours = fastseq.LSTM(3, 5, backend=backend, **options).double()
    theirs = nn.LSTM(3, 5, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def loss_of(module):
    """A loss on all results, of parameters and input."""

    def loss(parameters, x):
        output, (h_n, c_n) = functional_call(module, parameters, (x,))
        return output.square().sum() + h_n.sum() + c_n.square().sum()

    return loss


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("batch", [1, 6])
def test_grad_vjp_jacrev_and_jvp(backend, batch):
    ours, theirs = pair(backend, num_layers=2, bidirectional=True)
    parameters, x = dict(ours.named_parameters()), draw(4, batch, 3)
    torch.testing.assert_close(grad(loss_of(ours))(parameters, x), grad(loss_of(theirs))(parameters, x))
    ours_of, theirs_of = (lambda x, m=m: m(x)[0] for m in (ours, theirs))
    cotangent = draw(4, batch, 10)
    torch.testing.assert_close(vjp(ours_of, x)[1](cotangent), vjp(theirs_of, x)[1](cotangent))
    torch.testing.assert_close(jacrev(ours_of)(x), jacrev(theirs_of)(x))
    torch.testing.assert_close(jvp(ours_of, (x,), (x,)), jvp(theirs_of, (x,), (x,)))


@pytest.mark.parametrize("backend", ["auto", *VMAPPED])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_for_each_sample(backend, bidirectional):
    ours, theirs = pair(backend, bidirectional=bidirectional)
    parameters, x = dict(ours.named_parameters()), draw(SAMPLES, 4, 2, 3)
    actual = vmap(grad(loss_of(ours)), (None, 0))(parameters, x)
    each = [grad(loss_of(theirs))(parameters, one) for one in x]
    torch.testing.assert_close(actual, {name: torch.stack([g[name] for g in each]) for name in parameters})


@pytest.mark.parametrize("backend", ["auto", *VMAPPED])
@pytest.mark.parametrize("train", [True, False])
def test_vmap_over_samples_and_over_models(backend, train):
    ours, theirs = pair(backend)
    x = draw(SAMPLES, 4, 2, 3)
    with torch.set_grad_enabled(train):
        output, (h_n, c_n) = vmap(ours)(x)
        expected = [theirs(one) for one in x]
        torch.testing.assert_close(output, torch.stack([e[0] for e in expected]))
        torch.testing.assert_close((h_n, c_n), tuple(torch.stack([e[1][k] for e in expected]) for k in (0, 1)))
        models = {name: torch.stack([p * k for k in (1, 2)]) for name, p in ours.named_parameters()}
        actual = vmap(lambda p: functional_call(ours, p, (x[0],))[0])(models)
        for k in range(2):
            alone = functional_call(theirs, {name: p[k] for name, p in models.items()}, (x[0],))[0]
            torch.testing.assert_close(actual[k], alone)


@pytest.mark.parametrize("backend", ["auto", *VMAPPED])
def test_vmap_with_lengths(backend):
    module, x, lengths = pair(backend)[0], draw(SAMPLES, 4, 2, 3), torch.randint(0, 5, (SAMPLES, 2))
    shared = vmap(lambda one: module(one, lengths=lengths[0])[0])(x)
    torch.testing.assert_close(shared, torch.stack([module(one, lengths=lengths[0])[0] for one in x]))
    each = vmap(lambda one, n: module(one, lengths=n)[0])(x, lengths)
    torch.testing.assert_close(each, torch.stack([module(a, lengths=n)[0] for a, n in zip(x, lengths, strict=True)]))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("batch", [1, 6])
def test_batched_gradients(backend, batch):
    ours, theirs = pair(backend)
    x = draw(3, batch, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x)[0], x, check_batched_grad=True)
    actual, expected = (
        torch.autograd.functional.jacobian(lambda x, m=m: m(x)[0], x, vectorize=True) for m in (ours, theirs)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cell(backend):
    gates, c = draw(3, 20).requires_grad_(), draw(3, 5).requires_grad_()

    def h_of(gates, c):
        return ops.lstm_cell(gates, c, backend=backend)[0]

    def expected_of(gates, c):
        return ops.lstm_cell(gates, c, backend="torch")[0]

    assert torch.autograd.gradcheck(h_of, (gates, c), check_batched_grad=True)
    for transform in (jacrev, lambda f: vmap(grad(lambda *a: f(*a).sum()))):
        torch.testing.assert_close(transform(h_of)(gates, c), transform(expected_of)(gates, c))
    tangents = (gates.detach(), c.detach())
    torch.testing.assert_close(jvp(h_of, tangents, tangents), jvp(expected_of, tangents, tangents))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_cell_module(backend):
    ours, theirs = fastseq.LSTMCell(3, 5, backend=backend).double(), nn.LSTMCell(3, 5).double()
    theirs.load_state_dict(ours.state_dict())
    parameters, x = dict(ours.named_parameters()), draw(SAMPLES, 2, 3)

    def loss(module):
        return lambda p, x: functional_call(module, p, (x,))[0].square().sum()

    actual = vmap(grad(loss(ours)), (None, 0))(parameters, x)
    each = [grad(loss(theirs))(parameters, one) for one in x]
    torch.testing.assert_close(actual, {name: torch.stack([g[name] for g in each]) for name in parameters})


@pytest.mark.parametrize("backend", ["auto", *serving_attention(dtype=torch.float64)])
@pytest.mark.parametrize("score", ["dot", "general", "additive", "normed_additive"])
def test_attention(backend, score):
    module, plain = (fastseq.Attention(4, 4, score=score, backend=name).double() for name in (backend, "reference"))
    plain.load_state_dict(module.state_dict())
    query, keys = draw(SAMPLES, 2, 3, 4), draw(SAMPLES, 2, 5, 4)
    lengths = torch.tensor([5, 3])

    def loss(module):
        def of(parameters, query, keys):
            context, weights = functional_call(
                module, parameters, (query, keys), dict(lengths=lengths, need_weights=True)
            )
            return context.square().sum() + weights.square().sum()

        return of

    parameters = dict(module.named_parameters())
    actual = vmap(grad(loss(module), argnums=(0, 1, 2)), (None, 0, 0))(parameters, query, keys)
    for k in range(SAMPLES):
        leaves = [query[k].clone().requires_grad_(), keys[k].clone().requires_grad_()]
        wanted = [*plain.parameters(), *leaves]
        expected = torch.autograd.grad(loss(plain)(dict(plain.named_parameters()), *leaves), wanted)
        gradients = [*(actual[0][name][k] for name in parameters), actual[1][k], actual[2][k]]
        torch.testing.assert_close(gradients, list(expected))
    tangent = (query[0], keys[0])
    of_module, of_plain = (lambda q, k, m=m: m(q, k, lengths=lengths)[0] for m in (module, plain))
    torch.testing.assert_close(jvp(of_module, tangent, tangent), jvp(of_plain, tangent, tangent))
    q = query[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: of_module(q, keys[0]), q, check_batched_grad=True)


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
def test_batched_gradients_of_a_seq2seq_model(feeding):
    model = make_model(input_feeding=feeding)
    logits = model(*make_batch(model, steps=2)).logits.flatten()
    parameters, cotangents = list(model.parameters()), draw(SAMPLES, logits.numel())

    def gradients(cotangents, **options):
        return torch.autograd.grad(logits, parameters, cotangents, retain_graph=True, **options)

    each = zip(*map(gradients, cotangents), strict=True)
    torch.testing.assert_close(gradients(cotangents, is_grads_batched=True), tuple(map(torch.stack, each)))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_vmap_of_attention_without_gradients(score):
    """Includes the plain dot call, which skips the rules."""
    module, query, keys = fastseq.Attention(4, 4, score=score), torch.randn(SAMPLES, 2, 3, 4), torch.randn(2, 5, 4)
    with torch.no_grad():
        actual = vmap(lambda q: module(q, keys)[0])(query)
        torch.testing.assert_close(actual, torch.stack([module(q, keys)[0] for q in query]))


def test_torch_refuses_vmap():
    with pytest.raises(RuntimeError, match=r"cannot run under torch\.func\.vmap"):
        vmap(fastseq.LSTM(3, 5, backend="torch"))(torch.randn(SAMPLES, 4, 2, 3))
