"""The recurrence of an LSTM with recurrent dropout, zoneout or layer normalisation: one layer and direction."""

from fastseq.dispatch import register
from fastseq.ops.lstm_variant.api import lstm_variant
from fastseq.ops.lstm_variant.rules import RULES

register("lstm_variant", RULES)

__all__ = ["lstm_variant"]
