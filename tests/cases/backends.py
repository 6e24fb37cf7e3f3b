"""The backends that a test runs over: all that serve the call on this machine."""

import torch

from fastseq.dispatch import BACKENDS, objection
from fastseq.ops.attention.spec import AttentionCall
from fastseq.ops.linear_cross_entropy.spec import LinearCrossEntropyCall
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.ops.lstm_variant.spec import LSTMVariantCall


def serving_lstm(**changes) -> list[str]:
    """Names of the backends without objection to this lstm call."""
    call = LSTMCall("cpu", torch.float32, input_size=4, hidden_size=5, batch=2, steps=3)._replace(**changes)
    return [name for name in BACKENDS[1:] if objection("lstm", name, call) is None]


def serving_attention(**changes) -> list[str]:
    """Names of the backends without objection to this attention call."""
    call = AttentionCall("additive", "cpu", torch.float32, batch=2, steps=3, positions=4)._replace(**changes)
    return [name for name in BACKENDS[1:] if objection("attention", name, call) is None]


def serving_loss(**changes) -> list[str]:
    """Names of the backends without objection to this linear_cross_entropy call."""
    call = LinearCrossEntropyCall("cpu", torch.float32, hidden_size=4, classes=7, rows=5)._replace(**changes)
    return [name for name in BACKENDS[1:] if objection("linear_cross_entropy", name, call) is None]


def serving_variant(**changes) -> list[str]:
    """Names of the backends without objection to this lstm_variant call."""
    call = LSTMVariantCall("cpu", torch.float32, hidden_size=5, batch=2, steps=3)._replace(**changes)
    return [name for name in BACKENDS[1:] if objection("lstm_variant", name, call) is None]
