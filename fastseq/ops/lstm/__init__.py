"""The LSTM over whole sequences: one layer and direction as an op, stacked layers for the module."""

from fastseq.dispatch import register
from fastseq.ops.lstm.api import lstm
from fastseq.ops.lstm.rules import RULES
from fastseq.tune.record import advice

register("lstm", RULES, advice)

__all__ = ["lstm"]
