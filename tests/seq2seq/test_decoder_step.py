"""decode_step as one operator, beside the same step through lstm_cell and attention and beside float64."""

import copy
import itertools

import pytest
import torch
from seq2seq_cases import VARIANTS, make_batch, make_model
from torch import nn

import fastseq
from fastseq import _native
from fastseq.ops.decoder import native
from fastseq.seq2seq import decoder as decoder_module
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
SIZES = {
    "three layers, H 257": dict(hidden_size=257, embedding_dim=5, decoder_layers=3, bidirectional=False),
    "A 7, H 33": dict(hidden_size=33, bidirectional=False, attention_size=7, attention="normed_additive"),
    "V 70, H 64": dict(hidden_size=64, embedding_dim=32, tgt_vocab_size=70, attention="dot", bridge="zeros"),
}
ALL = VARIANTS | SIZES
ROWS = {"one row": ((4,), 1), "beams": ((5, 0, 3), 3), "packed": ((5, 0, 4, 1, 2), 2), "table": ((3, 5) * 10, 1)}


@pytest.fixture
def steps(monkeypatch):
    """Count the calls of the operator."""
    calls = []
    step = native.step
    monkeypatch.setattr(native, "step", lambda *args: calls.append(args) or step(*args))
    return calls


@torch.no_grad()
def run(model, lengths, rows_each, separate=False, count=3):
    """Some steps -> logits, states and weights by name, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    src, lengths, _ = make_batch(model, lengths)
    src = src.to(dtype) if src.is_floating_point() else src
    enc, rows = model.encode(src, lengths), torch.arange(len(src)).repeat_interleave(rows_each)
    state = model.start(enc).index_select(rows)
    generator = torch.Generator().manual_seed(3)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        if separate:
            patch.setattr(decoder_module, "one_operator", lambda *_: False)
        for t in range(count):
            tokens = torch.randint(4, model.config.tgt_vocab_size, (len(rows),), generator=generator)
            logits, state, weights = model.decode_step(tokens, state, enc)
            results |= {f"logits {t}": logits, f"h {t}": state.h, f"c {t}": state.c}
            results |= {} if weights is None else {f"weights {t}": weights}
            results |= {} if state.feed is None else {f"feed {t}": state.feed}
    return results


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("variant", ALL)
def test_the_operator_is_as_accurate_as_the_separate_ops(variant, rows, steps):
    model = make_model(torch.float32, **ALL[variant])
    wide = copy.deepcopy(model).double()
    exact = run(wide, *ROWS[rows], separate=True)
    assert not steps
    assert_all_accurate(run(model, *ROWS[rows]), exact, run(model, *ROWS[rows], separate=True))
    assert len(steps) == 3
    for name, result in run(wide, *ROWS[rows]).items():
        torch.testing.assert_close(result, exact[name], rtol=1e-12, atol=1e-13)


def test_saturated_gates_and_scores():
    model = make_model(torch.float32, decoder_layers=2)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(30)
    wide = copy.deepcopy(model).double()
    exact, plain = run(wide, (5, 2), 2, separate=True), run(model, (5, 2), 2, separate=True)
    assert_all_accurate(run(model, (5, 2), 2), exact, plain)


@torch.no_grad()
def test_threads_change_no_bit():
    """A team of threads, and blocks of sentences, beside one thread."""
    model = make_model(torch.float32, hidden_size=256, embedding_dim=64, decoder_layers=2)
    before = torch.get_num_threads()
    try:
        for lengths, rows_each in (((5,), 1), ((4, 5), 3), ((5, 3) * 8, 1)):
            torch.set_num_threads(1)
            src, lengths, _ = make_batch(model, lengths)
            enc, rows = model.encode(src, lengths), torch.arange(len(src)).repeat_interleave(rows_each)
            state, tokens = model.start(enc).index_select(rows), rows % 13
            _, expected, weights = model.decode_step(tokens, state, enc)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                _, actual, actual_weights = model.decode_step(tokens, state, enc)
                assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))
                assert torch.equal(actual_weights, weights)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 12])
def test_strided_states_and_short_tokens(rows, steps):
    model = make_model(torch.float32, decoder_layers=2)
    src, lengths, _ = make_batch(model)
    enc = model.encode(src[:2], lengths[:2])
    state = model.start(enc).index_select(torch.arange(2).repeat_interleave(rows // 2))
    tokens = torch.arange(rows, dtype=torch.int32) % 13
    expected = model.decode_step(tokens.long(), state, enc)
    strided = [torch.stack((t, t), -1)[..., 0] for t in state[:3]]
    strided_enc = enc._replace(memory=torch.stack((enc.memory, enc.memory), -1)[..., 0])
    actual = model.decode_step(tokens, decoder_module.DecoderState(*strided), strided_enc)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual[1][:3], expected[1][:3], strict=True))
    assert len(steps) == 2


@torch.no_grad()
def test_packed_weights_follow_the_parameters():
    """Change each weight in place, and replace one, between two steps of many rows."""
    model = make_model(torch.float32, decoder_layers=2)
    src, lengths, _ = make_batch(model, (5, 2, 4) * 4)
    enc, tokens = model.encode(src, lengths), torch.arange(12)
    state = model.decode_step(tokens, model.start(enc), enc)[1]
    assert state.packed is not None
    assert state.index_select(torch.arange(12)).packed is state.packed

    def check():
        actual = model.decode_step(tokens, state, enc)
        fresh = model.decode_step(tokens, state._replace(packed=None), enc)
        assert torch.equal(actual[0], fresh[0])
        assert model.decode_step(tokens, actual[1], enc)[1].packed is actual[1].packed
        return actual[0]

    seen = [check()]
    lstm = model.decoder.lstm
    for weight in (lstm.weight_ih_l0, lstm.weight_hh_l1, model.decoder.combine.weight, model.decoder.embedding.weight):
        weight.add_(0.25)
        seen.append(check())
    lstm.weight_hh_l0 = nn.Parameter(lstm.weight_hh_l0 * 2)
    seen.append(check())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


FALLBACKS = {
    "gradients": lambda model: torch.enable_grad(),
    "dropout": lambda model: model.train() and torch.no_grad(),
    "hook": lambda model: model.decoder.output.register_forward_hook(lambda *_: None) and torch.no_grad(),
    "backend": lambda model: setattr(model.decoder, "backend", "reference") or torch.no_grad(),
    "dtype": lambda model: model.bfloat16() and torch.no_grad(),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", FALLBACKS)
def test_other_calls_take_the_separate_ops(reason, steps):
    model = make_model(torch.float32, dropout=0.1)
    src, lengths, tgt = make_batch(model)
    with FALLBACKS[reason](model):
        enc = model.encode(src, lengths)
        model.decode_step(tgt[:, 0], model.start(enc), enc)
    assert not steps


@torch.no_grad()
@pytest.mark.parametrize("variant", ["additive, two layers", "general, whole target", "dot, zeros", "no attention"])
def test_greedy_and_beam_tokens_are_those_of_the_separate_ops(variant, steps, monkeypatch):
    model = make_model(torch.float32, **VARIANTS[variant])
    src, lengths, _ = make_batch(model, (5, 2, 4) * 4)
    calls = [dict(max_new_tokens=12), dict(max_new_tokens=12, num_beams=4)]
    actual = [model.generate(src, lengths, **options).sequences for options in calls]
    assert steps
    monkeypatch.setattr(decoder_module, "one_operator", lambda *_: False)
    for sequences, options in zip(actual, calls, strict=True):
        assert torch.equal(sequences, model.generate(src, lengths, **options).sequences)


FEEDING = [name for name, options in VARIANTS.items() if make_model(**options).config.input_feeding]


def loss_and_gradients(model, batch, separate=False, **options):
    with pytest.MonkeyPatch.context() as patch:
        if separate:
            patch.setattr(decoder_module, "one_sequence", lambda *_: False)
        out = model(*batch, need_weights=True, **options)
    loss = out.logits.square().sum() + out.attention.square().sum() + out.state.c.sum() + out.state.feed.sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return out.logits, out.attention, out.state.h, *grads


@pytest.mark.parametrize("variant", FEEDING)
def test_training_is_that_of_the_separate_ops(variant):
    model = make_model(**VARIANTS[variant])
    src, _, tgt = make_batch(model)
    batch = src, torch.tensor([5, 0, 4]), tgt
    expected = loss_and_gradients(model, batch, separate=True)
    for actual, x in zip(loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(actual, x)


def test_dropout_between_the_layers(monkeypatch):
    """With a dropout that halves: the operator takes its masks, the separate ops call it at every step."""
    model = make_model(decoder_layers=3, dropout=0.5, embed_dropout=0.0, output_dropout=0.0)
    batch = make_batch(model)
    without = model(*batch).logits
    model.decoder.train()
    monkeypatch.setattr(
        decoder_module.F, "dropout", lambda x, p, training=True, inplace=False: x / 2 if training and p else x
    )
    actual, expected = (loss_and_gradients(model, batch, separate) for separate in (False, True))
    assert not torch.allclose(actual[0], without)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def arguments(packed=False, attention=True, dot=False, table=False):
    """A valid call of the operator: L 2, N 6, K 2, H 8, E 5, A 7, P 4, D 8, V 9."""
    H, E, A, N, V = 8, 5, 8 if dot else 7, 6, 9
    draw = torch.randn
    matrices = [draw(4 * H, E + H if attention else E), draw(4 * H, H), draw(4 * H, H), draw(4 * H, H)]
    combine, query = draw(H, 2 * H), draw(A, H)
    if packed:
        matrices = [torch.ops.fastseq.decoder_pack(w, True) for w in matrices]
        combine, query = (torch.ops.fastseq.decoder_pack(w, False) for w in (combine, query))
    given = dict(tokens=torch.arange(N), embedding=draw(V, E), table=draw(V, 4 * H) if table else None)
    given |= dict(h=draw(2, N, H), c=draw(2, N, H), feed=draw(N, H) if attention else None)
    given |= dict(weights=matrices, biases=[draw(4 * H) for _ in range(4)])
    names = ["combine", "query_weight", "query_bias", "score_weight", "gain", "keys", "memory", "lengths", "prepared"]
    keys = draw(3, 4, A)
    values = combine, query, draw(A), draw(A), draw(()), keys, draw(3, 4, H), torch.tensor([4, 0, 2])
    values = (*values, torch.ops.fastseq.attention_prepare(keys, None))
    present = names if attention else ()
    present = [
        n for n in present if not (dot and n in ("query_weight", "query_bias", "score_weight", "gain", "prepared"))
    ]
    given |= {name: value if name in present else None for name, value in zip(names, values, strict=True)}
    return given | dict(output_weight=draw(V, H), output_bias=draw(V), scale=0.5, need_weights=True)


KINDS = {
    "additive": {},
    "dot": dict(dot=True),
    "none": dict(attention=False),
    "packed": dict(packed=True),
    "table": dict(table=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    torch.library.opcheck(torch.ops.fastseq.decoder_step.default, tuple(arguments(**KINDS[kind]).values()))


def test_opcheck_pack():
    for gates in (True, False):
        torch.library.opcheck(torch.ops.fastseq.decoder_pack.default, (torch.randn(12, 5), gates))


BAD = {
    "token": (dict(tokens=torch.tensor([0, 1, 2, 3, 4, 9])), r"tokens must lie in 0 .. 8, got 9"),
    "tokens": (dict(tokens=torch.arange(5)), r"tokens must have the shape \(6,\)"),
    "embedding": (dict(embedding=torch.randn(9)), r"embedding must have the shape \(V, E\)"),
    "table": (dict(table=torch.randn(9, 8)), r"table must have the shape \(9, 32\)"),
    "h": (dict(h=torch.randn(6, 8)), r"h must have the shape \(L, N, H\)"),
    "c": (dict(c=torch.randn(2, 5, 8)), r"c must have the shape \(2, 6, 8\)"),
    "feed": (dict(feed=torch.randn(6, 7)), r"feed must have the shape \(6, 8\)"),
    "weights": (dict(weights=[torch.randn(32, 13)]), "for each of 2 layers, got 1 tensors"),
    "weight_ih": (dict(weights=[torch.randn(32, 8)] * 4), r"weight_ih must have the shape \(32, 13\)"),
    "packed": (dict(combine=torch.randn(5)), r"combine must have the shape \(8, 16\), or \d+ packed elements, got 5"),
    "biases": (dict(biases=[torch.randn(32)] * 3), "got 3 tensors for 2 layers"),
    "combine": (dict(combine=torch.randn(8, 8)), r"combine must have the shape \(8, 16\)"),
    "query_weight": (dict(query_weight=torch.randn(7, 7)), r"query_weight must have the shape \(7, 8\)"),
    "query_bias": (dict(query_bias=torch.randn(8)), r"query_bias must have the shape \(7,\)"),
    "score_weight": (dict(score_weight=None), "belong to the additive score"),
    "gain": (dict(gain=torch.randn(1)), "gain must have the shape"),
    "keys": (dict(keys=torch.randn(3, 5, 7)), r"keys must have the shape \(3, 4, 7\)"),
    "memory": (dict(memory=torch.randn(4, 4, 8)), "got 4 sentences for 6 rows"),
    "lengths": (dict(lengths=torch.tensor([4, 0])), r"lengths must have the shape \(3,\)"),
    "prepared": (dict(prepared=torch.randn(3, 4, 7)), r"prepared must have the shape \(3, 4, 32\)"),
    "output_weight": (dict(output_weight=torch.randn(9, 9)), r"output_weight must have the shape \(9, 8\)"),
    "output_bias": (dict(output_bias=torch.randn(8)), r"output_bias must have the shape \(9,\)"),
    "dtype": (dict(c=torch.randn(2, 6, 8).double()), "c must have the dtype Float, got Double"),
    "no keys": (dict(keys=None), "attention needs memory, keys and combine"),
    "no attention": (dict(memory=None), "feed needs attention"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_get_a_sentence(case):
    changes, sentence = BAD[case]
    with pytest.raises(RuntimeError, match=f"decoder_step: .*{sentence}"):
        torch.ops.fastseq.decoder_step(*(arguments() | changes).values())


@pytest.mark.parametrize("config", [{}, {"backend": "torch"}])
def test_explain_names_the_operator(config):
    model = make_model(torch.float32, **config)
    src, lengths, tgt = make_batch(model)
    report = fastseq.explain(model, src, lengths, tgt)
    found = f"decoder(device=cpu, dtype=float32, steps={tgt.size(1)}, rows={len(src)}, hidden_size=" in report
    assert found == (not config)
    assert ("outside explain one operator runs these steps" in report) == (not config)
