"""`fastseq export`: encoder and decoder step of a trained model for another runtime, checked against the model."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import torch

from fastseq.errors import SuggestingParser, UserError
from fastseq.export.exported import ExportedModel
from fastseq.export.graphs import Encode, Step, encoder_inputs, encoder_outputs, examples, step_inputs, step_outputs
from fastseq.training.generation_config import read_search
from fastseq.training.saved import SavedFolder, is_saved
from fastseq.training.trained import TrainedModel

FORMATS = {"onnx": "fastseq.export.onnx", "torch": "fastseq.export.package"}
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit


def export(trained: TrainedModel, path: str | Path, format: str) -> float:
    """Write the graphs of a model, its tokenizers and its configuration into a new folder.

    Args:
        trained: on the CPU, float32.
        path: the folder.
        format: "onnx": encoder.onnx and step.onnx, for onnxruntime; "torch": encoder.pt2 and step.pt2, packages of
            AOTInductor for this machine's processor.

    Returns:
        The largest difference of an output from the model's, for another batch and length than the graphs were made
        with, relative to the largest output.

    Raises:
        UserError: the folder holds a model; the model asks for a backend by name; the graphs compute something else.
    """
    module, path = _format(format), Path(path)
    if is_saved(path) or (path / "config.yaml").exists():
        raise UserError(f"{path} holds a model already; choose another folder")
    model = trained.model
    if model.config.copy:
        raise UserError(
            "a model with copy cannot be exported: its logits have a column for each source position, whose words "
            "another runtime would have to look up; run it with fastseq, or train without copy"
        )
    if format != "onnx" and model.config.coverage:
        raise UserError("packages of a model with coverage are not supported yet; use --format onnx")
    if format == "onnx" and (model.config.layer_norm or model.config.zoneout_hidden or model.config.zoneout_cell):
        raise UserError(
            f"ONNX has no LSTM with {model.encoder.lstm.variant}, and a loop would be unrolled for one length; use "
            "--format torch"
        )
    if format == "onnx" and model.config.backend != "auto":
        raise UserError(f"the model asks for backend {model.config.backend!r}; ONNX needs auto: set it in config.json")
    trained.save_pretrained(path)
    SavedFolder(path).weights.unlink()  # the graphs hold them
    encoder, step = examples(model, batch=3, positions=7)
    config = model.config
    module.write(
        Encode(model).eval(), encoder, encoder_inputs(config), encoder_outputs(config), path / f"encoder{module.SUFFIX}"
    )
    module.write(Step(model).eval(), step, step_inputs(config), step_outputs(config), path / f"step{module.SUFFIX}")
    difference = _difference(trained, path, format)
    if not difference <= TOLERANCE:
        raise UserError(f"the graphs in {path} differ from the model by {difference:.1e}; expected {TOLERANCE:.0e}")
    return difference


def load(path: str | Path) -> TrainedModel:
    """The exported model of a folder, run by its graphs, with the search and the tokenizers of fastseq."""
    folder = SavedFolder(path)
    found = [name for name in FORMATS if (folder.path / f"encoder{_format(name).SUFFIX}").exists()]
    if not found:
        raise UserError(f"{path} holds no exported model; make one with `fastseq export`")
    module = _format(found[0])
    config, card = folder.load_config()
    graphs = (
        module.load(folder.path / f"{name}{module.SUFFIX}", inputs(config))
        for name, inputs in (("encoder", encoder_inputs), ("step", step_inputs))
    )
    model = ExportedModel(config, *graphs)
    return TrainedModel(model, *folder.load_tokenizers(), generation_config=read_search(folder.path), card=card)


def _format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[name])


def _difference(trained: TrainedModel, path: Path, format: str) -> float:
    """The largest relative difference of an output between the graphs and the model, for sizes of their own."""
    module, model, worst = _format(format), trained.model, 0.0
    for batch, positions in ((1, 4), (5, 11)):
        encoder, step = examples(model, batch, positions, seed=batch)
        for name, wrapped, inputs, given in (
            ("encoder", Encode(model), encoder_inputs, encoder),
            ("step", Step(model), step_inputs, step),
        ):
            found = module.load(path / f"{name}{module.SUFFIX}", inputs(model.config))(*given)
            with torch.no_grad():
                expected = wrapped(*given)
            for one, other in zip(found, expected, strict=True):
                scale = other.abs().max().clamp(min=1.0)
                worst = max(worst, float((one - other).abs().max() / scale))
    return worst


def main(argv: list[str]) -> None:
    """Command line of `fastseq export`."""
    options = _parser().parse_args(argv)
    difference = export(TrainedModel.from_pretrained(options.run), options.out, options.format)
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted(options.out.glob("*.onnx")) + sorted(
        options.out.glob("*.pt2")
    )}  # fmt: skip
    files = ", ".join(f"{name} ({size:.1f} MiB)" for name, size in sizes.items())
    print(f"wrote {options.out}: {files}; largest difference from the model {difference:.1e}")


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="fastseq export",
        description="Write encoder and decoder step of a trained model for another runtime.",
        epilog="example: fastseq export --format onnx runs/x exported/x",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a saved model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="onnx, or torch: packages of AOTInductor for this processor"
    )
    return parser
