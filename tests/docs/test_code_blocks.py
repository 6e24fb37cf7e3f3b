"""Runs the code blocks of the documentation: Python as written, in one namespace per page; command lines through the
parsers of `fastseq` and against the Makefile. `tests/cases/pages.py` lists the comments that change that.
"""

import argparse
import doctest
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import jsonargparse
import pytest
import yaml
from pages import ROOT, Block, blocks

from fastseq import cli

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:torch.quantize"
)
PAGES = [*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
SHELL = ("sh", "bash", "console")
UNCHECKED = ("text", "math", "mermaid")  # output, formulas, drawings
PROGRAMS = (
    "apt-get",
    "cat",
    "cd",
    "conda",
    "cp",
    "echo",
    "export",
    "git",
    "grep",
    "head",
    "module",
    "pip",
    "srun",
    "uv",
)
DOCTEST = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Parsed(BaseException):
    """Raised in place of running a command whose options were accepted."""


@pytest.fixture
def parse_only(monkeypatch):
    """A function that runs `fastseq ARGUMENTS` up to the point where its options are accepted."""

    def check(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cli, "check_inputs", lambda command, argv: None)  # the files need not exist
            for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
                patch.setattr(kind, "parse_args", stop_after(kind.parse_args))
            try:
                cli.main(arguments)
            except Parsed:
                return
            except SystemExit as stop:
                if stop.code:
                    pytest.fail(f"fastseq {shlex.join(arguments)}: exit code {stop.code}")

    def stop_after(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    return check


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """The names of a page's Python blocks, as a module that pickle finds; an empty folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return vars(module)


def execute(code: str, page: str, line: int, names: dict) -> None:
    """Run `code` so that a traceback shows the page and its lines."""
    exec(compile("\n" * (line - 1) + code, page, "exec"), names)


def compare_session(block: Block, page: str, names: dict) -> None:
    """Run a block of `>>>` lines and compare what it prints; `...` stands for any text."""
    test = doctest.DocTestParser().get_doctest(block.text + "\n", names, page, page, block.line - 1)
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=DOCTEST, verbose=False).run(
        test, out=report.append, clear_globs=False
    )
    names.update(test.globs)
    assert not failed, "".join(report)


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined; in a console only the lines after a `$`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]


def commands(line: str) -> list[list[str]]:
    """Words of each command of a line: split at pipes and separators, without redirections and assignments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    result, words = [], iter(lexer)
    command: list[str] = []
    for word in words:
        if set(word) <= set("<>"):
            next(words)
        elif set(word) <= set("|&;"):
            result.append(command)
            command = []
        elif command or not re.fullmatch(r"\w+=.*", word):
            command.append(word)
    return [c for c in (*result, command) if c]


def fastseq_arguments(words: list[str]) -> list[str] | None:
    """Arguments of `fastseq`, `python -m fastseq` or `torchrun ... -m fastseq`; None for another command."""
    if words[0].rpartition("/")[2] == "fastseq":
        return words[1:]
    return words[words.index("-m") + 2 :] if "-m" in words and words[words.index("-m") + 1] == "fastseq" else None


def check_command(words: list[str], parse_only, *, run: bool) -> None:
    """Assert that the command exists and takes its options; run it if `run`."""
    program, arguments = words[0].rpartition("/")[2], fastseq_arguments(words)
    if arguments is not None:
        cli.main(arguments) if run else parse_only(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        assert not unknown, f"{shlex.join(words)}: the Makefile has no target {unknown}"
    elif program in ("python", "python3"):
        scripts = [word for word in words[1:] if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), f"{shlex.join(words)}: no such file"
    else:
        assert program in PROGRAMS, (
            f"{shlex.join(words)}: neither fastseq, make, python nor one of {', '.join(PROGRAMS)}"
        )


def check(block: Block, page: str, names: dict, parse_only) -> None:
    """Run or check one block."""
    kind, text = block.comment or (None, "")
    if kind == "not run":
        assert text.strip(), f"{page}, line {block.line}: say why the block is not run"
        return
    if kind == "before":
        execute(text, page, block.line - 1 - text.count("\n") - 1, names)
    if kind == "file":
        Path(text).write_text(block.text + "\n", encoding="utf-8")
    if block.language in ("python", "pycon"):
        if block.text.lstrip().startswith(">>> "):
            compare_session(block, page, names)
        else:
            execute(block.text, page, block.line, names)
    elif block.language in SHELL:
        for line in command_lines(block):
            for words in commands(line):
                check_command(words, parse_only, run=kind == "run")
    elif block.language in ("yaml", "toml"):
        yaml.safe_load(block.text) if block.language == "yaml" else tomllib.loads(block.text)
    else:
        known = ("python", *SHELL, "yaml", "toml", *UNCHECKED)
        assert kind == "file" or block.language in UNCHECKED, (
            f"{page}, line {block.line}: a block of {block.language!r} is not checked; "
            f"choose one of {', '.join(known)}, or say above it why it is not run"
        )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(path, namespace, parse_only):
    page = str(path.relative_to(ROOT))
    for block in blocks(path.read_text(encoding="utf-8")):
        try:
            check(block, page, namespace, parse_only)
        except SystemExit as stop:
            raise AssertionError(f"{page}, line {block.line}: exit code {stop.code}") from stop


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "assert 1 == 2"),
        ("python", ">>> 1 + 1\n3"),
        ("sh", "fastseq generate runs/mine --beams 5"),
        ("sh", "echo hello | .venv/bin/fastseq generat runs/mine"),
        ("sh", "torchrun --nproc_per_node 2 -m fastseq train --model.hiden_size 3"),
        ("sh", "make dem"),
        ("sh", "python benchmarks/gpu_chek.py"),
        ("sh", "fastsec info"),
        ("yaml", "a: [1"),
        ("", "no language"),
    ],
)
def test_a_wrong_block_is_found(language, text, namespace, parse_only):
    (block,) = blocks(f"```{language}\n{text}\n```\n")
    with pytest.raises((AssertionError, pytest.fail.Exception, yaml.YAMLError)):
        check(block, "page.md", namespace, parse_only)


def test_comments_above_a_block(namespace, parse_only):
    page = "<!-- before: x = 1\ny = 2 -->\n```python\nz = x + y\n```\n<!-- file: z.txt -->\n```text\nhello\n```\n"
    page += "<!-- not run: raises -->\n```python\n1 / 0\n```\n- a list\n  ```python\n  z += 1\n  ```\n"
    for block in blocks(page):
        check(block, "page.md", namespace, parse_only)
    assert namespace["z"] == 4
    assert Path("z.txt").read_text() == "hello\n"
