"""The path of ``input`` from LSTM.forward to a kernel: few files, each entered once, listed in DESIGN.md.

The call stack is taken where the kernel would start; helpers that have returned are not on it.
"""

import re
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastseq
from fastseq import _native, ops
from fastseq.ops.lstm import triton as triton_backend

PACKAGE = Path(fastseq.__file__).parent
DESIGN = Path(__file__).parents[1] / "DESIGN.md"
MOST_FILES = 8


class Arrived(Exception):
    """Raised in place of the kernel, with the files of the call stack."""


def arrive(*args, **kwargs):
    """Replaces an operator or a launch: raises the files of fastseq on the stack, the outermost first."""
    files, frame = [], sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            files.append(str(path.relative_to(PACKAGE)))
        frame = frame.f_back
    raise Arrived([name for name, _ in groupby(reversed(files))])


OPERATORS = SimpleNamespace(
    lstm_forward=SimpleNamespace(default=arrive),
    lstm_recurrence_forward=SimpleNamespace(default=arrive),
    lstm_recurrence_fits=lambda *args: True,
    tf32_products_available=lambda: False,
)


@pytest.fixture
def place(request, monkeypatch):
    """Replace the kernels of one place by ``arrive`` -> the backend's name."""
    monkeypatch.setattr(_native, "operators", OPERATORS)
    monkeypatch.setattr(_native, "available", lambda: True)
    if request.param == "CUDA operator":
        monkeypatch.setattr(_native, "why_not_cuda", lambda index=None: "")
        monkeypatch.setattr(_native, "device_of", lambda t: "cuda")
        monkeypatch.setattr(_native, "on_cpu", lambda t: False)
    if request.param == "Triton launcher":
        monkeypatch.setattr(triton_backend, "why_not", lambda op, call: None)
        monkeypatch.setattr(triton_backend, "configure", arrive)
        return "triton"
    return "native"


def listed(place: str) -> list[str]:
    """The files that DESIGN.md lists for a place."""
    (line,) = re.findall(rf"^{place}: +(.*)$", DESIGN.read_text(), re.MULTILINE)
    return line.split(" > ")


@pytest.mark.parametrize("place", ["CPU operator", "CUDA operator", "Triton launcher"], indirect=True)
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_the_way_is_short_and_straight(place, train, request):
    module, x = fastseq.LSTM(4, 5, backend=place), torch.randn(3, 2, 4)
    with torch.set_grad_enabled(train), pytest.raises(Arrived) as of_module:
        module(x)
    weights = [w.detach().requires_grad_(train) for w in module.all_weights[0]]
    with pytest.raises(Arrived) as of_op:
        ops.lstm(x, (torch.zeros(2, 5), torch.zeros(2, 5)), *weights, backend=place)
    (files,), (files_of_op,) = of_module.value.args, of_op.value.args
    assert len(files) == len(set(files)) <= MOST_FILES
    name = request.node.callspec.params["place"]
    assert files == listed("CPU, inference" if name == "CPU operator" and not train else name)
    assert files_of_op == files[1:]
