"""Small models and batches for the seq2seq tests."""

import torch

from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.model import Seq2Seq

SRC_VOCAB, TGT_VOCAB, E, H = 11, 13, 6, 8
BASE = dict(src_vocab_size=SRC_VOCAB, tgt_vocab_size=TGT_VOCAB, embedding_dim=E, hidden_size=H)
VARIANTS = {
    "additive, feeding": {},
    "additive, two layers": dict(encoder_layers=2, decoder_layers=2),
    "additive, one direction": dict(bidirectional=False, input_feeding=False),
    "normed, uneven layers": dict(
        attention="normed_additive", encoder_layers=1, decoder_layers=2, bridge_activation="relu"
    ),
    "general, whole target": dict(attention="general", input_feeding=False, bridge="concat", attention_scale=0.5),
    "general, feeding, two layers": dict(attention="general", encoder_layers=2, decoder_layers=2, bridge="concat"),
    "dot, zeros": dict(attention="dot", bridge="zeros", attention_scale=0.3),
    "dot, whole target, two layers": dict(
        attention="dot", input_feeding=False, decoder_layers=2, bridge_activation="none"
    ),
    "no attention": dict(attention="none", input_feeding=False, bridge="concat", bidirectional=False),
    "features": dict(src_vocab_size=None, source_features=5),
    "tags": dict(tag_vocab_size=7, attention="dot"),
}
REDUCED = {
    "frame stack": dict(src_vocab_size=None, source_features=5, frame_stack=3),
    "frame stack of tokens, two layers": dict(frame_stack=2, encoder_layers=2, input_feeding=False),
    "pyramid": dict(src_vocab_size=None, source_features=5, encoder_layers=3, pyramid=True),
    "pyramid over frame stack": dict(frame_stack=2, encoder_layers=2, pyramid=True, bidirectional=False),
    "pyramid, concat": dict(encoder_layers=2, decoder_layers=2, pyramid=True, bridge="concat", attention="general"),
}
PORTED = {  # the options of ports
    "general, bias, no tanh": dict(
        attention="general", combine_bias=True, combine_activation="none", bridge="linear_h", decoder_layers=2
    ),
    "additive, bias, h for both": dict(combine_bias=True, bridge="linear_h", encoder_layers=2),
}


def make_model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(**(BASE | options))).to(dtype).eval()


def make_batch(model, lengths=(5, 2, 4), steps=4):
    generator = torch.Generator().manual_seed(1)
    size = max(lengths)
    if model.config.source_features:
        src = torch.randn(len(lengths), size, model.config.source_features, generator=generator, dtype=torch.float64)
    else:
        src = torch.randint(4, SRC_VOCAB, (len(lengths), size), generator=generator)
        if model.config.tag_vocab_size:
            tags = torch.randint(1, model.config.tag_vocab_size, (len(lengths), size, 3), generator=generator)
            src = torch.cat([src[..., None], tags], -1)
    tgt = torch.randint(4, TGT_VOCAB, (len(lengths), steps), generator=generator)
    tgt[:, 0] = model.config.bos_id
    return src, torch.tensor(lengths), tgt
