"""``fastseq bench --suite grid``: shapes of LSTMs drawn over the whole range, by which the rules of ``auto`` are held.

One call of a case takes at most ``MOST_FLOPS`` operations forwards, so that a row takes about a second.
"""

import math
import random

import torch

from fastseq.bench.cases import BenchCase

STEPS = (1, 2, 5, 10, 25, 50, 100, 200, 500)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HIDDEN = (64, 100, 128, 200, 256, 400, 512, 650, 1024, 1500)
INPUTS = (None, 40, 1)  # None: as many as hidden units
MOST_FLOPS = 6e8
DRAWN = {torch.float32: 64, torch.bfloat16: 40, torch.float64: 12, torch.float16: 8}
SWEPT = (torch.float32, torch.bfloat16)
ONCE_SLOWEST = ((500, 4, 1, 650), (1, 16, 64, 64), (10, 8, 64, 64))  # rows below 0.9 of nn.LSTM at first


def flops(case: BenchCase) -> int:
    """Operations of the products of one forward."""
    directions = 2 if case.bidirectional else 1
    inputs = case.input_size + (case.layers - 1) * directions * case.hidden_size
    columns = inputs + case.layers * case.hidden_size
    return 2 * case.steps * case.batch * 4 * case.hidden_size * directions * columns


def _group(case_dtype: torch.dtype) -> str:
    return f"grid {str(case_dtype).removeprefix('torch.')}"


def _case(dtype: torch.dtype, *shape: int, layers: int = 1, bidirectional: bool = False) -> BenchCase:
    return BenchCase(_group(dtype), "lstm", *shape, layers=layers, bidirectional=bidirectional, dtype=dtype)


def _draw(generator: random.Random, dtype: torch.dtype) -> BenchCase:
    """A case within MOST_FLOPS: most have one layer and direction."""
    while True:
        hidden, inputs = generator.choice(HIDDEN), generator.choice(INPUTS)
        shape = (generator.choice(STEPS), generator.choice(BATCHES), inputs or hidden, hidden)
        stacked = generator.random() < 0.45
        layers, bidirectional = (generator.choice((1, 2, 3)), generator.random() < 0.6) if stacked else (1, False)
        case = _case(dtype, *shape, layers=layers, bidirectional=bidirectional)
        if flops(case) <= MOST_FLOPS:
            return case


def cases() -> tuple[BenchCase, ...]:
    """Sweeps over H and B in float32 and bfloat16, once slow rows, and drawn ones; each once, in spread_out order."""
    swept = [(10, 16, h, h) for h in HIDDEN[:-2]] + [(10, b, 256, 256) for b in BATCHES[:-1]]
    found = [_case(dtype, *shape) for dtype in SWEPT for shape in swept]
    found += [_case(torch.float32, *shape) for shape in ONCE_SLOWEST]
    generator = random.Random(14)
    found += [_draw(generator, dtype) for dtype, count in DRAWN.items() for _ in range(count)]
    return spread_out(sorted(dict.fromkeys(found), key=lambda case: (case.group, flops(case))))


def spread_out(ordered: list[BenchCase]) -> tuple[BenchCase, ...]:
    """The cases in an order whose every beginning covers the list evenly: a run that is cut short is a fair sample.

    Case k moves to the place of frac(k * golden ratio) among the others.
    """
    golden = (math.sqrt(5) - 1) / 2
    return tuple(ordered[k] for k in sorted(range(len(ordered)), key=lambda k: k * golden % 1))


CASES = cases()
