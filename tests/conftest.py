"""Shared by all tests: the same seed at the start of each, NaN in memory that a kernel does not write."""

import os
import signal

os.environ.setdefault("FASTSEQ_TUNING", "0")  # the measurements of the developer's machine decide no test
os.environ.setdefault("FASTSEQ_POISON", "1")  # read by the compiled library when it is loaded

import pytest
import torch

from fastseq import dispatch


def pytest_collection_modifyitems(items):
    """Run long tests first, so that none starts when the other workers are about to finish."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def interrupts():
    """Restore Ctrl-C, which a shell lets background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    dispatch.forget()  # the previous test may have replaced what rules and unsupported() read
