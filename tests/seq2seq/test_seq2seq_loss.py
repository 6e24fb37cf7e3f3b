"""``Seq2Seq.loss``: the cross-entropy of the logits, without them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseq import Seq2Seq, Seq2SeqConfig
from fastseq.dispatch import record

SIZES = dict(src_vocab_size=11, tgt_vocab_size=13, embedding_dim=6, hidden_size=8)
OPTIONS = {
    "feeding": {},
    "whole": dict(input_feeding=False, decoder_layers=2),
    "no attention": dict(attention="none", input_feeding=False),
    "tied": dict(share_decoder_input_output_embed=True, embedding_dim=8, input_feeding=False),
}


def make(**options) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(**SIZES | options)).double().eval()


def batch(full: bool = False) -> dict[str, torch.Tensor]:
    """Three sentences of 5, 2 and 3 labels, or of 5 each."""
    generator = torch.Generator().manual_seed(1)
    src, labels = torch.randint(4, 11, (3, 4), generator=generator), torch.randint(4, 13, (3, 5), generator=generator)
    if not full:
        labels[1, 2:], labels[2, 3:] = 0, 0
    tgt_in = torch.cat((torch.ones(3, 1, dtype=torch.int64), labels[:, :-1]), 1)
    return dict(src=src, src_lengths=torch.tensor([4, 1, 3]), tgt_in=tgt_in, labels=labels)


def of_logits(model, src, src_lengths, tgt_in, labels, teacher_forcing_ratio=1.0, **options):
    logits = model(src, src_lengths, tgt_in, teacher_forcing_ratio=teacher_forcing_ratio).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0, **options)


@pytest.mark.parametrize("full", [False, True], ids=["padded", "full"])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_loss_of_the_logits(options, ratio, full):
    model, losses = make(**options), []
    for call in (model.loss, lambda **given: of_logits(model, **given)):
        torch.manual_seed(2)  # of the tokens that are drawn
        losses.append(call(**batch(full), label_smoothing=0.1, teacher_forcing_ratio=ratio))
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    model, given = make(), batch()
    actual, expected = model.loss(**given, reduction=reduction), of_logits(model, **given, reduction=reduction)
    torch.testing.assert_close(actual, expected.view(3, 5) if reduction == "none" else expected)


def test_the_decoder_skips_the_padding():
    model = make(input_feeding=False)
    for full in (False, True):
        with record() as choices:
            model.loss(**batch(full))
        of_decoder = [choice.call for choice in choices if choice.op == "lstm"][-1]
        assert of_decoder.lengths == (not full)


def test_a_sentence_and_a_batch_without_labels():
    model, given = make(input_feeding=False), batch()
    given["labels"][1] = 0
    torch.testing.assert_close(model.loss(**given), of_logits(model, **given))
    given["labels"][:] = 0
    assert model.loss(**given, reduction="sum") == 0
    assert model.loss(**given).isnan()


def test_an_output_layer_with_a_hook_or_of_another_kind():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model, given = make(), batch()
    handle = model.decoder.output.register_forward_hook(lambda module, args, result: 3 * result)
    for reduction in ("mean", "none"):
        actual, expected = model.loss(**given, reduction=reduction), of_logits(model, **given, reduction=reduction)
        torch.testing.assert_close(actual.flatten(), expected.flatten())
    handle.remove()
    model.decoder.output = Doubled(8, 13).double()
    torch.testing.assert_close(model.loss(**given), of_logits(model, **given))


def test_no_logits_are_kept():
    model, kept = make(input_feeding=False, tgt_vocab_size=1024), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model.loss(**batch())
    assert not [shape for shape in kept if shape[-1:] == (1024,) and len(shape) > 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=torch.zeros(3, 4, dtype=torch.int64)), r"shape of tgt_in, got \(3, 4\) and \(3, 5\)"),
        (dict(labels=torch.full((3, 5), 13)), "labels holds token ids from 13 to 13, but the vocabulary has 13"),
        (dict(labels=torch.zeros(3, 5)), r"labels must hold tokens \(B, T\)"),
        (dict(reduction="most"), "unknown reduction 'most'"),
        (dict(label_smoothing=-1.0), r"label_smoothing must lie in \[0, 1\]"),
        (dict(teacher_forcing_ratio=2.0), "teacher_forcing_ratio must lie in"),
    ],
    ids=["shape", "class", "dtype", "reduction", "smoothing", "ratio"],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        make().loss(**batch() | changes)
