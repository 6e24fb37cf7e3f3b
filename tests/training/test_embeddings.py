"""Pretrained embeddings: text files of word2vec and GloVe, and .npy matrices."""

import numpy as np
import pytest
import torch
from toy_runs import SMALL, refused, train

from fastseq.cli import main
from fastseq.training.folder import RunFolder

STILL = ("--trainer.max_epochs", "1", "--optim.lr", "0")  # the weights stay as they started
VECTORS = {word: torch.arange(16) * 0.1 + number for number, word in enumerate("abcd")}
TEXT = "".join(f"{word} {' '.join(f'{x:.3f}' for x in vector.tolist())}\n" for word, vector in VECTORS.items())


def weights(run) -> dict[str, torch.Tensor]:
    return RunFolder(run).load_model("last").state_dict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("plain") / "run"
    train(run, *STILL)
    return weights(run)


@pytest.mark.parametrize("header", ["", "7 16\n"])
@pytest.mark.parametrize(("side", "name"), [("src", "encoder"), ("tgt", "decoder")])
def test_text_vectors(plain, tmp_path, capsys, header, side, name):
    extra = "two words" + " 1" * 16 + "\n<pad>" + " 1" * 16 + "\n<unk>" + " 2" * 16 + "\n"
    (tmp_path / "vectors.txt").write_text(header + TEXT + extra)
    train(tmp_path / "run", *STILL, f"--model.{side}_embeddings", str(tmp_path / "vectors.txt"))
    assert f"5 of 9 tokens of the {'source' if side == 'src' else 'target'} vocabulary" in capsys.readouterr().out
    source, target = RunFolder(tmp_path / "run").load_tokenizers()
    found, key = weights(tmp_path / "run"), f"{name}.embedding.weight"
    tokens = (source if side == "src" else target).tokens(range(9))
    for row, word, before in zip(found[key], tokens, plain[key], strict=True):
        if word in VECTORS:
            torch.testing.assert_close(row, VECTORS[word].float())
        else:
            assert torch.equal(row, torch.full((16,), 2.0) if word == "<unk>" else before)
    assert all(torch.equal(tensor, plain[other]) for other, tensor in found.items() if other != key)
    main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"])
    assert "have a vector" not in capsys.readouterr().out


def test_a_matrix(plain, tmp_path):
    matrix = np.random.default_rng(0).normal(size=(9, 16))
    np.save(tmp_path / "m.npy", matrix)
    train(tmp_path / "run", *STILL, "--model.src_embeddings", str(tmp_path / "m.npy"), "--freeze", "src_embedding")
    found = weights(tmp_path / "run")["encoder.embedding.weight"]
    torch.testing.assert_close(found[1:], torch.from_numpy(matrix[1:]).float())
    assert torch.equal(found[0], torch.zeros(16))


LINE = "a" + " 1" * 16


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a" + " 1" * 15 + "\n", "has vectors of 15 numbers, the model has --model.embedding_dim 16"),
        ("9 300\n", "has vectors of 300 numbers"),
        (f"{LINE}\nb 1 2\n", "line 2: expected a word and 16 numbers"),
        (f"{LINE}\nb" + " x" * 16 + "\n", "line 2: could not convert string to float: 'x'"),
        (f"{LINE}\nb" + " nan" * 16 + "\n", "line 2: a number is not finite"),
        ("zzz" + " 1" * 16 + "\n", "has no vector for any token of the source vocabulary"),
        ("", "has no vector for any token"),
    ],
    ids=lambda value: value[:12],
)
def test_bad_text(tmp_path, capsys, content, reason):
    path = tmp_path / "vectors.txt"
    path.write_text(content)
    arguments = ("--run_dir", tmp_path / "run", "--model.src_embeddings", path)
    assert reason in refused(capsys, "train", *SMALL, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (np.zeros((9, 15)), "holds (9, 15) of float64; expected floating-point numbers (9, 16)"),
        (np.zeros((8, 16)), "holds (8, 16)"),
        (np.zeros((9, 16), dtype=int), "of int64"),
        (np.full((9, 16), np.inf), "row 0: a number is not finite"),
        (np.array([{}], dtype=object), "cannot be read as an array"),
    ],
    ids=["width", "rows", "dtype", "infinite", "objects"],
)
def test_bad_matrices(tmp_path, capsys, matrix, reason):
    np.save(tmp_path / "m.npy", matrix, allow_pickle=True)
    arguments = ("--run_dir", tmp_path / "run", "--model.tgt_embeddings", tmp_path / "m.npy")
    assert reason in refused(capsys, "train", *SMALL, *arguments)


def test_options_that_exclude_each_other(tmp_path, capsys):
    (tmp_path / "v.txt").write_text(TEXT)
    shared = ("--data.shared_vocabulary", "true", "--data.target_tokenizer", "char", "--model.embedding_dim", 32)
    both = ("--model.src_embeddings", tmp_path / "v.txt", "--model.tgt_embeddings", tmp_path / "v.txt")
    arguments = ("--run_dir", tmp_path / "run", *shared, "--model.share_all_embeddings", "true", *both)
    assert "has one matrix: give" in refused(capsys, "train", *SMALL, *arguments)
    arguments = ("--run_dir", tmp_path / "run", "--model.src_embeddings", tmp_path / "none.txt")
    assert "none.txt cannot be read" in refused(capsys, "train", *SMALL, *arguments)
