"""Recurrent dropout, zoneout and layer normalisation in the models: whole targets, steps, masks, decoding."""

import pytest
import torch
from seq2seq_cases import make_batch, make_model

from fastseq import Seq2Seq
from fastseq.errors import UserError
from fastseq.export.main import export
from fastseq.seq2seq import decoder as decoder_module

EVAL = {"zoneout": {"zoneout_hidden": 0.3, "zoneout_cell": 0.5}, "norm": {"layer_norm": True}}
EVAL["both"] = EVAL["zoneout"] | EVAL["norm"]
LAYERS = {"encoder_layers": 2, "decoder_layers": 2}


def randomise(model: Seq2Seq) -> Seq2Seq:
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "norm_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.mark.parametrize("option", EVAL)
@pytest.mark.parametrize("input_feeding", [True, False])
def test_steps_give_the_logits_of_the_whole_target(option, input_feeding):
    model = randomise(make_model(**EVAL[option], **LAYERS, input_feeding=input_feeding))
    src, lengths, tgt = make_batch(model)
    whole = model(src, lengths, tgt).logits
    enc = model.encode(src, lengths)
    state, steps = model.decoder.start(enc), []
    for tokens in tgt.unbind(1):
        logits, state, _ = model.decoder.step(tokens, state, enc, False)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    plain = make_model(**LAYERS, input_feeding=input_feeding)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(src, lengths, tgt).logits, whole)


def test_one_mask_of_recurrent_dropout_serves_all_steps(monkeypatch):
    model = make_model(recurrent_dropout=0.5, **LAYERS, dropout=0.0).train()
    masks = []
    step = decoder_module.LSTM.step

    def spy(self, gates, state, weight_hh, norms, hidden_mask):
        masks.append(hidden_mask)
        return step(self, gates, state, weight_hh, norms, hidden_mask)

    monkeypatch.setattr(decoder_module.LSTM, "step", spy)
    src, lengths, tgt = make_batch(model)
    model.loss(src, lengths, tgt, tgt).backward()
    first, second = masks[:2]
    assert len(masks) == 2 * tgt.size(1) and set(first.unique().tolist()) == {0.0, 2.0}
    assert all(m is (first, second)[k % 2] for k, m in enumerate(masks)) and not torch.equal(first, second)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("input_feeding", [True, False])
def test_masks_follow_the_seed(input_feeding):
    options = EVAL["both"] | {"recurrent_dropout": 0.5, "input_feeding": input_feeding}
    model = make_model(**options, **LAYERS).train()
    src, lengths, tgt = make_batch(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.loss(src, lengths, tgt, tgt))
    assert losses[0] == losses[1] != losses[2]


def test_recurrent_dropout_leaves_decoding_to_the_operator():
    """In eval mode it is off: same tokens as the plain model, by the same fast path."""
    model = make_model(torch.float32, recurrent_dropout=0.5)
    plain = make_model(torch.float32)
    src, lengths, _ = make_batch(model)
    assert model.decoder._plain_weights() is not None and make_model(layer_norm=True).decoder._plain_weights() is None
    torch.testing.assert_close(model.generate(src, lengths).sequences, plain.generate(src, lengths).sequences)


@pytest.mark.parametrize("option", EVAL)
def test_beams_of_a_batch_are_those_of_its_sentences(option):
    model = randomise(make_model(**EVAL[option]))
    src, lengths, _ = make_batch(model)
    together = model.generate(src, lengths, num_beams=3, max_new_tokens=5).sequences
    for k, length in enumerate(lengths.tolist()):
        alone = model.generate(src[k : k + 1, :length], lengths[k : k + 1], num_beams=3, max_new_tokens=5).sequences
        assert torch.equal(together[k, : alone.size(1)], alone[0])


def test_the_count_of_parameters():
    model = make_model(layer_norm=True, **LAYERS)
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count


def test_onnx_is_refused_with_a_way_out(tmp_path):
    class Trained:
        model = make_model(torch.float32, layer_norm=True)

    with pytest.raises(UserError, match=r"ONNX has no LSTM with layer_norm=True.*use --format torch"):
        export(Trained, tmp_path / "out", "onnx")
