"""Swap fastseq into a training loop that exists: one line, and the optimiser made before it stays valid.

The task: mark each step of a random walk x (B, T, 1) by whether its sum so far is positive.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq


class Tagger(nn.Module):
    """A bidirectional nn.LSTM and a linear layer: x (B, T, 1) -> one logit for each step (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = Tagger()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    print(fastseq.accelerate(model))  # the one new line; the module objects and their Parameters stay the same

    for step in range(args.steps):
        x = torch.randn(16, 40, 1)
        loss = F.binary_cross_entropy_with_logits(model(x), (x.cumsum(1) > 0).float().squeeze(-1))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    print(fastseq.explain(model, x))  # the backend that ran, and why the others did not
    plain = Tagger()
    plain.load_state_dict(model.state_dict())  # the weights go back into plain torch
    print(f"largest difference to nn.LSTM: {(plain(x) - model(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
