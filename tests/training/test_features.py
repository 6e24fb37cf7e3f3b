"""Sources of features: the files that a manifest names, their normalisation, and the commands on them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import refused

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.training.batching import TokenBatches
from fastseq.training.data import Sequences
from fastseq.training.features import Features, Frames
from fastseq.training.folder import RunFolder
from fastseq.training.mel import log_mel, mel_filters
from fastseq.training.tokenizer import EOS
from fastseq.training.trained import TrainedModel

F = 4


def frames(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, F)).astype(np.float32)


def read(folder: Path, *sources: str) -> list[torch.Tensor]:
    found = Features(F, 8000.0).read(sources, folder / "manifest.tsv")
    return [found.padded(torch.tensor([i]))[0][0] for i in range(len(sources))]


def test_every_kind_of_array_is_read(tmp_path):
    from safetensors.numpy import save_file

    one, three = frames(5), np.stack([frames(3, seed) for seed in range(4)])
    np.save(tmp_path / "one.npy", one)
    np.save(tmp_path / "three.npy", three.astype(np.float64))
    np.save(tmp_path / "bytes.npy", np.arange(2 * F, dtype=np.uint8).reshape(2, F))
    np.savez(tmp_path / "z.npz", first=one, second=three[1].astype(">f4"))
    save_file({"x": one.astype(np.float16)}, tmp_path / "s.safetensors")
    sources = ["one.npy", "one.npy#1:4", "three.npy#2", "z.npz#second", "s.safetensors#x", str(tmp_path / "bytes.npy")]
    found = read(tmp_path, *sources)
    expected = [one, one[1:4], three[2], three[1], one.astype(np.float16), np.arange(2 * F).reshape(2, F)]
    for actual, array in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        np.testing.assert_array_equal(actual.numpy(), array.astype(np.float32))


def test_a_manifest_may_name_more_files_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr("fastseq.training.features.OPEN_FILES", 2)
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", frames(i + 1, i))
    order = [0, 1, 2, 3, 4, 0, 2]
    found = read(tmp_path, *(f"{i}.npy" for i in order))
    for actual, i in zip(found, order, strict=True):
        np.testing.assert_array_equal(actual.numpy(), frames(i + 1, i))


def write_bad_files(folder: Path) -> None:
    np.save(folder / "a.npy", frames(5))
    np.save(folder / "wide.npy", np.zeros((5, F + 1)))
    np.save(folder / "flat.npy", np.zeros(F))
    np.save(folder / "none.npy", np.zeros((0, F)))
    np.save(folder / "text.npy", np.array([["a"] * F]))
    np.save(folder / "complex.npy", np.zeros((5, F), complex))
    np.save(folder / "objects.npy", np.array([[None] * F]), allow_pickle=True)
    holes, large = frames(5), np.ones((5, F))
    holes[3, 2], large[1, 0] = math.nan, 1e300
    np.save(folder / "nan.npy", holes)
    np.save(folder / "large.npy", large)
    np.savez(folder / "z.npz", first=frames(5))
    (folder / "cut.npy").write_bytes((folder / "a.npy").read_bytes()[:-8])
    (folder / "cut.npz").write_bytes((folder / "z.npz").read_bytes()[:-30])
    (folder / "swapped.npy").write_bytes((folder / "z.npz").read_bytes())
    (folder / "x.safetensors").write_bytes(b"not safe")
    (folder / "x.wav").write_bytes(b"RIFF no wave")
    (folder / "x.png").write_bytes(b"no picture")
    (folder / "empty.npy").touch()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("absent.npy", "absent.npy cannot be read (No such file or directory)"),
        ("absent.wav", "absent.wav cannot be read (No such file or directory)"),
        ("absent.png", "absent.png cannot be read (No such file or directory)"),
        ("wide.npy", "wide.npy has the shape (5, 5), expected (frames, 4) with at least one frame"),
        ("flat.npy", "flat.npy has the shape (4,), expected (frames, 4)"),
        ("none.npy", "none.npy has the shape (0, 4)"),
        ("text.npy", "text.npy holds <U1, expected numbers"),
        ("complex.npy", "complex.npy holds complex128, expected numbers"),
        ("objects.npy", "objects.npy is no npy file of numbers"),
        ("nan.npy", "nan.npy holds nan at frame 3, feature 2; expected finite numbers"),
        ("large.npy", "large.npy holds inf at frame 1, feature 0"),
        ("cut.npy", "cut.npy is no npy file of numbers"),
        ("empty.npy", "empty.npy is no npy file of numbers"),
        ("cut.npz#first", "cut.npz is no npz file of numbers"),
        ("swapped.npy", "swapped.npy is no npy file of numbers"),
        ("a.npy#1", "a.npy#1 needs an array (rows, frames, features), the file holds one of shape (5, 4)"),
        ("a.npy#x", "a.npy#x: after # comes a row, such as #7, or frames, such as #100:160"),
        ("a.npy#3:6", "a.npy#3:6 lies outside the array, which has 5 frames"),
        ("a.npy#3:3", "a.npy#3:3 lies outside the array"),
        ("z.npz", "z.npz names no array of the archive; it holds first; write z.npz#NAME"),
        ("z.npz#second", "z.npz#second names no array of the archive; it holds first"),
        ("x.safetensors#x", "x.safetensors is no safetensors archive"),
        ("x.wav", "x.wav is no recording that libsndfile reads"),
        ("x.png", "x.png is no picture"),
        ("words of text", "words of text has no ending of an array, recording or picture; known are .npy"),
    ],
)
def test_a_bad_source_names_its_line(tmp_path, source, sentence):
    write_bad_files(tmp_path)
    with pytest.raises(UserError) as error:
        read(tmp_path, "a.npy", "a.npy#0:2", source)
    assert str(error.value).startswith(f"{tmp_path / 'manifest.tsv'}, line 3: ")
    assert sentence in str(error.value)


def test_a_tone_lies_in_its_band():
    rate, bands, highest = 16_000, 40, 8000.0
    filters = mel_filters(bands, torch.linspace(0, 8000, 4001, dtype=torch.float64), highest)
    centres = filters.argmax(1) * 2.0
    for band in (5, 20, 35):
        tone = torch.sin(2 * math.pi * float(centres[band]) * torch.arange(rate) / rate)
        assert set(log_mel(tone, rate, bands, highest)[5:-5].argmax(1).tolist()) == {band}


def test_frames_of_sound_follow_its_time_whatever_the_rate():
    for rate in (16_000, 22_050, 48_000):
        samples = torch.zeros(rate // 2)
        samples[int(0.3 * rate) : int(0.31 * rate)] = torch.randn(int(0.31 * rate) - int(0.3 * rate))
        found = log_mel(samples, rate, 20, 8000.0)
        assert found.shape == (-(-len(samples) // round(rate / 100)), 20)
        assert int(found.mean(1).argmax()) == 30
    loud = [
        log_mel(torch.randn(rate, generator=torch.Generator().manual_seed(1)), rate, 80, 8000.0) for rate in (16_000,)
    ]
    assert loud[0].isfinite().all() and loud[0].min() > -10  # no band is empty


def test_recordings_are_read(tmp_path):
    import soundfile

    sound = np.random.default_rng(0).normal(scale=0.1, size=(16_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", sound, 16_000)
    soundfile.write(tmp_path / "slow.wav", sound, 8_000)
    (found,) = read(tmp_path, "a.flac")
    expected = log_mel(torch.from_numpy(sound.mean(1)), 16_000, F, 8000.0)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)  # 16-bit samples
    with pytest.raises(UserError, match=r"no frequency above 4000 Hz; lower --data\.highest_frequency 8000"):
        read(tmp_path, "slow.wav")


def test_pictures_are_read_by_columns_from_the_bottom(tmp_path):
    from PIL import Image

    pixels = np.arange(F * 6, dtype=np.uint8).reshape(F, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(tmp_path / "double.png")
    (found, scaled) = read(tmp_path, "a.png", "double.png")
    np.testing.assert_array_equal(found.numpy(), pixels[::-1].T.astype(np.float32) / np.float32(255))
    assert scaled.shape == found.shape


def test_normalisation_is_that_of_the_training_data(tmp_path):
    arrays = [frames(9, 1) * 3 + 2, frames(4, 2)]
    for array in arrays:
        array[:, 1] = 7.0
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    features = Features(F, 8000.0)
    raw = features.read(["0.npy", "1.npy"], tmp_path / "m.tsv")
    features.fit([raw])
    features.normalise(raw)
    flat = np.concatenate(arrays)
    torch.testing.assert_close(raw.flat.mean(0), torch.zeros(F), atol=1e-5, rtol=0)
    torch.testing.assert_close(raw.flat.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0, 1.0]), atol=1e-5, rtol=0)
    features.save(tmp_path / "source_features.json")
    again = Features.load(tmp_path / "source_features.json").read(["1.npy"], tmp_path / "m.tsv")
    torch.testing.assert_close(again.flat, raw.flat[len(arrays[0]) :], atol=0, rtol=0)
    torch.testing.assert_close(features.mean, torch.from_numpy(flat.mean(0)))


@pytest.mark.parametrize(
    "change",
    [{"size": 5}, {"size": "4"}, {"mean": [0, 0, 0, "x"]}, {"std": [1, 1, 1, 0]}, {"mean": [0, 0, 0, math.nan]},
     {"highest_frequency": 0}, {"highest_frequency": None}, {"std": None}],
    ids=str,
)  # fmt: skip
def test_damaged_statistics(tmp_path, change):
    path = tmp_path / "source_features.json"
    path.write_text(json.dumps({"size": F, "highest_frequency": 8000.0, "mean": [0.0] * F, "std": [1.0] * F} | change))
    with pytest.raises(UserError, match=r"source_features.json was not written by `fastseq train`"):
        Features.load(path)


def test_batches_of_frames_are_padded_with_zeros():
    rows = [torch.from_numpy(frames(steps, steps)) for steps in (3, 7, 2, 7)]
    source, target = Frames(rows, F), Sequences([[5, EOS]] * 4)
    found = list(TokenBatches(source, target, max_tokens=100, shuffle=False))
    assert [batch.source.shape for batch in found] == [(4, 7, F)]
    order = [2, 0, 1, 3]
    for row, length, i in zip(found[0].source, found[0].source_lengths.tolist(), order, strict=True):
        torch.testing.assert_close(row[:length], rows[i], atol=0, rtol=0)
        assert not row[length:].any()
    (share,) = TokenBatches(
        source.select(torch.tensor([0])), target.select(torch.tensor([0])), max_tokens=9, world_size=2, rank=1
    )
    assert share.source.shape == (1, 1, F) and not share.labels.any()


DIGITS = "0123"
PATTERNS = np.eye(F, dtype=np.float32)


def write_manifest(folder: Path, name: str, n: int, seed: int) -> Path:
    """A task that a small model learns in seconds: two frames of noise around a pattern for each digit."""
    random = np.random.default_rng(seed)
    arrays, lines = [], []
    start = 0
    for _ in range(n):
        digits = random.integers(0, F, size=random.integers(1, 5))
        arrays.append(PATTERNS[digits].repeat(2, 0) + random.normal(scale=0.05, size=(2 * len(digits), F)))
        lines.append(f"{name}.npy#{start}:{start + 2 * len(digits)}\t{' '.join(DIGITS[d] for d in digits)}\n")
        start += 2 * len(digits)
    np.save(folder / f"{name}.npy", 5 + 3 * np.concatenate(arrays))
    path = folder / f"{name}.tsv"
    path.write_text("".join(lines))
    return path


OPTIONS = [
    *("--model.source_features", str(F), "--model.hidden_size", "32", "--model.embedding_dim", "8"),
    *("--data.max_tokens", "100", "--optim.lr", "0.02", "--trainer.accelerator", "cpu", "--optim.label_smoothing", "0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    files = {
        name: str(write_manifest(folder, name, n, i)) for i, (name, n) in enumerate([("train", 400), ("valid", 40)])
    }
    arguments = ["--train", files["train"], "--valid", files["valid"], "--run_dir", str(folder / "run"), *OPTIONS]
    main(["train", *arguments, "--model.frame_stack", "2", "--trainer.max_epochs", "12",
          "--trainer.monitor", "valid_word_error_rate"])  # fmt: skip
    return folder


def test_the_commands_train_evaluate_and_generate(trained, tmp_path, capsys):
    test = write_manifest(trained, "test", 30, 7)
    main(["evaluate", str(trained / "run"), "--data", str(test), "--output", str(tmp_path), "--num-beams", "3"])
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["word_error_rate"] == values["token_error_rate"] < 5
    assert 0 <= values["character_error_rate"] < 5
    assert len(list((tmp_path / "attention").iterdir())) == 4
    printed = capsys.readouterr().out
    assert "word error rate %" in printed and "character error rate %" in printed

    targets = [line.split("\t")[1] for line in test.read_text().splitlines()]
    main(["generate", str(trained / "run"), "--input", str(test), "--output", str(tmp_path / "out.txt"),
          "--plot-attention", str(tmp_path / "pictures"), "--batch-lines", "7"])  # fmt: skip
    found = (tmp_path / "out.txt").read_text().splitlines()
    assert sum(a == b for a, b in zip(found, targets, strict=True)) >= 27
    assert len(list((tmp_path / "pictures").iterdir())) == 30


def test_score_reads_the_manifest(trained, tmp_path, monkeypatch):
    test = write_manifest(trained, "scored", 5, 3)
    monkeypatch.chdir(tmp_path)
    main(["score", str(trained / "run"), "--data", str(test), "--output", str(tmp_path / "scores.txt")])
    assert len((tmp_path / "scores.txt").read_text().splitlines()) == 5
    expected = TrainedModel.from_pretrained(trained / "run")
    (source, target) = test.read_text().splitlines()[4].split("\t")
    (score,) = expected.score([(str(trained / source), target)])
    assert f"{score.log_prob:.4f}" in (tmp_path / "scores.txt").read_text().splitlines()[4]


def test_the_run_folder_keeps_the_statistics(trained):
    run = RunFolder(trained / "run")
    assert not run.source_tokenizer.exists()
    source, target = run.load_tokenizers()
    assert source.size == F and 4 < float(source.mean.mean()) < 7
    assert run.load_config().model.source_features == F
    assert len(target) == 4 + F


def test_a_saved_model_reads_features(trained, tmp_path):
    from_run = TrainedModel.from_pretrained(trained / "run")
    from_run.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "source_tokenizer.json").exists()
    saved = TrainedModel.from_pretrained(tmp_path / "saved")
    array = 5 + 3 * PATTERNS[[2, 2, 0, 0]]
    np.save(tmp_path / "x.npy", array)
    assert saved([array, torch.from_numpy(array), str(tmp_path / "x.npy")]) == ["2 0"] * 3 == from_run([array] * 3)
    with pytest.raises(UserError, match=r"sources, line 1: the array has the shape \(3, 2\), expected \(frames, 4\)"):
        saved([np.zeros((3, 2))])
    assert from_run.predict([array], attention=True)[0][0].attention.shape == (3, 2)


def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path):
    files = ["--train", str(trained / "train.tsv"), "--valid", str(trained / "valid.tsv"), *OPTIONS]
    fixed = ["--optim.schedule", "constant", "--optim.warmup", "0"]
    main(["train", *files, *fixed, "--run_dir", str(tmp_path / "whole"), "--trainer.max_epochs", "2"])
    main(["train", *files, *fixed, "--run_dir", str(tmp_path / "parts"), "--trainer.max_epochs", "1"])
    main(["train", "--resume", str(tmp_path / "parts"), "--trainer.max_epochs", "2"])
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_starts_from_a_model_of_features(trained, tmp_path, capsys):
    """40 pairs teach a new name of the digit 3 to the old run, and little to a new one; its normalisation stays."""
    for name, n, seed in (("few", 40, 11), ("held", 30, 12)):
        path = write_manifest(trained, name, n, seed)
        path.write_text(re.sub(r"(?<=[\t ])3", "three", path.read_text()))
    files = ["--train", str(trained / "few.tsv"), "--valid", str(trained / "held.tsv"), *OPTIONS[6:]]
    epochs = ["--trainer.max_epochs", "8", "--trainer.monitor", "valid_word_error_rate"]
    start = ["--init_from", str(trained / "run"), "--grow_vocabulary", "true"]
    main(["train", *start, *files, *epochs, "--run_dir", str(tmp_path / "tuned")])
    main(["train", *OPTIONS[:6], *files, *epochs, "--model.frame_stack", "2", "--run_dir", str(tmp_path / "nothing")])
    capsys.readouterr()
    rates = {}
    for name in ("tuned", "nothing"):
        run = str(tmp_path / name)
        main(["evaluate", run, "--data", str(trained / "held.tsv"), "--output", run, "--pictures", "0"])
        rates[name] = json.loads((tmp_path / name / "evaluation.json").read_text())["word_error_rate"]
    assert rates["tuned"] < 25 and rates["nothing"] > 2 * rates["tuned"], rates
    (old, _), (new, words) = (RunFolder(run).load_tokenizers() for run in (trained / "run", tmp_path / "tuned"))
    assert new == old  # with mean and deviation
    assert RunFolder(tmp_path / "tuned").load_config().model.frame_stack == 2
    assert len(words) == 4 + F + 1
    other = ("--init_from", trained / "run", *files, "--run_dir", tmp_path / "other", "--model.source_features", "7")
    assert "--model.source_features is 4 in" in refused(capsys, "train", *other)


def test_a_bad_manifest_ends_in_a_sentence(trained, capsys):
    bad = trained / "bad.tsv"
    bad.write_text("train.npy#0:2\t1\nabsent.npy\t1\n")
    sentence = refused(capsys, "evaluate", trained / "run", "--data", bad)
    assert f"{bad}, line 2: {trained / 'absent.npy'} cannot be read (No such file or directory)" in sentence
    assert "line 2: " in refused(capsys, "generate", trained / "run", "--input", bad)
    common = ["--train", trained / "train.tsv", "--valid", bad, "--run_dir", trained / "new"]
    assert "bad.tsv, line 2: " in refused(capsys, "train", *common, *OPTIONS)
    assert not (trained / "new").exists()
    shape = refused(capsys, "train", *common, "--model.source_features", "3")
    assert "train.tsv, line 1: train.npy#0:" in shape and "expected (frames, 3)" in shape
    shared = refused(capsys, "train", *common, *OPTIONS, "--data.shared_vocabulary", "true")
    assert "data.shared_vocabulary needs text on both sides" in shared
    monitor = refused(capsys, "train", *common, "--trainer.monitor", "valid_word_error_rate")
    assert "valid_word_error_rate is not measured" in monitor


def test_time_reduction_counts_in_the_limit_of_a_prediction(trained):
    ratio = RunFolder(trained / "run").load_config().data.max_length_ratio
    assert ratio == 3.0  # one digit and eos, after one position of two frames
    assert Seq2SeqConfig(source_features=F, tgt_vocab_size=9, encoder_layers=3, pyramid=True).time_reduction == 4
