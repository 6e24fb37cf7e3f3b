"""generate(): prefixes, token scores and the coverage penalty, against brute force and the model's own step."""

import math

import pytest
import torch
from generation_models import (
    BOS,
    EOS,
    LENGTHS,
    MODELS,
    PAD,
    PENALTIES,
    SOURCES,
    CountingModel,
    FakeModel,
    all_sequences,
    force,
    has_repeat,
    next_log_probs,
    rows,
)

from fastseq.seq2seq import search
from fastseq.seq2seq.generation import generate
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig

PREFIXES = [[4, 3], [], [5], [3, 3, 5]]
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam_never": {"num_beams": 4, "early_stopping": "never", "length_penalty_type": "wu"},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "top_k": {"do_sample": True, "top_k": 2},
}
EVERYTHING = {"output_attentions": True, "output_scores": True}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_the_prefix_is_kept_and_scored_by_the_model(model, options):
    output = generate(model, SOURCES, LENGTHS, prefix_tokens=PREFIXES, length_penalty=0.0, **EVERYTHING, **options)
    returned = len(output.lengths) // len(SOURCES)
    for n, sequence in enumerate(rows(output)):
        b = n // returned
        assert sequence[: len(PREFIXES[b])] == PREFIXES[b]
        assert len(sequence) > len(PREFIXES[b])
        log_probs, weights = force(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], sequence)
        torch.testing.assert_close(output.token_scores[n, : len(sequence)], log_probs)
        torch.testing.assert_close(output.sequences_scores[n], log_probs.sum())
        torch.testing.assert_close(output.cross_attentions[n, : len(sequence)], weights)


@pytest.mark.parametrize("kind", ["avg", "none"])
def test_wide_beam_after_a_prefix_equals_brute_force(kind):
    model, everything, limit = MODELS["fake"](), 27 + 9 + 3 + 1, 3
    options = {"num_beams": everything, "num_return_sequences": everything, "length_penalty_type": kind}
    output = generate(model, SOURCES, LENGTHS, prefix_tokens=PREFIXES, max_new_tokens=limit, **options)
    sequences, scores = rows(output), output.sequences_scores.view(len(SOURCES), -1)
    for b, prefix in enumerate(PREFIXES):
        sentence, total = (SOURCES[b : b + 1], LENGTHS[b : b + 1]), 0.0
        for n, token in enumerate(prefix):
            total += next_log_probs(model, *sentence, prefix[:n])[token]
        found = all_sequences(model, *sentence, limit + len(prefix), tuple(prefix), total)
        expected = sorted(((score / PENALTIES[kind](len(s), 1.0), s) for s, score in found), reverse=True)
        assert sequences[b * everything : (b + 1) * everything] == [s for _, s in expected]
        torch.testing.assert_close(scores[b].tolist(), [score for score, _ in expected])


def test_a_prefix_of_the_greedy_sequence_changes_nothing():
    model = FakeModel(spread=4.0).eval()
    free = generate(model, SOURCES, LENGTHS)
    prefixes = [sequence[: max(len(sequence) - 2, 0)] for sequence in rows(free)]
    assert max(map(len, prefixes)) > 1
    forced = generate(model, SOURCES, LENGTHS, prefix_tokens=prefixes, max_new_tokens=40)
    assert torch.equal(forced.sequences, free.sequences)
    torch.testing.assert_close(forced.sequences_scores, free.sequences_scores)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_limits_count_the_tokens_after_the_prefix(options):
    endless, short = FakeModel(eos_bonus=-99.0).eval(), FakeModel(eos_bonus=99.0).eval()
    returned = options.get("num_return_sequences", 1)
    for limit, expected in (({"max_new_tokens": 4}, [4] * 4), ({}, [22, 16, 12, 10])):
        output = generate(endless, SOURCES, LENGTHS, prefix_tokens=PREFIXES, **limit, **options)
        lengths = [n + len(p) for n, p in zip(expected, PREFIXES, strict=True) for _ in range(returned)]
        assert output.lengths.tolist() == lengths
    output = generate(
        short, SOURCES, LENGTHS, prefix_tokens=PREFIXES, min_new_tokens=2, length_penalty=0.0, **{**options, "top_k": 0}
    )
    best = output.lengths.view(len(SOURCES), returned).amin(1)
    assert best.tolist() == [3 + len(p) for p in PREFIXES]


def test_prefixes_may_hold_forbidden_tokens_and_repeats():
    model = FakeModel(vocab_size=8).eval()
    model.config.unk_id = 3
    options = {"generate_unk": False, "no_repeat_ngram_size": 2, "prefix_tokens": [[3, 3, 3, 4]] * 4}
    for mode in ({}, {"num_beams": 3}):
        for sequence in rows(generate(model, SOURCES, LENGTHS, max_new_tokens=10, **mode, **options)):
            assert sequence[:4] == [3, 3, 3, 4]
            assert 3 not in sequence[4:]
            assert not has_repeat(sequence[3:], 2)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_prefixes_leave_with_their_sentences(monkeypatch, options):
    if options.get("do_sample"):
        options = {**options, "top_k": 1}
    src = torch.randint(3, 6, (40, 5))
    prefixes = [[3 + (n + k) % 3 for k in range(n % 7)] for n in range(40)]
    model = FakeModel(eos_bonus=0.5).eval()
    leaving = generate(model, src, prefix_tokens=prefixes, **EVERYTHING, **options)
    monkeypatch.setattr(search, "DONE_BEFORE_LEAVING", 2.0)
    staying = generate(model, src, prefix_tokens=prefixes, **EVERYTHING, **options)
    for a, b in zip(leaving, staying, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_no_prefix_is_the_call_without_one(model, options):
    plain, empty = (
        generate(model, SOURCES, LENGTHS, generator=torch.Generator().manual_seed(2), **more, **options)
        for more in ({}, {"prefix_tokens": [[], [], [], []]})
    )
    assert torch.equal(plain.sequences, empty.sequences)
    assert torch.equal(plain.sequences_scores, empty.sequences_scores)
    padded = torch.tensor([[4, 3, PAD], [PAD] * 3, [5, PAD, PAD], [3, 3, 5]])
    for dtype in (torch.int64, torch.int32):
        lists, tensor = (
            generate(model, SOURCES, LENGTHS, generator=torch.Generator().manual_seed(2), prefix_tokens=p, **options)
            for p in (PREFIXES, padded.to(dtype))
        )
        assert torch.equal(lists.sequences, tensor.sequences)


@pytest.mark.parametrize(
    ("prefixes", "sentence"),
    [
        ([[3], [4]], "prefix_tokens must hold integer tokens of 4 sentences"),
        (torch.ones(4, 2), "got .4, 2. torch.float32"),
        ([[3], [PAD, 4], [], []], r"prefix_tokens\[1\] holds pad .id 0. before other tokens"),
        ([[3], [4, EOS], [], []], r"prefix_tokens\[1\] holds eos"),
        ([[], [], [], [9]], r"prefix_tokens\[3\] holds an id outside the target vocabulary of 9 tokens"),
        ([[], [], [], [-1]], r"prefix_tokens\[3\] holds an id outside"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_bad_prefix_gets_a_sentence(prefixes, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(MODELS["input_feeding"](), SOURCES, LENGTHS, prefix_tokens=prefixes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_token_scores_sum_to_the_log_probability(options, dtype):
    model = FakeModel(dtype=dtype).eval()
    output = generate(model, SOURCES, LENGTHS, length_penalty=0.0, output_scores=True, **options)
    totals, steps = output.token_scores.sum(1), output.lengths.double()
    # A sum in another order, or of differences of sums: a rounding of the total for each token, on each side.
    bound = 2 * steps * torch.finfo(totals.dtype).eps * totals.double().abs()
    assert ((totals.double() - output.sequences_scores.double()).abs() <= bound).all()
    assert generate(model, SOURCES, LENGTHS, **options).token_scores is None
    for n, length in enumerate(output.lengths.tolist()):
        assert (output.token_scores[n, :length] < 0).all()
        assert (output.token_scores[n, length:] == 0).all()


def coverage_term(model, b, sequence, beta):
    spent = force(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], sequence)[1].sum(0)[: LENGTHS[b]]
    return beta * sum(math.log(min(total, 1.0)) for total in spent.tolist())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beta", [0.2, 3.0])
def test_coverage_penalty_equals_brute_force(name, beta):
    """Every sequence of at most three (or two) tokens, ranked by equation 14 of Wu et al. 2016."""
    model, limit = MODELS[name](), 3 if name == "fake" else 2
    found = [list(all_sequences(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], limit)) for b in range(4)]
    everything = max(map(len, found))
    assert min(map(len, found)) == everything
    options = {"num_beams": everything, "num_return_sequences": everything, "length_penalty": 0.6}
    output = generate(model, SOURCES, LENGTHS, max_new_tokens=limit, coverage_penalty=beta, **options)
    plain = generate(model, SOURCES, LENGTHS, max_new_tokens=limit, **options)
    sequences, scores = rows(output), output.sequences_scores.view(4, -1)
    assert sequences[:everything] != rows(plain)[:everything]
    for b in range(4):
        expected = [(t / len(s) ** 0.6 + coverage_term(model, b, s, beta), s) for s, t in found[b]]
        expected.sort(key=lambda item: item[0], reverse=True)
        torch.testing.assert_close(scores[b].tolist(), [score for score, _ in expected])
        own = sequences[b * everything : (b + 1) * everything]
        assert sorted(own) == sorted(s for _, s in expected)
        assert own[0] == expected[0][1]


@pytest.mark.parametrize("name", MODELS)
def test_coverage_of_a_narrow_beam_is_that_of_the_returned_sequences(name):
    model = MODELS[name]()
    options = {"num_beams": 3, "num_return_sequences": 3, "coverage_penalty": 0.4, "prefix_tokens": PREFIXES}
    output = generate(model, SOURCES, LENGTHS, **options, **EVERYTHING)
    for n, sequence in enumerate(rows(output)):
        log_probs, _ = force(model, SOURCES[n // 3 : n // 3 + 1], LENGTHS[n // 3 : n // 3 + 1], sequence)
        expected = log_probs.sum().item() / len(sequence) + coverage_term(model, n // 3, sequence, 0.4)
        assert output.sequences_scores[n].item() == pytest.approx(expected)
        torch.testing.assert_close(output.token_scores[n].sum(), log_probs.sum())


def test_coverage_goes_with_its_sentence(monkeypatch):
    src = torch.randint(3, 6, (40, 60))  # long: the coverage of no position reaches 1
    model = CountingModel(eos_bonus=0.5).eval()
    options = {"num_beams": 3, "coverage_penalty": 0.002, "length_penalty": 0.0, "max_new_tokens": 20}
    leaving = generate(model, src, **options)
    assert len(set(model.rows)) > 3
    monkeypatch.setattr(search, "DONE_BEFORE_LEAVING", 2.0)
    staying = generate(model, src, **options)
    assert torch.equal(leaving.sequences, staying.sequences)
    assert torch.equal(leaving.sequences_scores, staying.sequences_scores)


def test_coverage_needs_attention_and_a_beam():
    plain = Seq2Seq(Seq2SeqConfig(src_vocab_size=8, tgt_vocab_size=9, attention="none", input_feeding=False))
    with pytest.raises(ValueError, match="coverage_penalty needs a model with attention"):
        generate(plain, SOURCES, LENGTHS, num_beams=2, coverage_penalty=0.2)
    for options, sentence in (
        ({"coverage_penalty": 0.2}, "coverage_penalty=0.2 ranks the hypotheses of a beam search"),
        ({"coverage_penalty": -1.0, "num_beams": 2}, "coverage_penalty must be finite and >= 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            generate(MODELS["fake"](), SOURCES, LENGTHS, **options)


def test_bos_in_a_prefix_is_a_token_like_others():
    assert rows(generate(MODELS["fake"](), SOURCES, LENGTHS, prefix_tokens=[[BOS]] * 4))[0][0] == BOS
