"""The source distribution holds every file of the repository, and CI runs the script that anybody can run."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".gitignore"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_sdist_holds_every_file_of_the_repository(tmp_path):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
    names = {name for name in listed if (ROOT / name).is_file()} - LEFT_OUT
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)],
        cwd=tmp_path / "tree",
        env=os.environ | {"FASTSEQ_NATIVE": "0"},
        check=True,
    )
    (path,) = tmp_path.glob("*.tar")
    with tarfile.open(path) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert sorted(names - packed) == []


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs the repository")
def test_the_workflow_runs_the_ci_script():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (script,) = {step["run"] for step in steps if "run" in step}
    assert os.access(ROOT / script, os.X_OK)
