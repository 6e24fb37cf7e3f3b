"""The build's job runner: progress, skipped files, failures."""

import importlib
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compile(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("build_support.compile")


@pytest.fixture
def jobs(compile, tmp_path, monkeypatch):
    """Two C files and a header, in a folder with a space and a quote."""
    folder = tmp_path / "a user's files"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("value.h").write_text("#define VALUE 1\n")
    Path("first.c").write_text('#include "value.h"\nint first(void) { return VALUE; }\n')
    Path("second.c").write_text("int second(void) { return 2; }\n")
    past = time.time() - 10
    for path in folder.iterdir():
        os.utime(path, (past, past))
    return [compile.Job(f"{name}.c", f"{name}.o", ["cc", "-c", f"{name}.c"]) for name in ("first", "second")]


def compiled(compile, jobs):
    """The sources that a run compiled, in their order, from its lines of progress."""
    lines = []
    compile.compile_all(jobs, lines.append, Path.cwd())
    return [line.split("] ")[1] for line in lines if line.startswith("[")]


def test_only_changed_files_are_compiled(compile, jobs):
    assert compiled(compile, jobs) == ["first.c", "second.c"]
    assert compiled(compile, jobs) == []
    Path("value.h").write_text("#define VALUE 3\n")
    assert compiled(compile, jobs) == ["first.c"]
    jobs[1].command.append("-O2")
    assert compiled(compile, jobs) == ["second.c"]
    Path("value.h").unlink()
    Path("first.c").write_text("int first;\n")
    assert compiled(compile, jobs) == ["first.c"]
    Path("first.c").write_text("int first = 1;\n")
    assert compiled(compile, [job._replace(keyed=True) for job in jobs]) == []


def test_progress_and_max_jobs(compile, jobs, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "1")
    lines = []
    compile.compile_all(jobs, lines.append, Path.cwd())
    assert lines[:2] == ["[1/2] first.c", "[2/2] second.c"]
    assert lines[2].startswith("compiled 2 files in ") and lines[2].endswith("1 at once")
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive integer, got 'many'"):
        compile.compile_all(jobs, lines.append, Path.cwd())


def test_a_failure_names_the_file_and_is_tried_again(compile, jobs):
    Path("second.c").write_text("int second(void) { return }\n")
    with pytest.raises(compile.Failed, match=r"second\.c does not compile") as raised:
        compile.compile_all(jobs, print, Path.cwd())
    assert "second.c:1:27: error: expected expression" in raised.value.output
    Path("second.c").write_text("int second(void) { return 2; }\n")
    assert "second.c" in compiled(compile, jobs)
