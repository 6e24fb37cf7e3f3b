"""Fixtures of the CUDA tests: the places where kernels run, and memory that begins as NaN."""

import pytest
from cuda_cases import DEVICES, Place, place_of

from fastseq.testing.numerics import nan_filled_memory


@pytest.fixture
def nan_memory():
    """Fill new tensors with NaN: values that an operator does not write show in its results."""
    with nan_filled_memory():
        yield


@pytest.fixture(params=DEVICES)
def place(request, nan_memory) -> Place:
    """The host-side device, then a GPU; skips the test where that is missing."""
    return place_of(request.param)
