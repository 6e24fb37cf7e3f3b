"""The grid of ``fastseq parity``: few shapes, chosen to hurt, and for ``--cases full`` a sample of all combinations."""

import itertools
import random
from dataclasses import dataclass, field

from fastseq.testing.problems import modules, ops, variants

PROBLEMS = {
    "lstm_cell": ops.lstm_cell_problem,
    "lstm": ops.lstm_problem,
    "lstm_variant": variants.lstm_variant_problem,
    "attention": ops.attention_problem,
    "linear_cross_entropy": ops.loss_problem,
    "LSTMCell": modules.lstm_cell_module_problem,
    "LSTM": modules.lstm_module_problem,
    "Attention": modules.attention_module_problem,
    "Seq2Seq": modules.seq2seq_problem,
}


@dataclass(frozen=True)
class ParityCase:
    """One point of the grid.

    Attributes:
        op: a key of ``PROBLEMS``.
        options: keyword arguments of the op's function there.
        slices: the leaves and the incoming gradients are strided slices of larger tensors.
    """

    op: str
    options: dict = field(hash=False)
    slices: bool = False

    @property
    def name(self) -> str:
        parts = [str(v) if k == "shape" else f"{k}={v}" for k, v in self.options.items()]
        return ", ".join(parts + ["slices"] * self.slices)


def _quick() -> list[ParityCase]:
    cell = [dict(shape=s) for s in ((1, 1), (3, 257), (2, 3, 7))] + [dict(shape=(4, 5), spread=100.0)]
    sequence = [
        dict(shape=(1, 1, 1, 1)),
        dict(shape=(1, 3, 5, 257)),
        dict(shape=(3, 2, 6, 63), reverse=True),
        dict(shape=(2, 67, 5, 16)),
        dict(shape=(5, 3, 4, 7), form="lengths", cell_states=True),
        dict(shape=(5, 3, 4, 7), form="lengths", reverse=True),
        dict(shape=(5, 3, 4, 7), form="packed"),
        dict(shape=(5, 3, 4, 7), form="packed", reverse=True, bias=False),
        dict(shape=(5, 3, 4, 7), form="lengths", proj_size=3),
        dict(shape=(5, 3, 4, 7), spread=100.0),
        dict(shape=(6, 2, 33, 260), form="lengths"),  # enough work for several threads: skinny and wide batches
        dict(shape=(6, 40, 33, 130), form="packed", reverse=True),
    ]
    variants = [
        dict(shape=(1, 1, 1), dropout=True, zoneout="masks"),
        dict(shape=(1, 1, 5), dropout=True, layer_norm=True),
        dict(shape=(3, 2, 63), dropout=True, reverse=True),
        dict(shape=(4, 3, 7), zoneout="masks", form="lengths", cell_states=True),
        dict(shape=(4, 3, 7), zoneout="rates", form="lengths", reverse=True),
        dict(shape=(3, 2, 63), layer_norm=True, form="lengths"),
        dict(shape=(12, 9, 33), dropout=True, zoneout="masks", layer_norm=True, form="lengths", reverse=True),
        dict(shape=(2, 67, 16), dropout=True, zoneout="rates", layer_norm=True, cell_states=True),
        dict(shape=(4, 3, 7), dropout=True, zoneout="masks", spread=100.0),
    ]
    scores = ("dot", "general", "additive", "normed_additive")
    attentions = [
        *(dict(shape=(3, 4, 5, 6), score=score, padding="lengths") for score in scores),
        *(dict(shape=(3, 4, 5, 6), score=score, padding="step_mask") for score in scores),
        dict(shape=(3, 1, 17, 257), score="additive", padding="mask", one_step=True),
        dict(shape=(2, 3, 1, 1), score="additive"),
        dict(shape=(2, 3, 1, 1), score="dot", padding="lengths"),
        dict(shape=(2, 3, 4, 5), score="additive", spread=100.0),
        dict(shape=(2, 3, 4, 5), score="dot", spread=100.0),
        dict(shape=(2, 9, 70, 33), score="additive", padding="lengths"),
        dict(shape=(2, 9, 70, 33), score="additive", padding="lengths", coverage=True),
        dict(shape=(3, 1, 17, 257), score="normed_additive", padding="mask", one_step=True, coverage=True),
    ]
    losses = [
        dict(shape=(1, 1, 1)),
        dict(shape=(5, 257, 7), reduction="sum", label_smoothing=0.1, ignored=True),
        dict(shape=(37, 63, 16), reduction="none", label_smoothing=0.1, bias=False, ignored=True),
        dict(shape=(5, 40, 7), spread=30.0),
        dict(shape=(9, 33, 5), reduction="none", spread=30.0),
    ]
    grid = {
        "lstm_cell": cell,
        "lstm": sequence,
        "lstm_variant": variants,
        "attention": attentions,
        "linear_cross_entropy": losses,
        **_quick_modules(),
    }
    cases = [ParityCase(op, options) for op, several in grid.items() for options in several]
    sliced = {
        "lstm_cell": [cell[2]],
        "lstm": [sequence[k] for k in (2, 5, 8)],
        "lstm_variant": [variants[k] for k in (3, 6)],
        "attention": [attentions[2], attentions[4], attentions[-2]],
        "linear_cross_entropy": losses[1:3],
    }
    return cases + [ParityCase(op, options, slices=True) for op, several in sliced.items() for options in several]


def _quick_modules() -> dict[str, list[dict]]:
    return {
        "LSTMCell": [
            dict(shape=(1, 1, 1)),
            dict(shape=(3, 5, 257), states=False),
            dict(shape=(2, 4, 7), bias=False),
            dict(shape=(1, 4, 7), unbatched=True),
            dict(shape=(2, 4, 7), spread=100.0),
        ],
        "LSTM": [
            dict(shape=(1, 1, 1, 1)),
            dict(shape=(4, 2, 5, 7), num_layers=2, bidirectional=True),
            dict(shape=(4, 3, 5, 7), num_layers=2, bidirectional=True, form="packed"),
            dict(shape=(4, 3, 5, 7), num_layers=2, bidirectional=True, form="lengths", batch_first=True),
            dict(shape=(4, 2, 5, 7), proj_size=3, bidirectional=True),
            dict(shape=(4, 1, 5, 7), form="unbatched", bias=False, states=False),
        ],
        "Attention": [
            dict(shape=(3, 4, 5, 6, 6), score="dot", scale=0.5),
            dict(shape=(3, 4, 5, 6, 7), score="general", padding="step_mask"),
            dict(shape=(3, 4, 5, 6, 7), score="additive", attention_size=9),
            dict(shape=(3, 1, 5, 6, 7), score="normed_additive", padding="mask"),
        ],
        "Seq2Seq": [
            dict(attention="additive"),
            dict(attention="general", input_feeding=False, encoder_layers=2),
        ],
    }


def _full() -> list[ParityCase]:
    """Sixty draws of every option of each op, and twenty of each module; always the same ones."""
    both = (False, True)
    axes = {
        "lstm_cell": (60, dict(shape=[(1, 1), (2, 63), (3, 257), (70, 5), (2, 3, 16)])),
        "lstm": (60, dict(
            shape=[(1, 1, 1, 1), (5, 3, 4, 7), (3, 2, 6, 63), (2, 67, 5, 16), (4, 3, 5, 257), (30, 4, 64, 64)],
            form=["full", "lengths", "packed"], reverse=both, bias=both, proj_size=[0, 0, 1], cell_states=both,
        )),
        "lstm_variant": (60, dict(
            shape=[(1, 1, 5), (5, 3, 7), (3, 2, 63), (2, 67, 16), (4, 3, 257), (9, 5, 64)],
            zoneout=["none", "masks", "rates", "hidden", "cell"],
            dropout=both, layer_norm=both, form=["full", "lengths"], reverse=both, cell_states=both,
        )),
        "attention": (60, dict(
            shape=[(1, 1, 1, 1), (3, 4, 5, 6), (2, 3, 17, 257), (33, 1, 50, 64), (2, 20, 130, 33)],
            score=["dot", "general", "additive", "normed_additive"], padding=["none", "lengths", "mask", "step_mask"],
        )),
        "linear_cross_entropy": (60, dict(
            shape=[(1, 1, 1), (5, 257, 7), (70, 63, 16), (300, 16, 33), (3, 5000, 4)], bias=both, ignored=both,
            reduction=["mean", "sum", "none"], label_smoothing=[0.0, 0.1, 1.0],
        )),
        "LSTMCell": (20, dict(
            shape=[(1, 1, 1), (2, 4, 63), (40, 5, 16), (3, 300, 257)], states=both, bias=both,
        )),
        "LSTM": (20, dict(
            shape=[(1, 1, 1, 1), (5, 3, 4, 7), (3, 17, 6, 63), (12, 4, 65, 33)], form=["full", "lengths", "packed"],
            num_layers=[1, 2, 3], bidirectional=both, bias=both, batch_first=both, proj_size=[0, 0, 2],
        )),
        "Attention": (20, dict(
            shape=[(1, 1, 1, 1, 1), (3, 4, 5, 6, 6), (2, 9, 33, 40, 40)],
            score=["dot", "general", "additive", "normed_additive"], padding=["none", "lengths", "mask", "step_mask"],
        )),
        "Seq2Seq": (10, dict(
            attention=["dot", "general", "additive", "normed_additive"], input_feeding=both, bidirectional=both,
            encoder_layers=[1, 2], decoder_layers=[1, 2],
        )),
    }  # fmt: skip
    generator, cases = random.Random(0), []
    for op, (count, options) in axes.items():
        rows = [dict(zip(options, row, strict=True)) for row in itertools.product(*options.values())]
        for row in generator.sample(rows, min(count, len(rows))):
            if row.get("proj_size", 0) and row["proj_size"] >= row["shape"][-1]:
                row["proj_size"] = 0
            cases.append(ParityCase(op, row, slices=op.islower() and generator.random() < 0.5))
    saturated = [
        dict(shape=(3, 2, 6, 63), form="lengths", reverse=True),
        dict(shape=(2, 67, 5, 16), form="packed"),
        dict(shape=(4, 3, 5, 257), cell_states=True),
        dict(shape=(6, 4, 64, 64), reverse=True, bias=False),
    ]
    saturated_scores = [
        dict(shape=(2, 20, 130, 33), score="additive", padding="lengths"),
        dict(shape=(3, 1, 17, 257), score="normed_additive", padding="mask", one_step=True),
        dict(shape=(2, 20, 130, 33), score="dot", padding="step_mask"),
    ]
    named = [ParityCase("lstm", options | {"spread": 100.0}) for options in saturated]
    return (
        _quick()
        + cases
        + named
        + [ParityCase("attention", options | {"spread": 100.0}) for options in saturated_scores]
    )


GRIDS = {"quick": _quick, "full": _full}
