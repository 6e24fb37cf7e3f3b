"""README.md of a saved model: data, metrics and licence, with the metadata block that model hubs read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.training.closed_json import check_values, matches, read_object
from fastseq.training.metrics import LABELS

TEXTS = {"data": str | None, "license": str | None}
UNKNOWN = "not stated"


@dataclass(frozen=True)
class Card:
    """The facts of a model that its weights do not show.

    Args:
        data: the training data, as a name, a path or a sentence.
        license: licence of the weights, best as an SPDX identifier such as "MIT".
        metrics: measured values by name, such as {"sequence_error_rate": 30.2}; `fastseq evaluate` writes them.
    """

    data: str | None = None
    license: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All facts as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: object, where: str) -> Card:
        """The inverse of :meth:`to_dict`; raises UserError for an unknown fact or a wrong type."""
        if not isinstance(facts, dict):
            raise UserError(f"{where} must hold an object of data, license and metrics")
        metrics = facts.get("metrics", {})
        texts = {name: value for name, value in facts.items() if name != "metrics"}
        return cls(**check_values(texts, TEXTS, where), metrics=_numbers(metrics, f"{where}.metrics"))


def _numbers(metrics: object, where: str) -> dict[str, float]:
    plain = isinstance(metrics, dict) and len(metrics) <= 100
    if not plain or not all(matches(name, str) and matches(value, float) for name, value in metrics.items()):
        raise UserError(f"{where} must be an object of at most 100 named numbers")
    return metrics


def measured(evaluation: Path) -> dict[str, float]:
    """The metrics of evaluation.json, which `fastseq evaluate` writes; {} where there is none."""
    if not evaluation.is_file():
        return {}
    return {name: value for name, value in read_object(evaluation).items() if name in LABELS and matches(value, float)}


def model_card(card: Card, config: Seq2SeqConfig) -> str:
    """The text of README.md."""
    metadata = {"library_name": "fastseq", "license": card.license or "unknown", "tags": ["seq2seq", "lstm"]}
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()), "---", ""]
    lines += ["# LSTM sequence-to-sequence model", ""]
    attention = "no attention" if config.attention == "none" else f"{config.attention.replace('_', ' ')} attention"
    lines += [
        f"{config.parameter_count:,} parameters: {config.encoder_layers} encoder and {config.decoder_layers} decoder "
        f"layer(s) of {config.hidden_size} units, {attention}.",
        "",
        "```python",
        "import fastseq",
        "",
        'model = fastseq.TrainedModel.from_pretrained("path/of/this/folder")',
        'print(model(["a source line"]))',
        "```",
        "",
        *("## Data", "", f"Trained on: {card.data or UNKNOWN}", ""),
        *("## Metrics", ""),
    ]
    if card.metrics:
        rows = [f"| {LABELS.get(name, name)} | {value:g} |" for name, value in card.metrics.items()]
        lines += ["| metric | value |", "|---|---|", *rows]
    else:
        lines.append(UNKNOWN)
    return "\n".join([*lines, "", "## Licence", "", card.license or UNKNOWN, ""])
