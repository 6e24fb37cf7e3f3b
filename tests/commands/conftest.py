"""Shared by the tests of ``fastseq bench``."""

from dataclasses import replace

import pytest
import torch
from tiny_bench import TINY, TINY_ATTENTION

from fastseq.bench import timing
from fastseq.bench.cases import SUITES


@pytest.fixture
def small(monkeypatch):
    """A suite of two cases, and no time."""
    monkeypatch.setattr(timing, "SAMPLE_MS", 1e-3)
    monkeypatch.setitem(SUITES, "quick", ((TINY, replace(TINY_ATTENTION, dtype=torch.bfloat16)), "for tests"))
