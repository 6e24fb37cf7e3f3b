"""Train fastseq.Seq2Seq in plain torch: the model learns to write numbers of 2 to 6 digits backwards.

Ids 0 to 3 are pad, bos, eos and unk; digit d is id d + 4.
"""

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastseq

PAD, BOS, EOS = 0, 1, 2
pad = partial(pad_sequence, batch_first=True, padding_value=PAD)


def batch(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw sources (B, S), their lengths (B,), decoder inputs and expected outputs, both (B, T)."""
    lengths = torch.randint(2, 7, (size,))
    numbers = [torch.randint(4, 14, (n,)) for n in lengths.tolist()]
    bos, eos = torch.tensor([BOS]), torch.tensor([EOS])
    inputs = [torch.cat((bos, number.flip(0))) for number in numbers]
    outputs = [torch.cat((number.flip(0), eos)) for number in numbers]
    return pad(numbers), lengths, pad(inputs), pad(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    config = fastseq.Seq2SeqConfig(src_vocab_size=14, tgt_vocab_size=14, embedding_dim=32, hidden_size=64, dropout=0.0)
    model = fastseq.Seq2Seq(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(args.steps):
        sources, lengths, inputs, expected = batch(64)
        loss = model.loss(sources, lengths, inputs, expected)  # of the labels that are not PAD
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    sources, lengths, _, expected = batch(100)
    result = model.generate(sources, lengths, num_beams=3)
    rows = list(zip(result.sequences.tolist(), result.lengths.tolist(), expected.tolist(), strict=True))
    right = sum(row[:n] == want[:n] for row, n, want in rows)
    example = " -> ".join("".join(str(id - 4) for id in row if id > 3) for row in (sources[0].tolist(), rows[0][0]))
    print(f"{right} of 100 numbers reversed, for example {example}")


if __name__ == "__main__":
    main()
