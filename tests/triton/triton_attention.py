"""``attention`` on the triton backend against float64, in Triton's interpreter."""

import pytest
import torch
from attention_cases import PADDINGS, SCORES, allowed_positions, make_padding
from triton_cases import DTYPES, check, draw

from fastseq import ops


def attention(backend, score, scale=0.7, **options):
    def operation(**tensors):
        context, weights = ops.attention(
            **tensors, score=score, scale=scale, need_weights=True, backend=backend, **options
        )
        return {"context": context, "weights": weights}

    return operation


def tensors(score, dtype, B=3, T=4, S=5, A=6, D=7, coverage=False):
    more = {"weight": (A + 1, A)} if score == "general" else {}
    if "additive" in score:
        more = {"weight": (A,), "bias": (A,)}
    if score == "normed_additive":
        more["gain"] = (1,)
    if coverage:
        more |= {"coverage": (B, T, S), "coverage_weight": (A,)}
    return draw(dtype, query=(B, T, A + 1 if score == "general" else A), keys=(B, S, A), values=(B, S, D), **more)


def check_attention(score, inputs, dtype, **options):
    """Compare with torch op by op as the baseline."""
    check(*(attention(b, score, **options) for b in ("triton", "reference")), inputs, dtype,
          baseline=attention("torch", score, **options))  # fmt: skip


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_padding(score, padding):
    check_attention(score, [tensors(score, torch.float32) for _ in range(3)], torch.float32, **make_padding(padding))


@pytest.mark.parametrize("padding", ["mask", "step_mask"])
def test_coverage_with_padding(padding):
    inputs = [tensors("additive", torch.float32, coverage=True) for _ in range(3)]
    check_attention("additive", inputs, torch.float32, **make_padding(padding))


SHAPES = [
    {"T": 1, "S": 1, "B": 1},
    {"A": 1, "D": 1},
    {"B": 2, "T": 2, "S": 35, "A": 63, "D": 16},
    {"B": 1, "T": 17, "S": 17, "A": 16, "D": 128},
    {"T": 1, "S": 3, "A": 257, "D": 300},
]


CASES = [(shape, torch.float32) for shape in SHAPES] + [(shape, d) for shape in SHAPES[2:] for d in DTYPES[1:]]


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[2], torch.float32), (SHAPES[4], DTYPES[1])], ids=str)
def test_coverage_shapes_and_dtypes(shape, dtype):
    """A 257: three blocks of columns, whose parts of the coverage's gradient are summed."""
    check_attention("additive", [tensors("additive", dtype, **shape, coverage=True) for _ in range(3)], dtype)


def test_coverage_of_the_padding_may_be_nan():
    """And each gradient alone."""
    given, where = tensors("additive", torch.float32, coverage=True), make_padding("lengths")
    outside = ~allowed_positions(where)
    with torch.no_grad():
        given["coverage"][outside] = torch.nan
    for name in ("coverage", "coverage_weight", "keys"):
        leaves = {k: v.detach().requires_grad_(k == name) for k, v in given.items()}
        grads = []
        for backend in ("triton", "reference"):
            context, weights = ops.attention(**leaves, score="additive", **where, need_weights=True, backend=backend)
            (grad,) = torch.autograd.grad(context.sum() + weights.square().sum(), [leaves[name]])
            grads.append(grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_shapes_and_dtypes(score, shape, dtype):
    inputs = [tensors(score, dtype, **shape) for _ in range(3)]
    B, S, A = inputs[0]["keys"].shape
    if score == "dot":
        for case in inputs:
            case["query"] *= A**-0.5  # scores of order 1
    check_attention(score, inputs, dtype, lengths=torch.tensor([S, S // 2, 0][:B]))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_padding_may_hold_anything(score):
    clean = tensors(score, torch.float32)
    lengths = torch.tensor([2, 0, 5])
    padding = (torch.arange(5) >= lengths[:, None])[..., None]
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        leaves = {n: t.clone().requires_grad_() for n, t in clean.items()}
        dirty = leaves | {n: leaves[n].masked_fill(padding, filling) for n in ("keys", "values")}
        outputs = attention("triton", score, lengths=lengths)(**dirty)
        loss = sum((t * torch.arange(1.0, 1 + t.numel()).view(t.shape)).sum() for t in outputs.values())
        results.append([*outputs.values(), *torch.autograd.grad(loss, list(leaves.values()))])
    for dirty in results[1:]:
        torch.testing.assert_close(dirty, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_a_nan_that_is_attended_to_reaches_its_sentence_and_no_other(score):
    """Includes a NaN in a block of positions that precedes blocks without one."""
    given = tensors(score, torch.float32, S=70)
    given["keys"][1, 3] = float("nan")
    for result in attention("triton", score, lengths=torch.tensor([70, 70, 3]))(**given).values():
        assert result[1].isnan().all()
        assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_large_scores(score):
    """Overflows exp unless the running maximum is subtracted."""
    inputs = [tensors(score, torch.float32, B=1, S=40) for _ in range(5)]
    for case in inputs:
        case["query" if score == "dot" else "weight"] *= 100
    check_attention(score, inputs, torch.float32)


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("wanted", ["context", "weights"])
def test_one_result_in_the_loss(score, wanted):
    def only(backend):
        return lambda **given: {wanted: attention(backend, score, lengths=torch.tensor([2, 0, 5]))(**given)[wanted]}

    inputs = tensors(score, torch.float32)
    if wanted == "weights":
        del inputs["values"]  # the keys serve as values and get a gradient
    check(only("triton"), only("reference"), inputs, torch.float32)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_unneeded_gradients_are_none(score):
    inputs = tensors(score, torch.float32)
    for name, leaf in inputs.items():
        leaf.requires_grad_()
        ops.attention(**inputs, score=score, backend="triton")[0].sum().backward()
        assert [t.grad is not None for t in inputs.values()] == [n == name for n in inputs]
        leaf.grad = None
        leaf.requires_grad_(False)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_strided_inputs_and_gradients(score):
    def turned(query, keys, values, **more):
        query, keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, keys, values))
        mask = allowed_positions(make_padding("mask"), 3, 4, 5).transpose(1, 2).contiguous().transpose(1, 2)
        inputs = attention("triton", score, mask=mask)(query=query, keys=keys, values=values, **more)
        return {"context": inputs["context"].transpose(0, 1)}

    def oracle(**given):
        inputs = attention("reference", score, **make_padding("mask"))(**given)
        return {"context": inputs["context"].transpose(0, 1)}

    check(turned, oracle, tensors(score, torch.float32), torch.float32)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_keys_are_the_values_and_one_step(score):
    def same(backend):
        def operation(query, keys, values, **more):
            context, weights = ops.attention(
                query[:, 0],
                keys,
                score=score,
                backend=backend,
                need_weights=True,
                lengths=torch.tensor([1, 5, 0]),
                **more,
            )
            return {"context": context, "weights": weights, "values": values}

        return operation

    check(same("triton"), same("reference"), tensors(score, torch.float32), torch.float32)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_nothing_to_do(score):
    inputs = tensors(score, torch.float32, B=0)
    context, weights = attention("triton", score)(**inputs).values()
    assert (context.shape, weights.shape) == ((0, 4, 7), (0, 4, 5))
