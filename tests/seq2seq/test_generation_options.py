"""generate(): limits, sampling, modes, dtypes, and the sentences that bad options get."""

import math

import pytest
import torch
from generation_models import BOS, EOS, LENGTHS, MODELS, PAD, SOURCES, ConstantModel, FakeModel, has_repeat, rows
from torch import nn

from fastseq.seq2seq.generation import generate
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig


@pytest.fixture
def fake():
    return MODELS["fake"]()


@pytest.fixture(params=["input_feeding", "two_layers_dot"])
def seq2seq(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_in_every_mode(options, size):
    model = FakeModel(vocab_size=8, eos_bonus=-3.0).eval()
    src = torch.randint(3, 8, (20, 4))
    free = rows(generate(model, src, max_new_tokens=25, **options))
    blocked = rows(generate(model, src, max_new_tokens=25, no_repeat_ngram_size=size, **options))
    assert any(has_repeat(s, size) for s in free)
    assert not any(has_repeat(s, size) for s in blocked)


def test_eos_is_the_last_resort(fake):
    options = {"no_repeat_ngram_size": 1, "min_new_tokens": 9, "max_new_tokens": 9}
    for mode in ({}, {"num_beams": 3}, {"do_sample": True}):
        for sequence in rows(generate(fake, SOURCES, LENGTHS, **options, **mode)):
            assert sorted(sequence[:-1]) == [3, 4, 5]
            assert sequence[-1] == EOS


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}], ids=str)
def test_min_and_max_new_tokens(options):
    model = FakeModel(eos_bonus=6.0).eval()
    assert (generate(model, SOURCES, LENGTHS, length_penalty=0.0, **options).lengths < 4).all()
    for sequence in rows(generate(model, SOURCES, LENGTHS, min_new_tokens=4, length_penalty=0.0, **options)):
        assert EOS not in sequence[:4]
        assert len(sequence) >= 5
    assert generate(model, SOURCES, LENGTHS, min_new_tokens=3, max_new_tokens=3, **options).lengths.tolist() == [3] * 4


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beam", "sample"],
)
def test_the_default_limit_belongs_to_the_sentence(options):
    endless = FakeModel(eos_bonus=-99.0).eval()

    def lengths(**more):
        return generate(endless, SOURCES, LENGTHS, **options, **more).lengths.view(len(SOURCES), -1).unique(dim=1)

    assert lengths().tolist() == [[22], [16], [12], [10]]
    assert lengths(max_length_ratio=0.5).tolist() == [[13], [12], [11], [10]]
    assert lengths(min_new_tokens=14).tolist() == [[22], [16], [14], [14]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_pad_and_bos_are_never_generated(options):
    model = ConstantModel([0.5, 0.4, 0.02, 0.03, 0.03, 0.02])
    sequences = rows(generate(model, SOURCES, LENGTHS, max_new_tokens=6, **options))
    assert not {PAD, BOS} & {token for sequence in sequences for token in sequence}


def test_bos_may_be_eos():
    model = FakeModel(eos_id=BOS, eos_bonus=2.0).eval()
    for options in ({}, {"num_beams": 3}):
        assert all(sequence[-1] == BOS for sequence in rows(generate(model, SOURCES, LENGTHS, **options)))


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}, {"temperature": 1e-30, "top_k": 3}], ids=str
)
def test_sampling_without_choice_is_greedy(seq2seq, options):
    src = torch.randint(4, 8, (12, 5))
    greedy = generate(seq2seq, src)
    sampled = generate(seq2seq, src, do_sample=True, num_return_sequences=2, **options)
    assert rows(sampled) == [s for s in rows(greedy) for _ in range(2)]
    torch.testing.assert_close(sampled.sequences_scores, greedy.sequences_scores.repeat_interleave(2))


def test_a_denormal_temperature_is_greedy_in_float32():
    model = FakeModel(dtype=torch.float32).eval()
    sampled = generate(model, SOURCES, LENGTHS, do_sample=True, temperature=1e-40, max_new_tokens=5)
    assert rows(sampled) == rows(generate(model, SOURCES, LENGTHS, max_new_tokens=5))


TOKENS = [0.0, 0.0, 0.1, 0.4, 0.2, 0.3]
FREQUENCIES = {
    "plain": ({}, TOKENS),
    "temperature": ({"temperature": 0.5}, [p * p / 0.3 for p in TOKENS]),
    "top_k": ({"top_k": 3}, [0, 0, 0, 4 / 9, 2 / 9, 3 / 9]),
    "top_k_beyond_the_vocabulary": ({"top_k": 50}, TOKENS),
    "top_p": ({"top_p": 0.65}, [0, 0, 0, 4 / 7, 0, 3 / 7]),
    "top_p_of_three": ({"top_p": 0.89}, [0, 0, 0, 4 / 9, 2 / 9, 3 / 9]),
    "top_p_after_top_k": ({"top_p": 0.75, "top_k": 3}, [0, 0, 0, 4 / 7, 0, 3 / 7]),
    "top_p_after_temperature": ({"top_p": 0.8, "temperature": 0.5}, [0, 0, 0, 0.16 / 0.25, 0, 0.09 / 0.25]),
}


@pytest.mark.parametrize(("options", "expected"), FREQUENCIES.values(), ids=FREQUENCIES)
def test_sampling_frequencies(options, expected):
    count = 20_000
    noise = torch.Generator().manual_seed(3)
    output = generate(
        ConstantModel(TOKENS, torch.float32).eval(),
        SOURCES[:1],
        do_sample=True,
        num_return_sequences=count,
        max_new_tokens=1,
        generator=noise,
        **options,
    )
    seen = output.sequences[:, 0].bincount(minlength=6) / count
    for frequency, p in zip(seen.tolist(), expected, strict=True):
        sigma = math.sqrt(p * (1 - p) / count)
        assert abs(frequency - p) <= 4.5 * sigma  # of a binomial count: missed 7 times in a million
    torch.testing.assert_close(output.sequences_scores.exp(), torch.tensor(TOKENS)[output.sequences[:, 0]])


def test_seeds_repeat(fake):
    def draw(seed):
        noise = torch.Generator().manual_seed(seed)
        return generate(fake, SOURCES, LENGTHS, do_sample=True, num_return_sequences=5, generator=noise)

    before = torch.get_rng_state()
    assert torch.equal(draw(1).sequences, draw(1).sequences)
    assert rows(draw(1)) != rows(draw(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = generate(fake, SOURCES, LENGTHS, do_sample=True)
    torch.manual_seed(5)
    assert torch.equal(first.sequences, generate(fake, SOURCES, LENGTHS, do_sample=True).sequences)


def test_samples_of_a_sentence_lie_side_by_side():
    model = FakeModel(spread=30.0).eval()
    greedy = generate(model, SOURCES, LENGTHS)
    sampled = generate(model, SOURCES, LENGTHS, do_sample=True, num_return_sequences=3, temperature=1e-3)
    assert rows(sampled) == [s for s in rows(greedy) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scores_are_in_float32_at_least(dtype, options):
    model = FakeModel(dtype=dtype).eval()
    output = generate(model, SOURCES, LENGTHS, max_new_tokens=6, **options)
    assert output.sequences_scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b, sequence in enumerate(rows(output)):
        enc = model.encode(SOURCES[b : b + 1], LENGTHS[b : b + 1])
        state, total, token = model.start(enc), 0.0, BOS
        for following in sequence:
            logits, state, _ = model.decode_step(torch.tensor([token]), state, enc)
            total, token = total + logits.double().log_softmax(-1)[0, following].item(), following
        assert output.sequences_scores[b].item() == pytest.approx(total / len(sequence), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_training_flags_and_gradient_mode_come_back(options):
    fake = FakeModel()
    fake.frozen = nn.Dropout().eval()
    torch.manual_seed(1)
    training = generate(fake, SOURCES, LENGTHS, **options)
    assert fake.training
    assert fake.dropout.training
    assert not fake.frozen.training
    assert torch.is_grad_enabled()
    torch.manual_seed(1)
    assert rows(training) == rows(generate(fake.eval(), SOURCES, LENGTHS, **options))
    assert not fake.training

    fake.train()
    fake.decode_step = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(fake, SOURCES, LENGTHS, **options)
    assert fake.training
    assert fake.dropout.training
    assert torch.is_grad_enabled()


def test_answers_can_be_trained_on(seq2seq):
    src = torch.randint(4, 8, (3, 5))
    output = generate(seq2seq, src, num_beams=2)
    assert not output.sequences_scores.requires_grad
    logits = seq2seq(src, None, output.sequences).logits
    (logits * output.sequences_scores[:, None, None]).sum().backward()
    assert seq2seq.decoder.embedding.weight.grad.abs().sum() > 0


def test_the_method_of_the_model_is_the_function(seq2seq):
    src = torch.randint(4, 8, (3, 5))
    expected = generate(seq2seq, src, num_beams=3, num_return_sequences=2)
    assert torch.equal(seq2seq.generate(src, num_beams=3, num_return_sequences=2).sequences, expected.sequences)


def test_attention_is_asked_for_only_when_wanted(fake):
    asked = []
    step = fake.decode_step
    fake.decode_step = lambda *args, need_weights: asked.append(need_weights) or step(*args, need_weights=True)
    for options in ({}, {"num_beams": 2}):
        assert generate(fake, SOURCES, LENGTHS, **options).cross_attentions is None
    assert not any(asked)


ERRORS = {
    "num_beams": ({"num_beams": 0}, "num_beams must be at least 1 .got 0."),
    "num_return_sequences": ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, or None"),
    "max_length_ratio": ({"max_length_ratio": -1.0}, "max_length_ratio must be finite and >= 0"),
    "min_new_tokens": ({"min_new_tokens": -1}, "min_new_tokens must be >= 0"),
    "min_above_max": ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 is more than max_new_tokens=4"),
    "temperature_zero": ({"do_sample": True, "temperature": 0.0}, "temperature must be finite and > 0"),
    "temperature_nan": ({"do_sample": True, "temperature": math.nan}, "temperature must be finite and > 0"),
    "top_k": ({"do_sample": True, "top_k": -1}, "top_k must be >= 0"),
    "top_p_zero": ({"do_sample": True, "top_p": 0.0}, "top_p must be > 0 and <= 1"),
    "top_p_above_one": ({"do_sample": True, "top_p": 1.1}, "top_p must be > 0 and <= 1"),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be >= 0"),
    "length_penalty": ({"length_penalty": math.inf}, "length_penalty must be finite"),
    "length_penalty_type": ({"length_penalty_type": "gnmt"}, "length_penalty_type='gnmt'; valid: avg, wu, none"),
    "early_stopping": ({"num_beams": 2, "early_stopping": "always"}, "valid: True, False, 'never'"),
    "sampled_beams": ({"do_sample": True, "num_beams": 2}, "do_sample=True needs num_beams=1"),
    "too_many_returned": ({"num_beams": 2, "num_return_sequences": 3}, "raise num_beams, or draw samples"),
    "dead_option": ({"temperature": 0.5}, "act on sampling only; add do_sample=True"),
}


@pytest.mark.parametrize(("options", "sentence"), ERRORS.values(), ids=ERRORS)
def test_a_bad_option_gets_a_sentence(fake, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(fake, SOURCES, LENGTHS, **options)


def test_an_empty_batch_gets_a_sentence(fake):
    with pytest.raises(ValueError, match="the batch is empty"):
        generate(fake, SOURCES[:0], LENGTHS[:0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
def test_attentions_of_a_model_without_attention_get_a_sentence(options):
    model = Seq2Seq(Seq2SeqConfig(src_vocab_size=8, tgt_vocab_size=9, attention="none", input_feeding=False))
    with pytest.raises(ValueError, match="output_attentions=True needs a model with attention"):
        generate(model, SOURCES, LENGTHS, output_attentions=True, **options)
    assert generate(model, SOURCES, LENGTHS, **options).cross_attentions is None


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_unk_false_forbids_the_unknown_token(fake, num_beams):
    options = {"max_new_tokens": 4, "num_beams": num_beams}
    free = generate(fake, SOURCES, LENGTHS, **options).sequences
    fake.config.unk_id = int(free[free > EOS][0])
    banned = generate(fake, SOURCES, LENGTHS, generate_unk=False, **options).sequences
    assert (free == fake.config.unk_id).any()
    assert not (banned == fake.config.unk_id).any()
