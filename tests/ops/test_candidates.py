"""The candidates op: every backend against the reference, ties, NaN, forbidden columns, refusals."""

import math

import pytest
import torch

import fastseq
from fastseq import _native
from fastseq.dispatch import BACKENDS, objection, record, use_backend
from fastseq.ops import candidates
from fastseq.ops.candidates import rules
from fastseq.ops.candidates.spec import CandidatesCall
from fastseq.testing.numerics import assert_accurate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CALL = CandidatesCall("cpu", torch.float32, count=10)
SERVING = [name for name in BACKENDS[1:] if objection("candidates", name, CALL) is None]
EXACT = [name for name in SERVING if name != "torch"]  # equals in the order of the reference
SHAPES = {  # B, K, V, C
    "one": (1, 1, 1, 1),
    "greedy": (3, 1, 300, 1),
    "more places than columns": (2, 2, 3, 20),
    "beams": (4, 5, 1001, 10),
    "blocks": (2, 3, 16_385, 6),
    "wide blocks": (1, 2, 70_001, 10),
    "many": (2, 3, 100, 250),
}
NAN, INF = math.nan, math.inf


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(shape, dtype):
    batch, beams, vocab, _ = shape
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(batch * beams, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype), -5 * torch.rand(batch, beams, generator=generator, dtype=torch.float64).to(wide(dtype))


def forbidden_of(kind, rows, vocab):
    if kind == "none":
        return None
    if kind == "columns":
        return torch.tensor([0, vocab - 1, -1, vocab, 0])
    return torch.arange(vocab).repeat(rows, 1)[:, torch.randperm(vocab)[: max(1, min(vocab, 300) - 1)]]


def one_by_one(logits, scores, count, forbidden):
    """The definition in Python: all continuations of each sentence, sorted -> totals, beams, tokens."""
    rows, log_probs = [], logits.log_softmax(1).view(*scores.shape, -1)
    for b, beams in enumerate(scores.tolist()):
        every = []
        for k, score in enumerate(beams):
            row = b * len(beams) + k
            banned = () if forbidden is None else (forbidden if forbidden.dim() == 1 else forbidden[row]).tolist()
            every += [(-INF if v in banned else score + x, -k, -v) for v, x in enumerate(log_probs[b, k].tolist())]
        best = [(total, -k, -v) for total, k, v in sorted(every, reverse=True)[:count]]
        rows.append(best + [(-INF, 0, 0)] * (count - len(best)))
    return [torch.tensor(column) for column in zip(*(zip(*row, strict=True) for row in rows), strict=True)]


@pytest.mark.parametrize("kind", ["none", "columns", "rows"])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("one", "more places than columns", "many")], ids=str)
def test_the_reference_equals_the_definition(shape, kind):
    logits, scores = drawn(shape, torch.float64)
    forbidden, count = forbidden_of(kind, *logits.shape), shape[-1]
    actual = candidates(logits, count, scores, forbidden=forbidden, backend="reference")
    for a, b in zip(actual, one_by_one(logits, scores, count, forbidden), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "columns", "rows"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", SERVING)
def test_accuracy(backend, shape, kind, dtype):
    logits, scores = drawn(shape, dtype)
    forbidden, count = forbidden_of(kind, *logits.shape), shape[-1]
    totals, beams, tokens = candidates(logits, count, scores, forbidden=forbidden, backend=backend)
    oracle = candidates(logits.double(), count, scores.double(), forbidden=forbidden, backend="reference").totals
    finite = oracle.isfinite()
    assert torch.equal(totals.isfinite(), finite)
    assert (totals[~finite] == -INF).all()
    plain = candidates(logits, count, scores, forbidden=forbidden, backend="torch").totals
    if finite.any():
        assert_accurate(totals[finite], oracle[finite], plain[finite])
    rows = torch.arange(shape[0])[:, None] * shape[1] + beams
    own = (scores.double().flatten()[rows] + logits.double().log_softmax(1)[rows, tokens])[finite]
    torch.testing.assert_close(totals[finite].double(), own, rtol=1e-5, atol=1e-5)
    assert ((beams >= 0) & (beams < shape[1]) & (tokens >= 0) & (tokens < shape[2])).all()
    for b in range(shape[0]):
        pairs = list(zip(beams[b, finite[b]].tolist(), tokens[b, finite[b]].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", EXACT)
def test_equals_come_in_the_order_of_beam_and_token(backend, dtype):
    """Few different values: ties in every place, also those that only rounding makes."""
    logits = torch.randint(0, 3, (8, 500), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = torch.tensor([[-1.0, -1.0], [-1e6, -1e6], [0.0, -1.0], [-INF, -2.0]], dtype=wide(dtype))
    results = [
        candidates(logits, 40, scores, forbidden=torch.tensor([7]), backend=name) for name in (backend, "reference")
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    flat = results[0].beams * 500 + results[0].tokens
    totals = results[0].totals
    assert ((totals.diff() < 0) | (flat.diff() > 0)).all()
    assert (results[0].totals[1].unique().numel()) == 1  # 1e6 absorbs the differences of float32


@pytest.mark.parametrize("backend", SERVING)
def test_greedy_takes_the_first_of_equal_log_probabilities(backend):
    logits = torch.zeros(3, 300)
    logits[1, 5] = logits[1, 60] = 1.0
    logits[2, 40], logits[2, 50] = 1.0, 1.0 + 2**-23  # equal after the subtraction of 4.7
    tokens = candidates(logits, 1, forbidden=torch.tensor([0, 1]), backend=backend).tokens
    assert tokens.flatten().tolist() == [2, 5, 40]


BAD_ROWS = {
    "NaN": [0.0, NAN, 1.0, 2.0],
    "infinity": [0.0, INF, 1.0, 2.0],
    "no finite number": [-INF] * 4,
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("backend", EXACT)
def test_a_row_without_a_softmax_ranks_first(backend, bad):
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], bad])
    totals, beams, tokens = candidates(logits, 5, torch.zeros(1, 2), forbidden=torch.tensor([0]), backend=backend)
    assert totals[0, :3].isnan().all()
    assert beams.tolist() == [[1, 1, 1, 0, 0]]
    assert tokens.tolist() == [[1, 2, 3, 3, 2]]


@pytest.mark.parametrize("backend", SERVING)
def test_minus_infinity_is_an_ordinary_logit(backend):
    logits = torch.tensor([[-INF, 1.0, -INF, 2.0]])
    totals, _, tokens = candidates(logits, 4, backend=backend)
    assert tokens[0, :2].tolist() == [3, 1]
    torch.testing.assert_close(totals[0, :2].exp().sum(), torch.tensor(1.0))
    assert (totals[0, 2:] == -INF).all()


@pytest.mark.parametrize("backend", EXACT)
def test_the_last_resort_is_allowed_only_where_all_is_forbidden(backend):
    logits = torch.tensor([[5.0, 4.0, 3.0]] * 4)
    forbidden = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 1], [2, 1, 0, -1], [2, 0, 2, -1]])
    for last, first in ((0, [0, 2, 0, 1]), (2, [2, 2, 2, 1]), (None, [0, 2, 0, 1])):
        totals, _, tokens = candidates(logits, 1, forbidden=forbidden, last_resort=last, backend=backend)
        assert tokens.flatten().tolist() == first
        assert (totals == -INF).flatten().tolist() == [last is None, False, last is None, False]


@pytest.mark.skipif("native" not in SERVING, reason="the compiled library is missing")
def test_rows_do_not_depend_on_their_neighbours_or_on_threads():
    logits, scores = drawn((64, 5, 4000, 10), torch.float32)
    together = candidates(logits, 10, scores, backend="native")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with_threads = candidates(logits, 10, scores, backend="native")
    finally:
        torch.set_num_threads(before)
    for b in (0, 31, 63):
        alone = candidates(logits[5 * b : 5 * b + 5], 10, scores[b : b + 1], backend="native")
        for a, t, w in zip(alone, together, with_threads, strict=True):
            assert torch.equal(a[0], t[b])
            assert torch.equal(w[b], t[b])


def test_strides_are_honoured():
    logits, scores = drawn((3, 4, 50, 8), torch.float32)
    expected = candidates(logits, 8, scores)
    for name in SERVING:
        actual = candidates(logits.t().contiguous().t(), 8, scores.t().contiguous().t(), backend=name)
        assert torch.equal(actual.tokens, expected.tokens)


def test_no_scores_make_each_row_a_sentence():
    logits, _ = drawn((6, 1, 50, 3), torch.float32)
    for name in SERVING:
        alone = candidates(logits, 3, backend=name)
        for a, b in zip(alone, candidates(logits, 3, torch.zeros(6, 1), backend=name), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float32), (64, torch.bfloat16), (65, torch.float32)])
def test_the_fast_path_takes_the_backend_of_the_rules(monkeypatch, count, dtype):
    called = []
    monkeypatch.setattr(rules.native, "call", lambda *arguments: called.append(arguments))
    logits = torch.randn(2, 100).to(dtype)
    with record() as choices:
        chosen = fastseq.dispatch.select("candidates", None, CandidatesCall("cpu", dtype, count))
    assert len(choices) == 1
    with torch.no_grad():
        rules.fast_candidates(logits, count, None, None, -1)
    assert len(called) == (chosen == "native")
    with torch.no_grad(), use_backend("reference"):
        assert rules.fast_candidates(logits, 1, None, None, -1) is None


REFUSALS = {
    "rank": (dict(logits=torch.zeros(3)), r"logits must .*\(B \* K, V\)"),
    "integers": (dict(logits=torch.zeros(2, 3, dtype=torch.int64)), "logits must be floating point"),
    "no column": (dict(logits=torch.zeros(2, 0)), "V >= 1"),
    "count": (dict(count=0), "count must be at least 1, got 0"),
    "rows": (dict(scores=torch.zeros(3, 1)), "B . K = 2"),
    "dtype of scores": (dict(scores=torch.zeros(1, 2).double()), r"scores must be torch.float32"),
    "dtype of forbidden": (dict(forbidden=torch.zeros(2).int()), "forbidden must be int64"),
    "shape of forbidden": (dict(forbidden=torch.zeros(3, 1).long()), r"forbidden must be int64 \(F,\) or \(2, F\)"),
    "gradient": (dict(logits=torch.zeros(2, 3, requires_grad=True)), "has no gradient"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("backend", SERVING)
def test_a_bad_argument_gets_a_sentence(backend, changes, sentence):
    arguments = dict(logits=torch.zeros(2, 3), count=2, scores=torch.zeros(1, 2), forbidden=None) | changes
    with pytest.raises(RuntimeError, match=f"candidates: .*{sentence}"):
        candidates(**arguments, backend=backend)


def test_triton_says_what_to_do():
    with pytest.raises(RuntimeError, match="candidates: the triton backend has no kernel for it; use backend='torch'"):
        candidates(torch.zeros(2, 3), 1, backend="triton")


@pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
def test_operator_checks_its_arguments_and_has_a_fake():
    logits, scores, forbidden = torch.zeros(4, 9), torch.zeros(2, 2), torch.zeros(4, 3, dtype=torch.int64)
    operator = torch.ops.fastseq.candidates.default
    torch.library.opcheck(operator, (logits, scores, forbidden, 2, 3))
    torch.library.opcheck(operator, (logits.bfloat16(), None, None, -1, 1))
    for arguments, sentence in (
        ((logits, torch.zeros(3, 2), None, -1, 1), "a row for each of the 3 x 2 scores, got 4"),
        ((logits[:, :0], None, None, -1, 1), "at least one column"),
        ((logits, None, forbidden[0, 0], -1, 1), r"forbidden must have the shape \(0,\)"),
        ((logits, None, None, -1, 0), "count must be at least 1"),
        ((logits.t(), None, None, -1, 1), "logits must be contiguous"),
        ((logits.int(), None, None, -1, 1), "the dtype must be Float, Double"),
    ):
        with pytest.raises(RuntimeError, match=f"candidates: .*{sentence}"):
            operator(*arguments)
