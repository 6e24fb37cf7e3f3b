"""Shared by all tests: every test starts from the same seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
