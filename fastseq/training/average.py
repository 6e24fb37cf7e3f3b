"""`fastseq average`: one model whose weights are the mean of the last ones of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.training.checkpoint import weighted_model
from fastseq.training.folder import RunFolder
from fastseq.training.options import Count, command_parser, parsed
from fastseq.training.saved import is_saved, kept_weights, read_weights
from fastseq.training.trained import TrainedModel


def average_parser() -> ArgumentParser:
    """The options of `fastseq average`."""
    parser = command_parser(
        "average",
        "Average the weights that a run with --trainer.keep has kept, and write them as a saved model.",
        "fastseq average runs/mine --last 5 --output averaged",
    )
    parser.add_argument("run", type=str, help="run folder made by `fastseq train --trainer.keep N`")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--last", type=Count | None, help="how many, the latest first; default: all that the run kept")
    parser.add_argument("--output", type=str | None, help="folder of the saved model, default RUN/averaged")
    return parser


def mean_weights(paths: list[Path], config: Seq2SeqConfig) -> dict[str, torch.Tensor]:
    """The mean of the weights in these files, summed in float64; UserError for a file that does not fit the model."""
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in weighted_model(config, read_weights(path, config), path).state_dict().items():
            sums[name] = sums.get(name, 0) + tensor.double()
    return {name: total / len(paths) for name, total in sums.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq average`; `argv` without the command's own name."""
    options = parsed(average_parser(), sys.argv[1:] if argv is None else argv)
    if is_saved(options.run):
        raise UserError(f"{options.run} is a saved model; give the run folder, which keeps the weights to average")
    paths = kept_weights(RunFolder(options.run).checkpoints)
    wanted = options.last or max(len(paths), 1)
    if wanted > len(paths):
        raise UserError(
            f"{options.run} has kept the weights of {len(paths)} validations, not of {wanted}; train with "
            f"--trainer.keep {wanted}, or continue it: fastseq train --resume {options.run} --trainer.keep {wanted}"
        )
    trained = TrainedModel.from_pretrained(options.run)
    trained.model.load_state_dict(mean_weights(paths[-wanted:], trained.model.config))
    output = Path(options.output or Path(options.run) / "averaged")
    trained.save_pretrained(output, metrics={})  # the run's metrics belong to other weights
    print(f"{output}: the mean of {wanted}, {paths[-wanted].name} to {paths[-1].name}")
