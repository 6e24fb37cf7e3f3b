"""The seq2seq model where it is trained and where it is traced: precision, dropout, compiled and exported graphs."""

import pytest
import torch
import torch.nn.functional as F
from seq2seq_cases import VARIANTS, make_batch, make_model
from torch import nn

from fastseq.ops.attention.spec import Keys
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput


def test_learns_four_pairs_by_heart():
    torch.manual_seed(0)
    model = make_model(torch.float32, dropout=0.0).train()
    src, lengths, tgt = make_batch(model, lengths=(5, 2, 4, 3), steps=5)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(70):
        loss = F.cross_entropy(model(src, lengths, tgt[:, :-1]).logits.flatten(0, 1), tgt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
def test_trains_under_autocast_and_in_bfloat16(feeding):
    model = make_model(torch.float32, input_feeding=feeding).train()
    src, lengths, tgt = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(src, lengths, tgt, need_weights=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), tgt.flatten())
    loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    low = make_model(torch.bfloat16, input_feeding=feeding)
    wide = make_model(torch.float32, input_feeding=feeding)
    logits = low(src, lengths, tgt).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wide(src, lengths, tgt).logits, rtol=0.05, atol=0.05)


def test_dropout_repeats_with_the_seed_and_rests_in_evaluation():
    for feeding in (True, False):
        model = make_model(input_feeding=feeding, dropout=0.5, encoder_layers=2, decoder_layers=2)
        batch = make_batch(model)
        assert torch.equal(model(*batch).logits, model(*batch).logits)
        model.train()
        torch.manual_seed(1)
        first, second = model(*batch).logits, model(*batch).logits
        torch.manual_seed(1)
        assert torch.equal(model(*batch).logits, first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "no feeding"])
@pytest.mark.parametrize(
    ("side", "options"),
    [
        ("encoder", dict(embed_dropout=0.5)),
        ("encoder", dict(dropout=0.5, embed_dropout=0.0, output_dropout=0.0, encoder_layers=2)),
        ("decoder", dict(embed_dropout=0.5)),
        ("decoder", dict(dropout=0.5, embed_dropout=0.0, output_dropout=0.0, decoder_layers=2)),
        ("decoder", dict(output_dropout=0.5)),
    ],
    ids=["source embedding", "encoder layers", "target embedding", "decoder layers", "output"],
)
def test_each_dropout_acts_in_its_place(side, options, feeding):
    model = make_model(input_feeding=feeding, **(dict(dropout=0.0) | options))
    batch = make_batch(model)
    expected = model(*batch).logits
    getattr(model, side).train()
    assert not torch.allclose(model(*batch).logits, expected)


def test_compiles_into_one_graph_with_dynamic_sizes():
    torch._dynamo.reset()
    model = make_model(torch.float32, input_feeding=False)
    compiled = torch.compile(
        model, backend="eager", fullgraph=True, dynamic=True
    )  # traces as any backend, compiles nothing
    torch._dynamo.utils.counters.clear()
    for lengths, steps in (((5, 2, 4), 7), ((3, 9), 4)):
        batch = make_batch(model, lengths, steps)
        torch.testing.assert_close(compiled(*batch).logits, model(*batch).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("variant", ["additive, feeding", "dot, whole target, two layers"])
def test_generate_with_a_compiled_step(variant, num_beams):
    torch._dynamo.reset()
    model = make_model(torch.float32, **VARIANTS[variant]).eval()
    src, lengths, _ = make_batch(model, (5, 2, 4, 7, 1, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.decoder.output.bias[model.config.eos_id] += 1  # sentences end, and leave the batch, at different steps
    expected = model.generate(src, lengths, num_beams=num_beams, max_new_tokens=12)
    assert expected.lengths.unique().numel() > 1
    torch._dynamo.utils.counters.clear()
    model.decode_step = torch.compile(model.decode_step, backend="eager", fullgraph=True, dynamic=True)
    actual = model.generate(src, lengths, num_beams=num_beams, max_new_tokens=12)
    assert actual.sequences.equal(expected.sequences)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3, "compiled again for a number of rows"


class EncodeOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, src, lengths):
        return self.model.encode(src, lengths)


class StepOnly(EncodeOnly):
    def forward(self, tokens, state, enc):
        return self.model.decode_step(tokens, state, enc)


@pytest.mark.parametrize("variant", ["additive, feeding", "dot, whole target, two layers"])
def test_encode_and_decode_step_export_with_dynamic_sizes(variant):
    model = make_model(torch.float32, **VARIANTS[variant])
    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=64)
    src, lengths, tgt = make_batch(model)
    encode = torch.export.export(EncodeOnly(model), (src, lengths), dynamic_shapes=({0: b, 1: s}, {0: b})).module()
    enc = model.encode(src, lengths, single_steps=False)
    shapes = EncoderOutput({0: b, 1: s}, Keys({0: b, 1: s}), {0: b}, {1: b}, {1: b})
    state_shapes = DecoderState({1: b}, {1: b}, {0: b} if model.config.input_feeding else None)
    arguments = (tgt[:, 0], model.start(enc), enc)
    step = torch.export.export(StepOnly(model), arguments, dynamic_shapes=({0: b}, state_shapes, shapes)).module()

    src, lengths, tgt = make_batch(model, lengths=(7, 0, 1, 3, 6))
    enc = model.encode(src, lengths, single_steps=False)
    torch.testing.assert_close(tuple(encode(src, lengths)), tuple(enc))
    state = model.start(enc)
    for t in range(2):
        logits, state, weights = model.decode_step(tgt[:, t], previous := state, enc)
        exported = step(tgt[:, t], previous, enc)
        torch.testing.assert_close(exported[0], logits)
        torch.testing.assert_close(exported[2], weights)
        torch.testing.assert_close(tuple(exported[1]), tuple(state))
