"""A run folder is data from strangers: each field with a wrong type, a wrong size, or none gives one sentence."""

import copy
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import TOY, refused, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq import Seq2Seq, Seq2SeqConfig
from fastseq.training import resume
from fastseq.training.checkpoint import load_checkpoint, trained_model
from fastseq.training.files import MAX_YAML, write_text
from fastseq.training.folder import RunFolder, model_options
from fastseq.training.options import read_config, train_parser
from fastseq.training.plots import read_metrics
from fastseq.training.tokenizer import TextTokenizer

TEST = ("--data", TOY / "test.tsv")
WRONG = ("nonsense", -1, 10**30, 1e300, float("nan"), [1], {"a": 1}, None, True, b"x", torch.zeros(3, 3))
TEXTS = {"train", "valid", "run_dir", *(f"trainer.{option}" for option in ("precision", "accelerator", "monitor"))}
TEXTS |= {"train_targets", "valid_targets", "data.source_column", "data.target_column", "data.tag_column", "data.cache"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("hostile") / "run"
    train(run, "--trainer.max_epochs", "1", "--trainer.patience", "5")
    return run


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of that run, for a test to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def leaves(value, path=()):
    """The path of each value that is no dictionary or list of something."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def mutated(value, path, replacement):
    """A copy of nested `value` with another value at `path`, or without it for "missing"."""
    value = copy.copy(value)
    if len(path) > 1:
        value[path[0]] = mutated(value[path[0]], path[1:], replacement)
    elif isinstance(replacement, str) and replacement == "missing":
        del value[path[0]]
    else:
        value[path[0]] = replacement
    return value


def refusal(function, *arguments) -> str | None:
    """The sentence with which the function refuses its arguments, None if it accepts them."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


def accepted(function, *arguments) -> bool:
    """True if the function accepts its arguments, False if it refuses them with one short sentence."""
    sentence = refusal(function, *arguments)
    assert sentence is None or (len(sentence) < 1000 and "\n" not in sentence)
    return sentence is None


def test_every_field_of_the_configuration(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    defaults = train_parser().get_defaults()
    path = tmp_path / "config.yaml"
    for number, field in enumerate(leaves(config)):
        name = ".".join(map(str, field))
        for wrong in ("nonsense", None, (-1, 1e300, {"a": 1})[number % 3]):
            write_text(path, yaml.safe_dump(mutated(config, field, wrong)))
            if not accepted(lambda: model_options(read_config(path), 9, 9)):
                continue
            numbers = name == "seed" or name in ("model.attention_scale", "trainer.devices")
            assert name in TEXTS | {"trainer.devices"} if isinstance(wrong, str) else numbers or defaults[name] is wrong


ALIASES = "[&a [x, x], &b [*a, *a], &c [*b, *b]]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("config: ../../../../etc/passwd", "config names a file"),
        ("model: /etc/passwd", "model names a file"),
        (f"model: {ALIASES}", "aliases"),
        (f"train: '{ALIASES}'", "aliases"),
        ("a: " + "[" * 100, "nested more than"),
        ("seed: " + "1" * 6000, "4300 digits"),
        ("seed: 1\n" + "#" * MAX_YAML, "more than 1,048,576 bytes"),
        ("model: {encoder_layers: 1000000}", "encoder_layers must be at most"),
        ("model: {hidden_size: 1000000000}", "does not fit the configuration"),
        ("model: {hiden_size: 32}", "did you mean hidden_size?"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("- 1", "it holds no options"),
        ("reference_results: [{class_path: os.getcwd}]", "class_path"),
        ("data: {class_path: os.getcwd}", "class_path"),
        ("reference_results: [os.getcwd]", "reference_results"),
        ("reference_results: [{name: null}]", "reference_results"),
        ("model: {hidden_size: null}", "--model.hidden_size must not be null"),
    ],
    ids=lambda value: value[:24],
)
def test_hostile_configurations(copied, capsys, text, reason):
    (copied / "config.yaml").write_text(text)
    sentence = refused(capsys, "evaluate", copied, *TEST)
    assert reason in sentence
    assert "root:" not in sentence


def test_every_field_of_a_tokenizer(run, tmp_path):
    path = tmp_path / "t.json"
    stored = json.loads((run / "source_tokenizer.json").read_text())
    unused = ("version", "added_tokens", "unk_token")
    for field in leaves(stored):
        for wrong in (*(w for w in WRONG if not isinstance(w, (bytes, torch.Tensor))), "missing"):
            path.write_text(json.dumps(mutated(stored, field, wrong)))
            if accepted(TextTokenizer.load, path):
                loaded = TextTokenizer.load(path)
                assert set(unused) & set(map(str, field)) or wrong == "missing" or stored_at(stored, field) == wrong
                assert all(token < len(loaded) for ids in loaded.encode(["abcde"]) for token in ids)


def stored_at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("number", [9, 1_000_000, 4], ids=["past the end", "far past the end", "twice"])
def test_token_ids_that_are_no_permutation(copied, capsys, number):
    path = copied / "target_tokenizer.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(mutated(stored, ("model", "vocab", "e"), number)))
    assert "the 9 token ids are not 0 to 8" in refused(capsys, "generate", copied)


def trainer_and_task(run: Path):
    """Stand-ins with all that `resumable` reads."""
    import lightning as L

    from fastseq.training.callbacks import BestAndLast, Patience
    from fastseq.training.options import OptimOptions
    from fastseq.training.progress import EpochLines
    from fastseq.training.task import Seq2SeqTask

    folder = RunFolder(run)
    task = Seq2SeqTask(folder.load_model("last"), OptimOptions(), 4, 1, None)
    callbacks = [BestAndLast(folder.checkpoints, "valid_loss"), EpochLines(), Patience("valid_loss", patience=5)]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.callbacks = callbacks
    return trainer, task


def test_every_field_of_a_checkpoint(run):
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    trainer, task = trainer_and_task(run)
    read = resume.resumable(checkpoint, task, trainer, path)
    fields = [field for field in leaves(read) if field[0] not in ("state_dict", "lr_schedulers")]
    fields = [field for field in fields if "param_groups" not in field]
    assert len(fields) > 100
    for field in fields:
        right = stored_at(checkpoint, field)
        for wrong in (*WRONG, "missing"):
            arguments = mutated(checkpoint, field, wrong), task, trainer, path
            if accepted(resume.resumable, *arguments):
                assert type(wrong) is type(right) or field[-1] in ("best", "best_epoch", "updates", "loss_sum"), field


@pytest.mark.parametrize(
    "wrong",
    ["text", None, 3, torch.zeros(2, dtype=torch.int64), torch.zeros(1).expand(9, 16), torch.zeros(9, 16).to_sparse()],
)
def test_weights_that_are_no_dense_tensors(copied, capsys, wrong):
    path = copied / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.encoder.embedding.weight"] = wrong
    torch.save(checkpoint, path)
    assert f"{path} " in refused(capsys, "evaluate", copied, *TEST)


def test_a_pickled_object_is_not_run(copied, capsys):
    class Hostile:
        def __reduce__(self):
            return print, ("arbitrary code ran",)

    for name, command in (("best", ("evaluate", copied, *TEST)), ("last", ("train", "--resume", copied))):
        torch.save({"state_dict": {}, "x": Hostile()}, copied / "checkpoints" / f"{name}.ckpt")
        sentence = refused(capsys, *command)
        assert "is damaged" in sentence
        assert "arbitrary" not in sentence


def test_a_compressed_archive_is_refused(copied, capsys):
    path = copied / "checkpoints" / "best.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert "compressed" in refused(capsys, "evaluate", copied, *TEST)


def test_a_model_larger_than_its_checkpoint_is_not_built(run, monkeypatch):
    path = run / "checkpoints" / "last.ckpt"
    monkeypatch.setattr("fastseq.training.checkpoint.Seq2Seq", None)
    options = Seq2SeqConfig(src_vocab_size=9, tgt_vocab_size=9, hidden_size=10**9)
    with pytest.raises(UserError, match="does not fit the configuration"):
        trained_model(options, load_checkpoint(path), path)


@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive", "normed_additive"])
def test_parameter_count(attention):
    for change in (
        {"encoder_layers": 2, "decoder_layers": 3},
        {"bridge": "concat", "bidirectional": False, "share_decoder_input_output_embed": True},
        {"share_all_embeddings": True, "encoder_layers": 3},
        {"src_vocab_size": None, "source_features": 5, "input_feeding": False, "frame_stack": 3},
        {"encoder_layers": 3, "pyramid": True, "frame_stack": 2},
    ):
        sizes = {"src_vocab_size": 11, "tgt_vocab_size": 11, "embedding_dim": 6, "hidden_size": 6}
        options = Seq2SeqConfig(**sizes | {"attention": attention, "input_feeding": attention != "none"} | change)
        assert options.parameter_count == sum(p.numel() for p in Seq2Seq(options).parameters())


@pytest.mark.parametrize(
    "content",
    ["step\nx\n", "a,b\n1,2\n", "step,train_loss\n1,abc\n", "step\n\0\n", '"\n'],
    ids=ascii,
)
def test_damaged_metrics(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        read_metrics(path)


def test_results_replace_links(copied, tmp_path):
    """A run folder whose predictions.tsv links to a file of the user."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("predictions.tsv", "evaluation.json", "evaluation.json.partial"):
        (copied / name).symlink_to(precious)
    main(["evaluate", *map(str, (copied, *TEST)), "--pictures", "0"])
    assert precious.read_text() == "mine"
    assert (copied / "predictions.tsv").read_text().startswith("source\tprediction")


def test_pipes_instead_of_files(copied):
    import os

    (copied / "source_tokenizer.json").unlink()
    os.mkfifo(copied / "source_tokenizer.json")
    with pytest.raises(UserError, match="not a regular file"):
        TextTokenizer.load(copied / "source_tokenizer.json")


@pytest.mark.parametrize(
    "name", ["metrics.csv", "curves.png", "tensorboard", "tensorboard/hparams.yaml", "checkpoints"]
)
def test_nothing_is_written_through_a_link(name, copied, tmp_path, capsys):
    """The link leads to a file or folder outside the run, which must stay as it is."""
    path, outside = copied / name, tmp_path / "outside"
    path.rename(outside) if path.exists() else outside.touch()
    before = {file: file.read_bytes() for file in (outside, *outside.rglob("*")) if file.is_file()}
    path.symlink_to(outside)
    sentence = refused(capsys, "train", "--resume", copied, "--trainer.max_epochs", 2)
    assert sentence.startswith(f"fastseq train: {path} is a symbolic link")
    train(copied, "--trainer.max_epochs", "1", "--overwrite")
    assert not path.is_symlink()
    assert {file: file.read_bytes() for file in (outside, *outside.rglob("*")) if file.is_file()} == before


def test_no_picture_is_drawn_through_a_link(copied, tmp_path, capsys):
    (tmp_path / "0001.png").touch()
    (copied / "attention").symlink_to(tmp_path)
    sentence = refused(capsys, "evaluate", copied, *TEST, "--pictures", 1)
    assert sentence.startswith(f"fastseq evaluate: {copied / 'attention'} is a symbolic link")
    (copied / "attention").unlink()
    (copied / "attention").mkdir()
    (copied / "attention/0001.png").symlink_to(tmp_path / "0001.png")
    main(["evaluate", str(copied), *map(str, TEST), "--pictures", "1"])
    assert not (copied / "attention/0001.png").is_symlink()
    assert (tmp_path / "0001.png").read_bytes() == b""
