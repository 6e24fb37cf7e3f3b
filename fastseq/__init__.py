"""fastseq: fast LSTM sequence-to-sequence models with the weights and results of ``nn.LSTM``."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Attention",
    "LSTMCell",
    "Seq2Seq",
    "Seq2SeqConfig",
    "accelerate",
    "build_seq2seq_model",
    "empty_cache",
    "explain",
    "info",
    "linear_cross_entropy",
    "ops",
    "restore",
    "use_backend",
]


def _is_the_command() -> bool:
    """True in the process of ``fastseq`` or ``python -m fastseq``: its help and its refusals need no torch."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "fastseq" or (program == "-m" and "fastseq" in sys.orig_argv)


_HOMES = {"TrainedModel": "fastseq.training.trained"}  # not in __all__: it needs the extra `train`
if TYPE_CHECKING:
    from fastseq.training.trained import TrainedModel as TrainedModel

if TYPE_CHECKING or not _is_the_command():
    from fastseq import ops
    from fastseq._native import empty_cache
    from fastseq.dispatch import explain, use_backend
    from fastseq.info import info
    from fastseq.nn import LSTM, Attention, LSTMCell
    from fastseq.nn.accelerate import accelerate, restore  # the function: mypy would take fastseq.nn's submodule
    from fastseq.ops import linear_cross_entropy
    from fastseq.seq2seq import Seq2Seq, Seq2SeqConfig, build_seq2seq_model
else:
    _HOMES |= {
        **dict.fromkeys(("LSTM", "Attention", "LSTMCell", "accelerate", "restore"), "fastseq.nn"),
        **dict.fromkeys(("Seq2Seq", "Seq2SeqConfig", "build_seq2seq_model"), "fastseq.seq2seq"),
        **dict.fromkeys(("explain", "use_backend"), "fastseq.dispatch"),
        "empty_cache": "fastseq._native",
        "info": "fastseq.info",
        "linear_cross_entropy": "fastseq.ops",
        "ops": "fastseq",
    }


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastseq' has no attribute {name!r}")
    importlib.import_module("fastseq.ops")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "fastseq":
            raise
        raise ModuleNotFoundError(
            f'fastseq.{name} needs the package {error.name}; bring it with: pip install "fastseq[train]"',
            name=error.name,
        ) from error
    globals()[name] = value
    return value
