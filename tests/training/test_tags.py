"""Tags: side information beside the source text, from the training file to predictions."""

import json
import re

import pytest
import torch
from toy_runs import refused

import fastseq
from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training.cache import cached
from fastseq.training.data import Sequences, encode, read_pairs
from fastseq.training.reading import PairFile
from fastseq.training.tagged import Tagged, TaggedSequences
from fastseq.training.tokenizer import EOS, UNK, TextTokenizer

LINES = ["ab\tUP;LAST", "ba\tUP", "b\t", "abb\tLAST UP"]
OPTIONS = [
    *("--data.tags", "true", "--data.target_tokenizer", "char", "--data.max_tokens", "128"),
    *("--model.hidden_size", "32", "--model.embedding_dim", "16", "--model.attention", "dot"),
    *("--model.input_feeding", "false", "--model.dropout", "0", "--optim.lr", "0.02", "--trainer.threads", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.progress_bar", "false"),
]


def tagged() -> Tagged:
    text = TextTokenizer.train("char", ["ab"], 100)
    return Tagged.train(text, ["UP LAST", "UP"], 100)


def task(n: int, seed: int) -> list[tuple[str, str, str]]:
    """Words of a and b, copied: in capitals with UP, closed by an x with END."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        word = "".join(
            "ab"[i] for i in torch.randint(2, (int(torch.randint(2, 4, (), generator=random)),), generator=random)
        )
        tags = ["", "UP", "END", "UP;END", "END;UP"][int(torch.randint(5, (), generator=random))]
        made = f"{word}x" if "END" in tags else word
        rows.append((word, tags, made.upper() if "UP" in tags else made))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on the task, with its files."""
    path = tmp_path_factory.mktemp("tags")
    for name, n in (("train", 500), ("valid", 40)):
        (path / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in task(n, n)))
    files = ["--train", str(path / "train.tsv"), "--valid", str(path / "valid.tsv")]
    main(["train", *files, "--run_dir", str(path / "run"), *OPTIONS, "--trainer.max_epochs", "16"])
    return path


def test_ids_of_a_line_with_tags():
    source = tagged()
    sequences, note = source.encode(LINES, "lines")
    assert note is None and sequences.lengths.tolist() == [3, 3, 2, 4]
    rows, lengths = sequences.padded(torch.tensor([0, 2]))
    a, b = (source.text.encode([letter])[0][0] for letter in "ab")
    up, last = (source.tags.encode([tag])[0][0] for tag in ("UP", "LAST"))
    assert lengths.tolist() == [3, 2] and rows.shape == (2, 3, 3)
    assert rows[0].tolist() == [[a, up, last], [b, up, last], [EOS, up, last]]
    assert rows[1, :2].tolist() == [[b, 0, 0], [EOS, 0, 0]] and rows[1, 2, 0] == 0
    again = sequences.select(torch.tensor([2, 0])).padded(torch.tensor([1]))[0]
    assert again.equal(rows[:1])
    assert sequences.select(torch.tensor([2])).padded(torch.tensor([0]))[0].shape == (1, 2, 1)


def test_an_unknown_tag_is_unk_and_named():
    source = tagged()
    sequences, note = source.encode(["ac\tUP;PST"], "lines")
    assert note == (
        "lines: 1 of 2 tokens are not in the vocabulary and are read as <unk>\n"
        "lines (tags): 1 of 2 tokens are not in the vocabulary and are read as <unk>"
    )
    assert sequences.padded(torch.tensor([0]))[0][0, 0, 2] == UNK


@pytest.mark.parametrize("line", ["ab", "ab\tUP\tx", "\tUP"])
def test_a_line_without_tags(line):
    with pytest.raises(UserError, match=r"words\.txt, line 7: expected source<TAB>tags, such as walk<TAB>V;PST"):
        tagged().encode([line], "words.txt", [7])


FORMS = {
    "a.jsonl": json.dumps({"s": "walk", "t": "V;PST", "f": "walked"}) + "\n",
    "a.csv": "f,t,s\nwalked,V;PST,walk\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_other_files_with_tags(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name])
    file = PairFile(str(tmp_path / name), None, "s", "f", "t")
    assert list(file) == [("walk\tV;PST", "walked")]
    assert list(PairFile(str(tmp_path / name), None, "s", "f")) == [("walk", "walked")]


def test_parallel_files_and_parquet_with_tags(tmp_path):
    (tmp_path / "a").write_text("walk\tV;PST\n")
    (tmp_path / "b").write_text("walked\n")
    assert list(PairFile(str(tmp_path / "a"), str(tmp_path / "b"), tag_column="t")) == [("walk\tV;PST", "walked")]
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"source": ["walk"], "tags": [""], "target": ["walk"]}), tmp_path / "a.parquet")
    assert list(PairFile(str(tmp_path / "a.parquet"), tag_column="tags")) == [("walk\t", "walk")]


BROKEN = {
    "too few tabs": ("a.tsv", "walk\twalked\n", "line 1: expected source<TAB>tags<TAB>target with two tabs, found 1"),
    "no text": ("a.tsv", "\tV\twalked\n", "line 1: the source is empty; expected source<TAB>tags<TAB>target"),
    "no column": ("a.csv", "source,target\na,b\n", "a.csv has no column tags"),
    "a tab in the text": (
        "a.jsonl",
        json.dumps({"source": "a\tb", "tags": "V", "target": "c"}),
        "line 1: a tab in the source or in its tags",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_with_tags(name, tmp_path):
    file, content, sentence = BROKEN[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_pairs(PairFile(str(tmp_path / file), tag_column="tags"))


def test_a_source_file_without_a_tab(tmp_path):
    (tmp_path / "a").write_text("walk\n")
    with pytest.raises(UserError, match="a, line 1: expected source<TAB>tags with one tab"):
        read_pairs(PairFile(str(tmp_path / "a"), str(tmp_path / "a"), tag_column="tags"))


def test_the_cache_holds_tags(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.tsv").write_text("".join(f"{line}\tab\n" for line in LINES))
    source, target = tagged(), TextTokenizer.train("char", ["ab"], 100)
    file = PairFile(str(tmp_path / "a.tsv"), tag_column="tags")
    (sources, targets), counts, _ = cached(file, (source, target), tmp_path / "cache")
    assert counts.tokens == (8, 5, 8) and isinstance(sources, TaggedSequences)
    rows = torch.arange(4)
    assert sources.padded(rows)[0].equal(source.encode(LINES, "lines")[0].padded(rows)[0])
    assert targets.padded(rows)[0].equal(encode(target, ["ab"] * 4, "targets")[0].padded(rows)[0])
    other = TextTokenizer.of_words("whitespace", ["LAST", "UP"], closed=False)
    assert (
        not cached(file, (Tagged(source.text, other), target), tmp_path / "cache")[0][0]
        .padded(rows)[0]
        .equal(sources.padded(rows)[0])
    )


def test_training_learns_what_the_tags_say(folder, capsys):
    main(["evaluate", str(folder / "run"), "--data", str(folder / "valid.tsv"), "--pictures", "1", "--device", "cpu"])
    assert float(re.search(r"exact match % +([\d.]+)", capsys.readouterr().out)[1]) > 90
    header, first, *_ = (folder / "run" / "predictions.tsv").read_text().splitlines()
    assert header.split("\t") == ["source", "tags", "prediction", "references", "correct"]
    assert len(first.split("\t")) == 5
    model = fastseq.TrainedModel.from_pretrained(folder / "run")
    assert model(["ab\tUP", "ab\tEND;UP", "ab\tUP END", "ab\t"]) == ["AB", "ABX", "ABX", "ab"]
    right, wrong = model.score([("abb\tUP", "ABB"), ("abb\tEND", "ABB")])
    assert right.log_prob > wrong.log_prob + 3


def test_a_saved_model_keeps_its_tags(folder, tmp_path, capsys, monkeypatch):
    model = fastseq.TrainedModel.from_pretrained(folder / "run")
    model.save_pretrained(tmp_path / "saved")
    again = fastseq.TrainedModel.from_pretrained(tmp_path / "saved")
    assert again.source_tokenizer == model.source_tokenizer
    assert again(["ab\tEND"]) == model(["ab\tEND"]) == ["abx"]
    both = fastseq.TrainedModel.from_pretrained([folder / "run", tmp_path / "saved"])
    assert both(["ab\tEND"]) == ["abx"]
    (tmp_path / "words.txt").write_text("ab\tEND\n\naab\tUP\n")
    main(["generate", str(tmp_path / "saved"), "--input", str(tmp_path / "words.txt"), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == ["abx", "", "AAB"]
    main(["score", str(tmp_path / "saved"), "--data", str(folder / "valid.tsv"), "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()[0].split("\t")) == 5
    (tmp_path / "words.txt").write_text("ab\tEND\nab\n")
    sentence = refused(capsys, "generate", tmp_path / "saved", "--input", tmp_path / "words.txt")
    assert "words.txt, line 2: expected source<TAB>tags" in sentence
    (tmp_path / "saved" / "source_tags.json").unlink()
    with pytest.raises(UserError, match=r"tokens and 6 tags, the files beside it have 6, 10 and no; take all files"):
        fastseq.TrainedModel.from_pretrained(tmp_path / "saved")


def test_a_run_that_lost_its_tags(folder, tmp_path, capsys):
    kept = (folder / "run" / "source_tags.json").read_text()
    (folder / "run" / "source_tags.json").unlink()
    try:
        sentence = refused(capsys, "evaluate", folder / "run", "--data", folder / "valid.tsv")
    finally:
        (folder / "run" / "source_tags.json").write_text(kept)
    assert "data.tags is true, the source of this run has no tags (source_tags.json)" in sentence


def test_start_from_a_model_with_tags(folder, tmp_path, capsys):
    (tmp_path / "new.tsv").write_text("ab\tTWICE\tabab\nb\tTWICE;UP\tBB\n" * 40)
    files = ["--train", str(tmp_path / "new.tsv"), "--valid", str(tmp_path / "new.tsv")]
    start = ["--init_from", str(folder / "run"), "--trainer.accelerator", "cpu", "--trainer.threads", "1"]
    main(
        [
            "train",
            *files,
            *start,
            "--run_dir",
            str(tmp_path / "a"),
            "--grow_vocabulary",
            "true",
            "--trainer.max_epochs",
            "1",
        ]
    )
    old, new = (fastseq.TrainedModel.from_pretrained(path) for path in (folder / "run", tmp_path / "a"))
    assert len(new.source_tokenizer.tags) == len(old.source_tokenizer.tags) + 1
    assert new.source_tokenizer.text == old.source_tokenizer.text
    capsys.readouterr()
    frozen = ["--freeze", "src_embedding", "--trainer.max_epochs", "1", "--run_dir", str(tmp_path / "b")]
    main(["train", *files, *start, *frozen])
    assert "frozen" in capsys.readouterr().out
    after = fastseq.TrainedModel.from_pretrained(tmp_path / "b").model.encoder
    assert after.tag_embedding.weight.equal(old.model.encoder.tag_embedding.weight)
    sentence = refused(capsys, "train", *files, *start, "--run_dir", tmp_path / "c", "--data.tags", "false")
    assert "--data.tags is true in" in sentence


def test_shared_vocabulary_with_tags(tmp_path):
    (tmp_path / "a.tsv").write_text("ab\tX\tbc\n")
    arguments = [
        "--data.shared_vocabulary",
        "true",
        "--data.target_tokenizer",
        "char",
        "--model.share_all_embeddings",
        "true",
    ]
    sizes = [
        "--model.hidden_size",
        "8",
        "--model.embedding_dim",
        "8",
        "--trainer.max_epochs",
        "1",
        "--data.tags",
        "true",
    ]
    files = ["--train", str(tmp_path / "a.tsv"), "--valid", str(tmp_path / "a.tsv"), "--trainer.accelerator", "cpu"]
    main(["train", *files, "--run_dir", str(tmp_path / "run"), *arguments, *sizes])
    model = fastseq.TrainedModel.from_pretrained(tmp_path / "run")
    assert model.source_tokenizer.text == model.target_tokenizer and len(model.source_tokenizer.tags) == 5
    more = ["--run_dir", str(tmp_path / "new"), "--grow_vocabulary", "true", "--trainer.max_epochs", "1"]
    (tmp_path / "a.tsv").write_text("ad\tY\tbe\n")
    main(["train", *files, *more, "--init_from", str(tmp_path / "run")])
    new = fastseq.TrainedModel.from_pretrained(tmp_path / "new")
    assert new.source_tokenizer.text == new.target_tokenizer and len(new.source_tokenizer.tags) == 6


def test_tags_of_features(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("a.npy\tX\tb\n")
    files = ["--train", tmp_path / "a.tsv", "--valid", tmp_path / "a.tsv", "--run_dir", tmp_path / "run"]
    sentence = refused(capsys, "train", *files, "--data.tags", "true", "--model.source_features", "3")
    assert "tag_vocab_size is for a source of tokens" in sentence
    assert not (tmp_path / "run").exists()


def test_several_files_with_weights():
    from fastseq.training.corpus import joined

    parts = [tagged().encode(lines, "lines")[0] for lines in (LINES[:2], LINES[2:])]
    both = joined(parts, [1.0, 2.0])
    assert isinstance(both, TaggedSequences) and len(both) == 6
    rows = torch.tensor([0, 3])
    expected = tagged().encode([LINES[0], LINES[3]], "lines")[0].padded(torch.arange(2))[0]
    assert both.padded(rows)[0].equal(expected)
    assert isinstance(joined([Sequences([[1]])], [1.0]), Sequences)


def test_transformers_and_tags(folder, tmp_path):
    pytest.importorskip("transformers")
    from fastseq.hf import FastseqForSeq2SeqLM, load_tokenizers

    model = fastseq.TrainedModel.from_pretrained(folder / "run")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="reads tags beside its source, which tokenizers of transformers do not keep"):
        load_tokenizers(tmp_path / "saved")
    theirs = FastseqForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    sequences, _ = model.source_tokenizer.encode(["abb\tEND", "ba\tUP;END"], "lines")
    ids, lengths = sequences.padded(torch.arange(2))
    mask = (torch.arange(ids.size(1)) < lengths[:, None]).long()
    for options in ({}, {"num_beams": 3}):
        found = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, **options)[:, 1:]
        assert model.target_tokenizer.decode(found.tolist()) == model(["abb\tEND", "ba\tUP;END"], **options)


def test_export_with_tags(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    from fastseq.export.main import export, load

    model = fastseq.TrainedModel.from_pretrained(folder / "run")
    assert export(model, tmp_path / "graphs", "onnx") < 1e-4
    lines = ["abb\tEND", "ba\tUP", "ab\tUP;END"]
    assert load(tmp_path / "graphs")(lines) == model(lines)
