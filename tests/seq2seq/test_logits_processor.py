"""generate(logits_processor=...): any function, and the processors of transformers, against slow searches."""

import math

import pytest
import torch
from generation_models import (
    BOS,
    EOS,
    LENGTHS,
    MODELS,
    PAD,
    SOURCES,
    CountingModel,
    FakeModel,
    RepeatingModel,
    has_repeat,
    next_log_probs,
    rows,
    slow_beam_search,
)
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from fastseq.seq2seq import search
from fastseq.seq2seq.generation import generate

MODES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam_never": {"num_beams": 4, "early_stopping": "never", "length_penalty_type": "wu"},
    "sample": {"do_sample": True, "num_return_sequences": 2},
}
EVERYTHING = {"output_scores": True, "output_attentions": True}


def processors(*members):
    return LogitsProcessorList(members)


@pytest.fixture
def all_stay(monkeypatch):
    """Sentences that are done stay in the batch, as they do with processors: the random numbers are the same."""
    monkeypatch.setattr(search, "DONE_BEFORE_LEAVING", 2.0)


def both(model, processor, options, **equivalent):
    """Results with a processor, and with the options that mean the same; random numbers repeat."""
    for more in ({"logits_processor": processor}, equivalent):
        torch.manual_seed(3)
        yield generate(model, SOURCES, LENGTHS, **EVERYTHING, **options, **more)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.usefixtures("all_stay")
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_processor_that_changes_nothing(model, options):
    for with_processor, without in zip(*both(model, lambda input_ids, scores: scores, options), strict=True):
        torch.testing.assert_close(with_processor, without)


@pytest.mark.usefixtures("all_stay")
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    ("processor", "equivalent", "eos_bonus"),
    [
        (NoRepeatNGramLogitsProcessor(2), {"no_repeat_ngram_size": 2}, -4.0),
        (MinNewTokensLengthLogitsProcessor(1, 4, EOS), {"min_new_tokens": 4}, 4.0),
    ],
    ids=["ngram", "min_length"],
)
def test_transformers_processors_equal_our_options(options, processor, equivalent, eos_bonus):
    model = FakeModel(vocab_size=8, eos_bonus=eos_bonus).eval()
    options = {**options, "max_new_tokens": 12}
    for theirs, ours in zip(*both(model, processors(processor), options, **equivalent), strict=True):
        torch.testing.assert_close(theirs, ours)
    free, held = (generate(model, SOURCES, LENGTHS, **options, **more) for more in ({}, equivalent))
    assert rows(free) != rows(held)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_bad_words_never_come(options):
    model = FakeModel(vocab_size=8, eos_bonus=-1.0).eval()
    banned = [[4], [3, 5], [5, 5, 6]]
    processor = processors(NoBadWordsLogitsProcessor(banned, eos_token_id=EOS))

    def found(output):
        return [s for s in rows(output) for w in banned for i in range(len(s)) if s[i : i + len(w)] == w]

    assert found(generate(model, SOURCES, LENGTHS, max_new_tokens=15, **options))
    assert not found(generate(model, SOURCES, LENGTHS, max_new_tokens=15, logits_processor=processor, **options))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_repetition_penalty_in_beams_equals_a_slow_beam_search(early_stopping, penalty):
    model, processor = FakeModel(eos_bonus=0.5).eval(), processors(RepetitionPenaltyLogitsProcessor(penalty))

    def following(model, src, src_lengths, prefix):
        enc = model.encode(src, src_lengths)
        state = model.start(enc)
        for token in [BOS, *prefix]:
            logits, state, _ = model.decode_step(torch.tensor([token]), state, enc)
        scores = processor(torch.tensor([[BOS, *prefix]]), logits.log_softmax(-1))[0]
        scores[[PAD, BOS]] = -math.inf
        return scores.tolist()

    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 7, "early_stopping": early_stopping}
    output = generate(model, SOURCES, LENGTHS, logits_processor=processor, output_scores=True, **options)
    expected = []
    for b in range(len(SOURCES)):
        search = (7, 3, float, early_stopping, True)
        expected += slow_beam_search(model, SOURCES[b : b + 1], LENGTHS[b : b + 1], *search, following=following)
    assert rows(output) == [s for _, s in expected]
    torch.testing.assert_close(output.sequences_scores.tolist(), [score for score, _ in expected])
    torch.testing.assert_close(output.token_scores.sum(1) / output.lengths, output.sequences_scores)
    assert rows(output) != rows(generate(model, SOURCES, LENGTHS, **options))


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "top_k": 1}], ids=str)
@pytest.mark.parametrize("name", ["fake", "input_feeding"])
def test_repetition_penalty_token_by_token(name, mode):
    """Logits are processed; the scores are the log-probabilities of the model."""
    model = FakeModel(vocab_size=8, eos_bonus=-3.0).eval() if name == "fake" else MODELS[name]()
    processor = processors(RepetitionPenaltyLogitsProcessor(3.0))
    options = {"max_new_tokens": 12, "length_penalty": 0.0}
    output = generate(model, SOURCES, LENGTHS, logits_processor=processor, **options, **mode)
    for b, sequence in enumerate(rows(output)):
        enc = model.encode(SOURCES[b : b + 1], LENGTHS[b : b + 1])
        state, tokens, total = model.start(enc), [BOS], 0.0
        for token in sequence:
            logits, state, _ = model.decode_step(torch.tensor(tokens[-1:]), state, enc)
            scores = processor(torch.tensor([tokens]), logits.clone())
            scores[0, [PAD, BOS]] = -math.inf
            assert token == scores.argmax().item()
            total += logits.log_softmax(-1)[0, token].item()
            tokens.append(token)
        assert output.sequences_scores[b].item() == pytest.approx(total)
    assert rows(output) != rows(generate(model, SOURCES, LENGTHS, **options))


def test_sampling_after_processors():
    model = MODELS["fake"]()
    greedy = generate(model, SOURCES, LENGTHS)
    options = {"do_sample": True, "num_return_sequences": 2}
    for processor in (TopKLogitsWarper(1), TemperatureLogitsWarper(1e-6)):
        sampled = generate(model, SOURCES, LENGTHS, logits_processor=processors(processor), **options)
        assert rows(sampled) == [s for s in rows(greedy) for _ in range(2)]
    last = next_log_probs(model, SOURCES[:1], LENGTHS[:1], [])
    ranked = sorted(range(len(last)), key=last.__getitem__, reverse=True)
    ban = processors(NoBadWordsLogitsProcessor([[ranked[0]]], eos_token_id=None))
    for more in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}):
        sampled = generate(model, SOURCES[:1], LENGTHS[:1], logits_processor=ban, do_sample=True, **more)
        assert rows(sampled)[0][0] == ranked[1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_processor_sees_all_rows_at_every_step(num_beams):
    src, seen = torch.randint(3, 6, (40, 5)), []
    model = CountingModel(eos_bonus=0.5).eval()

    def processor(input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == len(src) * num_beams
        assert (input_ids[:, 0] == BOS).all()
        assert (scores[:, [PAD, BOS]] == -math.inf).all()
        assert bool((scores <= 0).all()) == (num_beams > 1)  # log-probabilities in beam search, else logits
        seen.append(input_ids.shape[1])
        return scores

    generate(model, src, num_beams=num_beams, logits_processor=processor, max_new_tokens=30)
    assert seen == list(range(1, len(seen) + 1))
    assert set(model.rows) == {len(src) * num_beams}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_constraints_by_sentence_and_prefix(options):
    """A row number names the sentence, and the prefix is among the tokens that it gets."""
    allowed = {0: [3, EOS], 1: [4, EOS], 2: [5, EOS], 3: [3, 5, EOS]}
    prefixes = [[5], [], [3, 4], []]

    def follow(sentence, input_ids):
        assert input_ids[: 1 + len(prefixes[sentence])].tolist()[1:] == prefixes[sentence][: len(input_ids) - 1]
        return allowed[sentence]

    processor = processors(PrefixConstrainedLogitsProcessor(follow, options.get("num_beams", 1)))
    output = generate(
        FakeModel(vocab_size=8).eval(), SOURCES, LENGTHS, prefix_tokens=prefixes, logits_processor=processor, **options
    )
    for b, sequence in enumerate(rows(output)):
        assert sequence[: len(prefixes[b])] == prefixes[b]
        assert set(sequence[len(prefixes[b]) :]) <= set(allowed[b])


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_where_all_is_forbidden_the_sequence_ends(options):
    def nothing(input_ids, scores):
        return torch.full_like(scores, -math.inf) if input_ids.shape[1] > 3 else scores

    model = FakeModel(eos_bonus=-9.0).eval()
    output = generate(model, SOURCES, LENGTHS, logits_processor=nothing, **options)
    returned = options.get("num_return_sequences", 1)
    for sequence in rows(output)[::returned]:
        assert sequence[-1] == EOS and (len(sequence) == 4 if "num_beams" not in options else len(sequence) <= 4)
    assert torch.isfinite(output.sequences_scores[::returned]).all()


def test_repeats_of_processors_and_options_combine():
    model = FakeModel(vocab_size=8, eos_bonus=-9.0).eval()
    processor = processors(NoBadWordsLogitsProcessor([[4]], eos_token_id=EOS))
    output = generate(model, SOURCES, LENGTHS, no_repeat_ngram_size=2, logits_processor=processor, num_beams=3)
    for sequence in rows(output):
        assert 4 not in sequence and not has_repeat(sequence, 2)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
def test_processors_with_repeated_sources(options):
    shared = MODELS["input_feeding"]()
    repeating = RepeatingModel(shared.config).double().eval()
    repeating.load_state_dict(shared.state_dict())
    options = options | {"logits_processor": RepetitionPenaltyLogitsProcessor(2.0)}
    outputs = [generate(model, SOURCES, LENGTHS, **options) for model in (shared, repeating)]
    assert rows(outputs[0]) == rows(outputs[1])


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        ([RepetitionPenaltyLogitsProcessor(2.0)], "logits_processor must be callable, .input_ids, scores. -> scores"),
        (lambda input_ids, scores: scores[:, :3], r"must return scores of shape \(4, 6\), got \(4, 3\)"),
        (lambda input_ids, scores: None, r"must return scores of shape \(4, 6\), got NoneType"),
    ],
    ids=["list", "shape", "none"],
)
def test_a_bad_processor_gets_a_sentence(processor, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(MODELS["fake"](), SOURCES, LENGTHS, logits_processor=processor)
