"""The search options of `fastseq generate` and `evaluate`: each changes a result, and bad ones get a sentence."""

import inspect
import json
import math

import pytest
import torch
from toy_runs import TOY, refused

import fastseq
from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.generation import generate
from fastseq.training.decode import Hypothesis
from fastseq.training.search_options import SEARCH
from fastseq.training.tokenizer import EOS, UNK, TextTokenizer
from fastseq.training.unknown import check_replacement, replace_unknown

TEST = ("--data", str(TOY / "test.tsv"))
WORDS = ["abcde", "edcba", "aabbc", "ddee", "cab"]
OTHERWISE = {"prefix_tokens": "--prefix", "num_return_sequences": "--n-best", "generator": "--seed"}
OTHERWISE |= {"output_attentions": "--output-attentions", "output_scores": "--output-scores"}


@pytest.fixture
def lines(barely_trained, tmp_path):
    """A function that runs `fastseq generate` on WORDS and returns the lines that it writes."""

    def run(*options, words=WORDS, model=barely_trained):
        (tmp_path / "in.txt").write_text("\n".join(words) + "\n")
        main(["generate", str(model), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), *options])
        return (tmp_path / "out").read_text().splitlines()

    return run


def test_every_keyword_of_generate_is_an_option(capsys):
    keywords = {p.name for p in inspect.signature(generate).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {*SEARCH, *OTHERWISE, "logits_processor"}
    for command in ("generate", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        for name in SEARCH:
            assert f"--{name} " in text


SAMPLE = ("--do-sample", "true", "--seed", "1")
RANDOM = (*SAMPLE, "--temperature=100", "--n-best=30")
BEAM = ("--num-beams", "4")
LONG = ("--min-new-tokens", "9")
LIVE = {
    "num_beams": ((), BEAM),
    "max_new_tokens": (LONG, ("--min-new-tokens=5", "--max-new-tokens=5")),
    "max_length_ratio": (RANDOM, (*RANDOM, "--max-length-ratio=0")),
    "min_new_tokens": ((), LONG),
    "length_penalty": (BEAM, (*BEAM, "--length-penalty", "-2")),
    "length_penalty_type": ((*BEAM, "--n-best=2"), (*BEAM, "--n-best=2", "--length-penalty-type=none")),
    "coverage_penalty": ((*BEAM, "--n-best=2"), (*BEAM, "--n-best=2", "--coverage-penalty=2")),
    "early_stopping": ((*BEAM, "--n-best=4"), (*BEAM, "--n-best=4", "--early-stopping", "true")),
    "no_repeat_ngram_size": (LONG, (*LONG, "--no-repeat-ngram-size=1")),
    "do_sample": ((), SAMPLE),
    "temperature": (SAMPLE, (*SAMPLE, "--temperature", "0.2")),
    "top_k": (SAMPLE, (*SAMPLE, "--top-k", "1")),
    "top_p": (SAMPLE, (*SAMPLE, "--top-p", "0.1")),
    "seed": (SAMPLE, (*SAMPLE[:2], "--seed", "2")),
    "prefix": ((), ("--prefix", "e d")),
}


@pytest.mark.parametrize(("before", "after"), LIVE.values(), ids=LIVE)
def test_each_option_changes_the_predictions(lines, before, after):
    first = lines(*before)
    assert first == lines(*before)
    assert first != lines(*after)


def test_generate_unk_is_connected(lines, barely_trained):
    sampled = lines(*SAMPLE, "--temperature", "100", words=WORDS * 20)
    assert any("<unk>" in line for line in sampled)
    without = lines(*SAMPLE, "--temperature", "100", "--generate-unk", "false", words=WORDS * 20)
    assert not any("<unk>" in line for line in without)


def test_the_folder_holds_defaults_that_options_override(lines, barely_trained, tmp_path):
    saved = tmp_path / "saved"
    fastseq.TrainedModel.from_pretrained(barely_trained).save_pretrained(saved)
    stored = json.loads((saved / "generation_config.json").read_text())
    (saved / "generation_config.json").write_text(json.dumps(stored | {"num_beams": 4, "min_new_tokens": 9}))
    assert lines(model=saved) == lines(*BEAM, *LONG) != lines()
    assert lines("--num-beams=1", "--min-new-tokens=0", model=saved) == lines()


def test_evaluate_takes_the_same_options(barely_trained, tmp_path, capsys):
    options = ("--prefix", "e d", "--num-beams=3", "--length-penalty=0.5", "--output-scores", "true", "--pictures=1")
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path), *options])
    header, *rows = [line.split("\t") for line in (tmp_path / "predictions.tsv").read_text().splitlines()]
    assert header[-2:] == ["score", "token_scores"]
    for row in rows:
        assert row[1].startswith("e d")
        scores = [float(score) for score in row[5].split()]
        assert sum(scores) / len(scores) ** 0.5 == pytest.approx(float(row[4]), abs=2e-3)
    search = json.loads((tmp_path / "evaluation.json").read_text())["search"]
    assert search["num_beams"] == 3 and search["length_penalty"] == 0.5 and search["prefix"] == "e d"
    main(["evaluate", str(barely_trained), *TEST, "--output", str(tmp_path), *options[:2], "--do-sample=true"])


def test_scores_and_alignments_are_columns(lines):
    options = ("--output-scores", "true", "--output-attentions", "true")
    for line in lines(*options):
        text, score, scores, alignment = line.split("\t")
        values = [float(value) for value in scores.split()]
        assert len(values) in (len(text.split()), len(text.split()) + 1)  # and eos
        assert sum(values) / len(values) == pytest.approx(float(score), abs=2e-3)
        pairs = [pair.split("-") for pair in alignment.split()]
        assert [int(place) for _, place in pairs] == list(range(len(text.split())))
        assert all(0 <= int(source) <= 5 for source, _ in pairs)
    assert len(lines("--num_return_sequences", "2")[0].split("\t")) == 2


def test_prefixes_of_a_file(lines, tmp_path):
    prefixes = ["a b c", "", "d", "e e e e", ""]
    (tmp_path / "prefixes").write_text("\n".join(prefixes) + "\n")
    for batch in ("256", "2"):
        found = lines("--prefix-file", str(tmp_path / "prefixes"), "--batch-lines", batch, "--num-beams=2")
        assert all(line.startswith(prefix) for line, prefix in zip(found, prefixes, strict=True))
    plain = lines("--num-beams=2")
    assert [found[1], found[4]] == [plain[1], plain[4]]


def test_unknown_tokens_become_source_tokens(lines, tmp_path):
    alignments = [line.split("\t")[-1] for line in lines("--prefix=zz", "--output-attentions=true")]
    assert all(line.startswith("<unk>") for line in lines("--prefix=zz"))
    places = [int(alignment.split("-")[0]) for alignment in alignments]
    replaced = lines("--prefix=zz", "--replace-unk=true")
    for line, word, place in zip(replaced, WORDS, places, strict=True):
        if place < len(word):  # else the closing eos has the most attention, and is left out
            assert line.split()[0] == word[place]
        assert line.split()[0] in word
    (tmp_path / "dictionary.tsv").write_text("".join(f"{letter}\t{letter.upper()}!\n" for letter in "abcd"))
    options = ("--replace-unk=true", "--unk-dictionary", str(tmp_path / "dictionary.tsv"))
    for line, plain in zip(lines("--prefix=zz", *options), replaced, strict=True):
        letter = plain.split()[0]
        assert line.split()[0] == (letter if letter == "e" else f"{letter.upper()}!")


@pytest.mark.parametrize("kind", ["char", "whitespace", "bpe"])
def test_replacement_in_each_kind_of_text(kind):
    tokenizer = TextTokenizer.train(kind, ["ab ba", "ab ab"], 20)
    source = "ab 名 ba" if kind != "char" else "ab名"
    (pieces,) = tokenizer.pieces([source])
    place = pieces.index("名")
    known = tokenizer.encode(["ab ba"])[0]
    ids = [*known, UNK, EOS]
    attention = torch.zeros(len(ids), len(pieces) + 1)
    attention[:, -1] = 0.6  # eos of the source
    attention[:, place] = 0.4
    hypothesis = Hypothesis("", ids, -1.0, attention)
    ((plain,),) = replace_unknown([[hypothesis]], [source], (tokenizer, tokenizer), {})
    assert plain.text == ("ab ba名" if kind != "whitespace" else "ab ba 名")
    ((named,),) = replace_unknown([[hypothesis]], [source], (tokenizer, tokenizer), {"名": "name"})
    assert named.text == plain.text.replace("名", "name")
    assert named.ids == ids and named.score == -1.0


def test_the_object_takes_prefixes_and_replaces_unknown_tokens(barely_trained, lines):
    trained = fastseq.TrainedModel.from_pretrained(barely_trained)
    prefixes = ["a b c", "", "zz", "e e e e", "zz"]
    plain = trained.predict(WORDS, prefixes=prefixes, num_beams=2, token_scores=True)
    replaced = trained.predict(WORDS, prefixes=prefixes, num_beams=2, replace_unk=True)
    names = dict.fromkeys("abcde", "X")
    named = trained.predict(WORDS, prefixes=prefixes, num_beams=2, replace_unk=names, attention=True)
    for word, prefix, (first,), (second,), (third,) in zip(WORDS, prefixes, plain, replaced, named, strict=True):
        assert first.text.startswith(prefix.replace("zz", "<unk>"))
        assert "<unk>" not in second.text and second.attention is None and third.attention is not None
        assert (second.text != first.text) == (prefix == "zz") == third.text.startswith("X")
        assert sum(first.token_scores) / len(first.ids) == pytest.approx(first.score, rel=1e-4)
        assert second.text.split()[0] in word or prefix != "zz"
    assert [best.text for (best,) in trained.predict(WORDS, prefixes=[""] * 5)] == lines()
    for bad in (["a"], "abc"):
        with pytest.raises(UserError, match=r"expected a list of 5 prefixes, one for each source, got (1|one text)"):
            trained.predict(WORDS, prefixes=bad)


def test_replacement_needs_attention_and_text():
    tokenizer = TextTokenizer.train("char", ["ab"], 20)
    with pytest.raises(UserError, match="the model has attention none"):
        check_replacement("none", tokenizer)
    with pytest.raises(UserError, match="the model reads features"):
        check_replacement("additive", object())


SENTENCES = {
    "top_k": (("--do-sample=true", "--top-k=-1"), "--top_k: must be >= 0"),
    "top_p": (("--do-sample=true", "--top-p=1.5"), "top_p must be > 0 and <= 1 (got 1.5)"),
    "temperature": (("--do-sample=true", "--temperature=0"), "temperature must be finite and > 0 (got 0.0)"),
    "without_sampling": (("--temperature=0.5",), "act on sampling only; add do_sample=True"),
    "sampled_beams": (("--do-sample=true", "--num-beams=2"), "do_sample=True needs num_beams=1"),
    "min_above_max": (("--min-new-tokens=5", "--max-new-tokens=4"), "min_new_tokens=5 is more than max_new_tokens=4"),
    "penalty": (("--num-beams=2", "--length-penalty=inf"), "--length_penalty: expected float; got inf"),
    "penalty_type": (("--length-penalty-type=gnmt",), "expected one of 'avg', 'wu', 'none'"),
    "early": (
        ("--num-beams=2", "--early-stopping=always"),
        "expected bool or one of 'never'; got always",
    ),
    "coverage_without_beams": (("--coverage-penalty=0.2",), "coverage_penalty=0.2 ranks the hypotheses of a beam"),
    "coverage": (("--num-beams=2", "--coverage-penalty=-1"), "--coverage_penalty: must be >= 0"),
    "ngram": (("--no-repeat-ngram-size=-1",), "--no_repeat_ngram_size: must be >= 0"),
    "seed": (("--seed=3",), "--seed acts on sampling only; add --do-sample true"),
    "dictionary": (("--unk-dictionary=x.tsv",), "--unk-dictionary has no use without --replace-unk true"),
    "no_dictionary": (("--replace-unk=true", "--unk-dictionary=nowhere.tsv"), "nowhere.tsv cannot be read"),
    "prefix_file": (("--prefix-file=nowhere.txt",), "nowhere.txt cannot be read"),
    "two_prefixes": (("--prefix=a", "--prefix-file=x"), "--prefix and --prefix-file exclude each other"),
    "misspelt": (("--num-beems=2",), "did you mean --num_beams?"),
}


@pytest.mark.parametrize(("options", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_bad_search_options_get_a_sentence(barely_trained, tmp_path, capsys, options, sentence):
    (tmp_path / "in.txt").write_text("")
    assert sentence in refused(capsys, "generate", barely_trained, "--input", tmp_path / "in.txt", *options)
    if "sampled_beams" not in sentence:
        assert sentence in refused(capsys, "evaluate", barely_trained, *TEST, "--output", tmp_path, *options)
    assert not (tmp_path / "predictions.tsv").exists()


def test_a_prefix_file_of_another_length_gets_a_sentence(barely_trained, tmp_path, capsys):
    (tmp_path / "prefixes").write_text("a\n\n\n")
    (tmp_path / "in.txt").write_text("abc\n" * 5)
    options = (barely_trained, "--prefix-file", tmp_path / "prefixes", "--output", tmp_path / "out")
    sentence = refused(capsys, "generate", *options, "--input", tmp_path / "in.txt")
    assert "prefixes has 3 lines for 5 sources" in sentence
    (tmp_path / "in.txt").write_text("abc\n" * 2)
    assert "has 3 lines for 2 sources" in refused(capsys, "generate", *options, "--input", tmp_path / "in.txt")
    assert "has 3 lines for 20 sources" in refused(capsys, "evaluate", *options, *TEST)


def test_seeds_repeat_samples(lines):
    several = ("--do-sample=true", "--n-best=3")
    one, again, other = (lines(*several, f"--seed={seed}") for seed in (1, 1, 2))
    assert one == again != other
    assert all(math.isfinite(float(line.split("\t")[1])) for line in one)
