"""Shared by the tests of generate(): a fake model, small real ones, brute force, a slow beam search."""

import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig

PAD, BOS, EOS = 0, 1, 2
PRIME = 10_007
PENALTIES = {"avg": lambda n, p: n**p, "wu": lambda n, p: ((5 + n) / 6) ** p, "none": lambda n, p: 1.0}
SOURCES = torch.tensor([[3, 4, 5, 3, 4, 5], [5, 5, 3, 0, 0, 0], [4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
LENGTHS = torch.tensor([6, 3, 1, 0])


class FakeEncoded(NamedTuple):
    seed: Tensor  # (B,)
    memory: Tensor  # (B, S)
    lengths: Tensor  # (B,)

    def repeat_interleave(self, k):
        return FakeEncoded(*(x.repeat_interleave(k, 0) for x in self))

    def index_select(self, rows):
        return FakeEncoded(*(x.index_select(0, rows) for x in self))


class FakeState(NamedTuple):
    prefix: Tensor  # (N,) a hash of the source and of all tokens so far

    def index_select(self, rows):
        return FakeState(self.prefix.index_select(0, rows))


class FakeModel(nn.Module):
    """Log-probabilities that are random, but the same for the same source and prefix; dropout would change them."""

    def __init__(self, vocab_size=6, dtype=torch.float64, eos_bonus=0.0, spread=1.5, eos_id=EOS):
        super().__init__()
        self.config = SimpleNamespace(pad_id=PAD, bos_id=BOS, eos_id=eos_id)
        self.dropout = nn.Dropout(0.5)
        noise = torch.Generator().manual_seed(7)
        self.table = spread * torch.randn(PRIME, vocab_size, dtype=torch.float64, generator=noise).to(dtype)
        self.table[:, eos_id] += eos_bonus
        self.steps = 0

    def encode(self, src, src_lengths=None):
        if src_lengths is None:
            src_lengths = torch.full((len(src),), src.shape[1])
        inside = torch.arange(src.shape[1]) < src_lengths[:, None]
        places = torch.arange(1, src.shape[1] + 1)
        return FakeEncoded((src * places * places * inside).sum(1) + 17, src, src_lengths)

    def start(self, enc):
        return FakeState(enc.seed)

    def decode_step(self, tokens, state, enc, *, need_weights=True):
        self.steps += 1
        prefix = (state.prefix * 31 + tokens + 1) % PRIME
        places = torch.arange(enc.memory.shape[1])
        weights = torch.cos(prefix[:, None] * (places + 1.0)).softmax(1) if need_weights else None
        return self.dropout(self.table[prefix]), FakeState(prefix), weights


class ConstantModel(FakeModel):
    """The same distribution at each step."""

    def __init__(self, probs, dtype=torch.float64):
        super().__init__(len(probs))
        self.table = torch.tensor(probs, dtype=dtype).log().expand(PRIME, -1)


class CountingModel(FakeModel):
    """Keeps the number of decoder rows of each step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rows = []

    def decode_step(self, tokens, state, enc, **options):
        self.rows.append(len(tokens))
        assert len(enc.seed) == len(tokens)
        return super().decode_step(tokens, state, enc, **options)


class RepeatingModel(Seq2Seq):
    """A model whose decode_step needs a sentence for each row, and whose sentences cannot leave the batch."""

    rows_share_sources = False

    def encode(self, *args, **options):
        enc = super().encode(*args, **options)
        return SimpleNamespace(enc=enc, lengths=enc.lengths, repeat_interleave=partial(self.repeated, enc))

    @staticmethod
    def repeated(enc, k):
        return SimpleNamespace(enc=enc.repeat_interleave(k))

    def start(self, enc):
        return super().start(enc.enc)

    def decode_step(self, tokens, state, enc, **options):
        assert len(enc.enc.lengths) == len(tokens)
        return super().decode_step(tokens, state, enc.enc, **options)


def real_model(**options):
    """Seq2Seq with weights large enough for its answers to differ, in float64 so that no batch shape decides a tie."""
    config = Seq2SeqConfig(src_vocab_size=8, tgt_vocab_size=9, embedding_dim=6, hidden_size=8, **options)
    model = Seq2Seq(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    nn.init.zeros_(model.decoder.output.bias[EOS])  # sequences of 1 to 9 tokens and longer
    return model.eval()


MODELS = {
    "fake": lambda: FakeModel().eval(),
    "input_feeding": lambda: real_model(attention="additive"),
    "two_layers_dot": lambda: real_model(attention="dot", input_feeding=False, decoder_layers=2),
}


def rows(output):
    """The sequences as lists without padding; everything after a sequence must be pad."""
    for tokens, length in zip(output.sequences, output.lengths, strict=True):
        assert (tokens[length:] == PAD).all()
        assert (tokens[:length] != PAD).all()
    return [tokens[:length].tolist() for tokens, length in zip(output.sequences, output.lengths, strict=True)]


def force(model, src, src_lengths, sequence):
    """Feed a given sequence (a list) for one sentence: its log-probabilities (n,) and attention weights (n, S)."""
    with torch.no_grad():
        enc = model.encode(src, src_lengths)
        state, token, log_probs, weights = model.start(enc), BOS, [], []
        for following in sequence:
            logits, state, attention = model.decode_step(torch.tensor([token]), state, enc, need_weights=True)
            log_probs.append(logits.log_softmax(-1)[0, following])
            weights.append(attention[0])
            token = following
    return torch.stack(log_probs), torch.stack(weights)


def next_log_probs(model, src, src_lengths, prefix):
    """(V,) after a prefix, a list; pad and bos forbidden."""
    enc = model.encode(src, src_lengths)
    state = model.start(enc)
    for token in [BOS, *prefix]:
        logits, state, _ = model.decode_step(torch.tensor([token]), state, enc)
    log_probs = logits.log_softmax(-1)[0]
    log_probs[[PAD, BOS]] = -math.inf
    return log_probs.tolist()


def all_sequences(model, src, src_lengths, limit, prefix=(), total=0.0):
    """Brute force: (sequence, log-probability) of each sequence that ends with eos or is cut off at the limit."""
    for token, log_prob in enumerate(next_log_probs(model, src, src_lengths, list(prefix))):
        if log_prob > -math.inf:
            sequence = (*prefix, token)
            if token == EOS or len(sequence) == limit:
                yield list(sequence), total + log_prob
            else:
                yield from all_sequences(model, src, src_lengths, limit, sequence, total + log_prob)


def slow_beam_search(model, src, src_lengths, limit, beams, penalty, early_stopping, grows, following=next_log_probs):
    """One sentence, Python lists: [(score, sequence)], best first. penalty(length) grows with it, or not."""
    running, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        extended = [
            (total + log_prob, [*prefix, token])
            for total, prefix in running
            for token, log_prob in enumerate(following(model, src, src_lengths, prefix))
            if log_prob > -math.inf
        ]
        extended = sorted(extended, reverse=True)[: 2 * beams]
        ended = [(total / penalty(length), s) for total, s in extended[:beams] if s[-1] == EOS or length == limit]
        finished = sorted(finished + ended, reverse=True)[:beams]
        running = [item for item in extended if item[1][-1] != EOS][:beams]
        if len(finished) == beams:
            horizon = limit if early_stopping == "never" and grows else length
            if early_stopping is True or running[0][0] / penalty(horizon) <= finished[-1][0]:
                break
    return finished


def has_repeat(sequence, size):
    ngrams = [tuple(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]
    return len(ngrams) > len(set(ngrams))
