"""Options that cannot work end with one sentence; the options of evaluate and generate have an effect."""

import argparse
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training.corpus import length_ratio, spread
from fastseq.training.data import Pairs, Sequences, group_references
from fastseq.training.metrics import LABELS
from fastseq.training.options import built_in_config, parsed, with_built_in_configs
from fastseq.training.tokenizer import TextTokenizer

TEST = ("--data", str(TOY / "test.tsv"))


@pytest.fixture
def copied(barely_trained, tmp_path) -> Path:
    """A copy of that run, for a test to damage."""
    return Path(shutil.copytree(barely_trained, tmp_path / "copy"))


@pytest.mark.parametrize(
    "option",
    [
        *("--trainer.precision=foo", "--trainer.accelerator=foo", "--trainer.devices=foo", "--trainer.threads=0"),
        *("--trainer.accumulate=0", "--trainer.log_every=0", "--trainer.max_epochs=0", "--trainer.patience=-1"),
        *("--trainer.monitor=valid_nothing", "--data.valid_sentences=0", "--data.max_tokens=-5", "--data.vocab_size=2"),
        *("--data.max_length_ratio=0", "--optim.lr=-1", "--optim.beta2=1", "--optim.label_smoothing=2"),
        *("--optim.teacher_forcing_ratio=2", "--optim.gradient_clip=-1", "--model.backend=triton", "--fly=1"),
    ],
)
def test_bad_training_options_leave_the_old_run(copied, capsys, option):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    sentence = refused(capsys, "train", *SMALL, "--run_dir", copied, "--overwrite", option)
    assert option.partition("=")[0] in sentence
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "option",
    ["--num-beams=0", "--pictures=-1", "--device=foo", "--max-tokens=0", "--max-new-tokens=0", "--device=cuda"],
)
def test_bad_evaluate_options(barely_trained, capsys, option):
    if option == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("cuda works here")
    assert option[2:5] in refused(capsys, "evaluate", barely_trained, *TEST, option)


def test_bad_generate_options(barely_trained, capsys):
    assert "--batch_lines" in refused(capsys, "generate", barely_trained, "--batch-lines", "0")
    assert "--device foo cannot be used here" in refused(capsys, "generate", barely_trained, "--device", "foo")


def test_messages_of_restricted_numbers(capsys):
    sentence = refused(capsys, "train", "--trainer.threads", "0")
    assert sentence == "fastseq train: --trainer.threads: must be >= 1 and <= 1024; got 0\n"


def test_broken_config_names_the_file(copied, capsys):
    for text in ("model: [", "model:\n  hidden_size: many\n", "fly: 1\n"):
        (copied / "config.yaml").write_text(text)
        for command in (("train", "--resume", copied), ("evaluate", copied, *TEST), ("generate", copied)):
            assert f"{copied / 'config.yaml'} is broken: " in refused(capsys, *command)


def test_resume_with_another_folder_or_overwrite(copied, tmp_path, capsys):
    for options in (("--run_dir", tmp_path / "other"), ("--overwrite",)):
        assert "leave out --run_dir and --overwrite" in refused(capsys, "train", "--resume", copied, *options)
    assert (copied / "checkpoints" / "last.ckpt").exists()


def test_only_the_value_of_config_names_a_built_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = built_in_config("cmudict")
    assert path.endswith("cmudict.yaml")
    (tmp_path / "cmudict").mkdir()
    arguments = ["--run_dir", "cmudict", "--config", "cmudict", "--config=cmudict", "--train=cmudict"]
    assert with_built_in_configs(arguments) == [
        *("--run_dir", "cmudict", "--config", path, f"--config={path}", "--train=cmudict")
    ]


def test_option_errors_are_user_errors():
    class Parser:
        def parse_args(self, argv):
            raise argparse.ArgumentError(None, 'Parser key "a.b":\n  no\n  good')

        def get_defaults(self):
            return {}

    with pytest.raises(UserError, match=r"^--a\.b: no good$"):
        parsed(Parser(), [])


def test_damaged_files(copied, capsys):
    best = copied / "checkpoints" / "best.ckpt"
    for content in ({"weights": 1}, [1]):
        torch.save(content, best)
        assert f"{best} is not a checkpoint" in refused(capsys, "evaluate", copied, *TEST)
    torch.save({"state_dict": torch.load(copied / "checkpoints" / "last.ckpt")["state_dict"]}, best)
    best.replace(copied / "checkpoints" / "last.ckpt")
    assert "last.ckpt cannot be resumed: epoch is missing" in refused(capsys, "train", "--resume", copied)
    path = copied / "source_tokenizer.json"
    broken = json.loads(path.read_text())
    broken["model"]["type"] = "Nothing"
    path.write_text(json.dumps(broken))
    assert f"{path} is not a tokenizer" in refused(capsys, "generate", copied)


def test_the_advice_for_a_missing_checkpoint_works(copied, capsys):
    for name in ("best", "last"):
        (copied / "checkpoints" / f"{name}.ckpt").unlink()
    advice = refused(capsys, "evaluate", copied, *TEST).partition("start again with: fastseq ")[2].split()
    assert advice[:2] == ["train", "--config"]
    main(advice)
    assert (copied / "checkpoints" / "last.ckpt").exists()


def test_overwrite_removes_an_evaluation(copied):
    main(["evaluate", str(copied), *TEST])
    train(copied, "--overwrite", "--trainer.max_epochs", "1")
    assert not {"evaluation.json", "predictions.tsv", "attention"} & {path.name for path in copied.iterdir()}


def test_evaluate_replaces_old_pictures(barely_trained, tmp_path, capsys):
    folder = ("--output", str(tmp_path))
    main(["evaluate", str(barely_trained), *TEST, *folder])
    (tmp_path / "attention" / "mine.png").touch()
    main(["evaluate", str(barely_trained), *TEST, *folder, "--pictures", "1"])
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == ["0001.png", "mine.png"]
    assert "pictures:" in capsys.readouterr().out
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path / "none"), "--pictures", "0"])
    assert not (tmp_path / "none" / "attention").exists()
    assert "pictures:" not in capsys.readouterr().out


def test_text_metrics(barely_trained, tmp_path, capsys):
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path), "--text_metrics", "true"])
    assert {"bleu", "chrf"} <= json.loads((tmp_path / "evaluation.json").read_text()).keys()
    printed = capsys.readouterr().out
    assert "BLEU" in printed
    assert "ER)" not in printed
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path)])
    assert "bleu" not in json.loads((tmp_path / "evaluation.json").read_text())


def test_metrics_by_name(barely_trained, tmp_path, capsys):
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path), "--metrics", "bleu,per"])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert LABELS.keys() & found == {"bleu", "token_error_rate"}
    assert "match" not in capsys.readouterr().out
    metrics = ("--output", tmp_path, "--metrics", "bleu,ter")
    assert "--metrics has no metric 'ter'; choose among ser, per," in refused(
        capsys, "evaluate", barely_trained, *TEST, *metrics
    )
    both = ("--metrics", "bleu", "--text_metrics", "true")
    assert "leave out --text_metrics" in refused(capsys, "evaluate", barely_trained, *TEST, "--output", tmp_path, *both)


def test_metrics_of_training_are_the_ones_of_its_evaluation(tmp_path, capsys):
    run = tmp_path / "run"
    train(
        run, "--trainer.max_epochs", "1", "--data.metrics", "cer,per", "--trainer.monitor", "valid_character_error_rate"
    )
    header = (run / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {name for name in header if name.startswith("valid_")} == {
        "valid_loss",
        "valid_token_error_rate",
        "valid_character_error_rate",
    }
    main(["evaluate", str(run), *TEST])
    assert LABELS.keys() & json.loads((run / "evaluation.json").read_text()) == {
        "token_error_rate",
        "character_error_rate",
    }
    assert ", character error rate % " in capsys.readouterr().out
    options = (*SMALL, "--run_dir", tmp_path / "other")
    assert "--data.metrics has no metric 'f1'" in refused(capsys, "train", *options, "--data.metrics", "f1")
    assert "valid_bleu is not measured; choose one of valid_token_error_rate, valid_loss" in refused(
        capsys, "train", *options, "--data.metrics", "per", "--trainer.monitor", "valid_bleu"
    )


def test_metrics_without_meaning_are_refused_before_the_first_epoch(tmp_path, capsys):
    pytest.importorskip("rouge_score")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.tsv").write_text("ab\tаб вг\ncd\tвг\n" * 4, encoding="utf-8")
    files = ("--train", tmp_path / "train.tsv", "--valid", tmp_path / "valid.tsv", "--run_dir", tmp_path / "run")
    assert "no reference has one; measure chrf" in refused(capsys, "train", *files, "--data.metrics", "rouge")
    assert not (tmp_path / "run").exists()


def test_text_metrics_are_on_with_bpe(tmp_path):
    run = tmp_path / "run"
    train(run, "--trainer.max_epochs", "1", "--data.target_tokenizer", "bpe")
    main(["evaluate", str(run), *TEST])
    assert "bleu" in json.loads((run / "evaluation.json").read_text())


def test_the_beam_is_as_wide_as_n_best(barely_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    main(["generate", str(barely_trained), "--n-best", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_length_ratio_of_training_data():
    sides = Sequences([[5, 2], [5, 5, 5, 2]]), Sequences([[5] * 19 + [2], [5, 2]])
    assert length_ratio(*sides) == 1.5 * 10
    assert length_ratio(sides[0], sides[0]) == 2.0


def test_long_targets_are_not_cut_off(tmp_path, capsys):
    """Targets of 30 tokens for sources of one: the limit of 2 x 2 + 10 tokens would end every prediction."""
    target = " ".join(map(str, range(30)))
    (tmp_path / "long.tsv").write_text("".join(f"{c}\t{target}\n" for c in "abcd"))
    run, data = tmp_path / "run", str(tmp_path / "long.tsv")
    options = "--trainer.max_epochs", "25", "--optim.label_smoothing", "0", "--optim.lr", "0.02", "--model.dropout", "0"
    train(run, "--train", data, "--valid", data, *options)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["max_length_ratio"] == 23.25
    assert float(rows(run)[-1]["valid_token_error_rate"]) < 30
    main(["evaluate", str(run), "--data", data])
    assert json.loads((run / "evaluation.json").read_text())["token_error_rate"] < 30
    main(["evaluate", str(run), "--data", data, "--max-new-tokens", "7"])
    assert "4 predictions were cut off at the limit of 7 tokens" in capsys.readouterr().out
    (tmp_path / "in.txt").write_text("a\n")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    lengths = []
    for limit in ([], ["--max-new-tokens", "7"]):
        main(["generate", str(run), *files, *limit])
        lengths.append(len((tmp_path / "out.txt").read_text().split()))
    assert lengths[0] > 20
    assert lengths[1] == 7


def test_spread():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 9) == [0, 1, 2]
    assert spread(list(range(1999)), 1000)[-1] == 1997
    assert spread([], 4) == []


def test_duplicate_references_count_once():
    assert group_references(Pairs(["a", "a", "a"], ["x", "y", "x"])) == {"a": ["x", "y"]}


def test_a_library_error_of_the_tokenizer_is_a_sentence(tmp_path):
    (tmp_path / "t.json").write_text('{"pre_tokenizer": {"type": "Split"}}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        TextTokenizer.load(tmp_path / "t.json")


def stopped(*arguments: str | Path) -> int:
    """Return the exit code of a command that ends by itself."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_a_closed_pipe_ends_training_with_its_own_code(tmp_path, monkeypatch):
    def closed(sentence):
        raise BrokenPipeError

    monkeypatch.setattr("fastseq.training.fit.say", closed)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        code = stopped("train", *SMALL, "--run_dir", tmp_path / "run")
    assert code == 141


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_while_decoding(barely_trained, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fastseq.training.decoding.decode", interrupted)
    assert stopped("evaluate", barely_trained, *TEST, "--output", tmp_path) == 130


def test_a_file_that_cannot_be_written_is_a_sentence(barely_trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    sentence = refused(capsys, "evaluate", barely_trained, *TEST, "--output", tmp_path / "file")
    assert sentence == f"fastseq evaluate: {tmp_path / 'file'}: File exists\n"
