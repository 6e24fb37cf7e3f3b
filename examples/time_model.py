"""Time your own model with and without fastseq: put it into `build` and `batch`, then run this file.

The two models take turns, so that load on the machine slows both alike; the ratio is the median over rounds.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import fastseq


def build() -> nn.Module:
    """The model under test, with torch's LSTMs."""
    return nn.LSTM(128, 256, num_layers=2, bidirectional=True, batch_first=True)


def batch() -> tuple[Tensor, ...]:
    """The arguments of one call."""
    return (torch.randn(4, 50, 128),)


def milliseconds(model: nn.Module, inputs: list[Tensor], train: bool) -> float:
    """Time of one forward, and with `train` its backward; on a GPU, until the GPU has finished."""
    synchronize = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        result = model(*inputs)
    if train:
        (result if isinstance(result, Tensor) else result[0]).sum().backward()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    plain = build().to(args.device)
    fast = copy.deepcopy(plain)
    print(fastseq.accelerate(fast))
    inputs = [t.to(args.device) for t in batch()]
    for train in (False, True):
        rounds = [[milliseconds(m, inputs, train) for m in (plain, fast)] for _ in range(args.rounds + 2)][2:]
        before, after = map(statistics.median, zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{'training' if train else 'inference'}: {before:.2f} ms -> {after:.2f} ms, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
