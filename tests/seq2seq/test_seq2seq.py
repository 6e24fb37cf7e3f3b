"""The seq2seq model against a textbook version of itself: one sentence at a time, without padding, in float64."""

import pytest
import torch
import torch.nn.functional as F
from seq2seq_cases import PORTED, REDUCED, VARIANTS, E, H, make_batch, make_model
from torch import nn

import fastseq
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput
from fastseq.seq2seq.model import build_seq2seq_model


def textbook(model, src, tgt):
    """One sentence: src (S,), (S, 1 + K) or (S, F), tgt (T,) -> logits (T, V), weights (T, S) or None."""
    c, p = model.config, model.state_dict()
    if c.tag_vocab_size:
        tags = p["encoder.tag_embedding.weight"]
        x = torch.stack([p["encoder.embedding.weight"][row[0]] + sum(tags[tag] for tag in row[1:]) for row in src])
    else:
        x = p["encoder.embedding.weight"][src] if c.source_features is None else src
    memory, finals = joined(x, c.frame_stack), []
    for number in range(c.encoder_layers if c.pyramid else 1):
        memory = joined(memory, 2) if number else memory
        layers, hidden = 1 if c.pyramid else c.encoder_layers, c.hidden_size // (1 + c.bidirectional)
        encoder = nn.LSTM(memory.size(1), hidden, layers, bidirectional=c.bidirectional).double()
        prefix = f"encoder.upper.{number - 1}." if number else "encoder.lstm."
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)})
        memory, final = encoder(memory)
        finals.append(final)
    # (layers, directions, H / directions) -> (layers, H), the directions side by side
    h, cell = (torch.cat(s).unflatten(0, (c.encoder_layers, -1)).flatten(1) for s in zip(*finals, strict=True))
    if c.bridge == "zeros":
        h = cell = torch.zeros(c.decoder_layers, H).double()
    if c.bridge in ("linear", "linear_h"):
        names = (("h", h), ("c", cell)) if c.bridge == "linear" else (("h", h), ("h", h))
        squash = {"tanh": torch.tanh, "relu": torch.relu, "none": lambda x: x}[c.bridge_activation]
        h, cell = (
            squash(p[f"bridge.{name}_proj.weight"] @ s.flatten() + p[f"bridge.{name}_proj.bias"]).view(
                c.decoder_layers, H
            )
            for name, s in names
        )
    h, cell, feed = list(h), list(cell), torch.zeros(H).double()
    logits, all_weights = [], []
    for token in tgt:
        inner = p["decoder.embedding.weight"][token]
        if c.input_feeding:
            inner = torch.cat((inner, feed))
        for k in range(c.decoder_layers):
            w = {n: p[f"decoder.lstm.{n}_l{k}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            gates = w["weight_ih"] @ inner + w["bias_ih"] + w["weight_hh"] @ h[k] + w["bias_hh"]
            i, f, g, o = gates.chunk(4)
            cell[k] = f.sigmoid() * cell[k] + i.sigmoid() * g.tanh()
            h[k] = inner = o.sigmoid() * cell[k].tanh()
        if c.attention != "none":
            weights = textbook_weights(c, p, inner, memory)
            feed = p["decoder.combine.weight"] @ torch.cat((weights @ memory, inner))
            feed = feed + p["decoder.combine.bias"] if c.combine_bias else feed
            feed = inner = feed.tanh() if c.combine_activation == "tanh" else feed
            all_weights.append(weights)
        logits.append(p["decoder.output.weight"] @ inner + p["decoder.output.bias"])
    return torch.stack(logits), torch.stack(all_weights) if all_weights else None


def joined(x, n):
    """(S, W) -> (S / n, n W): groups of n rows, the last one filled up with zeros."""
    groups = [x[i : i + n] for i in range(0, len(x), n)]
    return torch.stack([torch.cat([*group, *[torch.zeros_like(x[0])] * (n - len(group))]) for group in groups])


def textbook_weights(c, p, query, memory):
    p = {k.removeprefix("decoder.attention."): v for k, v in p.items()}
    if c.attention == "dot":
        scores = memory @ query
    elif c.attention == "general":
        scores = (memory @ p["key_proj.weight"].T) @ query
    else:
        v = p["v"] if c.attention == "additive" else p["gain"] * p["v"] / p["v"].norm()
        scores = torch.tanh(memory @ p["key_proj.weight"].T + p["query_proj.weight"] @ query + p["query_proj.bias"]) @ v
    return torch.softmax((c.attention_scale or 1.0) * scores, 0)


@pytest.mark.parametrize("variant", VARIANTS | REDUCED | PORTED)
def test_forward_is_the_textbook_model_without_padding(variant):
    model = make_model(**(VARIANTS | REDUCED | PORTED)[variant])
    src, lengths, tgt = make_batch(model)
    out = model(src, lengths, tgt, need_weights=True)
    for b, length in enumerate(lengths.tolist()):
        logits, weights = textbook(model, src[b, :length], tgt[b])
        torch.testing.assert_close(out.logits[b], logits)
        length = -(-length // model.config.time_reduction)
        if weights is None:
            assert out.attention is None
        else:
            torch.testing.assert_close(out.attention[b, :, :length], weights)
            assert out.attention[b, :, length:].eq(0).all()


@pytest.mark.parametrize("variant", VARIANTS | REDUCED)
def test_decode_step_is_forward_at_that_step(variant):
    model = make_model(**(VARIANTS | REDUCED)[variant])
    src, lengths, tgt = make_batch(model)
    out = model(src, lengths, tgt, need_weights=True)
    enc = model.encode(src, lengths)
    state = model.start(enc)
    for t in range(tgt.size(1)):
        logits, state, weights = model.decode_step(tgt[:, t], state, enc)
        torch.testing.assert_close(logits, out.logits[:, t])
        torch.testing.assert_close(weights, None if out.attention is None else out.attention[:, t])
    torch.testing.assert_close(tuple(state), tuple(out.state))
    assert (state.feed is not None) == model.config.input_feeding
    assert model.decode_step(tgt[:, 0], model.start(enc), enc, need_weights=False)[2] is None


@pytest.mark.parametrize("variant", REDUCED)
def test_padding_of_a_reduced_source_has_no_influence(variant):
    model = make_model(**REDUCED[variant])
    src, lengths, tgt = make_batch(model, lengths=(7, 3, 0))
    expected = model(src, lengths, tgt, need_weights=True)
    for b, length in enumerate(lengths.tolist()):
        src[b, length:] = float("nan") if src.is_floating_point() else 9
    actual = model(src, lengths, tgt, need_weights=True)
    torch.testing.assert_close(tuple(actual[:2]), tuple(expected[:2]), rtol=0, atol=0)
    reduced = model.encode(src, lengths)
    assert reduced.lengths.tolist() == [-(-n // model.config.time_reduction) for n in (7, 3, 0)]
    assert model.encode(src[:1]).lengths.tolist() == [reduced.memory.size(1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_sentence_share_its_keys_as_if_repeated(variant):
    model = make_model(**VARIANTS[variant])
    src, *_ = make_batch(model)
    enc = model.encode(src, torch.tensor([5, 0, 4]))
    tokens = torch.arange(4, 13)
    repeated, shared = enc.repeat_interleave(3), enc
    state = model.start(repeated)
    for _ in range(2):
        expected = model.decode_step(tokens, state, repeated)
        actual = model.decode_step(tokens, state, shared)
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(tuple(actual[1]), tuple(expected[1]))
        torch.testing.assert_close(actual[2], expected[2])
        state, tokens = actual[1], tokens.flip(0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_the_gradient_of_the_textbook_model(variant):
    model = make_model(**VARIANTS[variant])
    src, lengths, tgt = make_batch(model, lengths=(3, 3))
    parameters = dict(model.named_parameters())
    actual = torch.autograd.grad(model(src, lengths, tgt).logits.square().sum(), list(parameters.values()))

    def loss(*values):  # the numerical derivative of the model itself, along one random direction per parameter
        return (
            torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (src, lengths, tgt))
            .logits.square()
            .sum()
        )

    eps, generator = 1e-5, torch.Generator().manual_seed(2)
    for k, (name, grad) in enumerate(zip(parameters, actual, strict=True)):
        values = [p.detach().clone() for p in parameters.values()]
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        plus, minus = ([*values[:k], values[k] + s * eps * direction, *values[k + 1 :]] for s in (1, -1))
        if "embedding" in name:
            direction[model.config.pad_id] = 0  # not trained, and no token of this batch
        numerical = (loss(*plus) - loss(*minus)) / (2 * eps)
        torch.testing.assert_close((grad * direction).sum(), numerical, rtol=1e-5, atol=1e-7, msg=name)


def test_padding_has_no_influence():
    for options in (
        dict(),
        dict(encoder_layers=2, bridge="concat", decoder_layers=2, input_feeding=False, attention="dot"),
    ):
        model = make_model(**options)
        src, lengths, tgt = make_batch(model)
        expected = model(src, lengths, tgt)
        padding = torch.arange(src.size(1)) >= lengths[:, None]
        wider = F.pad(src.masked_fill(padding, 7), (0, 3), value=9)
        actual = model(wider, lengths, tgt)
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(tuple(actual.state), tuple(expected.state))


def test_no_lengths_means_all_of_the_source():
    model = make_model()
    src, _, tgt = make_batch(model)
    torch.testing.assert_close(model(src, None, tgt).logits, model(src, torch.tensor([5, 5, 5]), tgt).logits)
    assert model.encode(src).lengths.tolist() == [5, 5, 5]


def test_an_empty_source_is_finite_in_outputs_and_gradients():
    model = make_model()
    src, _, tgt = make_batch(model)
    out = model(src, torch.tensor([5, 0, 4]), tgt, need_weights=True)
    out.logits.square().sum().backward()
    assert out.logits.isfinite().all()
    assert out.attention[1].eq(0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["none", "general", "additive"])
def test_whole_target_equals_step_loop(attention):
    model = make_model(attention=attention, input_feeding=False, encoder_layers=2, decoder_layers=2)
    src, lengths, tgt = make_batch(model)
    torch.manual_seed(0)
    stepwise = model(src, lengths, tgt, teacher_forcing_ratio=1 - 1e-9, need_weights=True)  # below 1.0: runs the loop
    whole = model(src, lengths, tgt, need_weights=True)
    torch.testing.assert_close(stepwise.logits, whole.logits)
    torch.testing.assert_close(stepwise.attention, whole.attention)
    torch.testing.assert_close(tuple(stepwise.state), tuple(whole.state))


def test_both_modes_share_one_layout_but_for_the_first_input():
    shapes = [
        {k: tuple(v.shape) for k, v in make_model(decoder_layers=2, input_feeding=feeding).state_dict().items()}
        for feeding in (True, False)
    ]
    first = "decoder.lstm.weight_ih_l0"
    assert shapes[0].pop(first) == (4 * H, E + H)
    assert shapes[1].pop(first) == (4 * H, E)
    assert shapes[0] == shapes[1]


def scheduled(model, src, lengths, tgt, ratio):
    """Scheduled sampling written out with decode_step."""
    enc = model.encode(src, lengths)
    state, tokens, logits = model.start(enc), tgt[:, 0], []
    for t in range(tgt.size(1)):
        if t > 0:
            own = logits[-1].argmax(-1)
            tokens = own if ratio == 0 else torch.where(torch.rand(len(tgt), 1).squeeze(1) < ratio, tgt[:, t], own)
        step_logits, state, _ = model.decode_step(tokens, state, enc)
        logits.append(step_logits)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_scheduled_sampling_draws_per_step_and_sentence(ratio, feeding):
    model = make_model(input_feeding=feeding)
    src, lengths, tgt = make_batch(model, lengths=(5, 2, 4, 3, 5, 1), steps=7)
    torch.manual_seed(5)
    expected = scheduled(model, src, lengths, tgt, ratio)
    torch.manual_seed(5)
    actual = model(src, lengths, tgt, teacher_forcing_ratio=ratio)
    torch.testing.assert_close(actual.logits, expected)
    assert not torch.allclose(actual.logits, model(src, lengths, tgt).logits)
    actual.logits.sum().backward()


@pytest.mark.parametrize(("ratio", "draws"), [(1.0, False), (0.0, False), (0.5, True)])
def test_teacher_forcing_draws_only_between_zero_and_one(ratio, draws):
    model = make_model()
    batch = make_batch(model)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model(*batch, teacher_forcing_ratio=ratio)
    assert torch.equal(torch.get_rng_state(), before) != draws


def test_nothing_is_remembered_on_the_modules():
    model = make_model()
    src, lengths, tgt = make_batch(model)

    def attributes():
        return {name: sorted(vars(module)) for name, module in model.named_modules()}

    before, first = attributes(), model(src, lengths, tgt).logits
    model(src.flip(1), None, tgt, teacher_forcing_ratio=0.0)
    enc = model.encode(src, lengths)
    model.decode_step(tgt[:, 0], model.start(enc), enc)
    assert attributes() == before
    torch.testing.assert_close(model(src, lengths, tgt).logits, first, rtol=0, atol=0)


def test_states_select_and_repeat_their_sentences():
    model = make_model(decoder_layers=2)
    src, lengths, tgt = make_batch(model)
    enc, state = model.encode(src, lengths), model(src, lengths, tgt).state
    rows, doubled = torch.tensor([2, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    for value, selected, order in (
        (enc, enc.index_select(rows), rows),
        (enc, enc.repeat_interleave(2), doubled),
        (state, state.index_select(rows), rows),
    ):
        for field, x, picked in zip(value._fields, value, selected, strict=True):
            if field == "packed" or x is None:
                continue
            if field == "keys":
                x, picked = x.projected, picked.projected
            batch_dim = 1 if field in ("h", "c") else 0
            assert torch.equal(picked, torch.stack([x.select(batch_dim, r) for r in order], batch_dim)), field
    tokens = torch.tensor([4, 5, 6])
    logits, *_ = model.decode_step(tokens, state, enc)
    picked, *_ = model.decode_step(tokens[rows], state.index_select(rows), enc.index_select(rows))
    torch.testing.assert_close(picked, logits[rows])
    assert state.h.requires_grad
    assert DecoderState(state.h, state.c, None).index_select(rows).feed is None
    without = EncoderOutput(*enc[:1], None, *enc[2:])
    assert without.index_select(rows).keys is without.repeat_interleave(2).keys is None


def test_classic_model_is_two_lstms_joined_by_the_final_state():
    torch.manual_seed(0)
    model = build_seq2seq_model(10, 4, 6)
    lstm = 4 * 6 * (4 + 6 + 2)
    assert sum(p.numel() for p in model.parameters()) == 2 * 10 * 4 + 2 * lstm + 6 * 10 + 10
    src, tgt = torch.randint(4, 10, (3, 5)), torch.randint(4, 10, (3, 7))
    plain = [nn.LSTM(4, 6, batch_first=True) for _ in range(2)]
    for ours, theirs in zip((model.encoder.lstm, model.decoder.lstm), plain, strict=True):
        theirs.load_state_dict(ours.state_dict())
    _, state = plain[0](model.encoder.embedding(src))
    output, _ = plain[1](model.decoder.embedding(tgt), state)
    out = model(src, None, tgt)
    torch.testing.assert_close(out.logits, model.decoder.output(output))
    assert out.logits.shape == (3, 7, 10)
    assert model.training  # and even so, without dropout:
    torch.testing.assert_close(model(src, None, tgt).logits, out.logits)


TOKENS = torch.full((2, 3), 4)
BAD_CALLS = {
    "rank of src": (dict(src=TOKENS[0]), r"src must hold tokens \(B, S\), int64 or int32, got \(3,\)"),
    "dtype of src": (dict(src=TOKENS.float()), "src must hold tokens .* torch.float32"),
    "id of src": (dict(src=TOKENS + 7), "src holds token ids from 11 to 11, but the vocabulary has 11; map unknown"),
    "negative id": (dict(tgt_in=TOKENS - 5), "tgt_in holds token ids from -1 to -1"),
    "lengths": (dict(src_lengths=torch.tensor([1, 4])), "lengths must lie in 0..3"),
    "number of lengths": (dict(src_lengths=torch.tensor([1])), r"lengths must have shape \(2,\)"),
    "batch": (dict(tgt_in=TOKENS[:1]), r"the batch size of src.*got tgt_in \(1, 3\) for src \(2, 3\)"),
    "no source": (dict(src=TOKENS[:, :0]), r"at least one position \(S >= 1\), got \(2, 0\)"),
    "no steps": (dict(tgt_in=TOKENS[:, :0]), "at least one step"),
    "ratio": (dict(teacher_forcing_ratio=1.5), r"teacher_forcing_ratio must lie in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_gets_a_sentence(case):
    arguments, sentence = BAD_CALLS[case]
    with pytest.raises(ValueError, match=sentence):
        make_model()(**(dict(src=TOKENS, src_lengths=None, tgt_in=TOKENS) | arguments))


def test_features_and_steps_are_checked_too():
    model = make_model(src_vocab_size=None, source_features=5)
    for src in (torch.ones(2, 3, 4), torch.ones(2, 5), torch.ones(2, 3, 5).long()):
        with pytest.raises(ValueError, match=r"src must hold features \(B, S, 5\)"):
            model.encode(src)
    enc = model.encode(torch.ones(2, 3, 5).double())
    with pytest.raises(ValueError, match=r"tokens \(3,\), a state of 2 rows and an encoder output of 2"):
        model.decode_step(torch.tensor([1, 1, 1]), model.start(enc), enc)
    state = model.start(enc).index_select(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"K >= 1 rows per sentence.*a state of 3 rows and an encoder output of 2"):
        model.decode_step(torch.tensor([1, 1, 1]), state, enc)


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
def test_gradients_for_each_sentence(feeding):
    """torch.func.vmap over torch.func.grad beside one backward a sentence, in float64."""
    model = make_model(input_feeding=feeding)
    src, lengths, tgt = make_batch(model)
    parameters = dict(model.named_parameters())

    def loss(parameters, src, tgt):
        return torch.func.functional_call(model, parameters, (src, lengths, tgt)).logits.square().sum()

    both = torch.stack([src, src.flip(0)]), torch.stack([tgt, tgt.flip(0)])
    actual = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, *both)
    for k in range(2):
        expected = torch.autograd.grad(
            loss(parameters, both[0][k], both[1][k]),
            list(parameters.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        torch.testing.assert_close([actual[name][k] for name in parameters], list(expected))


def test_a_step_with_a_token_outside_the_vocabulary_gets_the_sentence_of_forward():
    model = make_model()
    src, lengths, tgt = make_batch(model)
    enc = model.encode(src, lengths)
    for bad in (-1, model.config.tgt_vocab_size):
        tokens = tgt[:, 0].clone()
        tokens[-1] = bad
        with pytest.raises(ValueError, match="but the vocabulary has"):
            model.decode_step(tokens, model.start(enc), enc)


@pytest.mark.parametrize(
    "kind", [list, tuple, lambda n: torch.tensor(n, device="cpu").numpy()], ids=["list", "tuple", "array"]
)
def test_lengths_in_any_form_and_under_any_default_device(kind):
    model = make_model()
    src, lengths, tgt = make_batch(model)
    expected = model(src, lengths, tgt).logits
    generated = model.generate(src, lengths, max_new_tokens=4).sequences
    try:
        torch.set_default_device("meta")
        assert torch.equal(model(src, kind(lengths.tolist()), tgt).logits, expected)
        assert torch.equal(model.generate(src, kind(lengths.tolist()), max_new_tokens=4).sequences, generated)
        query, keys = torch.ones(len(src), 2, 4, device="cpu"), torch.ones(len(src), src.size(1), 4, device="cpu")
        assert fastseq.ops.attention(query, keys, lengths=kind(lengths.tolist()))[0].device.type == "cpu"
    finally:
        torch.set_default_device(None)
