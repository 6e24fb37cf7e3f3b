"""The compiled CPU kernels on the narrower instruction sets of this machine, each in its own process.

All other tests run on the widest one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")

TESTS = Path(__file__).parents[1]
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")  # each includes the ones before
SUITES = [  # files, and the -k expression of those tests that reach the arithmetic of the kernels
    (
        ("native/test_native_lstm", "native/test_native_cell", "native/test_native_threads", "nn/test_decode_step"),
        "layer_matches and both and lengths or every_path and forward or threads_change and both and place or padding"
        " or other_rows or cell_matches or roundings or saturate or 16_bit or hundred or denormal or step"
        " or random_calls",
    ),
    (
        ("native/test_attention_native",),
        "as_accurate and (lengths or step_mask) or digits or cancel or (keys_change and float32) or nan-mask",
    ),
]
RUN = """
import json, sys, pytest
from fastseq import _native
used, expected = _native.build_info()["cpu"], sys.argv[1]
assert used == expected, f"the kernels use {used}, expected {expected}"
for arguments in json.loads(sys.argv[2]):
    if code := pytest.main(arguments):
        sys.exit(int(code))
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_narrower_instruction_set(isa):
    widest = _native.build_info()["cpu"]
    if INSTRUCTION_SETS.index(isa) >= INSTRUCTION_SETS.index(widest):
        pytest.skip(f"this process runs on {widest}")
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k")
    # avx512_bf16 runs avx512's kernels for all dtypes but bfloat16, so the other tests have reached those.
    only = "bfloat16 or 16_bit or random_calls" if (isa, widest) == ("avx512", "avx512_bf16") else "test"
    runs = [[*(str(TESTS / f"{name}.py") for name in names), *options, f"({k}) and ({only})"] for names, k in SUITES]
    command = [sys.executable, "-c", RUN, isa, json.dumps(runs)]
    environment = os.environ | {"FASTSEQ_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
