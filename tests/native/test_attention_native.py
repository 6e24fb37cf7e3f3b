"""The compiled attention operators: accuracy, edge cases, padding, threads, prepared keys."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fuzz_native
import pytest
import torch
from attention_cases import allowed_positions, gradients, make_padding

from fastseq import _native
from fastseq.dispatch import record, use_backend
from fastseq.nn.attention import Attention
from fastseq.ops.attention.api import attention, prepare_keys
from fastseq.ops.attention.spec import Keys
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
ops = torch.ops.fastseq

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [  # B, T, S, A, D
    (3, 1, 1, 1, 1),
    (9, 1, 7, 257, 63),  # in two short softmaxes torch's own error varies by chance
    (3, 2, 1, 5, 3),
    (3, 5, 9, 16, 32),
    (2, 9, 131, 33, 17),
    (1, 4, 6, 64, 64),
]
SCORES = ["dot", "additive"]
PADDINGS = ["none", "lengths", "mask", "step_mask"]


def shape_id(shape):
    return "B{}T{}S{}A{}D{}".format(*shape)


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Fill new tensors with NaN: an element that an operator does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sliced(x):
    """Return the same values as a slice of a larger tensor full of NaN, strided in every dimension."""
    bigger = torch.full([2 * n + 1 for n in x.shape], math.nan, dtype=x.dtype)
    view = bigger[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def make_inputs(shape, score, dtype, spread=1.0, strided=False):
    """Draw query, keys, values and, for the additive score, weight and bias, rounded to the dtype."""
    B, T, S, A, D = shape
    generator = torch.Generator().manual_seed(5)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = {"query": spread * draw(B, T, A), "keys": spread * draw(B, S, A), "values": draw(B, S, D)}
    if score == "dot":
        tensors["query"] /= A**0.5
    else:
        tensors |= {"weight": 2 * draw(A) / A**0.5, "bias": 0.1 * spread * draw(A)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    return {name: (sliced(x) if strided else x).requires_grad_() for name, x in tensors.items()}


def padding_for(kind, shape):
    B, T, S, *_ = shape
    if kind == "lengths":
        return {"lengths": torch.arange(B) * S // max(1, B - 1)}
    return make_padding(kind, b=B, t=T, s=S)


def plain(query, keys, values, weight=None, bias=0, *, allowed):
    """Attention op by op in the dtype of the inputs: in float64 the oracle, else the baseline."""
    scores = query @ keys.mT if weight is None else ((query + bias)[:, :, None] + keys[:, None]).tanh() @ weight
    p = torch.nan_to_num(scores.masked_fill(~allowed, -math.inf).softmax(-1))
    return p @ values, p


def assert_as_accurate_as_torch(shape, score, dtype, kind, **options):
    tensors = make_inputs(shape, score, dtype, **options)
    where = padding_for(kind, shape)
    B, T, S, *_ = shape
    allowed = allowed_positions(where, b=B, t=T, s=S)
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    actual = attention(**tensors, score=score, **where, need_weights=True, backend="native")
    oracle, baseline = plain(**wide, allowed=allowed), plain(**tensors, allowed=allowed)
    outputs = [dict(zip(("context", "weights"), results, strict=True)) for results in (actual, oracle, baseline)]
    assert_all_accurate(*outputs, factor=2)
    sides = ((actual, tensors), (oracle, wide), (baseline, tensors))
    grads = [dict(zip(tensors, gradients(out, x), strict=True)) for out, x in sides]
    assert_all_accurate(*grads, factor=3)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_as_accurate_as_torch(dtype, score, shape, kind):
    assert_as_accurate_as_torch(shape, score, dtype, kind, strided=True)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.4, 3.0, 100.0])
@pytest.mark.parametrize("shape", [(12, 1, 40, 100, 16), (3, 8, 40, 96, 32)], ids=shape_id)
def test_tanh_of_any_size_keeps_its_digits(shape, spread):
    """Covers the addition theorem, the exponentials and tanh(q + k), each where it is selected."""
    assert_as_accurate_as_torch(shape, "additive", torch.float32, "lengths", spread=spread)


@pytest.mark.parametrize("steps", [1, 6])
def test_opposite_hundreds_cancel(steps):
    small = torch.linspace(-3, 3, 40).view(1, 8, 5)
    query = torch.full((1, steps, 5), 100.0) + torch.linspace(-1, 1, steps).view(1, steps, 1)
    keys, weight = small - 100, torch.linspace(-1, 1, 5)
    context, weights = attention(query, keys, score="additive", weight=weight, need_weights=True, backend="native")
    exact = torch.softmax(torch.tanh(query.double()[:, :, None] + keys.double()[:, None]) @ weight.double(), -1)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(context.double(), exact @ keys.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("where", ["query", "keys"])
@pytest.mark.parametrize("steps", [1, 3])
def test_infinite_and_nan_inputs_give_what_torch_gives(where, steps):
    tensors = make_inputs((2, steps, 5, 6, 3), "additive", torch.float32)
    for value in (math.inf, -math.inf, math.nan):
        changed = {name: x.detach().clone() for name, x in tensors.items()}
        changed[where][0, 0, 2] = value
        expected = plain(**changed, allowed=torch.ones(2, steps, 5, dtype=torch.bool))[1]
        _, weights = attention(**changed, score="additive", need_weights=True, backend="native")
        expected = expected if not math.isnan(value) else weights.where(expected.eq(0), expected)  # softmax over NaN
        assert torch.equal(weights.isnan(), expected.isnan()) or math.isnan(value)
        assert weights[0, 0].isnan().all() == math.isnan(value)
        torch.testing.assert_close(weights[1], expected[1])
        if not math.isnan(value):
            torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("kind", PADDINGS[1:])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("score", SCORES)
def test_not_a_bit_depends_on_the_padding(score, steps, kind, garbage):
    shape = (3, steps, 19, 24, 20)
    tensors, where = make_inputs(shape, score, torch.float32), padding_for(kind, shape)
    unused = ~allowed_positions(where, b=3, t=steps, s=19).any(1)[..., None]
    assert unused.any()
    results = []
    for fill in (0.0, garbage):
        given = {k: x.detach().masked_fill(unused, fill) if k in ("keys", "values") else x for k, x in tensors.items()}
        given = {k: x.detach().requires_grad_() for k, x in given.items()}
        outputs = attention(**given, score=score, **where, need_weights=True, backend="native")
        results.append([*outputs, *gradients(outputs, given)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    grads = dict(zip(tensors, results[1][2:], strict=True))
    for name in ("keys", "values"):
        assert (grads[name].masked_select(unused) == 0).all(), name
        assert (grads[name].masked_select(~unused) != 0).all(), name
    assert (results[1][1].masked_select(~allowed_positions(where, b=3, t=steps, s=19)) == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("steps", [1, 3])
def test_masked_rows_are_exactly_zero(score, steps):
    shape = (4, steps, 6, 5, 7)
    tensors = make_inputs(shape, score, torch.float32)
    mask = torch.ones(4, steps, 6, dtype=torch.bool)
    mask[0], mask[2, 0] = False, False
    where = {"mask": mask} if steps > 1 else {"mask": mask[:, 0]}
    outputs = attention(**tensors, score=score, **where, need_weights=True, backend="native")
    grads = dict(zip(tensors, gradients(outputs, tensors), strict=True))
    for result in (*outputs, grads["query"]):
        assert (result[0] == 0).all()
        assert (result[2, 0] == 0).all()
        assert (result[1] != 0).all()


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("steps", [1, 30])
def test_threads_change_nothing(score, steps, kind):
    shape = (9, steps, 60, 128, 64)
    tensors, where = make_inputs(shape, score, torch.float32), padding_for("lengths", (3, *shape[1:]))
    where = {"lengths": torch.arange(9) * 60 // 8} if kind == "lengths" else {}
    if kind in ("mask", "step_mask"):
        where = {"mask": torch.rand(9, *[steps] * (kind == "step_mask" and steps > 1), 60) < 0.7}

    def run():
        outputs = attention(**tensors, score=score, **where, need_weights=True, backend="native")
        return [*outputs, *gradients(outputs, tensors)]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, *3 * (2, 3)):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        results += pool.map(lambda _: run(), range(4))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)], ids=str)
def test_empty_batch_steps_or_positions(score, sizes):
    tensors = make_inputs((*sizes, 5, 4), score, torch.float32)
    outputs = attention(**tensors, score=score, need_weights=True, backend="native")
    assert [x.shape for x in outputs] == [(*sizes[:2], 4), sizes]
    assert (outputs[0] == 0).all()
    grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), list(tensors.values()))
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, tensors.values(), strict=True))


def test_results_not_needed_are_not_computed():
    tensors = make_inputs((2, 3, 4, 5, 6), "additive", torch.float32)
    query, keys, values, weight, bias = (x.detach() for x in tensors.values())
    context, weights = ops.attention_forward(query, keys, values, weight, bias, None, None, None, 1.0, False)
    assert weights.shape == (0,)
    full, weights = ops.attention_forward(query, keys, values, weight, bias, None, None, None, 1.0, True)
    assert torch.equal(context, full)
    rest = (query, keys, values, weight, bias, None, None, None, weights, 1.0)
    everything = ops.attention_backward(full, None, *rest, True, True)
    for scores, from_values in ((True, False), (False, True)):
        grads = ops.attention_backward(full, None, *rest, scores, from_values)
        needed = (scores, scores, from_values, scores, scores)
        for grad, expected, need in zip(grads, everything, needed, strict=True):
            assert torch.equal(grad, expected) if need else grad.shape == (0,)


def test_memory_grows_with_the_weights_not_with_the_hidden_layer():
    script = (
        "import resource, torch; from fastseq.ops.attention import attention\n"
        "q, k, w = torch.randn(1, 1500, 256), torch.randn(1, 1500, 256), torch.randn(256)\n"
        "for x in (q, k, w): x.requires_grad_()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "attention(q[:, :2], k[:, :2], score='additive', weight=w, backend='native')[0].sum().backward()\n"
        "before = peak()\n"
        "attention(q, k, score='additive', weight=w, backend='native')[0].sum().backward()\n"
        "print(peak() - before)"
    )
    megabytes = float(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert megabytes < 100  # the hidden layer would take 2300


PREPARED_SPREADS = {"addition": 0.05, "exponentials": 1.0, "direct": 60.0}


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("spread", PREPARED_SPREADS.values(), ids=PREPARED_SPREADS)
@pytest.mark.parametrize("kind", PADDINGS[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_prepared_keys_change_no_result(dtype, kind, spread, strided):
    shape = (3, 1, 23, 37, 16)
    tensors, where = make_inputs(shape, "additive", dtype, spread, strided), padding_for(kind, shape)
    prepared = prepare_keys(tensors["keys"], score="additive", lengths=where.get("lengths"), backend="native")
    expected, actual = (
        attention(**tensors | {"keys": keys}, score="additive", **where, need_weights=True, backend="native")
        for keys in (tensors["keys"], prepared)
    )
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(actual, expected, **close)
    close = {"rtol": 1e-4, "atol": 2e-6 * max(1, 1 / spread)} if dtype == torch.float32 else {}
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors), **close)


@pytest.mark.parametrize("steps", [1, 3])
def test_prepared_keys_are_read(steps):
    tensors = make_inputs((2, steps, 7, 20, 4), "additive", torch.float32)
    prepared = prepare_keys(tensors["keys"], score="additive", backend="native")
    other = prepare_keys(tensors["keys"] + 1, score="additive", backend="native")
    results = [
        attention(**tensors | {"keys": keys}, score="additive", backend="native")[0]
        for keys in (tensors["keys"], prepared, prepared._replace(prepared=other.prepared))
    ]
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[2], results[0], atol=1e-3)


def test_positions_that_were_not_prepared_are_computed_directly():
    tensors = make_inputs((3, 1, 23, 37, 16), "additive", torch.float32)
    prepared = prepare_keys(tensors["keys"], score="additive", lengths=torch.tensor([0, 4, 23]), backend="native")
    longer = {"lengths": torch.tensor([3, 9, 23])}
    expected, actual = (
        attention(**tensors | {"keys": keys}, score="additive", **longer, need_weights=True, backend="native")
        for keys in (tensors["keys"], prepared)
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, tensors), gradients(expected, tensors), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("size", [0.4, 15.0], ids=["addition", "exponentials"])
@pytest.mark.parametrize("query", [-80.0, 6.0, 80.0, math.inf])
def test_prepared_keys_serve_queries_of_any_size(query, size):
    keys, weight = torch.linspace(-size, size, 42).view(1, 7, 6), torch.linspace(-2, 2, 6)
    tensors = {"query": torch.full((1, 1, 6), query), "keys": keys, "weight": weight}
    for x in tensors.values():
        x.requires_grad_()
    prepared = prepare_keys(keys, score="additive", backend="native")
    results = []
    for given in (keys, prepared):
        outputs = attention(**tensors | {"keys": given}, score="additive", need_weights=True, backend="native")
        results.append([*outputs, *gradients(outputs, tensors)])
    assert all(x.isfinite().all() for x in results[0])
    torch.testing.assert_close(results[1], results[0])


def test_keys_that_changed_after_they_were_prepared_are_refused():
    keys, query, weight = torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(4)
    prepared = prepare_keys(keys, score="additive", backend="native")
    keys.mul_(2)
    for use in (
        lambda: attention(query, prepared, score="additive", weight=weight),
        lambda: prepared.repeat_interleave(2),
        lambda: prepared.index_select(torch.tensor([1])),
    ):
        with pytest.raises(ValueError, match="changed in place after they were prepared; project them again"):
            use()


def test_selected_rows_of_prepared_keys_stay_prepared():
    keys, query, weight = torch.randn(3, 5, 4), torch.randn(3, 4), torch.randn(4)
    prepared, rows = prepare_keys(keys, score="additive", backend="native"), torch.tensor([2, 0, 0])
    for selected, plain in (
        (prepared.index_select(rows), keys[rows]),
        (prepared.repeat_interleave(2).index_select(torch.arange(3)), keys[[0, 0, 1]]),
    ):
        assert torch.equal(selected.projected, plain)
        expected = prepare_keys(plain, score="additive", backend="native")
        assert torch.equal(selected.prepared.data, expected.prepared.data)
        torch.testing.assert_close(*(attention(query, k, score="additive", weight=weight) for k in (selected, plain)))


def test_keys_are_prepared_only_where_that_saves_time():
    keys = torch.randn(2, 5, 4)
    assert prepare_keys(keys, score="dot") == Keys(keys, None)
    assert prepare_keys(keys, score="additive", backend="reference").prepared is None
    assert prepare_keys(keys, score="normed_additive", backend="native").prepared is not None
    with use_backend("torch"):
        assert prepare_keys(keys, score="additive").prepared is None
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_keys(keys, score="additive", backend="native").prepared is None
        assert prepare_keys(keys.bfloat16(), score="additive", backend="native").prepared is not None


def test_keys_prepared_outside_autocast_are_not_used_within():
    module = Attention(6, 6, backend="native")
    keys, query = torch.randn(2, 5, 6), torch.randn(2, 6)
    plain, prepared = (module.project_keys(keys, single_steps=steps) for steps in (False, True))
    assert (plain.prepared is None, prepared.prepared is None) == (True, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(query, prepared, keys)[0], module(query, plain, keys)[0])


@torch.no_grad()
def test_a_traced_graph_ignores_prepared_keys():
    module = Attention(6, 6, backend="native")
    keys, query = torch.randn(2, 5, 6), torch.randn(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for single_steps in (False, True):
        projected = module.project_keys(keys, single_steps=single_steps)
        torch.testing.assert_close(compiled(query, projected, keys)[0], module(query, projected, keys)[0])


@pytest.fixture
def model():
    config = Seq2SeqConfig(src_vocab_size=20, tgt_vocab_size=15, hidden_size=24, embedding_dim=8, dropout=0.0)
    assert config.attention == "additive"
    assert config.input_feeding
    return Seq2Seq(config)


def count_prepared(choices):
    return sum(c.call.prepared and c.backend == "native" for c in choices if c.op == "attention")


@pytest.fixture
def without_preparation(monkeypatch):
    """Return a function after whose call keys are projected as for many steps at once."""
    project = Attention.project_keys
    return lambda: monkeypatch.setattr(Attention, "project_keys", lambda self, keys, *_, **__: project(self, keys))


def test_the_decoder_prepares_its_keys_once_and_trains_the_same(model, without_preparation):
    src, tgt, lengths = torch.randint(4, 20, (3, 9)), torch.randint(4, 15, (3, 7)), torch.tensor([9, 4, 0])

    def run():
        with record() as choices:
            logits = model(src, lengths, tgt).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))], count_prepared(choices)

    actual, uses = run()
    without_preparation()
    expected, without = run()
    assert (uses, without) == (8, 0)  # one preparation, seven steps
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_prepares_its_keys_and_returns_the_same(model, without_preparation, beams):
    src, lengths = torch.randint(4, 20, (3, 9)), torch.tensor([9, 4, 1])
    with record() as choices:
        actual = model.generate(src, lengths, num_beams=beams, max_new_tokens=6)
    without_preparation()
    assert count_prepared(choices) > 2
    expected = model.generate(src, lengths, num_beams=beams, max_new_tokens=6)
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize(("feeding", "ratio", "prepares"), [(True, 1.0, 1), (False, 1.0, 0), (False, 0.5, 1)])
def test_whole_targets_prepare_nothing(feeding, ratio, prepares):
    config = Seq2SeqConfig(src_vocab_size=20, tgt_vocab_size=15, hidden_size=24, embedding_dim=8, input_feeding=feeding)
    model, src, tgt = Seq2Seq(config), torch.randint(4, 20, (3, 9)), torch.randint(4, 15, (3, 7))
    with record() as choices:
        model(src, None, tgt, teacher_forcing_ratio=ratio)
    assert count_prepared(choices) == 8 * prepares


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "keys"])
def test_small_differences_of_large_terms_in_float64(prepared):
    """The keys are alike, so grad_query is 1e-2 and its terms are 10: a float64 oracle errs as the kernel does."""
    case = fuzz_native.Case("additive", 31436, 1, 1, 100, 3, 3, form="lengths", spread=0.1, dtype="float64")
    for seed in range(case.seed, case.seed + 64, 4):
        fuzz_native.check(replace(case, seed=seed, prepared=prepared))
