"""The grid of ``fastseq parity`` through the CUDA kernels, on the host-side device: every op that has kernels.

The full grid, wider LSTMs (H to 1040) and TF32. A sample runs in every run of the suite; ``make cuda-parity`` runs all
of it, or FASTSEQ_CUDA_PARITY=2/5 the second of five parts.
"""

import contextlib
import itertools
import math
import os
import re

import emulator
import pytest
import torch
from tf32_products import tf32_products

from fastseq.parity import main as parity
from fastseq.parity.cases import GRIDS, ParityCase

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")

SAMPLE = 61  # one of so many in every run of the suite, without those that take seconds
KINDS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("lstm_cell", "lstm", "attention", "LSTMCell", "LSTM", "Attention", "Seq2Seq")
WIDE = [
    ParityCase("lstm", dict(shape=(2, batch, 5, hidden_size), form=form, reverse=reverse, cell_states=reverse))
    for (hidden_size, batch), (form, reverse) in zip(
        itertools.product((264, 512, 520, 768, 1024, 1040), (1, 9, 17)),
        itertools.cycle((("full", False), ("lengths", True), ("packed", False), ("full", True), ("lengths", False))),
        strict=False,
    )
]


def grid() -> list[tuple[ParityCase, str]]:
    """Every case and kind. TF32 concerns the float32 products of an LSTM."""
    cases = [case for case in GRIDS["full"]() if case.op in OPS] + WIDE
    return [(case, kind) for case in cases for kind in KINDS if kind != "tf32" or case.op in ("lstm", "LSTM")]


def is_small(case: ParityCase) -> bool:
    """True if the host-side device takes no seconds. A model has no shape."""
    return math.prod(case.options.get("shape", (10_000,))) < 10_000


def chosen() -> list[tuple[ParityCase, str]]:
    """The part that FASTSEQ_CUDA_PARITY names: "1/1" is all of it; unset, the sample."""
    text = os.environ.get("FASTSEQ_CUDA_PARITY", "")
    if not text:
        return [
            (c, kind) for c, kind in grid()[SAMPLE // 2 :: SAMPLE] if math.prod(c.options.get("shape", (10_000,))) < 1e4
        ]
    part, _, parts = text.partition("/")
    if not (re.fullmatch(r"\d+/\d+", text) and 1 <= int(part) <= int(parts)):
        raise ValueError(f"FASTSEQ_CUDA_PARITY must be a part such as 2/5, got {text!r}")
    return grid()[int(part) - 1 :: int(parts)]


@pytest.mark.parametrize(("case", "kind"), chosen(), ids=lambda x: x if isinstance(x, str) else f"{x.op} {x.name}")
def test_parity(case, kind):
    """One draw a case: torch's errors in wide results are representative."""
    tf32 = kind == "tf32"
    with emulator.as_native(), tf32_products() if tf32 else contextlib.nullcontext():
        (row,) = parity.check(case, KINDS[kind], ("native",), tf32=tf32, draws=1 if case in WIDE else None)
    assert row.ok, row.failure or "\n".join(str(c) for c in row.comparisons if not c.ok)
