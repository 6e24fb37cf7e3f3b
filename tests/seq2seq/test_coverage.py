"""Coverage in the decoder (See et al. 2017, equations 11 to 13): training, steps, search."""

import pytest
import torch

from fastseq import Seq2Seq, Seq2SeqConfig

SIZES = dict(src_vocab_size=11, tgt_vocab_size=13, embedding_dim=6, hidden_size=8, coverage=True)
OPTIONS = {
    "feeding": {},
    "whole": dict(input_feeding=False, decoder_layers=2),
    "normed": dict(attention="normed_additive", backend="torch"),
    "copy": dict(copy=True),
}


def make(**options) -> Seq2Seq:
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(**SIZES | options)).double().eval()
    if hasattr(model.decoder.attention, "coverage_weight"):
        torch.nn.init.normal_(model.decoder.attention.coverage_weight)
    return model


def batch(model: Seq2Seq) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    src, labels = torch.randint(4, 11, (3, 4), generator=generator), torch.randint(4, 13, (3, 5), generator=generator)
    labels[1, 2:], labels[2, 3:] = 0, 0
    tgt_in = torch.cat((torch.ones(3, 1, dtype=torch.int64), labels[:, :-1]), 1)
    src = torch.stack((src, src), 2) if model.config.copy else src
    return dict(src=src, src_lengths=torch.tensor([4, 1, 3]), tgt_in=tgt_in, labels=labels)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_of_the_definition_and_gradients(options):
    model = make(**options)
    given = batch(model)
    output = model(given["src"], given["src_lengths"], given["tgt_in"], need_weights=True)
    covered = output.attention.cumsum(1) - output.attention
    torch.testing.assert_close(output.state.coverage, output.attention.sum(1))
    repeats = torch.minimum(output.attention, covered).sum(-1)[given["labels"] != 0].sum()
    losses = -output.logits.log_softmax(-1).gather(-1, given["labels"][..., None])[..., 0]
    expected = losses[given["labels"] != 0].sum() + repeats
    loss = model.loss(**given, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.loss(**given), loss / (given["labels"] != 0).sum())
    torch.testing.assert_close(model.loss(**given, reduction="none").sum(), expected - repeats)
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)]
    torch.testing.assert_close(*grads)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_the_attention_reads_the_coverage():
    """The first step has no coverage; the later ones differ with its weight."""
    model, without = make(), make(coverage=False)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "coverage" not in k})
    given = batch(model)
    tensors = given["src"], given["src_lengths"], given["tgt_in"]
    with_it, plain = (m(*tensors, need_weights=True).attention for m in (model, without))
    torch.testing.assert_close(with_it[:, 0], plain[:, 0])
    assert (with_it[0, 1:] - plain[0, 1:]).abs().max() > 1e-3


def test_the_weight_of_the_coverage_loss():
    losses = [make(coverage_loss=weight).loss(**batch(make())) for weight in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
    assert losses[1] > losses[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_are_the_ones_of_the_whole_target(options):
    model = make(**options)
    given = batch(model)
    logits = model(given["src"], given["src_lengths"], given["tgt_in"]).logits
    with torch.no_grad():
        enc = model.encode(given["src"], given["src_lengths"])
        rows = torch.arange(3).repeat_interleave(2)
        state = model.start(enc).index_select(rows)
        for step in range(5):
            actual, state, _ = model.decode_step(given["tgt_in"][rows, step], state, enc, need_weights=False)
            torch.testing.assert_close(actual.softmax(-1), logits[rows, step].softmax(-1))


@pytest.mark.parametrize("search", [{}, dict(num_beams=3), dict(do_sample=True)])
def test_search(search):
    model = make()
    given = batch(model)
    torch.manual_seed(3)
    found = model.generate(given["src"], given["src_lengths"], max_new_tokens=7, output_scores=True, **search)
    tgt_in = torch.cat((torch.ones(3, 1, dtype=torch.int64), found.sequences[:, :-1]), 1)
    losses = model.loss(given["src"], given["src_lengths"], tgt_in, found.sequences, reduction="none")
    torch.testing.assert_close(-found.token_scores, losses.to(found.token_scores.dtype))


def test_predicted_inputs():
    model = make()
    given = batch(model)
    sampled = model(given["src"], given["src_lengths"], given["tgt_in"], teacher_forcing_ratio=0.0)
    tokens = torch.cat((given["tgt_in"][:, :1], sampled.logits.argmax(-1)[:, :-1]), 1)
    torch.testing.assert_close(model(given["src"], given["src_lengths"], tokens).logits, sampled.logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(attention="dot"), "coverage is a term of the additive scores, and attention is 'dot'"),
        (dict(coverage_loss=-1.0), "coverage_loss must be finite and >= 0, got -1.0"),
        (dict(coverage=False, coverage_loss=0.5), "coverage_loss has no use without coverage"),
    ],
)
def test_options_that_exclude_each_other(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Seq2SeqConfig(**SIZES | options)


def test_parameter_count():
    model = make(attention_size=5, attention="normed_additive")
    assert model.config.parameter_count == sum(p.numel() for p in model.parameters())
