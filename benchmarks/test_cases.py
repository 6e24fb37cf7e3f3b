"""pytest-benchmark over the cases of ``fastseq bench``: python -m pytest benchmarks --benchmark-group-by=param:problem

For ratios prefer ``fastseq bench``, which lets the candidates take turns in one process; this keeps and compares runs.
Choose with -k, for example -k "packed and training".
"""

import pytest

from fastseq import _native
from fastseq.bench.cases import CASES, MODES, make_module
from fastseq.bench.timing import Problem, check_parity
from fastseq.testing.numerics import is_refusal

BACKENDS = ["peer", "auto"] + (["native"] if _native.available() else [])


@pytest.fixture(scope="module", params=[case for case in CASES if case.device == "cpu"], ids=lambda case: case.name)
def problem(request):
    return Problem(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_case(benchmark, problem, mode, backend):
    train = mode == "training"
    module = problem.peer if backend == "peer" else make_module(problem.case, backend)
    try:
        check_parity(problem, module, train)
    except RuntimeError as refusal:
        if not is_refusal(refusal):
            raise
        pytest.skip(str(refusal))
    benchmark.extra_info["peer"] = type(problem.peer).__name__
    benchmark(problem.step(module, train))
