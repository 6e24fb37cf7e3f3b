"""The `fastseq` command itself: help, dispatch, errors, configuration files."""

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import fastseq
from fastseq.cli import COMMANDS, DATA_SETS, main
from fastseq.training.options import underscored

ARGUMENTS = ["train", "--train", __file__, "--valid", __file__, "--run_dir", "nowhere"]
HEAVY = ("lightning", "jsonargparse", "tokenizers", "matplotlib", "sacrebleu", "tensorboard", "torch")


def fresh(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def stopped(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that ends by itself."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_help_imports_nothing_heavy():
    result = fresh("-X", "importtime", "-m", "fastseq", "--help")
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "fastseq" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=["nothing", "--help", "-h"])
def test_help_lists_every_command_with_an_example(capsys, arguments):
    code, out, _ = stopped(capsys, *arguments)
    assert code == 0
    for name, command in COMMANDS.items():
        assert f"    {name} " in out
        assert command.help in out
        assert command.example in out


def test_examples_start_with_their_command():
    assert all(command.example.startswith(f"fastseq {name}") for name, command in COMMANDS.items())
    assert all(command.example.startswith(f"fastseq data {name}") for name, command in DATA_SETS.items())


def test_version(capsys):
    assert stopped(capsys, "--version")[:2] == (0, f"fastseq {fastseq.__version__}\n")


@pytest.mark.parametrize("arguments", [("fly",), ("data", "fly"), ("train", "--fly"), ("evaluate",), ("score",)])
def test_unknown_commands_and_options(capsys, arguments):
    code, _, err = stopped(capsys, *arguments)
    assert code == 2
    assert "fly" in err or "required" in err


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "score"])
def test_help_of_commands(capsys, name):
    code, out, _ = stopped(capsys, name, "--help")
    assert code == 0
    assert "Example: " in out


def test_info_runs(capsys):
    main(["info"])
    assert "torch" in capsys.readouterr().out


def test_data_is_dispatched(capsys):
    code, out, _ = stopped(capsys, "data", "cmudict", "--help")
    assert code == 0
    assert "usage: fastseq data cmudict" in out


@pytest.mark.parametrize("package", ["lightning", "matplotlib"])
def test_missing_extra_names_the_pip_line(package):
    code = f"import sys; sys.modules[{package!r}] = None; from fastseq.cli import main; main({ARGUMENTS})"
    result = fresh("-c", code)
    assert result.returncode == 2
    sentence = f'fastseq train: the package {package} is not installed; bring it with: pip install "fastseq[train]"\n'
    assert result.stderr.endswith(sentence)
    assert "Traceback" not in result.stderr


def test_other_missing_modules_are_bugs(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastseq.training.fit", raising=False)
    monkeypatch.setitem(sys.modules, "fastseq.training.plots", None)
    with pytest.raises(ModuleNotFoundError, match="plots"):
        main(ARGUMENTS)


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_DEBUG", "1")
    with pytest.raises(Exception, match="not a run folder"):
        main(["train", "--resume", str(tmp_path)])


def test_print_config_is_a_config(capsys, tmp_path):
    arguments = ("--train", "a.tsv", "--model.hidden-size", "512", "--optim.lr=0.5")
    code, out, _ = stopped(capsys, "train", *arguments, "--print_config")
    assert code == 0
    config = yaml.safe_load(out)
    assert (config["train"], config["model"]["hidden_size"], config["optim"]["lr"]) == ("a.tsv", 512, 0.5)
    assert config["data"]["source_tokenizer"] == "char"
    (tmp_path / "c.yaml").write_text(out)
    code, again, _ = stopped(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--seed", "9", "--print_config")
    assert code == 0
    assert yaml.safe_load(again) == config | {"seed": 9}


def test_built_in_config_by_name(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = stopped(capsys, "train", "--config", "cmudict", "--print_config")
    assert code == 0
    stored = yaml.safe_load((files("fastseq.training") / "cmudict.yaml").read_text())
    printed = yaml.safe_load(out)
    for group, options in stored.items():
        if isinstance(options, dict):
            assert options.items() <= printed[group].items()
    assert [result["name"] for result in printed["reference_results"]] == [
        r["name"] for r in stored["reference_results"]
    ]
    assert Path("cmudict").exists() is False


@pytest.mark.parametrize("command", ["bench", "parity", "tune", "warmup", "convert", "export"])
def test_every_option_is_explained(command, capsys):
    """An option without help is a line that neither goes on after two spaces nor on the next, deeper one."""
    code, out, _ = stopped(capsys, command, "--help")
    lines = out.splitlines()
    bare = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("  -") and "  " not in line.strip() and not below.startswith(" " * 20)
    ]
    assert (code, bare) == (0, [])


def test_dashes_and_underscores():
    assert underscored(["run-1", "--n-best=a-b", "--run-dir", "x-y", "-", "--"]) == [
        *("run-1", "--n_best=a-b", "--run_dir", "x-y", "-", "--")
    ]


def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m fastseq --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("usage: fastseq")
    assert "Traceback" not in result.stderr
