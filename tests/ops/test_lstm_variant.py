"""``fastseq.ops.lstm_variant``: gradients of first and second order, lengths, transforms and refusals."""

import pytest
import torch
from backends import serving_variant
from torch.func import vmap

import fastseq
from fastseq import ops

BACKENDS = serving_variant()
T, B, H = 4, 3, 5
VARIANTS = {
    "plain": {},
    "dropout": {"hidden_mask": (torch.arange(B * H).view(B, H) % 3 > 0) * 1.5},
    "zoneout": {
        "zoneout_hidden": torch.arange(T * B * H).view(T, B, H) % 3 == 0,
        "zoneout_cell": torch.arange(T * B * H).view(T, B, H) % 4 == 0,
    },
    "expectation": {"zoneout_hidden": 0.25, "zoneout_cell": 0.5},
    "zoneout of h": {"zoneout_hidden": torch.arange(T * B * H).view(T, B, H) % 2 == 0},
    "norms": {"norms": True},
}
VARIANTS["all"] = VARIANTS["dropout"] | VARIANTS["zoneout"] | VARIANTS["norms"]
LENGTHS = {"full": None, "lengths": torch.tensor([4, 0, 2])}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def arguments(variant: str, dtype=torch.float64) -> list[torch.Tensor]:
    """gates, h0, c0, weight_hh and the norms, if the variant has them; leaves."""
    shapes = [(T, B, 4 * H), (B, H), (B, H), (4 * H, H)]
    shapes += [(4 * H,), (H,), (H,)] if "norms" in VARIANTS[variant] else []
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call(tensors, variant: str, **options):
    gates, h0, c0, weight_hh, *norms = tensors
    options = VARIANTS[variant] | options | ({"norms": tuple(norms)} if norms else {})
    output, states, *cells = ops.lstm_variant(gates, (h0, c0), weight_hh, **options)
    return output, *states, *cells


@backends
@variants
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_of_first_and_second_order(backend, variant, lengths, reverse):
    def run(*given):
        options = {"lengths": lengths, "reverse": reverse, "return_cell_states": reverse, "backend": backend}
        return call(given, variant, **options)

    tensors = arguments(variant)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@backends
def test_without_options_it_is_the_lstm(backend):
    gates, h0, c0, weight_hh = (t.detach() for t in arguments("plain"))
    eye = torch.eye(4 * H, dtype=torch.float64)
    for lengths in LENGTHS.values():
        for reverse in (False, True):
            options = {"lengths": lengths, "reverse": reverse, "return_cell_states": True}
            expected = ops.lstm(gates, (h0, c0), eye, weight_hh, **options, backend="reference")
            actual = ops.lstm_variant(gates, (h0, c0), weight_hh, **options, backend=backend)
            torch.testing.assert_close(actual, expected)


@backends
@variants
def test_each_input_alone_may_need_the_gradient(backend, variant):
    tensors = arguments(variant)
    outputs = call(tensors, variant, backend=backend)
    expected = torch.autograd.grad(sum(t.square().sum() for t in outputs), tensors)
    for k, want in enumerate(expected):
        given = [t.detach().requires_grad_(k == n) for n, t in enumerate(tensors)]
        outputs = call(given, variant, backend=backend)
        (actual,) = torch.autograd.grad(sum(t.square().sum() for t in outputs), given[k])
        torch.testing.assert_close(actual, want)


@backends
@variants
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_is_never_read(backend, variant, reverse):
    tensors, lengths = arguments(variant), torch.tensor([4, 0, 2])
    damaged = tensors[0].detach().clone()
    damaged[:, 1], damaged[2:, 2] = torch.nan, torch.nan
    results = []
    for gates in (tensors[0], damaged.requires_grad_()):
        given = [gates, *tensors[1:]]
        outputs = call(given, variant, lengths=lengths, reverse=reverse, return_cell_states=True, backend=backend)
        results.append((outputs, torch.autograd.grad(sum(t.square().sum() for t in outputs), given)))
    torch.testing.assert_close(*results)
    (output, h_n, c_n, cells), grads = results[0]
    for t in (output, cells, grads[0]):
        assert not t[:, 1].any() and not t[2:, 2].any()
    assert torch.equal(h_n[1], tensors[1][1]) and torch.equal(c_n[1], tensors[2][1])


@backends
@variants
def test_strided_and_expanded_tensors(backend, variant):
    tensors = [t.detach() for t in arguments(variant)]
    strided = [t.repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in tensors]
    strided[0] = strided[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    results = []
    for given in (strided, [t.detach().contiguous().requires_grad_() for t in strided]):
        output, _, _ = call(given, variant, backend=backend)
        grad = torch.ones(H, dtype=torch.float64).expand(T, B, H)  # stride 0, as from .sum()
        results.append([output, *torch.autograd.grad(output, given, grad)])
    torch.testing.assert_close(*results)


@backends
@variants
def test_a_changed_output_leaves_the_gradient(backend, variant):
    """Users change outputs in place: the backward reads nothing of them."""
    tensors = arguments(variant)
    expected, actual = [], []
    for grads, change in ((expected, False), (actual, True)):
        output, h_n, c_n, cells = call(tensors, variant, return_cell_states=True, backend=backend)
        loss = (output * 3).sum() + h_n.sum() + c_n.sum() + cells.sum()
        if change:
            for t in (output, h_n, c_n, cells):
                t.detach().zero_()
        grads += torch.autograd.grad(loss, tensors)
    torch.testing.assert_close(actual, expected)


@backends
@pytest.mark.parametrize("randomness", [True, False], ids=["masks of each sample", "one mask"])
def test_vmap(backend, randomness):
    gates, h0, c0, weight_hh = (t.detach() for t in arguments("plain"))
    several = torch.stack([gates, 2 * gates])
    masks = (torch.rand(2, B, H) > 0.5) * 2.0

    def run(gates, mask):
        return ops.lstm_variant(gates, (h0, c0), weight_hh, hidden_mask=mask, backend=backend)[0]

    actual = vmap(run, (0, 0 if randomness else None))(several, masks if randomness else masks[0])
    expected = [run(g, masks[k] if randomness else masks[0]) for k, g in enumerate(several)]
    torch.testing.assert_close(actual, torch.stack(expected))


@backends
def test_forward_mode(backend):
    tensors = arguments("all")
    gates = tensors[0].detach()

    def run(gates):
        return call([gates, *(t.detach() for t in tensors[1:])], "all", backend=backend)[0]

    primal, tangent = torch.func.jvp(run, (gates,), (gates,))
    torch.testing.assert_close(primal, run(gates))
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(run, gates, gates)[1])


REFUSED = {
    "gates must be": {"gates": torch.randn(T, B, 7)},
    "gates must be floating point": {"gates": torch.zeros(T, B, 4 * H, dtype=torch.int64)},
    "at least one time step": {"gates": torch.randn(0, B, 4 * H)},
    "h0 must have shape": {"hx": (torch.zeros(B, 1), torch.zeros(B, H))},
    "c0 must have shape": {"hx": (torch.zeros(B, H), torch.zeros(1, H))},
    "weight_hh must have shape": {"weight_hh": torch.randn(H, 4 * H)},
    "weight_hh is torch.float64": {"weight_hh": torch.randn(4 * H, H, dtype=torch.float64)},
    "weight_hh is on meta": {"weight_hh": torch.randn(4 * H, H, device="meta")},
    "hidden_mask must have shape": {"hidden_mask": torch.ones(H)},
    "zoneout_hidden must have shape": {"zoneout_hidden": torch.ones(B, H, dtype=torch.bool)},
    "zoneout_cell must be a bool mask": {"zoneout_cell": torch.ones(T, B, H)},
    "norm_c must have shape": {"norms": (torch.ones(4 * H), torch.ones(4 * H), torch.ones(H))},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_wrong_tensors_are_named(sentence):
    plain = {"gates": torch.randn(T, B, 4 * H), "hx": (torch.zeros(B, H),) * 2, "weight_hh": torch.randn(4 * H, H)}
    with pytest.raises(RuntimeError, match=sentence):
        ops.lstm_variant(**plain | REFUSED[sentence])


def test_a_rate_out_of_range_is_refused():
    gates, h0, c0, weight_hh = arguments("plain")
    with pytest.raises(ValueError, match=r"zoneout_cell must be a rate in 0\.\.1"):
        ops.lstm_variant(gates, (h0, c0), weight_hh, zoneout_cell=1.5)


@pytest.mark.parametrize(("backend", "sentence"), [("torch", "has no .*"), ("triton", "computes in float32, .*")])
def test_a_backend_that_cannot_serve_says_so(backend, sentence):
    gates, h0, c0, weight_hh = arguments("plain")
    with pytest.raises(RuntimeError, match=f"the {backend} backend {sentence}use backend="):
        ops.lstm_variant(gates, (h0, c0), weight_hh, backend=backend)
    module = fastseq.LSTM(4, H, zoneout_hidden=0.1)
    assert f"no {backend} for lstm_variant: the {backend} backend" in fastseq.explain(module, torch.randn(T, B, 4))
