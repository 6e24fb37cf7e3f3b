"""Every patch of tests/mutations applies to the present sources and names test files that exist."""

import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = sorted(path.relative_to(ROOT) for path in Path(__file__).parent.glob("*/*.patch"))


def apply_check(*patches: Path) -> subprocess.CompletedProcess:
    command = ["git", "apply", "--check", "--recount", *map(str, patches)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_every_patch_applies():
    stale = [f"{path}: {done.stderr}" for path in PATCHES if (done := apply_check(path)).returncode]
    assert not stale, "repair these, do not delete them:\n" + "\n".join(stale)


def test_every_named_test_file_exists():
    missing = []
    for path in PATCHES:
        header = (ROOT / path).read_text().partition("--- a/")[0].splitlines()
        selections = [line.removeprefix("tests: ") for line in header if line.startswith("tests: ")]
        words = [word for selection in selections for word in shlex.split(selection)]
        files = [word for word in words if word.startswith("tests/")]
        missing += [f"{path}: {name}" for name in files if not (ROOT / name).exists()]
        assert selections and len(files) >= len(selections), path
    assert not missing


def test_there_are_patches_for_every_part():
    assert {path.parts[2] for path in PATCHES} >= {"cpu", "cuda", "triton", "ops", "nn", "generation", "training"}
