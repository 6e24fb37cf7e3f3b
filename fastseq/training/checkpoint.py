"""Reads a checkpoint, which may come from a stranger, into a model. Needs no Lightning."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig

WEIGHTS = "model."  # the task's prefix of the names of the model's parameters


def start_again(run: Path) -> str:
    """The advice to train the run again, as part of a sentence."""
    return f"start again with: fastseq train --config {run / 'config.yaml'} --run_dir {run} --overwrite"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without unpickling objects; raises UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path.parent.parent} has no checkpoint {path.name}; {start_again(path.parent.parent)}")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError("it holds no state_dict")
        for name, tensor in checkpoint["state_dict"].items():
            check_tensor(name, tensor)
    except Exception as error:  # torch.load raises a different type for every kind of damage
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path} is not a checkpoint of `fastseq train` or is damaged: {reason}") from error
    return checkpoint


def check_archive(path: Path) -> None:
    """Raise unless the file is as large as its contents: a compressed archive may hold far more than memory does."""
    with zipfile.ZipFile(path) as archive:
        content = sum(entry.file_size for entry in archive.infolist())
    if content > path.stat().st_size:
        raise ValueError(f"its {content:,} bytes of content are compressed")


def check_tensor(name: object, tensor: object) -> None:
    """Raise ValueError unless `tensor` is a dense floating-point one that owns as much memory as its shape says."""
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ValueError("state_dict holds something else than named tensors")
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name[:100]} is no dense tensor of floating-point numbers")


def trained_model(options: Seq2SeqConfig, checkpoint: dict[str, Any], path: Path) -> Seq2Seq:
    """The model of `options` with the weights of the checkpoint; raises UserError naming tensors that do not fit."""
    names = [name for name in checkpoint["state_dict"] if name.startswith(WEIGHTS)]
    return weighted_model(options, {name.removeprefix(WEIGHTS): checkpoint["state_dict"][name] for name in names}, path)


def weighted_model(options: Seq2SeqConfig, weights: dict[str, torch.Tensor], path: Path) -> Seq2Seq:
    """The model of `options` with these weights, which came from `path`; raises UserError naming tensors that misfit.

    Builds no model larger than the weights: a stranger's configuration may ask for more than memory.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights.values()}  # shared matrices once
    stored = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())
    misfit = f"{path} does not fit the configuration and vocabulary of this run"
    advice = "use the model options and tokenizers that it was trained with"
    if options.parameter_count > stored:
        raise UserError(f"{misfit}: it has {stored:,} parameters, expected {options.parameter_count:,}; {advice}")
    model = Seq2Seq(options)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    if wrong:
        listed = "; ".join(f"{n} is {found.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{misfit}: {listed}{more}; {advice}")
    model.load_state_dict(weights)
    return model
