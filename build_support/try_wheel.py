"""Installs a wheel into fresh environments, with no program on the PATH, and trains one step in each.

python build_support/try_wheel.py dist/*.whl --python python3.11 python3.12 --torch 2.11.0 2.13.0
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LARGEST = 30 * 2**20  # bytes
CHECK = """
import torch, fastseq
from fastseq import _native
from fastseq.info import info
print(info())
assert _native.available(), _native.why_not()
assert fastseq.__file__.startswith({home!r}), fastseq.__file__
assert not {cuda} or _native.build_info()["cuda_architectures"], "built without CUDA kernels"
torch.manual_seed(0)
x = torch.randn(5, 2, 8)
ours, theirs = fastseq.LSTM(8, 16, backend="native"), torch.nn.LSTM(8, 16)
theirs.load_state_dict(ours.state_dict())
for module in (ours, theirs):
    module(x)[0].square().sum().backward()
for ours, theirs in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad)
"""


def try_in(folder: Path, wheel: Path, python: str, torch: str, cuda: bool) -> None:
    """Raises CalledProcessError if the wheel does not install, import or train."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    interpreter = str(folder / "bin/python")
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTSEQ_", "PYTHON"))}
    command = [interpreter, "-c", CHECK.format(home=str(folder.resolve()), cuda=cuda)]
    subprocess.run(command, check=True, cwd=folder, env=environment | {"PATH": str(folder / "empty")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], help="versions")
    parser.add_argument("--cpu", action="store_true", help="accept a wheel without CUDA kernels")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    if (size := wheel.stat().st_size) > LARGEST:
        raise SystemExit(f"{wheel.name} has {size / 2**20:.1f} MiB; at most {LARGEST / 2**20:.0f} are allowed.")
    for python, torch in itertools.product(arguments.python, arguments.torch):
        with tempfile.TemporaryDirectory() as folder:
            print(f"== {wheel.name}, {size / 2**20:.1f} MiB: {python}, torch {torch}", flush=True)
            try_in(Path(folder), wheel, python, torch, not arguments.cpu)
    print("The wheel installs, imports and trains in every environment.")


if __name__ == "__main__":
    main()
