"""Shared by all tests: every test starts from the same seed, and memory that a kernel forgot to write is NaN."""

import os

os.environ.setdefault("FASTSEQ_POISON", "1")  # read by the compiled library when it is loaded

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
