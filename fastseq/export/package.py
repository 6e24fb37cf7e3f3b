"""Packages of torch.export, compiled ahead of time by AOTInductor; they call the compiled operators of fastseq."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from fastseq.export.exported import Graph
from fastseq.export.graphs import Axes

SUFFIX = ".pt2"


def write(graph: nn.Module, example: tuple[Tensor, ...], inputs: list[Axes], outputs: list[Axes], path: Path) -> None:
    """Compile ``graph`` for this machine's processor into a package.

    A package takes inputs with the strides of its example, and does not check them: both are contiguous, see ``load``.
    """
    example = tuple(tensor.contiguous() for tensor in example)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program(graph, example, inputs), package_path=str(path))


def program(graph: nn.Module, example: tuple[Tensor, ...], inputs: list[Axes]) -> torch.export.ExportedProgram:
    """The exported program of ``graph``, for all batches and lengths."""
    dims = {name: Dim(name) for axis in inputs for name in axis.sizes.values()}
    shapes = tuple({i: dims[name] for i, name in axis.sizes.items()} for axis in inputs)
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=_for(graph, shapes))


def _for(graph: nn.Module, shapes: tuple) -> tuple:
    """The shapes of the arguments; further ones of a step come as one tuple."""
    named = graph.forward.__code__.co_argcount - 1
    return shapes if len(shapes) == named else (*shapes[:named], shapes[named:])


def load(path: Path, inputs: list[Axes]) -> Graph:
    """The graph as a function of tensors."""
    package = torch._inductor.aoti_load_package(str(path))

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return package(*(tensor.contiguous() for tensor in tensors))

    return run
