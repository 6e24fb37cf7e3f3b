"""Refusals of the compiled CPU operators: tensors whose memory was freed, sizes that overflow 64 bits."""

import operator_calls as calls
import pytest
import torch

import fastseq
from fastseq import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
operators = torch.ops.fastseq


def operator(call):
    return getattr(operators, call.__name__).default


def test_weight_freed_between_forward_and_backward():
    lstm = fastseq.LSTM(8, 16, backend="native")
    output, _ = lstm(torch.randn(5, 2, 8))
    lstm.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"lstm_backward: weight_hh .*storage of 0 bytes"):
        output.sum().backward()


def freed(t):
    """Return a copy of ``t`` whose storage was freed, as FSDP does it between forward and backward."""
    copy = t.clone()
    copy.untyped_storage().resize_(0)
    return copy


def one_element_short(t):
    copy = t.clone()
    copy.untyped_storage().resize_(t.nbytes - t.element_size())
    return copy


@pytest.mark.parametrize("damage", [freed, one_element_short], ids=["freed", "too small"])
@pytest.mark.parametrize("call", calls.CPU, ids=lambda call: call.__name__)
def test_every_tensor_whose_memory_is_gone_gets_a_sentence(call, damage):
    op, prepared = operator(call), torch.zeros(2, 5, 32)
    assert calls.check_damaged(op, call, damage, prepared) == calls.tensor_names(op)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_view_into_a_freed_storage(packed):
    arguments = list(calls.lstm_forward(packed=packed))
    base = torch.zeros(2, *arguments[0].shape)
    arguments[0] = base[1]  # its data pointer is not null after the next line
    base.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"lstm_forward: input .*storage"):
        operators.lstm_forward(*arguments)


# S for which 272 bytes of scratch memory a position wrap around to a few.
WRAPPING = -(-(2**64) // 272)


@pytest.mark.parametrize("call", calls.BOTH[3:], ids=lambda call: call.__name__)
def test_sizes_beyond_64_bits_get_a_sentence(call):
    positions = 5  # a size that no other dimension of the call has

    def stretched(t):
        if not isinstance(t, torch.Tensor) or positions not in t.shape:
            return t
        one = t[tuple(slice(0, 1) if n == positions else slice(None) for n in t.shape)]
        return one.expand([WRAPPING if n == positions else n for n in t.shape])

    with pytest.raises(RuntimeError, match=rf"{call.__name__}: \w+ must have at most 2\^48 elements"):
        operator(call)(*map(stretched, call()))


EMPTY = {
    "steps": lambda: operators.lstm_forward(torch.empty(2**62, 0, 5), *calls.lstm_forward(1, 0)[1:]),
    "hidden": lambda: operators.lstm_cell_forward(torch.empty(0, 0), torch.empty(0, 2**62)),  # 4 * 2^62 wraps to 0
    "batch": lambda: operators.attention_prepare(torch.empty(2**50, 0, 4), None),
}


@pytest.mark.parametrize("which", EMPTY)
def test_sizes_beyond_64_bits_of_no_elements(which):
    with pytest.raises(RuntimeError, match=r"must have at most 2\^48 elements"):
        EMPTY[which]()


def test_many_steps_of_an_empty_batch_take_no_memory():
    T = 2**40
    output, *_ = operators.lstm_forward(torch.empty(T, 0, 5), *calls.lstm_forward(1, 0)[1:])
    assert output.shape == (T, 0, 7)
