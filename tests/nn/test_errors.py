"""Bad input: the exception type of ``torch.nn``, and a sentence."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import LSTM, LSTMCell, ops

X = torch.randn(3, 2, 4)  # (T, B, I)
PACKED = pack_padded_sequence(X, [3, 2])


def state(*shape, c=None, **kwargs):
    return torch.zeros(*shape, **kwargs), torch.zeros(*(c or shape), **kwargs)


REFUSED = {
    "rank 1": (X[0, 0],),
    "rank 4": (X[None],),
    "wrong input size": (X[..., :3],),
    "wrong dtype": (X.double(),),
    "integers": (X.long(),),
    "no time step": (X[:0],),
    "not a tensor": ([1.0],),
    "other device": (X.to("meta"),),
    "hx of another batch": (X, state(1, 3, 5)),
    "hx of another size": (X, state(1, 2, 6)),
    "hx of other layers": (X, state(2, 2, 5)),
    "cx of another size": (X, state(1, 2, 5, c=(1, 2, 6))),
    "hx unbatched": (X, state(1, 5)),
    "hx batched for unbatched input": (X[:, 0], state(1, 2, 5)),
    "hx of another dtype": (X, state(1, 2, 5, dtype=torch.float64)),
    "cx of another dtype": (X, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5).double())),
    "hx on another device": (X, state(1, 2, 5, device="meta")),
    "hx one tensor": (X, torch.zeros(1, 2, 5)),
    "hx three tensors": (X, (torch.zeros(1, 2, 5),) * 3),
    "hx a tuple of one": (X, (torch.zeros(1, 2, 5),)),
    "packed: wrong input size": (pack_padded_sequence(X[..., :3], [3, 2]),),
    "packed: wrong dtype": (pack_padded_sequence(X.double(), [3, 2]),),
    "packed: hx of another batch": (PACKED, state(1, 3, 5)),
    "packed: hx of another size": (PACKED, state(1, 2, 6)),
    "packed: hx of other layers": (PACKED, state(2, 2, 5)),
    "packed: hx unbatched": (PACKED, state(2, 5)),
    "packed: hx of another dtype": (PACKED, state(1, 2, 5, dtype=torch.float64)),
    "packed: other device": (PACKED.to("meta"),),
    "packed: empty": (PackedSequence(X.reshape(6, 4)[:0], torch.tensor([], dtype=torch.long)),),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("args", [pytest.param(v, id=k) for k, v in REFUSED.items()])
def test_lstm_refuses_what_nn_lstm_refuses(args, backend):
    theirs = nn.LSTM(4, 5)
    if args[0] is REFUSED["packed: hx of other layers"][0] and args[-1][0].size(0) == 2 and args[-1][0].dim() == 3:
        expected = RuntimeError  # nn.LSTM ignores the surplus states here; a wrong number of layers is an error to us
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            theirs(*args)
        expected = caught.type
    with pytest.raises(expected) as ours:
        LSTM(4, 5, backend=backend)(*args)
    assert ours.type is expected
    assert len(str(ours.value)) > 10


CELL_REFUSED = {
    "rank 3": (X,),
    "wrong input size": (X[0, :, :3],),
    "wrong dtype": (X[0].double(),),
    "hx of another batch": (X[0], state(3, 5)),
    "hx of another size": (X[0], state(2, 6)),
    "cx of another size": (X[0], state(2, 5, c=(2, 6))),
    "hx of another dtype": (X[0], state(2, 5, dtype=torch.float64)),
    "hx unbatched": (X[0], state(5)),
    "hx one tensor": (X[0], torch.zeros(2, 5)),
    "hx rank 3": (X[0], state(1, 2, 5)),
    "hx three tensors": (X[0], (torch.zeros(2, 5),) * 3),
    "hx a tuple of one": (X[0], (torch.zeros(2, 5),)),
    "cx on another device": (X[0], (torch.zeros(2, 5), torch.zeros(2, 5, device="meta"))),
    "integers": (X[0].long(),),
    "unbatched input, batched hx": (X[0, 0], state(1, 5)),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("args", [pytest.param(v, id=k) for k, v in CELL_REFUSED.items()])
def test_cell_refuses_what_nn_lstm_cell_refuses(args, backend):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        nn.LSTMCell(4, 5)(*args)
    with pytest.raises(caught.type) as ours:
        LSTMCell(4, 5, backend=backend)(*args)
    assert ours.type is caught.type


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((0, 5), {}), ((4, 0), {}), ((4, 5, 0), {}), ((4, 5), {"proj_size": 5}), ((4, 5), {"proj_size": -1}),
     ((4, 5), {"dropout": 2}), ((4, 5), {"bias": 1}), ((4, 5), {"batch_first": "yes"}), ((4.0, 5), {}),
     ((4, 5), {"no_such_option": 1})],
    ids=str,
)  # fmt: skip
def test_constructor_refuses_what_nn_lstm_refuses(args, kwargs):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        nn.LSTM(*args, **kwargs)
    with pytest.raises(caught.type):
        LSTM(*args, **kwargs)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ([3], r"shape \(2,\)"),
        ([[3, 2]], r"shape \(2,\)"),
        ([4, 1], r"0\.\.3"),
        ([-1, 1], r"0\.\.3"),
        ([2.0, 1.0], "integers"),
        ([True, True], "integers"),
    ],
    ids=str,
)
def test_bad_lengths(lengths, sentence):
    with pytest.raises(ValueError, match=sentence):
        LSTM(4, 5)(X, lengths=torch.tensor(lengths))


def test_lengths_do_not_go_with_packed_or_unbatched_input():
    with pytest.raises(ValueError, match="PackedSequence"):
        LSTM(4, 5)(PACKED, lengths=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="unbatched"):
        LSTM(4, 5)(X[:, 0], lengths=torch.tensor([3]))


@pytest.mark.parametrize(
    "make",
    [
        lambda b: LSTM(4, 5, backend=b),
        lambda b: LSTMCell(4, 5, backend=b),
        lambda b: fastseq.accelerate(nn.LSTM(4, 5), b),
    ],
)
def test_unknown_backend_lists_the_valid_ones(make):
    with pytest.raises(ValueError, match=r"cudnn.*'auto', 'reference', 'torch', 'native', 'triton'"):
        make("cudnn")


def weights(**changes):
    return {"weight_ih": torch.randn(20, 4), "weight_hh": torch.randn(20, 5), **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight_ih": torch.randn(20, 3)}, r"weight_ih must have shape \(20, 4\), got \(20, 3\)"),
        ({"weight_hh": torch.randn(5, 20)}, r"weight_hh must have shape \(20, 5\), got \(5, 20\)"),
        ({"bias_ih": torch.randn(20)}, "both bias_ih and bias_hh"),
        ({"hx": state(3, 5)}, r"h0 must have shape \(2, 5\)"),
        ({"weight_hh": torch.randn(20, 5).double()}, "weight_hh is torch.float64"),
        ({"weight_hh": torch.randn(20, 5, device="meta")}, "move them to one device"),
        ({"weight_hr": torch.randn(2, 5)}, r"h0 must have shape \(2, 2\)"),
        ({"input": X[0]}, r"3 dimensions, \(T, B, I\)"),
        ({"input": X[:0]}, "at least one time step"),
        ({"input": X.long()}, "floating point"),
        ({"hx": (torch.zeros(2, 5),) * 3}, "hx must be two tensors"),
        ({"hx": (torch.zeros(2, 5), torch.zeros(()))}, r"c0 must have shape \(B, H\)"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, str) else "",
)
def test_op_says_what_is_wrong(changes, sentence):
    arguments = {"input": X, "hx": state(2, 5), **weights(), **changes}
    with pytest.raises(RuntimeError, match=sentence):
        ops.lstm(**arguments)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [3, 0], []], ids=str)
def test_batch_sizes_that_do_not_fit_the_rows(sizes):
    data, sizes = torch.randn(3, 4), torch.tensor(sizes, dtype=torch.int64)
    batch = int(sizes[0]) if len(sizes) else 1
    with pytest.raises(RuntimeError, match="batch_sizes"):
        ops.lstm(data, state(batch, 5), **weights(), batch_sizes=sizes, backend="reference")
    if len(sizes):
        with pytest.raises(RuntimeError, match="batch_sizes"):
            LSTM(4, 5, backend="reference")(PackedSequence(data, sizes))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_batch_sizes_of_another_dtype(dtype):
    with pytest.raises(RuntimeError, match="int64"):
        ops.lstm(torch.randn(3, 4), state(2, 5), **weights(), batch_sizes=torch.tensor([2, 1]).to(dtype))


def test_op_refuses_lengths_with_batch_sizes():
    with pytest.raises(ValueError, match="not both"):
        ops.lstm(X[0], state(2, 5), **weights(), lengths=torch.tensor([1, 1]), batch_sizes=torch.tensor([2]))


def test_cell_op_says_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"got gates \(2, 19\) and c \(2, 5\)"):
        ops.lstm_cell(torch.randn(2, 19), torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="move them to one device"):
        ops.lstm_cell(torch.randn(2, 20, device="meta"), torch.randn(2, 5))
