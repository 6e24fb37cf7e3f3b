"""pytest-benchmark over the cases of ``fastseq bench``: python -m pytest benchmarks --benchmark-group-by=param:case

For ratios prefer ``fastseq bench``, which lets the candidates take turns in one process; this keeps and compares runs.
"""

import pytest

from fastseq import _native
from fastseq.bench import CASES, check_parity, make_input, make_module, make_step

BACKENDS = ["nn", "auto"] + (["native"] if _native.available() else [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lstm(benchmark, case, mode, backend):
    x, options = make_input(case)
    peer = make_module(case, None)
    module = peer if backend == "nn" else make_module(case, backend)
    check_parity(case, module, peer, x, options, mode == "training")
    benchmark(make_step(module, x, options, mode == "training"))
