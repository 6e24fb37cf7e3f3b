"""Greedy decoding in one operator, beside the loop over decode_step."""

import copy
import itertools

import pytest
import torch
from seq2seq_cases import VARIANTS, make_batch, make_model

from fastseq import _native
from fastseq.ops.decoder import native
from fastseq.seq2seq import search
from fastseq.seq2seq.model import Seq2Seq

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
LENGTHS = {
    "one": (5,),
    "three": (4, 1, 6),
    "eight": (3, 5, 2, 6, 1, 4, 5, 2),
    "packed": (2, 6, 3) * 4,
    "empty source": (3, 0),
    "many": (4, 2, 5) * 7,
}
OPTIONS = {
    "default": {},
    "one token": dict(max_new_tokens=1),
    "at least four": dict(min_new_tokens=4, max_new_tokens=6),
    "no unk": dict(generate_unk=False, output_scores=True),
    "limits": dict(max_length_ratio=0.5),
}


@pytest.fixture
def loops(monkeypatch):
    """The number of steps of each call of the operator."""
    calls = []
    greedy = native.greedy

    def counted(*args):
        result = greedy(*args)
        calls.append(result[0].tokens.shape[1])
        return result

    monkeypatch.setattr("fastseq.ops.decoder.api.fast_greedy", counted)
    return calls


def by_steps(model, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Seq2Seq, "greedy_steps", lambda *_: None)
        return model.generate(*args, **options)


def make(dtype=torch.float32, **config):
    """A model with clear preferences, whose answers end at different steps."""
    model = make_model(dtype, **config)
    with torch.no_grad():
        model.decoder.output.weight *= 8
    return model


def check(model, src, lengths, **options):
    ours, expected = model.generate(src, lengths, **options), by_steps(model, src, lengths, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    assert torch.equal(ours.lengths, expected.lengths)
    torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores)
    if ours.token_scores is not None:
        torch.testing.assert_close(ours.token_scores, expected.token_scores)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_and_scores(variant, dtype, loops):
    model = make(dtype, **VARIANTS[variant])
    for lengths in LENGTHS.values():
        src, lengths, _ = make_batch(model, lengths)
        check(model, src.to(dtype) if src.is_floating_point() else src, lengths)
    assert sum(loops) > 5 * len(LENGTHS) > len(loops)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", LENGTHS)
def test_options(rows, options, loops):
    model = make(decoder_layers=2)
    src, lengths, _ = make_batch(model, LENGTHS[rows])
    if options == "at least four":
        with torch.no_grad():
            model.decoder.output.bias[model.config.eos_id] += 9
    result = check(model, src, lengths, **OPTIONS[options])
    assert loops
    if options == "at least four":
        assert set(result.lengths.tolist()) == {5}


def parts_of(lengths):
    """The steps of each call: a call ends when a quarter of its rows is done."""
    ends, left = [0], sorted(lengths)
    while left:
        ends.append(left[-(-len(left) // 4) - 1])
        left = [n for n in left if n > ends[-1]]
    return [end - start for start, end in itertools.pairwise(ends)]


def test_answers_of_all_lengths_leave_the_batch(loops):
    model = make()
    src, lengths, _ = make_batch(model, (1, 6, 2, 5, 3, 4, 6, 1))
    found = check(model, src, lengths, max_length_ratio=3.0).lengths
    limits = 3 * lengths + 10
    assert (found < limits).any() and (found == limits).any()  # by eos and by the limit
    assert loops == parts_of(found.tolist())


def test_long_answers_take_several_calls(loops, monkeypatch):
    model = make()
    src, lengths, _ = make_batch(model, (4, 3))
    whole = model.generate(src, lengths, min_new_tokens=11, max_new_tokens=11)
    assert loops == [11]
    monkeypatch.setattr(search, "STEPS_OF_A_CALL", 4)
    parts = model.generate(src, lengths, min_new_tokens=11, max_new_tokens=11)
    assert loops == [11, 4, 4, 3]
    assert torch.equal(parts.sequences, whole.sequences)


def test_no_token_is_left_but_eos():
    model = make(tgt_vocab_size=5)
    src, lengths, _ = make_batch(model, (4, 3))
    eos = model.config.eos_id
    with torch.no_grad():
        model.decoder.output.bias[eos] -= 100
    forbidden = torch.tensor([*(token for token in range(5) if token != eos), eos])
    bos, limits, done = torch.full((2,), model.config.bos_id), torch.tensor([9, 9]), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        enc = model.encode(src, lengths)
        found = model.greedy_steps(bos, model.start(enc), enc, search.Search(limits, done, forbidden, 9, eos, 2, 9))
    assert found is not None
    assert found[0].tolist() == [[eos], [eos]]
    assert found[2].all()


@pytest.mark.parametrize("change", ["sampling", "attentions", "n-grams", "prefix", "processor", "step", "submodule"])
def test_other_calls_run_step_by_step(change, loops):
    model = make()
    src, lengths, _ = make_batch(model, (4, 3))
    options = {
        "sampling": dict(do_sample=True),
        "attentions": dict(output_attentions=True),
        "n-grams": dict(no_repeat_ngram_size=2),
        "prefix": dict(prefix_tokens=[[5], []]),
        "processor": dict(logits_processor=lambda ids, scores: scores),
    }.get(change, {})
    if change == "step":
        decode_step = model.decode_step
        model.decode_step = lambda *args, **kwargs: decode_step(*args, **kwargs)
    if change == "submodule":
        model.decoder.output = torch.nn.Sequential(model.decoder.output)
    model.generate(src, lengths, **options)
    assert not loops


@pytest.mark.parametrize("rows", ["one", "eight", "many"])
def test_two_threads_choose_the_same(rows):
    model = make(hidden_size=96, decoder_layers=2)
    src, lengths, _ = make_batch(model, LENGTHS[rows])
    alone, threads = model.generate(src, lengths, output_scores=True), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team = model.generate(src, lengths, output_scores=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(team.sequences, alone.sequences)
    torch.testing.assert_close(team.token_scores, alone.token_scores)


def test_weights_that_change_between_calls_count():
    model = make()
    src, lengths, _ = make_batch(model, (4,))
    changed = copy.deepcopy(model)
    first = model.generate(src, lengths)
    with torch.no_grad():
        changed.decoder.embedding.weight.neg_()
        model.decoder.embedding.weight.neg_()
    assert not torch.equal(model.generate(src, lengths).sequences, first.sequences)
    assert torch.equal(model.generate(src, lengths).sequences, by_steps(changed, src, lengths).sequences)
