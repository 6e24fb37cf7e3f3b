"""``fastseq info``: versions, compiled parts, and the backends that serve each op, with a reason for every no."""

import argparse
import importlib.metadata
import platform

import torch

from fastseq import _native
from fastseq.dispatch import BACKENDS, objection, refusals
from fastseq.ops.attention.spec import AttentionCall
from fastseq.ops.candidates.spec import CandidatesCall
from fastseq.ops.linear_cross_entropy.spec import LinearCrossEntropyCall
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.ops.lstm_cell.spec import LSTMCellCall
from fastseq.ops.lstm_variant.spec import LSTMVariantCall
from fastseq.tune.record import describe as tuning


def _example_calls(device: str, dtype: torch.dtype) -> dict[str, object]:
    return {
        "lstm_cell": LSTMCellCall(device, dtype, hidden_size=256),
        "lstm": LSTMCall(device, dtype, input_size=256, hidden_size=256, batch=32, steps=50),
        "lstm_variant": LSTMVariantCall(device, dtype, hidden_size=256, layer_norm=True, batch=32, steps=50),
        "attention": AttentionCall("additive", device, dtype),
        "linear_cross_entropy": LinearCrossEntropyCall(device, dtype, hidden_size=256, classes=16384, rows=1600),
        "candidates": CandidatesCall(device, dtype, count=10),
    }


def info() -> str:
    """Printable text: versions, compiled parts, parts left out at install, and an op-by-backend table with reasons."""
    lines = [f"{name:<22}{value}" for name, value in _versions().items()]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        lines += ["", f"backends on {device} (float32, H=256)", *_table(_example_calls(device, torch.float32))]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    facts = {
        "fastseq": _version_of("fastseq"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if _native.available():
        built = _native.build_info()
        built["cuda"] = ", ".join(built.pop("cuda_architectures")) or "none"
        facts |= {f"native: {key}": value for key, value in built.items()}
    else:
        facts["native"] = f"missing: {_native.why_not()}"
    facts["tuning"] = tuning()
    reasons = [f"{part} ({reason})" for part, reason in _native.left_out().items()]
    nothing = "nothing" if _native.build_record() else "not recorded: this tree was not built here"
    return facts | {"left out at install": "; ".join(reasons) or nothing}


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(calls: dict[str, object]) -> list[str]:
    names = BACKENDS[1:]
    rows, objections = [], []
    for op in calls:
        sentences = {name: objection(op, name, calls[op]) for name in names}
        rows.append(f"  {op:<22}" + "".join(f"{'yes' if sentences[name] is None else 'no':<12}" for name in names))
        objections += [(op, name, sentence) for name, sentence in sentences.items() if sentence is not None]
    reasons = (f"  {line}" for line in refusals(objections))
    return [f"  {'':<22}" + "".join(f"{name:<12}" for name in names), *rows, *reasons]


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq info``."""
    parser = argparse.ArgumentParser(prog="fastseq info", description=__doc__.replace("``", ""))
    parser.parse_args(argv)
    print(info())
