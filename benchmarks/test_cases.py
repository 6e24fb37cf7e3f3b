"""pytest-benchmark over the cases of ``fastseq bench``: python -m pytest benchmarks --benchmark-group-by=param:setup

For ratios prefer ``fastseq bench``, whose candidates take turns in one process; this keeps and compares whole runs.
Select with -k, for example -k "packed and training".
"""

import pytest

from fastseq import _native
from fastseq.bench.cases import CASES, KINDS, MODES
from fastseq.bench.timing import Setup, check_accuracy
from fastseq.testing.numerics import is_refusal

BACKENDS = ["baseline", "auto"] + (["native"] if _native.available() else [])


@pytest.fixture(scope="module", params=[case for case in CASES if case.device == "cpu"], ids=lambda case: case.name)
def setup(request):
    return Setup(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_case(benchmark, setup, mode, backend):
    train = mode == "training"
    call = setup.baseline if backend == "baseline" else setup.make(backend)
    try:
        check_accuracy(setup, call, train)
    except RuntimeError as refusal:
        if not is_refusal(refusal):
            raise
        pytest.skip(str(refusal))
    benchmark.extra_info["baseline"] = KINDS[setup.case.kind][0]
    benchmark(setup.step(call, train))
