"""Repeats the autocast and bfloat16 tests with oneDNN lowered to AVX2, where it refuses 16-bit LSTMs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = (
    "nn/test_autocast.py",
    "nn/test_dropin.py",
    "nn/test_compile.py",
    "ops/test_dispatch.py",
    "seq2seq/test_seq2seq_training.py",
    "training/test_training_run.py",
)


@pytest.mark.slow
def test_autocast_and_bfloat16_without_avx512():
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", "autocast or bfloat16 or bf16 or auto_follows", *(str(tests / name) for name in SUITES)],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
