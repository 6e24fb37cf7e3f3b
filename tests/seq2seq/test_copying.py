"""Copying: the pointer-generator of See et al. 2017 against its equations, in loss, logits and search."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseq import Seq2Seq, Seq2SeqConfig
from fastseq.seq2seq.copying import copies_of, extended_logits, gate_of, negative_log_probability
from fastseq.seq2seq.ensemble import Ensemble

V = 9
SIZES = dict(src_vocab_size=11, tgt_vocab_size=V, embedding_dim=6, hidden_size=8, copy=True)
OPTIONS = {
    "feeding": {},
    "whole": dict(input_feeding=False, decoder_layers=2),
    "dot, tied": dict(attention="dot", share_decoder_input_output_embed=True, embedding_dim=8, input_feeding=False),
    "torch": dict(backend="torch"),
}


def make(**options) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(**SIZES | options)).double().eval()


def batch() -> dict[str, torch.Tensor]:
    """Three sources of 4, 1 and 3 positions; the first has the unknown words 9 and 10, one of them twice."""
    tokens = torch.tensor([[3, 5, 3, 3], [4, 0, 0, 0], [6, 3, 7, 0]])
    columns = torch.tensor([[9, 5, 10, 9], [4, 0, 0, 0], [8, 9, 8, 0]])
    labels = torch.tensor([[9, 10, 5, 7, 2], [4, 2, 0, 0, 0], [8, 9, 2, 0, 0]])
    tgt_in = torch.cat((torch.ones(3, 1, dtype=torch.int64), labels[:, :-1]), 1)
    lengths = torch.tensor([4, 1, 3])
    return dict(src=torch.stack((tokens, columns), 2), src_lengths=lengths, tgt_in=tgt_in, labels=labels)


def distribution(logits, gate, attention, columns):
    """Equation 9 word for word: (B, R, V + S) probabilities."""
    p = gate.sigmoid()[..., None]
    total = F.pad(p * logits.softmax(-1), (0, attention.size(-1)))
    for s in range(attention.size(-1)):
        column = columns[:, None, s, None].expand(*gate.shape, 1)
        total = total.scatter_add(-1, column, (1 - p) * attention[..., s, None])
    return total


def parts(seed: int = 3, lengths=(4, 1, 3)):
    torch.manual_seed(seed)
    logits, gate = torch.randn(3, 2, V, dtype=torch.float64) * 3, torch.randn(3, 2, dtype=torch.float64) * 2
    scores = torch.randn(3, 2, 4, dtype=torch.float64)
    outside = torch.arange(4) >= torch.tensor(lengths)[:, None, None]
    attention = scores.masked_fill(outside, -torch.inf).softmax(-1).nan_to_num()
    return logits, gate, attention, batch()["src"][..., 1]


def test_extended_logits_are_the_mixture():
    logits, gate, attention, columns = parts()
    actual = extended_logits(logits, gate, attention, copies_of(columns)).softmax(-1)
    expected = distribution(logits, gate, attention, columns)
    torch.testing.assert_close(expected.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)
    assert (actual[0, :, V + 2 :] == 0).all()  # no word of the source


def test_the_loss_of_a_label_is_its_log_probability():
    logits, gate, attention, columns = parts()
    labels = torch.tensor([[9, 10], [4, 7], [8, 9]])
    generated = -logits.log_softmax(-1).gather(-1, labels.where(labels < V, 3)[..., None])[..., 0]
    actual = negative_log_probability(generated, gate, attention, copies_of(columns), labels, V)
    expected = -distribution(logits, gate, attention, columns).gather(-1, labels[..., None])[..., 0].log()
    torch.testing.assert_close(actual, expected)


def test_an_empty_source_generates():
    logits, gate, attention, columns = parts(lengths=(4, 0, 3))
    columns = columns.clone()
    columns[1] = 0
    gate = gate_of(gate, torch.tensor([4, 0, 3]))
    extended = extended_logits(logits, gate, attention, copies_of(columns))
    torch.testing.assert_close(extended[1, :, :V].softmax(-1), logits[1].softmax(-1))
    loss = negative_log_probability(
        -logits[..., 5].log_softmax(-1), gate, attention, copies_of(columns), torch.full((3, 2), 5), V
    )
    torch.testing.assert_close(loss[1], -logits[1, :, 5].log_softmax(-1))


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_gradients_are_finite_for_extreme_gates_and_weights(size):
    """Weights that underflow, a gate that is certain: no NaN, and the gradient of the mixture where it is one."""
    logits, gate, attention, columns = (x.float() if x.is_floating_point() else x for x in parts())
    attention[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    inputs = [x.clone().requires_grad_() for x in (logits * size, gate * size, attention)]
    extended = extended_logits(*inputs, copies_of(columns))
    labels = torch.tensor([[9, 10], [4, 7], [8, 9]])
    F.cross_entropy(extended.flatten(0, 1), labels.flatten()).backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    given = inputs[0].detach().log_softmax(-1).gather(-1, labels.where(labels < V, 3)[..., None])[..., 0]
    loss = negative_log_probability(-given, *inputs[1:], copies_of(columns), labels, V)
    loss.sum().backward()
    assert loss.isfinite().all() and all(x.grad.isfinite().all() for x in inputs[1:])


def test_gradcheck():
    logits, gate, attention, columns = parts(lengths=(4, 4, 4))  # no weight is 0, below which numbers are clamped
    inputs = [x.requires_grad_() for x in (logits, gate, attention)]
    copies, labels = copies_of(columns), torch.tensor([[9, 10], [4, 7], [8, 9]])

    def finite(*given):  # columns outside the source hold -inf
        extended = extended_logits(*given, copies)
        return extended.masked_fill(extended.isinf(), 0.0)

    assert torch.autograd.gradcheck(finite, inputs)
    assert torch.autograd.gradcheck(
        lambda *given: negative_log_probability(*given, copies, labels, V), (-logits[..., 0], gate, attention)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_and_gradients_are_the_ones_of_the_logits(options, smoothing):
    model, given = make(**options), batch()
    mask = given["labels"] != 0
    loss = model.loss(**given, label_smoothing=smoothing, reduction="sum")
    logits = model(given["src"], given["src_lengths"], given["tgt_in"]).logits
    assert logits.shape == (3, 5, V + 4)
    expected = -logits.log_softmax(-1).gather(-1, given["labels"][..., None])[..., 0][mask].sum()
    if smoothing:
        steps = model.decoder.vectors(
            given["tgt_in"], model.encode(given["src"], given["src_lengths"]), 1.0, False, None
        )
        even = -model.decoder.output(steps.vectors).log_softmax(-1).mean(-1)[mask].sum()
        expected = (1 - smoothing) * expected + smoothing * even
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)]
    torch.testing.assert_close(*grads)
    assert all(grad.abs().sum() > 0 for grad in grads[0])  # each parameter is connected
    mean = model.loss(**given, label_smoothing=smoothing)
    torch.testing.assert_close(mean, loss / mask.sum())


def test_rows_of_the_loss():
    model, given = make(), batch()
    rows = model.loss(**given, reduction="none")
    logits = model(given["src"], given["src_lengths"], given["tgt_in"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), ignore_index=0, reduction="none")
    torch.testing.assert_close(rows, expected.view(3, 5))


def test_an_output_layer_with_a_hook():
    model, given = make(), batch()
    plain = model.loss(**given, label_smoothing=0.1)
    model.decoder.output.register_forward_hook(lambda module, args, output: output * 1.0)
    torch.testing.assert_close(model.loss(**given, label_smoothing=0.1), plain)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_steps_are_the_ones_of_the_whole_target(backend):
    """With one operator a step (auto) and without; two rows of each sentence."""
    model, given = make(backend=backend), batch()
    logits = model(given["src"], given["src_lengths"], given["tgt_in"]).logits
    with torch.no_grad():
        enc = model.encode(given["src"], given["src_lengths"])
        rows = torch.arange(3).repeat_interleave(2)
        state = model.start(enc).index_select(rows)
        for step in range(5):
            tokens = given["tgt_in"][rows, step]
            actual, state, _ = model.decode_step(tokens, state, enc)
            torch.testing.assert_close(actual.softmax(-1), logits[rows, step].softmax(-1))


def test_ratios_below_one_read_the_extended_prediction():
    model, given = make(), batch()
    with torch.no_grad():
        model.decoder.copy_gate.bias.fill_(-50.0)  # always copies
    sampled = model(given["src"], given["src_lengths"], given["tgt_in"], teacher_forcing_ratio=0.0).logits
    assert set(sampled[0].argmax(-1).tolist()) <= {5, 9, 10}
    tokens = torch.cat((given["tgt_in"][:, :1], sampled.argmax(-1)[:, :-1]), 1)
    torch.testing.assert_close(model(given["src"], given["src_lengths"], tokens).logits, sampled)


def test_copies_follow_their_sentences():
    copies = copies_of(batch()["src"][..., 1])
    assert copies.first.tolist() == [[0, 1, 2, 0], [0, 1, 1, 1], [0, 1, 0, 3]]
    rows = torch.tensor([2, 0, 0])
    assert copies.index_select(rows).columns.tolist() == [copies.columns[row].tolist() for row in (2, 0, 0)]
    doubled = copies.repeat_interleave(2)
    assert doubled.first.tolist() == [row for row in copies.first.tolist() for _ in range(2)]


def copying_model() -> Seq2Seq:
    model = make()
    with torch.no_grad():
        model.decoder.copy_gate.bias.fill_(-50.0)
    return model


@pytest.mark.parametrize(
    "search", [{}, dict(num_beams=3), dict(do_sample=True), dict(do_sample=True, top_k=3), dict(num_beams=2)]
)
def test_search_over_the_extended_vocabulary(search):
    model, given = copying_model(), batch()
    torch.manual_seed(5)
    found = model.generate(given["src"], given["src_lengths"], max_new_tokens=6, output_scores=True, **search)
    allowed = [{5, 9, 10}, {4}, {8, 9}]
    for row, length, possible in zip(found.sequences.tolist(), found.lengths.tolist(), allowed, strict=True):
        assert set(row[:length]) <= possible
    tgt_in = torch.cat((torch.ones(3, 1, dtype=torch.int64), found.sequences[:, :-1]), 1)
    losses = model.loss(given["src"], given["src_lengths"], tgt_in, found.sequences, reduction="none")
    torch.testing.assert_close(-found.token_scores, losses.to(found.token_scores.dtype))


def test_a_prefix_may_be_a_copy():
    model, given = copying_model(), batch()
    found = model.generate(given["src"], given["src_lengths"], prefix_tokens=[[10], [], []], max_new_tokens=2)
    assert found.sequences[0, 0] == 10
    with pytest.raises(ValueError, match="outside the target vocabulary of 13 tokens"):
        model.generate(given["src"], given["src_lengths"], prefix_tokens=[[13], [], []])


def test_an_ensemble_of_copying_models():
    models, given = [make(), make(backend="torch", input_feeding=False)], batch()
    both = Ensemble(models).eval()
    tensors = given["src"], given["src_lengths"], given["tgt_in"]
    total = sum(model(*tensors).logits.log_softmax(-1) for model in models) / 2
    expected = -total.log_softmax(-1).gather(-1, given["labels"][..., None])[..., 0]
    expected = expected.masked_fill(given["labels"] == 0, 0)
    torch.testing.assert_close(both.loss(*tensors, given["labels"], reduction="none"), expected)
    assert both.generate(*tensors[:2], num_beams=2, max_new_tokens=3).sequences.shape[0] == 3
    with pytest.raises(ValueError, match="copy must be the same"):
        Ensemble([models[0], make(copy=False)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(attention="none", input_feeding=False), "copy follows the attention"),
        (dict(src_vocab_size=None, source_features=3), "source_features has none"),
        (dict(frame_stack=2), "copy needs the attention to see each source position"),
    ],
)
def test_options_that_exclude_copying(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Seq2SeqConfig(**SIZES | options)


def test_bad_sources_and_labels():
    model, given = make(), batch()
    with pytest.raises(ValueError, match=r"\(B, S, 2\)"):
        model.encode(given["src"][..., 0])
    with pytest.raises(ValueError, match="ids from 5 to 13, but the vocabulary has 13"):
        model.encode(given["src"].clamp(max=8) + torch.tensor([0, 5]))
    labels = given["labels"].clone()
    labels[1, 0] = 9
    with pytest.raises(ValueError, match="no word of its source"):
        model.loss(given["src"], given["src_lengths"], given["tgt_in"], labels)


def test_parameter_count():
    for options in OPTIONS.values():
        model = make(**options)
        assert model.config.parameter_count == sum(p.numel() for p in model.parameters())


def test_training_learns_to_copy_unknown_words():
    """Fresh unknown words in each batch, all read as unk: right above chance by copying alone."""
    torch.manual_seed(1)
    config = Seq2SeqConfig(**SIZES | dict(hidden_size=16, embedding_dim=8, dropout=0.0, attention="dot"))
    model = Seq2Seq(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def draw():  # "k0 x k1 y" -> the word after the marker 5
        place = torch.randint(0, 3, (16,))
        tokens = torch.full((16, 6), 3)
        tokens[torch.arange(16), 2 * place] = 5
        columns = tokens.where(tokens != 3, V + torch.arange(6))
        label = V + 2 * place + 1
        labels = torch.stack((label, torch.full_like(label, 2)), 1)
        return torch.stack((tokens, columns), 2), labels

    for _ in range(150):
        src, labels = draw()
        tgt_in = torch.cat((torch.ones(16, 1, dtype=torch.int64), labels[:, :1]), 1)
        optimizer.zero_grad()
        model.loss(src, None, tgt_in, labels).backward()
        optimizer.step()
    src, labels = draw()
    found = model.generate(src, max_new_tokens=2).sequences
    assert (found == labels).all(1).float().mean() > 0.9


def test_replaced_gate_is_used():
    model, given = make(), batch()
    before = model.loss(**given)
    model.decoder.copy_gate = nn.Linear(22, 1).double()
    assert model.loss(**given) != before
