"""The training commands at the edges: encodings, closed pipes, numbers that are too large, typing errors."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import SMALL, TOY, refused

from fastseq.cli import main
from fastseq.training import folder

TEST = ("--data", str(TOY / "test.tsv"))


@pytest.fixture
def run(barely_trained) -> Path:
    return barely_trained


@pytest.fixture
def accented(run, tmp_path) -> Path:
    """A copy of the run whose predictions consist of the word é."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / "target_tokenizer.json"
    text = path.read_text()
    for letter in "abcde":
        text = text.replace(f'"{letter}": ', f'"{"é" * (ord(letter) - 96)}": ')
    path.write_text(text, encoding="utf-8")
    return copy


def ascii_output(monkeypatch) -> io.BytesIO:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    return output


def test_predictions_are_utf8_whatever_the_locale(accented, monkeypatch):
    output = ascii_output(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    main(["generate", str(accented)])
    assert set(output.getvalue().decode("utf-8")) <= set("é \n")
    assert "é" in output.getvalue().decode("utf-8")


def test_tables_in_an_ascii_terminal(run, tmp_path, monkeypatch):
    data = Path(shutil.copy(TOY / "test.tsv", tmp_path / "tést.tsv"))
    output = ascii_output(monkeypatch)
    main(["evaluate", str(run), "--data", str(data), "--output", str(tmp_path / "out")])
    assert b"t\\xe9st.tsv: 20 sources" in output.getvalue()


@pytest.mark.parametrize("command", [["info"], ["evaluate", "RUN", *TEST, "--pictures", "0"], ["generate", "RUN"]])
def test_a_closed_pipe_is_a_quiet_end(run, tmp_path, monkeypatch, capsys, command):
    arguments = [str(run) if argument == "RUN" else argument for argument in command]
    arguments += ["--output", str(tmp_path)] if command[0] == "evaluate" else []
    (tmp_path / "words").write_text("abc\n" * 10)
    arguments += ["--input", str(tmp_path / "words")] if command[0] == "generate" else []
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    assert stop.value.code == 141
    assert not capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_output_is_a_sentence(monkeypatch, capsys):
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stop:
            main(["info"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "fastseq info: No space left on device\n"


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_a_sentence(run, monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, stream, None)
    expected = "standard input is closed" if stream == "stdin" else "standard output is closed"
    if stream == "stdout":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    assert expected in refused(capsys, "generate", run)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--seed=1180591620717411303424", "--seed: must be >="),
        (f"--seed={'1' * 6000}", "Exceeds the limit (4300 digits)"),
        (f"--trainer.threads={'1' * 6000}", "Exceeds the limit (4300 digits)"),
        ("--data.max_length_ratio=inf", "--data.max_length_ratio: must be > 0"),
        ("--optim.lr=1e999", "--optim.lr: must be >= 0"),
        ("--data.vocab_size=10000000000", "--data.vocab_size: must be > 4"),
        ("--model.hidden_size=1000000000", "this machine has"),
        ("--model.embedding_dim=1000000000000000000000000000000", "this machine has"),
        ("--model.encoder_layers=1000000", "encoder_layers must be at most 1000"),
        ("--model.dropout=nan", "--model.dropout: expected float; got nan"),
        ("--trainer.accumulate=1000000", "choose at most 160"),
        ("--trainer.devices=1000000", "starts as many processes"),
        ("--trainer.threads=100000", "--trainer.threads: must be >= 1 and <= 1024"),
        ("--trainer.accelerator=meta", "--trainer.accelerator meta"),
        ("--model.hiden_size=3", "did you mean --model.hidden_size?"),
        ("--modle.hidden_size=3", "did you mean --model.hidden_size?"),
        ("--train=/nowhere.tsv", "/nowhere.tsv cannot be read"),
    ],
    ids=lambda text: text[:28],
)
def test_training_options_past_their_limits(tmp_path, capsys, option, sentence):
    message = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run", option)
    assert sentence in message
    assert len(message) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--num-beams=10000000", "--num_beams: must be >= 1 and <= 1024"),
        ("--num-beams=1e30", "--num_beams: expected int"),
        ("--batch-lines=1000000000000000000000000000000", "--batch_lines: must be >= 1"),
        ("--max-new-tokens=1000000000000", "--max_new_tokens: must be >= 1"),
        ("--device=meta", "--device meta cannot be used here"),
        ("--device=hpu", "--device hpu cannot be used here"),
        ("--nbest=2", "did you mean --n_best?"),
    ],
    ids=lambda text: text[:28],
)
def test_generate_options_past_their_limits(run, capsys, option, sentence):
    assert sentence in refused(capsys, "generate", run, option)


@pytest.mark.parametrize(("given", "near"), [("trian", "train"), ("generat", "generate"), ("dta", "data")])
def test_a_misspelt_command(capsys, given, near):
    with pytest.raises(SystemExit, match="2"):
        main([given])
    assert f"unknown command '{given}' (did you mean {near}?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["bench", "--sute", "cpu"], "--suite"),
        (["parity", "--backed", "native"], "--backend"),
        (["warmup", "--hidden-size", "8", "--dtpe", "fp32"], "--dtype"),
    ],
    ids=lambda value: value[0],
)
def test_a_misspelt_option(capsys, arguments, near):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"(did you mean {near}?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out")],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_a_sentence(run, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(folder, "trained_model", fail)
    assert "out of memory" in refused(capsys, "generate", run)


def test_other_runtime_errors_keep_their_traceback(run, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(folder, "trained_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", str(run)])


def test_control_characters_of_a_stranger_are_shown_escaped(capsys):
    assert "\\x1b[31m" in refused(capsys, "evaluate", "\x1b[31m", *TEST)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--train", "nowhere.tsv", "--valid", "nowhere.tsv"),
        ("train", "--resume=nowhere"),
        ("evaluate", "nowhere", "--data", "x"),
        ("generate", "nowhere"),
        ("trian",),
    ],
    ids=" ".join,
)
def test_a_wrong_name_is_refused_before_torch_is_imported(arguments):
    code = f"import sys; sys.argv = ['fastseq', *{arguments}]; from fastseq.cli import main\n"
    code += "try: main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "2 False\n"
    assert arguments[-1].partition("=")[2] in result.stderr


def test_the_package_is_whole_in_the_command_too():
    """There each public name is imported when it is first used."""
    code = "import sys; sys.argv[0] = 'fastseq'; import fastseq; assert 'torch' not in sys.modules\n"
    code += "print(*(type(getattr(fastseq, name)).__name__ for name in fastseq.__all__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    import fastseq

    assert result.stdout.split() == [type(getattr(fastseq, name)).__name__ for name in fastseq.__all__], result.stderr
