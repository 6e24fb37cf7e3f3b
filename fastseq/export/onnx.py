"""ONNX: both graphs by the TorchScript exporter of torch, through the ``torch`` backend, and back by onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseq.export.exported import Graph
from fastseq.export.graphs import Axes

SUFFIX = ".onnx"


def write(graph: nn.Module, example: tuple[Tensor, ...], inputs: list[Axes], outputs: list[Axes], path: Path) -> None:
    """Write ``graph`` as an ONNX file."""
    import onnx  # noqa: F401  # torch.onnx would name it in a traceback

    axes = {axis.name: axis.sizes for axis in (*inputs, *outputs)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # checks on values, which a trace leaves out; the legacy exporter
        torch.onnx.export(
            graph,
            example,
            str(path),
            dynamo=False,
            input_names=[axis.name for axis in inputs],
            output_names=[axis.name for axis in outputs],
            dynamic_axes=axes,
        )


def load(path: Path, inputs: list[Axes]) -> Graph:
    """The graph as a function of tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [axis.name for axis in inputs]

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run
