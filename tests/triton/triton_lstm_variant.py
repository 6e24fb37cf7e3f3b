"""``lstm_variant`` on the triton backend against float64, in Triton's interpreter."""

import pytest
import torch
from triton_cases import DTYPES, check, draw

from fastseq import ops
from fastseq.testing.problems.variants import plain_variant

VARIANTS = {
    "dropout": {"dropout": True},
    "masks": {"keep": True},
    "rates": {"zoneout_hidden": 0.25, "zoneout_cell": 0.4},
    "norms": {"norms": True},
    "all": {"dropout": True, "keep": True, "norms": True},
}


def operation(call, shape, dropout=False, keep=False, norms=False, lengths=None, **options):
    """A function of the leaves -> output, h_n, c_n and cell states. dropout, keep: draw the masks."""
    (T, B, H), generator = shape, torch.Generator().manual_seed(2)
    if dropout:
        options["hidden_mask"] = (torch.rand(B, H, generator=generator) < 0.7) / 0.7
    if keep:
        for name in ("zoneout_hidden", "zoneout_cell"):
            options[name] = torch.rand(T, B, H, generator=generator) < 0.3
    options["lengths"] = None if lengths is None else torch.tensor(lengths)

    def run(gates, h0, c0, weight_hh, **gains):
        given = tuple(gains.values()) if norms else None
        result = call(gates, (h0, c0), weight_hh, norms=given, return_cell_states=True, **options)
        return dict(zip(("output", "h_n", "c_n", "cell_states"), (result[0], *result[1], result[2]), strict=True))

    return run


def tensors(dtype, T, B, H, norms=False):
    """Leaves as in fastseq.testing.problems: with norms a wide cell state, whose deviation is not small."""
    drawn = draw(torch.float64, gates=(T, B, 4 * H), h0=(B, H), c0=(B, H), weight_hh=(4 * H, H))
    drawn["weight_hh"] /= H**0.5
    if norms:
        drawn["gates"][..., H : 2 * H] += 2
        drawn["c0"] *= 3
        drawn |= {"norm_hh": 0.5 + torch.randn(4 * H) / 8, "norm_c": 1 + torch.randn(H) / 4}
        drawn["norm_c_bias"] = torch.randn(H) / 4
    return {name: t.to(dtype) for name, t in drawn.items()}


def check_variant(dtype, shape, variant, **options):
    options |= VARIANTS[variant]

    def backend(*args, **kwargs):
        return ops.lstm_variant(*args, **kwargs, backend="triton")

    calls = (operation(call, shape, **options) for call in (backend, plain_variant))
    check(*calls, [tensors(dtype, *shape, norms="norms" in options) for _ in range(2)], dtype)


CASES = [*((variant, torch.float32) for variant in VARIANTS), *(("all", dtype) for dtype in DTYPES[1:])]


@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=str)
def test_accuracy(variant, dtype):
    check_variant(dtype, (3, 3, 33), variant, lengths=[3, 0, 2], reverse=variant in ("masks", "all"))


@pytest.mark.parametrize(("shape", "reverse"), [((1, 1, 16), False), ((3, 2, 16), True)], ids=str)
def test_full_sequences(shape, reverse):
    check_variant(torch.float32, shape, "all", reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_is_never_read(reverse):
    shape, options = (4, 3, 5), {"lengths": [4, 0, 2], "reverse": reverse, "backend": "triton"}
    given = tensors(torch.float32, *shape, norms=True)
    damaged = given | {"gates": given["gates"].clone()}
    damaged["gates"][:, 1], damaged["gates"][2:, 2] = torch.nan, torch.nan
    results = []
    for leaves in (given, damaged):
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        outputs = operation(ops.lstm_variant, shape, **VARIANTS["all"], **options)(**leaves)
        grads = torch.autograd.grad(sum(t.square().sum() for t in outputs.values()), list(leaves.values()))
        results.append((outputs, grads))
    for side in results:
        assert not side[0]["output"][:, 1].any() and not side[1][0][2:, 2].any()
    torch.testing.assert_close(*results)


def test_inference_and_a_loss_on_one_result():
    """Nothing is saved in inference; gradients of the other results are absent."""
    shape = (3, 2, 5)
    leaves = {name: t.requires_grad_() for name, t in tensors(torch.float32, *shape, norms=True).items()}
    run = operation(ops.lstm_variant, shape, **VARIANTS["all"], backend="triton")
    plain = operation(plain_variant, shape, **VARIANTS["all"])
    with torch.no_grad():
        torch.testing.assert_close(run(**leaves), plain(**leaves))
    for name in ("output", "c_n"):
        sides = (torch.autograd.grad(f(**leaves)[name].sum(), leaves["gates"])[0] for f in (run, plain))
        torch.testing.assert_close(*sides)


def test_second_derivatives_go_through_the_reference():
    leaves = list(tensors(torch.float32, 2, 2, 3).values())
    leaves = [t.requires_grad_() for t in leaves]

    def penalty(backend):
        output, _ = ops.lstm_variant(leaves[0], (leaves[1], leaves[2]), leaves[3], zoneout_cell=0.5, backend=backend)
        (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    torch.testing.assert_close(penalty("triton"), penalty("reference"))


def test_refusals():
    state, weight = torch.zeros(1, 2049), torch.zeros(1).expand(4 * 2049, 2049)
    with pytest.raises(RuntimeError, match=r"hidden size of at most 2048 \(got 2049\); use backend='reference'"):
        ops.lstm_variant(torch.zeros(1, 1, 4 * 2049), (state, state), weight, backend="triton")
    gates = torch.zeros(1, 1, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"computes in float32, bfloat16, float16 .got torch.float64"):
        ops.lstm_variant(gates, (gates[0, :, :1],) * 2, gates[0, 0].unsqueeze(1), backend="triton")
