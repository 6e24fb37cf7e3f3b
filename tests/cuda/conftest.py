"""Fixtures of the CUDA tests: the places where kernels run, and memory filled with NaN."""

import pytest
from cuda_cases import DEVICES, Place, place_of

from fastseq.testing.numerics import nan_filled_memory


@pytest.fixture
def nan_memory():
    """Fill new tensors with NaN, so that an element that an operator leaves out is NaN in its result."""
    with nan_filled_memory():
        yield


@pytest.fixture(params=DEVICES)
def place(request, nan_memory) -> Place:
    """The host-side device, then a GPU; skips the test if there is none."""
    return place_of(request.param)
