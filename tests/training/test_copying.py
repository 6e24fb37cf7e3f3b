"""Models that copy, from text to text: tokenizers, batches, commands, folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import refused

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2SeqConfig
from fastseq.training import templates
from fastseq.training.batching import TokenBatches
from fastseq.training.copying import CopyTokenizer
from fastseq.training.data import encode, encode_prefixes, encode_targets, read_pairs
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.trained import TrainedModel

KNOWN = ["calls", "thanks", "at"]  # target ids 4, 5, 6


def tokenizers(kind: str = "whitespace") -> tuple[CopyTokenizer, TextTokenizer]:
    source = TextTokenizer.of_words(kind, ["at", "calls", "please"])
    target = TextTokenizer.of_words(kind, KNOWN)
    return CopyTokenizer.of(source, target), target


def test_unknown_words_are_numbered_within_their_sentence():
    source, _ = tokenizers()
    sources, note = encode(source, ["ada calls bob at ada", "please <pad> 12"], "file")
    tokens, lengths = sources.padded(torch.arange(2))
    assert tokens[..., 0].tolist() == [[3, 5, 3, 4, 3, 2], [6, 3, 3, 2, 0, 0]]
    assert tokens[..., 1].tolist() == [[7, 4, 8, 6, 7, 2], [7, 8, 9, 2, 0, 0]]  # please is not a target word
    assert lengths.tolist() == [6, 4] and sources.words == [("ada", "bob"), ("please", "<pad>", "12")]
    assert note == "file: 5 of 8 tokens are not in the vocabulary; the model can copy them"
    chosen = sources.select([1])
    assert chosen.words == [("please", "<pad>", "12")] and chosen.padded(torch.tensor([0]))[0].shape == (1, 4, 2)


def test_targets_know_the_words_of_their_source():
    both = tokenizers()
    sources, _ = encode(both[0], ["ada calls bob", "eve"], "file")
    targets, note = encode_targets(both, sources, ["bob thanks ada", "ada calls <pad>"], "targets")
    assert targets.padded(torch.arange(2))[0].tolist() == [[8, 5, 7, 2], [3, 4, 3, 2]]
    assert note == "targets: 2 of 6 tokens are not in the vocabulary and are read as <unk>"
    assert encode_prefixes(both, sources, ["bob", ""]) == [[8], []]


def test_characters_are_copied_too():
    source = TextTokenizer.of_words("char", ["a", " "])
    both = CopyTokenizer.of(source, source), source
    sources, _ = encode(both[0], ["a é"], "file")
    assert sources.padded(torch.tensor([0]))[0][0, :, 1].tolist() == [4, 5, 6, 2]
    targets, _ = encode_targets(both, sources, ["éa"], "targets")
    (row,) = targets.padded(torch.tensor([0]))[0].tolist()
    assert row == [6, 4, 2] and source.text(row, sources.words[0]) == "éa"


def test_batches_have_both_tokens_and_a_share_without_examples():
    both = tokenizers()
    sources, _ = encode(both[0], ["ada calls bob", "eve"], "file")
    targets, _ = encode_targets(both, sources, ["ada bob", "eve thanks"], "targets")
    (batch,) = TokenBatches(sources, targets, max_tokens=100, shuffle=False)  # the shorter source comes first
    assert batch.source.shape == (2, 4, 2) and batch.labels.tolist() == [[7, 5, 2], [7, 8, 2]]
    (empty,) = TokenBatches(sources, targets, max_tokens=100, world_size=3, rank=2)
    assert empty.source.shape == (1, 1, 2)


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        (object(), TextTokenizer.of_words("char", ["a"]), "the model reads features"),
        (TextTokenizer.of_words("char", ["a"]), TextTokenizer.of_words("whitespace", ["a"]), "one kind of tokens"),
        (*[TextTokenizer.train("bpe", ["a b"], 10)] * 2, "bpe has no unknown words to copy"),
    ],
    ids=["features", "kinds", "bpe"],
)
def test_tokenizers_that_do_not_copy(source, target, sentence):
    with pytest.raises(UserError, match=sentence):
        CopyTokenizer.of(source, target)


SMALL = "--config templates --model.embedding_dim 16 --model.hidden_size 32 --optim.lr 0.02 --trainer.accelerator cpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty pairs of two kinds of facts: enough to run, and to learn a little."""
    folder = tmp_path_factory.mktemp("copying")
    for name, n in (("train", 300), ("valid", 20), ("test", 20)):
        lines = [f"{a}\t{b}\n" for a, b in templates.pairs(name, n, 1) if "room" in a or "shares" in a]
        (folder / f"{name}.tsv").write_text("".join(lines))
    return folder


def options(data: Path, run: Path, *more: str) -> list[str]:
    files = ["--train", str(data / "train.tsv"), "--valid", str(data / "valid.tsv"), "--run_dir", str(run)]
    return ["train", *SMALL.split(), *files, "--trainer.max_epochs", "8", *more]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("copying-run") / "run"
    main(options(data, run))
    return run


def test_unseen_words_come_out(run, data):
    """After some updates most predictions are not right yet, but names of the test are in them."""
    trained, pairs = TrainedModel.from_pretrained(run), read_pairs(data / "test.tsv")
    found = trained.predict(pairs.sources, num_beams=2)
    size = len(trained.target_tokenizer)
    copied = [word for (best,) in found for word in best.copied if word in best.text.split()]
    assert any(token >= size for (best,) in found for token in best.ids)
    assert copied and not any(word in trained.target_tokenizer._ids_of_words for word in copied)


def test_scores_are_the_ones_of_the_search(run, data):
    trained, pairs = TrainedModel.from_pretrained(run), read_pairs(data / "test.tsv")
    found = trained.predict(pairs.sources[:4], token_scores=True, max_tokens=64)
    ended = [(s, best) for s, (best,) in zip(pairs.sources, found, strict=False) if not best.cut_off]
    scores = trained.score([(source, best.text) for source, best in ended])
    for (_, best), score in zip(ended, scores, strict=True):
        assert score.token_scores == pytest.approx(best.token_scores, rel=1e-3, abs=1e-4)
    prefixed = trained.predict(pairs.sources[:1], prefixes=[pairs.sources[0].split()[-1]])
    assert prefixed[0][0].text.split()[0] == pairs.sources[0].split()[-1]


def test_commands_and_a_saved_folder(run, data, tmp_path, capsys):
    main(["evaluate", str(run), "--data", str(data / "test.tsv"), "--pictures", "1", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["sources"] == len(
        set(read_pairs(data / "test.tsv").sources)
    )
    assert (tmp_path / "out" / "attention" / "0001.png").exists()
    trained = TrainedModel.from_pretrained(run)
    trained.save_pretrained(tmp_path / "saved")
    again = TrainedModel.from_pretrained(tmp_path / "saved")
    sources = read_pairs(data / "test.tsv").sources
    assert again(sources) == trained(sources) == trained(sources[::-1])[::-1]
    (tmp_path / "in.txt").write_text("\n".join(sources) + "\n")
    capsys.readouterr()
    main(["generate", str(tmp_path / "saved"), "--input", str(tmp_path / "in.txt"), "--replace-unk", "true"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sources) and not any("<unk>" in line for line in lines)


def test_a_run_resumes_and_another_starts_from_it(run, data, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    main(["train", "--resume", str(copied), "--trainer.max_epochs", "9"])
    assert "could not" not in capsys.readouterr().out
    sentence = refused(capsys, *options(data, tmp_path / "x", "--init_from", str(run), "--model.copy", "false"))
    assert "--model.copy is true" in sentence
    main(options(data, tmp_path / "next", "--init_from", str(run), "--freeze", "decoder", "--trainer.max_epochs", "1"))
    before, after = (TrainedModel.from_pretrained(path).model.decoder.copy_gate for path in (run, tmp_path / "next"))
    assert torch.equal(before.weight, after.weight)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data.cache", "cache"], "--data.cache holds no copies"),
        (["--data.target_tokenizer", "char", "--data.shared_vocabulary", "false"], "one kind of tokens"),
        (["--model.attention", "none"], "copy follows the attention"),
    ],
)
def test_refusals(data, tmp_path, capsys, more, sentence):
    assert sentence in refused(capsys, *options(data, tmp_path / "run", *more))


def test_export_refuses(run, tmp_path, capsys):
    pytest.importorskip("onnx")
    assert "cannot be exported" in refused(capsys, "export", "--format", "onnx", run, tmp_path / "exported")


def test_transformers_refuses():
    pytest.importorskip("transformers")
    from fastseq.hf import FastseqConfig, FastseqForSeq2SeqLM

    sizes = dict(src_vocab_size=5, tgt_vocab_size=5, embedding_dim=2, hidden_size=2, copy=True)
    with pytest.raises(ValueError, match=r"use fastseq\.TrainedModel"):
        FastseqForSeq2SeqLM(FastseqConfig(**Seq2SeqConfig(**sizes).to_dict()))


def test_templates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(templates, "SIZES", {"train": 60, "valid": 9, "test": 20})
    main(["data", "templates", str(tmp_path / "a")])
    assert f"{tmp_path / 'a' / 'test'}.tsv: 20 pairs" in capsys.readouterr().out
    main(["data", "templates", str(tmp_path / "b")])
    assert (tmp_path / "a" / "train.tsv").read_bytes() == (tmp_path / "b" / "train.tsv").read_bytes()


def test_no_name_or_number_is_in_two_files():
    fixed = {word for ways in templates.FACTS for way in ways for word in way.split()}
    fixed |= {word for opening in templates.OPENINGS for word in opening.split()}
    words = {}
    for name in templates.SIZES:
        lines = [side for pair in templates.pairs(name, 500, 3) for side in pair]
        words[name] = {word for line in lines for word in line.split()} - fixed
    assert all(len(found) > 300 for found in words.values())
    assert not words["train"] & words["test"] and not words["train"] & words["valid"]
    for source, target in templates.pairs("test", 50, 4):  # every unknown word of the target stands in the source
        assert set(target.split()) - fixed <= set(source.split())


def test_the_configuration_names_the_options_it_needs():
    stored = yaml.safe_load((Path(templates.__file__).parent / "templates.yaml").read_text())
    assert stored["model"]["copy"] is True


def test_coverage_is_added_to_a_trained_model(run, data, tmp_path):
    """As in See et al. 2017, who train with coverage at the end only."""
    more = ["--model.coverage", "true", "--model.coverage_loss", "0.5", "--trainer.max_epochs", "1"]
    main(options(data, tmp_path / "next", "--init_from", str(run), *more))
    trained = TrainedModel.from_pretrained(tmp_path / "next")
    assert trained.model.decoder.coverage and trained.model.config.coverage_loss == 0.5
    trained.save_pretrained(tmp_path / "saved")
    sources = read_pairs(data / "test.tsv").sources[:3]
    assert TrainedModel.from_pretrained(tmp_path / "saved")(sources) == trained(sources)
