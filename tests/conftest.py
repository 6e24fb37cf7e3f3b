"""Shared by all tests: one thread unless a test asks for more, one seed, and the grids of shapes that hurt."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
