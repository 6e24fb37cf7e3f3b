"""Shared by all tests: every test starts from the same seed, and memory that a kernel forgot to write is NaN."""

import os
import signal

os.environ.setdefault("FASTSEQ_POISON", "1")  # read by the compiled library when it is loaded

import pytest
import torch

from fastseq import dispatch


@pytest.fixture
def interrupts():
    """Ctrl-C interrupts, also where the tests are a job in the background, which a shell lets ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    dispatch.forget()  # the last test may have replaced what rules and unsupported() read
