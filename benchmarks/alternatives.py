"""LSTM inference beside the engines that a user would take instead: onnxruntime, OpenVINO, torch's quantize_dynamic.

    python benchmarks/alternatives.py --threads 1 --output alternatives

One layer, T = 100, I = H. All candidates take turns in one process, after a check against float64; engines that are not
installed are left out. onnxruntime and OpenVINO have no variable that lowers them to AVX2: preload avx2_only.c.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import fastseq
from fastseq import _native
from fastseq.bench.baselines import _onnx_model
from fastseq.console import load_average

STEPS = 100
SIZES = [(hidden, batch) for hidden in (256, 512, 1024) for batch in (1, 32)]
FLOAT, INT8 = "fastseq", "fastseq int8"
AGAINST = {"nn.LSTM": FLOAT, "onnxruntime": FLOAT, "openvino": FLOAT, "quantize_dynamic": INT8}
LARGEST_ERROR = {"quantize_dynamic": 0.1, INT8: 0.02}  # relative; others: 1e-5


def onnxruntime_call(lstm: nn.LSTM, x: torch.Tensor):
    """Calls of onnxruntime, or None."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes a core from the next one
    session = onnxruntime.InferenceSession(_onnx_model(lstm), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(["Y"], {"X": x.numpy()})[0]).squeeze(1)


def openvino_call(lstm: nn.LSTM, x: torch.Tensor):
    """Calls of OpenVINO on the same ONNX graph, or None."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    model = core.read_model(_onnx_model(lstm))
    model.reshape({"X": list(x.shape)})
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def call() -> torch.Tensor:
        request.infer({"X": x.numpy()}, share_inputs=True)
        return torch.from_numpy(request.get_tensor("Y").data.copy()).squeeze(1)

    return call


def candidates(hidden: int, batch: int) -> tuple[dict, torch.Tensor]:
    """The calls by name, and the result in float64."""
    torch.manual_seed(0)
    lstm, x = nn.LSTM(hidden, hidden).eval(), torch.randn(STEPS, batch, hidden)
    exact = copy.deepcopy(lstm).double()(x.double())[0]
    ours, narrow = (nn.Sequential(copy.deepcopy(lstm)) for _ in range(2))
    fastseq.accelerate(ours)
    fastseq.accelerate(narrow, weight_dtype=torch.int8)
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(lstm)), {nn.LSTM}, dtype=torch.qint8)
    calls = {
        FLOAT: lambda: ours(x)[0],
        "nn.LSTM": lambda: lstm(x)[0],
        "onnxruntime": onnxruntime_call(lstm, x),
        "openvino": openvino_call(lstm, x),
        INT8: lambda: narrow(x)[0],
        "quantize_dynamic": lambda: quantised(x)[0],
    }
    return {name: call for name, call in calls.items() if call is not None}, exact


def measure(hidden: int, batch: int, seconds: float) -> list[dict]:
    """A row for each candidate."""
    calls, exact = candidates(hidden, batch)
    errors = {name: float((call().double() - exact).norm() / exact.norm()) for name, call in calls.items()}
    for name, error in errors.items():
        assert error <= LARGEST_ERROR.get(name, 1e-5), f"{name}: relative error {error:.2g}"
    times, names, end = {name: [] for name in calls}, list(calls), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[FLOAT]) < 5:
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return [
        {
            "case": f"lstm ({STEPS}, {batch}, {hidden}, {hidden})",
            "candidate": name,
            "median_ms": statistics.median(own),
            "over": AGAINST.get(name),
            "ratio": statistics.median(a / b for a, b in zip(own, times[AGAINST.get(name, name)], strict=True)),
            "error": errors[name],
            "rounds": len(own),
        }
        for name, own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the six sizes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    facts = {
        "command": f"python benchmarks/alternatives.py --threads {args.threads} --seconds {args.seconds}",
        "cpu": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "native": _native.instruction_set(),
        "load average at the start": load_average(),
    }
    with torch.no_grad():
        rows = [row for size in SIZES for row in measure(*size, args.seconds)]
    facts["load average at the end"] = load_average()
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "A ratio is the candidate's time over the time of the fastseq named beside it: above 1 fastseq is faster.",
        "",
    ]
    lines += ["| case | candidate | ms | over | ratio | relative error |", "|---|---|---|---|---|---|"]
    for r in rows:
        over, ratio = (r["over"], f"{r['ratio']:.2f}") if r["over"] else ("", "")
        lines.append(f"| {r['case']} | {r['candidate']} | {r['median_ms']:.3g} | {over} | {ratio} | {r['error']:.1e} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text)
        args.output.with_suffix(".json").write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
