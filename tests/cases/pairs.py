"""torch's module and ours with the same weights, and their results side by side."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fastseq import LSTM


def pair(*args, backend="auto", cls=LSTM, **kwargs):
    """``nn.LSTM`` or ``nn.LSTMCell``, and ``cls`` with its weights."""
    theirs = (nn.LSTM if cls is LSTM else nn.LSTMCell)(*args, **kwargs)
    ours = cls(*args, **kwargs, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(result):
    """Output (the data of a packed one), h_n, c_n of an LSTM's result."""
    output, (h, c) = result
    return [output.data if isinstance(output, PackedSequence) else output, h, c]


def assert_same(ours, theirs, **tolerances):
    """Two results of an LSTM within ``rtol`` and ``atol``."""
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, **tolerances)
