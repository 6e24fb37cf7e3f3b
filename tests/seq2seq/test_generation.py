"""generate(): against brute force, against a slow beam search, and against the model's own step."""

import inspect
import math

import pytest
import torch
from generation_models import (
    EOS,
    LENGTHS,
    MODELS,
    PENALTIES,
    SOURCES,
    CountingModel,
    FakeModel,
    RepeatingModel,
    all_sequences,
    force,
    has_repeat,
    next_log_probs,
    rows,
    slow_beam_search,
)

from fastseq.ops.candidates.api import forbidden_mask
from fastseq.seq2seq import generation, search
from fastseq.seq2seq.generation import generate

EVERYTHING = {"output_attentions": True, "output_scores": True}


@pytest.fixture
def fake():
    return MODELS["fake"]()


@pytest.fixture(params=["input_feeding", "two_layers_dot"])
def seq2seq(request):
    return MODELS[request.param]()


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("kind", ["avg", "wu", "none"])
@pytest.mark.parametrize("power", [1.0, 0.6, -0.5])
def test_wide_beam_equals_brute_force(fake, kind, power):
    everything = 81 + 27 + 9 + 3 + 1  # three ordinary tokens: four of them, or eos after three, two, one, none
    penalty = {"length_penalty": power, "length_penalty_type": kind}
    output = generate(
        fake, SOURCES, LENGTHS, max_new_tokens=4, num_beams=everything, num_return_sequences=everything, **penalty
    )
    sequences = rows(output)
    for b in range(len(SOURCES)):
        expected = [
            (total / PENALTIES[kind](len(s), power), s)
            for s, total in all_sequences(fake, SOURCES[b : b + 1], LENGTHS[b : b + 1], 4)
        ]
        assert len(expected) == everything
        expected.sort(reverse=True)
        own = slice(b * everything, (b + 1) * everything)
        assert sequences[own] == [s for _, s in expected]
        torch.testing.assert_close(output.sequences_scores[own].tolist(), [score for score, _ in expected])


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("kind", "power"), [("avg", 1.0), ("avg", -1.0), ("wu", 2.0), ("none", 1.0)])
@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("eos_bonus", [0.0, 1.0], ids=["long", "short"])
def test_narrow_beam_equals_a_slow_beam_search(early_stopping, kind, power, beams, eos_bonus):
    model = FakeModel(eos_bonus=eos_bonus).eval()
    options = {"early_stopping": early_stopping, "length_penalty": power, "length_penalty_type": kind}
    output = generate(model, SOURCES, LENGTHS, max_new_tokens=7, num_beams=beams, num_return_sequences=beams, **options)
    search = (7, beams, lambda n: PENALTIES[kind](n, power), early_stopping, power > 0)
    expected = []
    for b in range(len(SOURCES)):
        expected += slow_beam_search(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], *search)
    assert rows(output) == [s for _, s in expected]
    torch.testing.assert_close(output.sequences_scores.tolist(), [score for score, _ in expected])


def test_early_stopping_variants_differ():
    model = FakeModel(eos_bonus=1.0).eval()
    sources = torch.randint(3, 6, (30, 1, 5))
    steps, best = {}, {}
    for early_stopping in (True, False, "never"):
        model.steps = 0
        options = {"num_beams": 2, "max_new_tokens": 12, "early_stopping": early_stopping}
        outputs = [generate(model, src, **options) for src in sources]
        steps[early_stopping] = model.steps
        best[early_stopping] = torch.cat([output.sequences_scores for output in outputs])
    assert steps[True] < steps[False] < steps["never"]
    assert (best["never"] >= best[False]).all()
    assert (best[False] >= best[True]).all()
    assert (best["never"] > best[False]).any()
    assert (best[False] > best[True]).any()


def test_stopping_later_never_lowers_the_best_score():
    """For 100 random models: True <= False <= "never" for every sentence and width, and "never" finds the optimum."""
    limit, everything = 3, 27 + 9 + 3 + 1
    for seed in range(100):
        torch.manual_seed(seed)
        model = FakeModel(eos_bonus=seed % 3 / 2).eval()
        model.table = torch.randn_like(model.table).log_softmax(-1)
        options = {"max_new_tokens": limit, "length_penalty": 0.5 + seed % 4 / 2}

        def best(beams, stopping, model=model, options=options):
            return generate(
                model, SOURCES, LENGTHS, num_beams=beams, early_stopping=stopping, **options
            ).sequences_scores

        for beams in (2, 3):
            at_once, later, never = (best(beams, stopping) for stopping in (True, False, "never"))
            assert (later >= at_once).all() and (never >= later).all()
        b = seed % len(SOURCES)
        found = all_sequences(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], limit)
        optimum = max(total / len(s) ** options["length_penalty"] for s, total in found)
        assert best(everything, "never")[b].item() == pytest.approx(optimum)


def test_the_default_is_that_of_hugging_face():
    assert inspect.signature(generate).parameters["early_stopping"].default is False


@pytest.mark.parametrize("kind", ["avg", "wu", "none"])
@pytest.mark.parametrize("power", [1.0, -0.5])
def test_never_stopping_early_loses_nothing(fake, monkeypatch, kind, power):
    src = torch.randint(3, 6, (200, 5))
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": power, "length_penalty_type": kind}
    output = generate(fake, src, max_new_tokens=7, early_stopping="never", **options)
    undecided = torch.zeros(len(src), dtype=torch.bool)
    monkeypatch.setattr(search, "_decided", lambda *_: undecided)
    assert rows(output) == rows(generate(fake, src, max_new_tokens=7, **options))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_of_one_is_greedy(seq2seq, early_stopping):
    src = torch.randint(4, 8, (12, 5))
    greedy = generate(seq2seq, src, max_new_tokens=9)
    one = generate(seq2seq, src, max_new_tokens=9, num_beams=1, early_stopping=early_stopping)
    assert rows(one) == rows(greedy)
    assert torch.equal(one.sequences_scores, greedy.sequences_scores)


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "output_attentions": True}])
def test_beam_search_of_width_one_is_greedy(seq2seq, monkeypatch, options):
    src = torch.randint(4, 8, (12, 5))
    monkeypatch.setattr(type(seq2seq), "greedy_steps", lambda *_: None)  # has another product for the outputs
    greedy = generate(seq2seq, src, max_new_tokens=9, **options)
    monkeypatch.setattr(generation, "decode_rows", search.beam_search)
    beam = generate(seq2seq, src, max_new_tokens=9, **options)
    assert len({len(s) for s in rows(greedy)}) > 1
    assert torch.equal(beam.sequences, greedy.sequences)
    assert torch.equal(beam.sequences_scores, greedy.sequences_scores)
    if options:
        assert torch.equal(beam.cross_attentions, greedy.cross_attentions)


def test_greedy_takes_the_best_token(fake):
    for b, sequence in enumerate(rows(generate(fake, SOURCES, LENGTHS, max_new_tokens=12))):
        for n, token in enumerate(sequence):
            log_probs = next_log_probs(fake, SOURCES[b : b + 1], LENGTHS[b : b + 1], sequence[:n])
            assert token == log_probs.index(max(log_probs))
        assert EOS not in sequence[:-1]
        assert sequence[-1] == EOS or len(sequence) == 12


MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam_never": {"num_beams": 4, "early_stopping": "never", "length_penalty_type": "wu"},
    "beam_ngram": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 2},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_batched_equals_one_by_one(model, options):
    together = generate(model, SOURCES, LENGTHS, **EVERYTHING, **options)
    sequences, returned = rows(together), options.get("num_return_sequences", 1)
    for b, length in enumerate(LENGTHS.tolist()):
        own = slice(b * returned, (b + 1) * returned)
        alone = generate(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], **EVERYTHING, **options)
        assert rows(alone) == sequences[own]
        torch.testing.assert_close(alone.sequences_scores, together.sequences_scores[own])
        width = alone.sequences.shape[1]
        torch.testing.assert_close(alone.cross_attentions, together.cross_attentions[own, :width])
        if length:
            unpadded = generate(model, SOURCES[b : b + 1, :length], **EVERYTHING, **options)
            assert rows(unpadded) == sequences[own]
            torch.testing.assert_close(unpadded.sequences_scores, together.sequences_scores[own])


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_steps_after_the_end_change_nothing(fake, monkeypatch, options):
    output = generate(fake, SOURCES, LENGTHS, max_new_tokens=40, **EVERYTHING, **options)
    steps, fake.steps = fake.steps, 0
    monkeypatch.setattr(search, "_number_done", lambda done, step: 0)
    longer = generate(fake, SOURCES, LENGTHS, max_new_tokens=40, **EVERYTHING, **options)
    assert steps < fake.steps == 40
    for a, b in zip(output, longer, strict=True):
        assert torch.equal(a, b)


def test_an_accelerator_is_asked_only_now_and_then():
    class Done:
        device, shape, asked = torch.device("cuda"), (3, 1), 0

        def sum(self):
            self.asked += 1
            return torch.tensor(2)

    done = Done()
    assert [search._number_done(done, step) for step in range(9)] == [0] * 7 + [2, 0]
    assert done.asked == 1
    assert search._number_done(torch.tensor([[True], [False]]), 0) == 1
    assert search._number_done(torch.tensor([[True, False], [True, True]]), 0) == 1


LEAVING = {**MODES, "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 1}}


@pytest.mark.parametrize("options", LEAVING.values(), ids=LEAVING)
def test_sentences_that_are_done_leave_the_batch(monkeypatch, options):
    src = torch.randint(3, 6, (40, 5))
    model = CountingModel(eos_bonus=0.5).eval()
    output = generate(model, src, **EVERYTHING, **options)
    rows_of_a_sentence = model.rows[1] // len(src)
    assert len(set(model.rows[1:])) > 3
    assert model.rows[1:] == sorted(model.rows[1:], reverse=True)
    for before, after in zip(model.rows[1:], model.rows[2:], strict=False):
        assert after == before or before - after >= search.DONE_BEFORE_LEAVING * before
        assert after % rows_of_a_sentence == 0
    leaving, model.rows = model.rows, []
    monkeypatch.setattr(search, "DONE_BEFORE_LEAVING", 2.0)
    staying = generate(model, src, **EVERYTHING, **options)
    assert len(set(model.rows[1:])) == 1
    assert len(model.rows) == len(leaving)
    for a, b in zip(output, staying, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", LEAVING.values(), ids=LEAVING)
def test_rows_that_share_sources_give_the_results_of_repeated_sources(seq2seq, options):
    src, lengths = torch.randint(4, 8, (12, 5)), torch.randint(1, 6, (12,))
    asked = []
    step = seq2seq.decode_step
    seq2seq.decode_step = lambda tokens, state, enc, **more: asked.append(enc) or step(tokens, state, enc, **more)
    shared = generate(seq2seq, src, lengths, **EVERYTHING, **options)
    assert max(len(enc.lengths) for enc in asked) == len(src)
    repeating = RepeatingModel(seq2seq.config).double().eval()
    repeating.load_state_dict(seq2seq.state_dict())
    repeated = generate(repeating, src, lengths, **EVERYTHING, **options)
    assert rows(shared) == rows(repeated)
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("options", [{"num_beams": 5, "num_return_sequences": 5}, {"do_sample": True}, {}], ids=str)
@pytest.mark.parametrize("kind", ["avg", "wu", "none"])
def test_scores_and_attentions_are_those_of_the_returned_sequences(seq2seq, kind, options):
    src, lengths = torch.randint(4, 8, (4, 6)), torch.tensor([6, 1, 4, 5])
    output = generate(seq2seq, src, lengths, length_penalty=0.8, length_penalty_type=kind, **EVERYTHING, **options)
    returned = len(output.lengths) // len(src)
    assert output.cross_attentions.shape == (*output.sequences.shape, src.shape[1])
    for n, sequence in enumerate(rows(output)):
        b = n // returned
        log_probs, weights = force(seq2seq, src[b : b + 1], lengths[b : b + 1], sequence)
        score = log_probs.sum() / PENALTIES[kind](len(sequence), 0.8)
        torch.testing.assert_close(output.sequences_scores[n], score)
        torch.testing.assert_close(output.cross_attentions[n, : len(sequence)], weights)
        assert (output.cross_attentions[n, len(sequence) :] == 0).all()
    scores = output.sequences_scores.view(len(src), returned)
    assert (scores.diff(dim=1) <= 0).all()
    assert len({tuple(s) for s in rows(output)[:returned]}) == returned


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_leaves_exactly_the_sequences_without_repeats(fake, size):
    beams, limit = 400, 5
    output = generate(
        fake,
        SOURCES,
        LENGTHS,
        max_new_tokens=limit,
        num_beams=beams,
        num_return_sequences=beams,
        no_repeat_ngram_size=size,
    )
    sequences, scores = rows(output), output.sequences_scores.view(-1, beams)
    for b in range(len(SOURCES)):
        expected = [
            (total / len(s), s)
            for s, total in all_sequences(fake, SOURCES[b : b + 1], LENGTHS[b : b + 1], limit)
            if not has_repeat(s, size)
        ]
        expected.sort(reverse=True)
        assert sequences[b * beams : b * beams + len(expected)] == [s for _, s in expected]
        torch.testing.assert_close(scores[b, : len(expected)].tolist(), [score for score, _ in expected])
        assert (scores[b, len(expected) :] == -math.inf).all()
        assert not any(sequences[b * beams + len(expected) : (b + 1) * beams])


def test_ngrams_are_compared_in_full():
    history = torch.tensor([[3, 4, 3, 5, 3], [3, 3, 3, 3, 3], [4, 5, 6, 7, 3]])
    for size in (1, 2, 3, 5, 6):
        repeats = search._repeats(history, size)
        forbidden = forbidden_mask(8, repeats)
        for row, tokens in zip(forbidden, history.tolist(), strict=True):
            seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
            begun = tuple(tokens[len(tokens) - size + 1 :])
            expected = [len(begun) == size - 1 and (*begun, token) in seen for token in range(8)]
            assert row.tolist() == expected
