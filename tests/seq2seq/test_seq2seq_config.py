"""The options of the seq2seq model: each one has an effect, and contradictory ones raise."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import torch
from seq2seq_cases import BASE, SRC_VOCAB, TGT_VOCAB, H, make_batch, make_model
from torch import nn

from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq

# Per option: the options that the change starts from, and the change. It must change parameters or output, or raise.
LIVE = {
    "src_vocab_size": ({}, 20),
    "tgt_vocab_size": ({}, 20),
    "source_features": ({}, 5),
    "tag_vocab_size": ({}, 7),
    "embedding_dim": ({}, 7),
    "hidden_size": ({}, 10),
    "encoder_layers": ({}, 2),
    "decoder_layers": ({}, 2),
    "bidirectional": ({}, False),
    "frame_stack": ({}, 2),
    "pyramid": (dict(encoder_layers=2), True),
    "attention": ({}, "normed_additive"),
    "attention_size": ({}, 5),
    "attention_scale": ({}, 2.0),
    "input_feeding": ({}, False),
    "bridge": ({}, "zeros"),
    "bridge_activation": ({}, "none"),
    "combine_bias": ({}, True),
    "combine_activation": ({}, "none"),
    "dropout": (dict(encoder_layers=2, embed_dropout=0.0, output_dropout=0.0, dropout=0.0), 0.5),
    "embed_dropout": (dict(dropout=0.0), 0.5),
    "output_dropout": (dict(dropout=0.0), 0.5),
    "recurrent_dropout": (dict(dropout=0.0), 0.5),
    "zoneout_hidden": ({}, 0.5),
    "zoneout_cell": ({}, 0.5),
    "layer_norm": ({}, True),
    "share_all_embeddings": (dict(src_vocab_size=TGT_VOCAB, embedding_dim=H), True),
    "share_decoder_input_output_embed": (dict(embedding_dim=H), True),
    "freeze_bias_hh": ({}, True),
    "copy": ({}, True),
    "coverage": ({}, True),
    "coverage_loss": (dict(coverage=True), 2.0),
    "pad_id": ({}, 10),
    "bos_id": ({}, 10),
    "eos_id": ({}, 10),
    "unk_id": ({}, 10),
    "backend": ({}, "torch"),
}
BOS = 1


def trace_of(options):
    """Everything an option can change: parameters, training output, greedy decoding; or the sentence if it raises."""
    torch.manual_seed(0)
    try:
        model = Seq2Seq(Seq2SeqConfig(**(BASE | options)))
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        torch.manual_seed(0)
        for p in model.parameters():
            p.data = 0.5 * torch.randn(p.shape)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.zeros_(module.weight.data[module.padding_idx])
        src, lengths, tgt = make_batch(model)
        if model.config.copy:
            src = torch.stack((src, src % TGT_VOCAB), 2)
        tgt[:, 0] = BOS  # whatever bos_id is: only generate reads it
        src = src.float() if model.config.source_features else src
        logits, loss = model(src, lengths, tgt).logits, model.loss(src, lengths, tgt, tgt).item()
        decoded = torch.cat(
            [model.generate(src, lengths, max_new_tokens=12, generate_unk=u).sequences for u in (0, 1)], 1
        )
        trained = [p.requires_grad for p in model.parameters()]
        return trained, shapes, logits.tolist(), loss, decoded.tolist()
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_every_option_of_the_config_is_alive():
    assert set(LIVE) == {field.name for field in dataclasses.fields(Seq2SeqConfig)}
    for name, (base, value) in LIVE.items():
        changed = trace_of(base | {name: value})
        assert changed != trace_of(base), name


REFUSED = {
    "no source": (dict(src_vocab_size=None), "either src_vocab_size .* or source_features"),
    "two sources": (dict(source_features=3), "either src_vocab_size .* or source_features"),
    "tags of features": (
        dict(src_vocab_size=None, source_features=3, tag_vocab_size=5),
        "tag_vocab_size is for a source of tokens and must exceed pad_id, got 5 with src_vocab_size None",
    ),
    "no room for padding": (dict(tag_vocab_size=5, pad_id=6), "must exceed pad_id, got 5"),
    "copies with tags": (dict(copy=True, tag_vocab_size=5), "copy and tags cannot be combined yet"),
    "no tags": (dict(tag_vocab_size=0), "tag_vocab_size must be at least 1, got 0"),
    "zero size": (dict(hidden_size=0), "hidden_size must be at least 1, got 0"),
    "odd size": (dict(hidden_size=7), "must be even for a bidirectional encoder.*got 7; choose an even number or"),
    "dropout": (dict(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
    "output dropout": (dict(output_dropout=-0.1), r"output_dropout must lie in \[0, 1\)"),
    "attention": (dict(attention="mlp"), "unknown attention 'mlp'; choose one of 'none', 'dot'"),
    "bridge": (dict(bridge="last"), "unknown bridge 'last'; choose one of 'concat', 'linear', 'linear_h', 'zeros'"),
    "activation": (dict(bridge_activation="gelu"), "unknown bridge_activation 'gelu'"),
    "backend": (dict(backend="cudnn"), "unknown backend 'cudnn'"),
    "same ids": (dict(bos_id=2), "reserved ids must differ"),
    "id outside": (dict(unk_id=SRC_VOCAB), "must lie below the vocabulary size 11"),
    "nothing to feed": (dict(attention="none"), "set input_feeding=False with attention='none'"),
    "nothing to scale": (
        dict(attention="none", input_feeding=False, attention_scale=1.0),
        "attention_scale has no use",
    ),
    "source unseen": (dict(attention="none", input_feeding=False, bridge="zeros"), "would not see the source"),
    "useless size": (dict(attention="dot", attention_size=3), "attention_size has no use with attention='dot'"),
    "uneven concat": (
        dict(bridge="concat", encoder_layers=2),
        "encoder_layers must equal decoder_layers, got 2 and 1; choose",
    ),
    "useless activation": (
        dict(bridge="zeros", bridge_activation="relu"),
        "bridge_activation has no use with bridge='zeros'",
    ),
    "pyramid of one layer": (dict(pyramid=True), "encoder_layers is 1; raise it, or use frame_stack"),
    "long frames": (dict(frame_stack=1025), "more than 1024 positions to one; lower frame_stack"),
    "high pyramid": (dict(encoder_layers=1000, pyramid=True), "more than 1024 positions to one"),
    "sizes of shared": (
        dict(share_decoder_input_output_embed=True),
        "needs embedding_dim == hidden_size .*got 6 and 8; make",
    ),
    "vocabularies of shared": (
        dict(share_all_embeddings=True, embedding_dim=H),
        "one vocabulary .*got sizes 11 and 13; use",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_makes_no_sense_raises(case):
    options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        Seq2SeqConfig(**(BASE | options))


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Seq2SeqConfig(**BASE).hidden_size = 3


def test_embedding_of_padding_starts_at_zero_and_is_not_trained():
    model = make_model(pad_id=5)
    src = torch.tensor([[5, 4, 5]])
    model(src, None, src).logits.sum().backward()
    for embedding in (model.encoder.embedding, model.decoder.embedding):
        assert embedding.weight[5].eq(0).all()
        assert embedding.weight.grad[5].eq(0).all()
        assert embedding.weight[4].ne(0).all()
        assert embedding.weight.grad[4].ne(0).any()


def test_config_and_weights_make_the_model_again():
    model = make_model(attention="general", decoder_layers=2)
    batch = make_batch(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    config = Seq2SeqConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert config == model.config
    other = Seq2Seq(config).double().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(*batch).logits, model(*batch).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"unknown options \['hiden_size'\]; known are"):
        Seq2SeqConfig.from_dict({"hiden_size": 8})


def test_sharing_uses_one_matrix_through_copies_and_checkpoints():
    options = dict(src_vocab_size=TGT_VOCAB, embedding_dim=H)
    one_side = make_model(**options, share_decoder_input_output_embed=True)
    assert one_side.decoder.output.weight is one_side.decoder.embedding.weight
    assert one_side.encoder.embedding.weight is not one_side.decoder.embedding.weight
    everywhere = make_model(**options, share_all_embeddings=True)
    batch = make_batch(everywhere)
    expected = everywhere(*batch).logits
    reloaded = make_model(**options, share_all_embeddings=True)
    nn.init.zeros_(reloaded.decoder.embedding.weight)
    reloaded.load_state_dict(everywhere.state_dict())
    for model in (everywhere, copy.deepcopy(everywhere), pickle.loads(pickle.dumps(everywhere)), reloaded):
        assert model.encoder.embedding.weight is model.decoder.embedding.weight is model.decoder.output.weight
        torch.testing.assert_close(model(*batch).logits, expected, rtol=0, atol=0)
    separate = sum(p.numel() for p in make_model(**options).parameters())
    assert sum(p.numel() for p in everywhere.parameters()) == separate - 2 * TGT_VOCAB * H
