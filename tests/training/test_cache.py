"""Encoded data on disk: it equals what memory would hold, and nothing incomplete is ever read."""

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training import batching, cache, data
from fastseq.training.batching import TokenBatches
from fastseq.training.cache import cached, fingerprint
from fastseq.training.data import Joined, Sequences, encode, read_pairs
from fastseq.training.reading import PairFile
from fastseq.training.tokenizer import TextTokenizer

pytest.importorskip("pyarrow")


@pytest.fixture
def small_batches(monkeypatch):
    """Record batches of 7 pairs and encoding by 3, so that a small file has many of them."""
    monkeypatch.setattr(cache, "ROWS", 7)
    monkeypatch.setattr(data, "ENCODED", 3)


def write_file(folder: Path, n: int = 40) -> PairFile:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeé", k=rng.randint(1, 9))) for _ in range(n)]
    (folder / "a.tsv").write_text("".join(f"{word}\t{' '.join(reversed(word))}\n" for word in words), encoding="utf-8")
    return PairFile(str(folder / "a.tsv"))


def tokenizers_of(file: PairFile) -> tuple[TextTokenizer, TextTokenizer]:
    pairs = read_pairs(file)
    return TextTokenizer.train("char", ["abcde"], 80), TextTokenizer.train("whitespace", pairs.targets, 80)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("large_vocabulary", [False, True])
def test_a_cache_is_the_encoded_file(tmp_path, monkeypatch, large_vocabulary):
    file = write_file(tmp_path)
    tokenizers = tokenizers_of(file)
    if large_vocabulary:
        monkeypatch.setattr(TextTokenizer, "__len__", lambda self: 1 << 17)
    sides, counts, seconds = cached(file, tokenizers, tmp_path / "cache")
    assert seconds > 0
    for side, tokenizer, lines, unknown in zip(sides, tokenizers, read_pairs(file), counts.unknown, strict=True):
        expected, note = encode(tokenizer, lines, "a")
        assert (unknown > 0) == (note is not None)
        assert len(side) == len(expected) == counts.rows == 40
        assert torch.equal(side.lengths, expected.lengths)
        for some in (torch.arange(40), torch.tensor([39]), torch.tensor([6, 7, 0, 39, 7])):
            for actual, wanted in zip(side.padded(some), expected.padded(some), strict=True):
                assert torch.equal(actual, wanted)
            assert torch.equal(side.select(some).padded(torch.arange(len(some)))[0], expected.padded(some)[0])
    again, _, seconds = cached(file, tokenizers, tmp_path / "cache")
    assert seconds == 0
    assert torch.equal(again[0].padded(torch.arange(40))[0], sides[0].padded(torch.arange(40))[0])


def test_datasets_opens_the_cache(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = write_file(tmp_path)
    tokenizers = tokenizers_of(file)
    sides, _, _ = cached(file, tokenizers, tmp_path / "cache")
    found = datasets.Dataset.from_file(str(next((tmp_path / "cache").glob("*.arrow"))))
    assert found.num_rows == 40
    assert found[5]["target"] == sides[1].padded(torch.tensor([5]))[0][0].tolist()


def test_the_fingerprint_follows_file_and_tokens(tmp_path):
    file = write_file(tmp_path)
    one, other = tokenizers_of(file), (TextTokenizer.train("char", ["abc"], 80), tokenizers_of(file)[1])
    first = fingerprint(file, one)
    assert first == fingerprint(file, one) == fingerprint(file, tokenizers_of(file))
    assert first != fingerprint(file, other)
    assert first != fingerprint(file, one[::-1])
    stat = os.stat(file.path)
    os.utime(file.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert first != fingerprint(file, one)


@pytest.mark.usefixtures("small_batches")
def test_a_bad_line_leaves_no_cache(tmp_path):
    file = write_file(tmp_path)
    tokenizers = tokenizers_of(file)
    with open(file.path, "a") as out:
        out.write("no tab\n")
    with pytest.raises(UserError, match=r"a\.tsv, line 41: expected source<TAB>target"):
        cached(file, tokenizers, tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_a_full_disk_leaves_no_cache(tmp_path):
    file = write_file(tmp_path, 4000)
    tokenizers = tokenizers_of(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*cache .*nothing of it is kept; make room"):
            cached(file, tokenizers, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    sides, _, seconds = cached(file, tokenizers, tmp_path / "cache")
    assert seconds > 0 and len(sides[0]) == 4000


KILLED = """
import os, sys
from fastseq.training import cache
from fastseq.training.reading import PairFile
from fastseq.training.tokenizer import TextTokenizer
cache.ROWS = 7
stage, folder = sys.argv[1:]
tokenizers = [TextTokenizer.load(cache.Path(folder, f"{side}.json")) for side in ("source", "target")]
calls = 0
def encode_flat(*args, original=cache.encode_flat):
    global calls
    calls += 1
    if stage == "encoding" and calls == 6:
        os._exit(9)
    return original(*args)
cache.encode_flat = encode_flat
if stage == "renamed":
    cache.write_text = lambda *args: os._exit(9)
if stage == "written":
    cache.os.fsync = lambda *args: os._exit(9)
cache.cached(PairFile(folder + "/a.tsv"), tokenizers, cache.Path(folder, "cache"))
"""


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("stage", ["encoding", "written", "renamed"])
def test_a_killed_process_leaves_no_cache_that_is_read(tmp_path, stage):
    file = write_file(tmp_path)
    tokenizers = tokenizers_of(file)
    for side, tokenizer in zip(("source", "target"), tokenizers, strict=True):
        tokenizer.save(tmp_path / f"{side}.json")
    run = subprocess.run([sys.executable, "-c", KILLED, stage, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert ".json" not in left
    assert len(left) == 2  # the lock, and what was being written
    sides, counts, seconds = cached(file, tokenizers, tmp_path / "cache")
    assert seconds > 0 and counts.rows == 40
    assert torch.equal(sides[0].lengths, encode(tokenizers[0], read_pairs(file).sources, "a")[0].lengths)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".json", ".arrow"}


@pytest.mark.parametrize("cut", [8, 0])
def test_a_cache_of_another_size_is_made_again(tmp_path, cut):
    file = write_file(tmp_path)
    tokenizers = tokenizers_of(file)
    cached(file, tokenizers, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.arrow")
    content = path.read_bytes()
    path.write_bytes(content[:-8] if cut else bytes(len(content)))
    if cut:
        assert cached(file, tokenizers, tmp_path / "cache")[2] > 0
        assert path.read_bytes() == content
    else:
        with pytest.raises(UserError, match=r"is no cache of encoded data .* remove it: it is made again"):
            cached(file, tokenizers, tmp_path / "cache")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_from_a_cache_equals_training_from_memory(tmp_path, capsys):
    epochs = ("--trainer.max_epochs", "2")
    train(tmp_path / "memory", *epochs)
    train(tmp_path / "cached", *epochs, "--data.cache", str(tmp_path / "shared"))
    assert "160 pairs encoded in " in capsys.readouterr().out
    assert equal(weights_of(tmp_path / "memory"), weights_of(tmp_path / "cached"))
    main(["train", "--resume", str(tmp_path / "cached"), "--trainer.max_epochs", "3"])
    assert "160 pairs already encoded" in capsys.readouterr().out


def test_large_files_are_cached_in_the_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastseq.training.corpus.CACHED_FROM", 1000)
    train(tmp_path / "run", "--trainer.max_epochs", "1")
    assert len(list((tmp_path / "run" / "cache").glob("*.arrow"))) == 1
    train(tmp_path / "run", "--trainer.max_epochs", "1", "--overwrite")
    assert "already encoded" in capsys.readouterr().out
    assert "holds a run already" in refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run")


def test_a_vocabulary_of_a_large_file_comes_from_lines_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fastseq.training.corpus.CACHED_FROM", 0)
    monkeypatch.setattr("fastseq.training.corpus.VOCABULARY_LINES", 40)
    lines = []

    def spy(kind, given, size, original=TextTokenizer.train):
        lines.append(list(given))
        return original(kind, lines[-1], size)

    monkeypatch.setattr(TextTokenizer, "train", spy)
    train(tmp_path / "run", "--trainer.max_epochs", "1")
    sources = read_pairs(TOY / "train.tsv").sources
    assert lines[0] == sources[::4]


def test_several_files_with_weights(tmp_path, capsys):
    pairs = (TOY / "train.tsv").read_text().splitlines(keepends=True)
    for name, part in (("one", pairs[:60]), ("two", pairs[60:])):
        (tmp_path / f"{name}.tsv").write_text("".join(part))
    files = f"[{tmp_path / 'one.tsv'}, {tmp_path / 'two.tsv'}]"
    train(tmp_path / "run", "--train", files, "--data.weights", "[2, 0.5]", "--trainer.max_epochs", "1")
    assert "170 training pairs" in capsys.readouterr().out
    bad = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "x", "--data.weights", "[1, 2]")
    assert "--data.weights has 2 numbers for 1 training file(s)" in bad


def test_parallel_training_files(tmp_path, capsys):
    for name in ("train", "valid"):
        pairs = read_pairs(TOY / f"{name}.tsv")
        for side, lines in zip(("a", "b"), pairs, strict=True):
            (tmp_path / f"{name}.{side}").write_text("".join(line + "\n" for line in lines))
    both = [part for name in ("train", "valid") for part in
            (f"--{name}", str(tmp_path / f"{name}.a"), f"--{name}_targets", str(tmp_path / f"{name}.b"))]  # fmt: skip
    train(tmp_path / "parallel", *both, "--trainer.max_epochs", "1")
    train(tmp_path / "tsv", "--trainer.max_epochs", "1")
    assert equal(weights_of(tmp_path / "parallel"), weights_of(tmp_path / "tsv"))
    main(["evaluate", str(tmp_path / "tsv"), "--data", str(tmp_path / "valid.a"), "--targets",
          str(tmp_path / "valid.b"), "--pictures", "0"])  # fmt: skip
    assert "20 sources" in capsys.readouterr().out


FLAT = ("--optim.schedule", "constant", "--optim.warmup", "0")


def test_validation_by_updates_changes_no_weight(tmp_path, capsys):
    train(tmp_path / "passes", *FLAT, "--trainer.max_epochs", "3")  # of 4 updates
    capsys.readouterr()
    train(tmp_path / "updates", *FLAT, "--trainer.max_epochs", "3", "--trainer.val_every", "3")
    printed = capsys.readouterr().out
    assert "update 9/12: train loss " in printed and "best update " in printed and " of 12: " in printed
    assert equal(weights_of(tmp_path / "passes"), weights_of(tmp_path / "updates"))
    assert [row["step"] for row in rows(tmp_path / "updates") if row["valid_loss"]] == ["2", "5", "8", "11"]
    train(tmp_path / "parts", *FLAT, "--trainer.max_steps", "5", "--trainer.val_every", "3")
    assert [row["step"] for row in rows(tmp_path / "parts") if row["valid_loss"]] == ["2", "5"]
    assert "--trainer.val_every is 3 in the run" in refused(
        capsys, "train", "--resume", tmp_path / "parts", "--trainer.val_every", "4"
    )
    main(["train", "--resume", str(tmp_path / "parts"), "--trainer.max_steps", "12"])
    assert equal(weights_of(tmp_path / "passes"), weights_of(tmp_path / "parts"))
    main(["train", "--resume", str(tmp_path / "parts")])
    assert "is finished: all 4 epochs are trained" in capsys.readouterr().out


def test_joined_sequences():
    one, two = Sequences([[5], [6, 6], [7, 7, 7]]), Sequences([[8, 8, 8, 8], [9], [10], [11]])
    both = Joined([one, two], [2.0, 0.5])
    assert len(both) == 8
    tokens, lengths = both.padded(torch.arange(8))
    assert tokens[:, 0].tolist() == [5, 6, 7, 5, 6, 7, 8, 10]
    assert lengths.tolist() == both.lengths.tolist() == [1, 2, 3, 1, 2, 3, 4, 1]
    assert tokens[6].tolist() == [8] * 4 and tokens[0].tolist() == [5, 0, 0, 0]
    assert both.padded(torch.tensor([7, 0]))[0].tolist() == [[10], [5]]


def test_windows_hold_every_example_once_an_epoch(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW", 32)
    monkeypatch.setattr(batching, "BLOCK", 8)
    rng = random.Random(3)
    source = Sequences([[100 + i] + [9] * rng.randint(0, 9) for i in range(101)])
    target = Sequences([[5] * rng.randint(1, 9) for _ in range(101)])
    batches = TokenBatches(source, target, max_tokens=30, accumulate=2, seed=4)
    assert len(batches._windows) == 4
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = [[int(i) - 100 for i in batch.source[:, 0] if i >= 100] for batch in batches]
        assert len(found) == len(batches)
        assert sorted(i for batch in found for i in batch) == list(range(101))
        orders.append(found)
    assert orders[0] != orders[1]
    for done in range(len(batches)):
        batches.epoch, batches._done = 2, done
        rest = [[int(i) - 100 for i in batch.source[:, 0] if i >= 100] for batch in batches]
        assert rest == orders[2][done:]
