"""The rules by which ``auto`` chooses the backend of ``lstm_variant``."""

from fastseq.dispatch import Rule

RULES = (Rule("reference", (), "no other backend serves recurrent dropout, zoneout and layer normalisation here"),)
