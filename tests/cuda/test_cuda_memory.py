"""Arguments of the CUDA operators whose memory was freed or whose sizes overflow are refused, not read."""

import emulator
import operator_calls as calls
import pytest
import torch

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")


def freed(t):
    copy = t.clone()
    copy.untyped_storage().resize_(0)
    return copy


@pytest.mark.parametrize("call", calls.CUDA, ids=lambda call: call.__name__)
def test_every_tensor_whose_memory_is_gone_gets_a_sentence(call):
    operator = getattr(emulator.load(), call.__name__).default
    tried = calls.check_damaged(operator, call, freed)
    assert tried == calls.tensor_names(operator) - {"prepared"}  # which has no elements on CUDA


def test_sizes_beyond_64_bits_get_a_sentence():
    query, _, _, *rest = calls.attention_forward()
    keys, values = (torch.zeros(2, 1, n).expand(2, 2**57, n) for n in (4, 6))
    with pytest.raises(RuntimeError, match=r"attention_forward: keys must have at most 2\^48 elements"):
        emulator.load().attention_forward(query, keys, values, *rest)
