"""The runner of mutations on a project of one function and two tests."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
ADD = "def add(a, b):\n    # the sum\n    return a + b\n"
TESTS = """\
import pytest
from pack.arithmetic import add

def test_sum():
    assert add(2, 3) == 5

def test_zero():
    assert add(0, 0) == 0

def test_wrong_anyway():
    assert add(1, 1) == 3

@pytest.fixture
def two():
    assert add(1, 1) == 2
    return 2

def test_fixture(two):
    assert two == 2

@pytest.mark.skip(reason="no GPU")
def test_skipped():
    pass
"""
CHANGE = """\
--- a/pack/arithmetic.py
+++ b/pack/arithmetic.py
@@ -99,2 +99,2 @@
     # the sum
-    return a + b
+    {}
"""


@pytest.fixture
def project(tmp_path):
    files = {"pack/__init__.py": "", "pack/arithmetic.py": ADD, "tests/test_add.py": TESTS, "conftest.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".gitignore").write_text("build/\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def plant(project: Path, name: str, tests: str, code: str = "return a - b", ends: str = "", needs: str = "") -> None:
    path = project / "tests/mutations" / f"{name}.patch"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"breaks: {code}\ntests: tests/test_add.py -k {tests}\n" + (f"ends: {ends}\n" if ends else "")
    header += f"needs: {needs}\n" if needs else ""
    path.write_text(header + CHANGE.format(code))


def run(project: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(RUN), "--root", str(project), *options]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


def results(output: str) -> dict[str, str]:
    lines = [line.split("]", 1)[1].split() for line in output.splitlines() if line.startswith("[")]
    return {name: result for result, name, *_ in lines}


def test_killed_survived_and_broken(project):
    plant(project, "add/sign", "sum")
    plant(project, "add/weak", "zero")
    plant(project, "add/red", "wrong_anyway")
    plant(project, "add/none", "no_such_test")
    plant(project, "add/skipped", "skipped")
    plant(project, "add/fixture", "fixture")
    plant(project, "add/syntax", "sum", code="return a +")
    plant(project, "add/same", "sum", code="return a + b")
    plant(project, "add/crash", "sum", code="import os; os.abort()", ends="crash")
    plant(project, "add/unexpected-crash", "sum", code="import os; os.abort()")
    code, output = run(project, "--jobs", "2")
    assert code == 1
    assert results(output) == {
        "add/sign": "killed",
        "add/weak": "SURVIVED",
        "add/red": "broken",
        "add/none": "broken",
        "add/skipped": "broken",
        "add/fixture": "broken",
        "add/syntax": "broken",
        "add/same": "broken",
        "add/crash": "killed",
        "add/unexpected-crash": "broken",
    }
    for sentence in (
        "2 killed, 1 SURVIVED, 7 broken",
        "pytest tests/test_add.py -k zero passes. Planted: return a - b",
        "without the bug, pytest tests/test_add.py -k wrong_anyway ends in a fail, too",
        "without the bug: pytest tests/test_add.py -k skipped ran no test",
        "stopped before the test itself",
        "tests/mutations/add/same.patch changes nothing",
        "ends in a crash, expected a fail",
    ):
        assert sentence in output, output
    assert (project / "pack/arithmetic.py").read_text() == ADD


def test_all_killed_twice_and_after_an_edit_nearby(project):
    plant(project, "add/sign", "sum")
    for text in (ADD, ADD, '"""Sums."""\n\n\n' + ADD):
        (project / "pack/arithmetic.py").write_text(text)
        code, output = run(project)
        assert (code, results(output)) == (0, {"add/sign": "killed"}), output


def test_a_patch_that_no_longer_applies_is_named(project):
    plant(project, "add/sign", "sum")
    (project / "pack/arithmetic.py").write_text(ADD.replace("a + b", "b + a"))
    code, output = run(project)
    assert (code, results(output)) == (1, {"add/sign": "broken"})
    assert "tests/mutations/add/sign.patch does not apply" in output


def test_a_patch_for_another_processor_is_left_out_by_name(project):
    plant(project, "add/sign", "sum")
    plant(project, "add/other", "sum", needs="no_such_flag")
    code, output = run(project)
    assert (code, results(output)) == (0, {"add/sign": "killed"})
    assert "left out: add/other needs a processor with no_such_flag" in output
    assert run(project, "--only", "add/other")[0] == 0


def test_a_sample_is_drawn_by_the_seed(project):
    for k in range(20):
        plant(project, f"add/number-{k:02}", "sum")
    draws = {seed: run(project, "--list", "--sample", "5", "--seed", seed)[1].split("\n", 1)[1] for seed in "ab"}
    assert [text.count("add/number") for text in draws.values()] == [5, 5]
    assert draws["a"] != draws["b"]
    assert run(project, "--list", "--sample", "5", "--seed", "a")[1].split("\n", 1)[1] == draws["a"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("breaks: x\n" + CHANGE, "needs one 'breaks', some 'tests'"), ("kills: x\n", "expected 'breaks: ...'")],
    ids=["no tests", "unknown key"],
)
def test_a_bad_header_is_refused(project, text, sentence):
    plant(project, "add/sign", "sum")
    (project / "tests/mutations/add/sign.patch").write_text(text)
    code, output = run(project)
    assert code == 1 and sentence in output


def test_a_glob_that_matches_nothing_is_refused(project):
    plant(project, "add/sign", "sum")
    code, output = run(project, "--only", "gpu/*")
    assert code == 1 and "matches 'gpu/*'; see --list" in output
