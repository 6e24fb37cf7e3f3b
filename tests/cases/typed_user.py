"""A user's script for ``mypy --strict``: tests/test_typing.py runs it, checks it, and misspells its keywords."""

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastseq

lstm = fastseq.LSTM(4, 8, num_layers=2, batch_first=True, dtype=torch.float32, backend="auto")
x = torch.randn(3, 5, 4)
output, (h_n, c_n) = lstm(x, lengths=[5, 0, 2])
assert_type(lstm(x, (h_n, c_n), return_cell_states=True), tuple[Tensor, tuple[Tensor, Tensor], Tensor])
assert_type(lstm(pack_sequence([x[0]])), tuple[PackedSequence, tuple[Tensor, Tensor]])
h, c = fastseq.LSTMCell(4, 8)(x[:, 0], (h_n[0], c_n[0]))
context, weights = fastseq.Attention(8, 8, score="additive")(h, output, need_weights=True)
report = fastseq.accelerate(nn.Sequential(nn.LSTM(4, 8)), backend="torch")

model = fastseq.Seq2Seq(fastseq.Seq2SeqConfig(src_vocab_size=11, tgt_vocab_size=13, attention="dot"))
source = torch.ones(2, 3, dtype=torch.int64)
logits: Tensor = model(source, [3, 1], source).logits
scores: Tensor = model.generate(source, num_beams=5).sequences_scores
with fastseq.use_backend("torch"):
    print(fastseq.explain(lstm, x), report, context, weights, logits, scores)
