"""Plans make without running it: when the CUDA kernels are compiled."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the repository")
@pytest.mark.parametrize(
    ("arguments", "environment", "value"),
    [
        ([], {}, "" if any(map(os.path.exists, ("/dev/nvidia0", "/dev/dxg"))) else "0"),
        ([], {"FASTSEQ_CUDA": "1"}, "1"),
        (["CUDA=auto"], {}, ""),
        (["CUDA=1"], {"FASTSEQ_CUDA": "0"}, "1"),
    ],
    ids=["unset", "FASTSEQ_CUDA", "auto", "CUDA"],
)
def test_the_environment_has_cuda_kernels_with_a_gpu_or_on_request(arguments, environment, value):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "FASTSEQ_", "MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--what-if=setup.py", ".venv/.ready", *arguments]
    plan = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True)
    assert f"FASTSEQ_CUDA={value} TORCH_CUDA_ARCH_LIST=" in plan.stdout
