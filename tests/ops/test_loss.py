"""``linear_cross_entropy``: F.cross_entropy(F.linear(...)) on every backend, in values, derivatives and refusals."""

import pytest
import torch
import torch.nn.functional as F
from backends import serving_loss
from torch.func import grad, jvp, vmap

import fastseq
from fastseq import _native
from fastseq.dispatch import record
from fastseq.ops.linear_cross_entropy import linear_cross_entropy, reference
from fastseq.ops.linear_cross_entropy.spec import InputGrads, Inputs, Want

BACKENDS = serving_loss()
needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled operators are not part of this install")
TARGET = torch.tensor([3, -100, 0, 6, -100])


def leaves(N=5, V=7, H=4, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((N, H), (V, H), (V,))]


def plain(input, weight, target, bias=None, **options):
    return F.cross_entropy(F.linear(input, weight, bias), target, **options)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some"])
def test_values_and_gradients(backend, reduction, smoothing, ignored):
    x, weight, bias = given = leaves()
    target = TARGET if ignored else TARGET.abs() % 7
    options = {"label_smoothing": smoothing, "reduction": reduction}
    actual = linear_cross_entropy(x, weight, target, bias, backend=backend, **options)
    expected = plain(x, weight, target, bias, **options)
    torch.testing.assert_close(actual, expected)
    factor = torch.randn_like(expected)
    grads = [torch.autograd.grad((factor * loss).sum(), given) for loss in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivative_numerically(backend, reduction):
    def run(x, weight, bias):
        options = {"label_smoothing": 0.1, "reduction": reduction, "backend": backend}
        return linear_cross_entropy(x, weight, TARGET, bias, **options)

    assert torch.autograd.gradcheck(run, leaves(), fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves(), fast_mode=True)


@pytest.mark.parametrize("per_row", [False, True])
def test_written_backward_equals_autograd(per_row):
    x, weight, bias = given = leaves()
    want = Want(per_row, InputGrads(True, True, True))
    inputs = Inputs(x, weight, bias, TARGET, -100, 0.1)
    loss, saved = reference.forward(inputs, want)
    cotangent = torch.randn_like(loss)
    written = reference.backward(inputs, saved, cotangent, want, want.grads)
    torch.testing.assert_close(tuple(written), torch.autograd.grad(loss, given, cotangent))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_some_inputs_need_no_gradient(backend, reduction):
    given = [t.detach() for t in leaves()]
    for wanted in range(3):
        x, weight, bias = now = [t.requires_grad_(k == wanted) for k, t in enumerate(given)]
        loss = linear_cross_entropy(x, weight, TARGET, bias, reduction=reduction, backend=backend).sum()
        (actual,) = torch.autograd.grad(loss, now[wanted])
        (expected,) = torch.autograd.grad(plain(x, weight, TARGET, bias, reduction="sum"), now[wanted])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_twice_from_one_graph(backend):
    x, weight, _ = leaves()
    loss = linear_cross_entropy(x, weight, TARGET, backend=backend)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0).double(), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0).double())
    torch.testing.assert_close(tuple(1.5 * g for g in first), second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_none_given_and_leading_dimensions(backend):
    x, weight, bias = leaves()
    nothing = torch.full((5,), -100)
    assert linear_cross_entropy(x, weight, nothing, bias, backend=backend).isnan()
    loss = linear_cross_entropy(x, weight, nothing, bias, reduction="sum", backend=backend)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight, bias)))
    empty = linear_cross_entropy(x[:0], weight, TARGET[:0], bias, reduction="none", backend=backend)
    assert empty.shape == (0,)
    assert linear_cross_entropy(x[:0], weight, TARGET[:0], bias, backend=backend).isnan()
    wide = linear_cross_entropy(
        x.view(5, 1, 4).expand(-1, 2, -1),
        weight,
        TARGET[:, None].expand(-1, 2),
        bias,
        reduction="none",
        backend=backend,
    )
    each = plain(x, weight, TARGET, bias, reduction="none")
    torch.testing.assert_close(wide, each[:, None].expand(-1, 2))
    one = linear_cross_entropy(x[0], weight, TARGET[0], bias, backend=backend)
    torch.testing.assert_close(one, each[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weights_and_another_ignore_index(backend):
    weight, tokens = leaves()[1], torch.tensor([[1, 2, 5], [4, 0, 0]])
    labels = torch.tensor([[2, 5, 0], [0, 0, 0]])
    x = F.embedding(tokens, weight).tanh()  # (2, 3, 4)
    actual = linear_cross_entropy(x, weight, labels, ignore_index=0, backend=backend)
    expected = plain(x.flatten(0, 1), weight, labels.flatten(), ignore_index=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight, retain_graph=True) for loss in (actual, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    x, weight, bias = (t.detach() for t in leaves())

    def loss(f, **options):
        return lambda x: f(x, weight, TARGET, bias, label_smoothing=0.1, **options)

    ours, theirs = loss(linear_cross_entropy, backend=backend), loss(plain)
    samples = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(ours))(samples), torch.stack([grad(theirs)(s) for s in samples]))
    torch.testing.assert_close(vmap(ours)(samples), torch.stack([theirs(s) for s in samples]))
    torch.testing.assert_close(jvp(ours, (x,), (x,)), jvp(theirs, (x,), (x,)))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_autocast_has_the_dtypes_of_torch(backend):
    x, weight, bias = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_cross_entropy(x, weight, TARGET, bias, backend=backend)
        expected = plain(x, weight, TARGET, bias)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(loss, (x, weight, bias)) for loss in (actual, expected)]
    assert [g.dtype for g in grads[0]] == [g.dtype for g in grads[1]]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compile_is_one_graph_for_all_sizes(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(x, weight, target, bias):
        losses = linear_cross_entropy(x, weight, target, bias, reduction="none", backend=backend)
        return losses.square().sum() + linear_cross_entropy(x, weight, target, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 8, 3):
        x, weight, bias = given = leaves(N)
        target = torch.randint(7, (N,))
        losses = [f(x, weight, target, bias) for f in (compiled, run)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, given) for loss in losses))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


REFUSALS = {
    "reduction": (dict(reduction="all"), ValueError, "unknown reduction 'all'; choose one of 'mean'"),
    "smoothing": (dict(label_smoothing=1.5), ValueError, r"must lie in \[0, 1\], got 1.5"),
    "class": (dict(target=torch.tensor([0, 7, 1, 1, 1])), IndexError, r"lie in \[0, 7\).* got 7"),
    "negative": (dict(target=torch.tensor([0, -1, 1, 1, 1])), IndexError, r"ignore_index = -100; got -1"),
    "rows": (dict(target=TARGET[:4]), RuntimeError, r"got \(5, 4\), \(7, 4\), \(4,\) and None"),
    "size": (dict(weight=torch.zeros(7, 3)), RuntimeError, r"expected input \(..., H\), weight \(V, H\)"),
    "no classes": (dict(weight=torch.zeros(0, 4), target=TARGET * 0 - 100), RuntimeError, "at least one class"),
    "probabilities": (dict(target=torch.rand(5)), RuntimeError, "must hold integer classes, got torch.float32"),
    "dtype": (dict(weight=torch.zeros(7, 4).double()), RuntimeError, "input is torch.float32 but weight is"),
    "integers": (dict(input=torch.zeros(5, 4).int()), RuntimeError, "must be floating point, got torch.int32"),
    "device": (dict(weight=torch.zeros(7, 4, device="meta")), RuntimeError, "on cpu but weight is on meta"),
    "backend": (dict(backend="mkl"), ValueError, "unknown backend 'mkl'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(changes, error, message):
    arguments = dict(input=torch.zeros(5, 4), weight=torch.zeros(7, 4), target=TARGET)
    with pytest.raises(error, match=f"{message}"):
        fastseq.linear_cross_entropy(**arguments | changes)


@needs_native
def test_no_logits_of_all_rows():
    """The forward keeps the gradients of its inputs and nothing of size (N, V)."""
    kept = []
    x, weight, bias = leaves(600, 2000, 4)
    target = torch.randint(2000, (600,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, target, bias, backend="native")
        linear_cross_entropy(x, weight, target, bias, reduction="none", backend="native")
    assert max(kept) == weight.numel()


@needs_native
def test_a_backward_that_ends_the_graph_takes_no_further_memory_for_the_weight():
    """The saved gradient of the weight becomes its .grad."""
    kept, (x, weight, _) = [], leaves(dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        loss = linear_cross_entropy(x, weight, TARGET, backend="native")
    loss.backward()
    assert weight.grad.data_ptr() in kept


@needs_native
@pytest.mark.parametrize(("classes", "backend"), [(7, "torch"), (1024, "native")])
def test_auto_on_cpu(classes, backend):
    """A short row of logits costs torch less than the passes of a chunk."""
    with record() as choices:
        linear_cross_entropy(*leaves(V=classes)[:2], TARGET)
    assert [choice.backend for choice in choices] == [backend]
