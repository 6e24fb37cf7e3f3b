"""The report of ``benchmarks/gpu_check.py``: its tables, and predictions beside measurements."""

from types import SimpleNamespace

import emulator
import gpu_cases
import gpu_check
import gpu_report
import pytest
import step_prediction

needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")


def test_the_report_counts_kernels_that_the_cache_had(tmp_path):
    line = "compiled for sm_90, H=512, bf16: 3.2 s, 2 kernels; 40 were in the cache\n"
    check = SimpleNamespace(outputs=SimpleNamespace(name=tmp_path), report=gpu_report.Report(tmp_path / "out", ""))
    (tmp_path / "compile-0.txt").write_text(line)
    gpu_check.keep_compiled(check)
    assert check.report.data["compile"] == [{"H": 512, "dtype": "bf16", "s": 3.2, "compiled": 2, "found": 40}]
    assert "found" in check.report.tables()["Ahead-of-time compilation"]


@needs_emulator
def test_predictions_stand_beside_what_the_smoke_measures():
    """By csrc/cuda/lstm/cost.h on the host-side device; a step of nn.LSTM is that of cuDNN."""
    cases = {case.name: case for case in gpu_cases.bench_case_list("smoke")}
    small, large = cases["lstm (128, 16, 512, 512) bf16 cuda"], cases["lstm (128, 128, 512, 512) bf16 cuda"]
    with emulator.as_native():
        for kernel in ("cluster", "grid", "cudnn"):
            us, both = (step_prediction.predicted_us(small, kernel, train) for train in (False, True))
            assert 0 < us < both and us <= step_prediction.predicted_us(large, kernel, False)
        assert step_prediction.predicted_us(cases["lstm (128, 16, 1024, 1024) bf16 cuda"], "cluster", False) is None
        assert step_prediction.predicted_us(small, "", False) is None, "not one kernel"
        float_case = cases["lstm (128, 16, 512, 512) tf32 cuda"]
        assert step_prediction.predicted_us(float_case, "cluster", False) > 0
        assert step_prediction.predicted_us(float_case, "cluster", True) is None, "no backward in clusters of 16"
    row = {"case": "c", "mode": "inference", "candidate": "native cluster", "us_per_step": 1.5, "ratio": 2.0}
    lines = gpu_report.smoke_lines([row | {"predicted_us_per_step": 1.04}])
    assert lines[0][3:5] == ("1.5 (1)", "2.00")


def test_the_scales_of_the_cost_model_are_medians_of_measured_over_modelled():
    """The backward's time is training less inference, each without its products over all steps."""

    def row(case, mode, us, products, predicted):
        figures = {"us_per_step": us, "products_us_per_step": products, "predicted_us_per_step": predicted}
        return {"case": case, "mode": mode, "kernel": "grid", **figures}

    rows = [row("a", "inference", 2.5, 0.5, 1.0), row("a", "training", 9.5, 1.5, 3.0)]  # 2 / 1, (9.5 - 2.5 - 1) / 2
    rows += [row("b", "inference", 4.0, 1.0, 1.0), row("c", "inference", 5.0, 1.0, 1.0)]  # 3 / 1, 4 / 1
    rows += [row("d", "training", 5.0, 1.0, 1.0), {"case": "a", "mode": "inference", "us_per_step": 1.0}]
    assert step_prediction.scales(rows) == [("grid", "backward", 1, 3.0), ("grid", "forward", 3, 3.0)]


def test_the_summary_fits_a_terminal(tmp_path):
    """The printed tables are cut by whole rows, and the most informative ones stay."""
    report = gpu_report.Report(tmp_path, "gpu_check.py")
    for number in range(300):
        key = {"case": f"lstm {number}", "mode": "inference", "group": "g"}
        report.data["bench"].append(key | {"candidate": "native", "verdict": "WRONG", "detail": "x" * 400})
    smoke = {"case": "lstm", "mode": "training", "candidate": "native grid", "us_per_step": 1.5, "ratio": 2.0}
    report.data["smoke"].append(smoke | {"baseline": "nn.LSTM", "verdict": "ok"})
    report.stage("smoke", 1.0, "done")
    text = report.summary()
    assert 4000 < len(text) <= gpu_report.MOST_PRINTED
    assert "## Stages" in text and "## Smoke" in text and text.endswith("(cut: Wrong)\n")
    assert all(line.startswith(("|", "#", "(")) for line in text.splitlines() if line)


def test_the_report_survives_odd_text(tmp_path):
    report = gpu_report.Report(tmp_path, "gpu_check.py")
    detail = "a | pipe\nand a new line"
    report.add(
        "parity", {"op": "lstm", "case": "c", "dtype": "d", "backend": "b", "verdict": "failed", "detail": detail}
    )
    (line,) = [line for line in (tmp_path / "report.md").read_text().splitlines() if "pipe" in line]
    assert line.count("|") == 5
    assert report.wrong()[0]["detail"] == detail
