"""The trained model as one object: run folders and saved folders, predictions, scores, the model card."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from toy_runs import TOY, refused, train

import fastseq
from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.generation import generate
from fastseq.training import generation_config
from fastseq.training.closed_json import MAX_JSON
from fastseq.training.folder import RunFolder
from fastseq.training.tokenizer import RESERVED, TextTokenizer
from fastseq.training.trained import TrainedModel

WORDS = ["abc", "e", "dcbae", "ab"]
PAIRS = [("abc", "c b a"), ("e", "e"), ("dcba", "a b"), ("ab", "c b a d e a")]
FILES = ("README.md", "config.json", "generation_config.json", "model.safetensors")
TOKENIZERS = ("source_tokenizer.json", "target_tokenizer.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("object") / "run"
    train(run, "--trainer.max_epochs", "3")
    return run


@pytest.fixture(scope="module")
def trained(run) -> TrainedModel:
    return TrainedModel.from_pretrained(run)


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    """A saved folder, for a test to damage."""
    trained.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_object_is_a_public_name():
    assert fastseq.TrainedModel is TrainedModel


def test_a_run_is_read_as_its_parts_are(run, trained):
    folder = RunFolder(run)
    expected = folder.load_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.model.state_dict().items())
    assert trained.generation_config == {"max_length_ratio": folder.load_config().data.max_length_ratio}
    assert trained.card.data == "train.tsv"


def test_predictions_are_the_ones_of_generate(trained):
    for word, several in zip(WORDS, trained.predict(WORDS, num_beams=4, n_best=3), strict=True):
        ids = torch.tensor([trained.source_tokenizer.encode([word])[0] + [trained.model.config.eos_id]])
        options = {"num_beams": 4, "num_return_sequences": 3} | trained.generation_config
        output = trained.model.generate(ids, **options)
        texts = trained.target_tokenizer.decode(output.sequences.tolist())
        assert [h.text for h in several] == texts
        assert [h.score for h in several] == pytest.approx(output.sequences_scores.tolist(), rel=1e-5)
    assert trained(WORDS) == [best.text for (best,) in trained.predict(WORDS)]
    assert trained.predict([]) == [] == trained.score([])


def test_attention_alignment_and_token_scores(trained):
    (hypothesis,) = trained.predict(["abcd"], attention=True, token_scores=True)[0]
    assert hypothesis.attention.shape == (len(hypothesis.ids), 5)
    assert hypothesis.alignment == hypothesis.attention.argmax(1).tolist()
    assert sum(hypothesis.token_scores) / len(hypothesis.ids) == pytest.approx(hypothesis.score, rel=1e-4)
    (plain,) = trained.predict(["abcd"])[0]
    assert plain.attention is plain.alignment is plain.token_scores is None


def test_scores_are_the_log_probabilities_of_the_logits(trained):
    eos, bos = trained.model.config.eos_id, trained.model.config.bos_id
    for (source, target), score in zip(PAIRS, trained.score(PAIRS, max_tokens=12), strict=True):
        ids = torch.tensor([trained.source_tokenizer.encode([source])[0] + [eos]])
        labels = trained.target_tokenizer.encode([target])[0] + [eos]
        with torch.no_grad():
            logits = trained.model(ids, None, torch.tensor([[bos, *labels[:-1]]])).logits[0]
        expected = logits.double().log_softmax(-1)[range(len(labels)), labels]
        assert score.token_scores == pytest.approx(expected.tolist(), rel=1e-4)
        assert score.log_prob == pytest.approx(float(expected.sum()), rel=1e-4)
        assert score.perplexity == pytest.approx(math.exp(-float(expected.mean())), rel=1e-4)


def test_a_single_text_is_refused(trained):
    with pytest.raises(TypeError, match=r"write \['abc'\]"):
        trained.predict("abc")


def test_saved_and_read_again(trained, saved, tmp_path):
    assert sorted(path.name for path in saved.iterdir()) == sorted((*FILES, *TOKENIZERS))
    again = TrainedModel.from_pretrained(saved)
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in trained.model.state_dict().items())
    assert again.model.config == trained.model.config
    assert again.generation_config == trained.generation_config
    assert again.card == trained.card
    assert again.predict(WORDS, num_beams=3) == trained.predict(WORDS, num_beams=3)
    again.save_pretrained(tmp_path / "second")
    for name in (*FILES, *TOKENIZERS):
        assert (saved / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_saved_in_bfloat16(trained, saved, tmp_path):
    """The file has half the size, and the model that is read from it the rounded weights in float32."""
    trained.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    size, whole = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "half", saved))
    assert 0.45 < size / whole < 0.6
    weights = TrainedModel.from_pretrained(tmp_path / "half").model.state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(weights[name], tensor.bfloat16().float())
    with pytest.raises(UserError, match=r"dtype must be one of .*torch\.bfloat16, got torch\.int8"):
        trained.save_pretrained(tmp_path / "bytes", dtype=torch.int8)
    assert not (tmp_path / "bytes").exists()


@pytest.mark.parametrize("share", ["share_all_embeddings", "share_decoder_input_output_embed"])
def test_tied_matrices_are_saved_once_and_stay_tied(share, tmp_path):
    tokenizer = TextTokenizer.train("char", ["abcde"], 20)
    size = len(tokenizer)
    config = Seq2SeqConfig(
        src_vocab_size=size,
        tgt_vocab_size=size,
        embedding_dim=8,
        hidden_size=8,
        attention="none",
        bidirectional=False,
        input_feeding=False,
        **{share: True},
    )
    model = fastseq.Seq2Seq(config)
    TrainedModel(model, tokenizer, tokenizer).save_pretrained(tmp_path / "tied")
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == config.parameter_count
    again = TrainedModel.from_pretrained(tmp_path / "tied").model
    assert again.decoder.output.weight is again.decoder.embedding.weight
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_model_card(trained, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    main(["evaluate", str(copy), "--data", str(TOY / "test.tsv"), "--pictures", "0"])
    model = TrainedModel.from_pretrained(copy)
    model.save_pretrained(tmp_path / "saved", license="MIT", data="letters in reverse")
    text = (tmp_path / "saved" / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {"library_name": "fastseq", "license": "MIT", "tags": ["seq2seq", "lstm"]}
    rate = json.loads((copy / "evaluation.json").read_text())["sequence_error_rate"]
    assert f"| sequence error rate % | {rate:g} |" in body
    assert "Trained on: letters in reverse" in body
    trained.save_pretrained(tmp_path / "bare")
    assert "not stated" in (tmp_path / "bare" / "README.md").read_text()


OPTIONS = {
    "num_beams": 4,
    "max_new_tokens": 2,
    "max_length_ratio": 0.1,
    "length_penalty": 0.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "coverage_penalty": 2.0,
}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_each_search_option_of_the_folder_is_used(trained, saved, name, value):
    """Changing it in generation_config.json changes the prediction or its score; a call overrides it."""
    base = {"max_length_ratio": 3.0, "num_beams": 2} | ({"min_new_tokens": 12} if name == "max_length_ratio" else {})
    (saved / "generation_config.json").write_text(json.dumps(base | {name: value}))
    model = TrainedModel.from_pretrained(saved)
    assert model.predict(WORDS) != trained.predict(WORDS, **base)
    assert (
        model.predict(WORDS, **{name: value}) == model.predict(WORDS) == trained.predict(WORDS, **base | {name: value})
    )


def test_a_folder_with_samples_and_with_several_predictions(saved):
    (saved / "generation_config.json").write_text('{"do_sample": true, "top_k": 3, "num_return_sequences": 5}')
    model = TrainedModel.from_pretrained(saved)
    torch.manual_seed(1)
    several = model.predict(WORDS)
    assert {len(row) for row in several} == {5}
    assert len({h.text for row in several for h in row}) > 4
    assert {len(row) for row in model.predict(WORDS, n_best=2)} == {2}


def test_the_commands_read_a_saved_folder(run, saved, tmp_path, capsys):
    outputs = []
    for folder in (run, saved):
        capsys.readouterr()
        main(["generate", str(folder), "--input", str(TOY / "test.tsv"), "--num-beams", "3"])
        arguments = ["--data", str(TOY / "test.tsv"), "--output", str(tmp_path / folder.name), "--pictures", "1"]
        main(["evaluate", str(folder), *arguments])
        outputs.append(capsys.readouterr().out.replace(str(tmp_path / folder.name), ""))
    assert outputs[0] == outputs[1]
    assert "saved model, which has no checkpoint last" in refused(capsys, "generate", saved, "--checkpoint", "last")


def test_the_folder_sets_the_beam_of_the_commands(saved, capsys, tmp_path):
    (saved / "generation_config.json").write_text('{"num_beams": 3}')
    main(["evaluate", str(saved), "--data", str(TOY / "test.tsv"), "--output", str(tmp_path), "--pictures", "0"])
    assert "3 beam(s)" in capsys.readouterr().out
    (saved / "generation_config.json").write_text('{"num_beams": 0}')
    (tmp_path / "words").write_text("abc\n")
    assert "num_beams must be at least 1 (got 0)" in refused(capsys, "generate", saved, "--input", tmp_path / "words")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "[1]", "holds no JSON object"),
        ("config.json", '{"a": ', "is not JSON"),
        ("config.json", '{"dropout": NaN}', "NaN is no JSON number"),
        ("config.json", "[" * 100_000, "is not JSON"),
        ("config.json", '{"model_type": "bert"}', "of type 'bert'; expected 'fastseq'"),
        ("config.json", '{"model_type": "fastseq"}', "tgt_vocab_size"),
        ("config.json", " " * (MAX_JSON + 1), "more than the 1,048,576"),
        ("generation_config.json", '{"num_beems": 3}', "unknown key 'num_beems' (did you mean num_beams?)"),
        ("generation_config.json", '{"num_beams": 1000000}', "num_beams must be at most 1,024"),
        ("generation_config.json", '{"max_new_tokens": true}', "max_new_tokens must be int | null, got 'True'"),
        ("generation_config.json", '{"generator": 1}', "unknown key 'generator'"),
        ("model.safetensors", "", "is not a safetensors file"),
        ("model.safetensors", "\x80\x04garbage", "is not a safetensors file"),
        ("target_tokenizer.json", "{}", "is not a tokenizer"),
    ],
)
def test_damaged_files(saved, capsys, name, content, reason):
    (saved / name).write_text(content, encoding="latin-1")
    sentence = refused(capsys, "generate", saved)
    assert str(saved / name) in sentence
    assert reason in sentence


@pytest.mark.parametrize("name", [*FILES[1:], *TOKENIZERS])
def test_missing_files(saved, capsys, name):
    (saved / name).unlink()
    if name == "generation_config.json":
        assert TrainedModel.from_pretrained(saved).generation_config == {}
    else:
        assert f"{saved / name} is missing" in refused(capsys, "generate", saved) or name == "config.json"


def refusal(function, *arguments) -> str | None:
    """The sentence with which the function refuses its arguments, None if it accepts them."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


WRONG = ("nonsense", -1, 10**30, 1e300, [1], {"a": 1}, None, True)


def test_every_field_of_the_configuration(saved):
    """A value of a wrong type or size is refused, or is one that the option may have."""
    path = saved / "config.json"
    stored = json.loads(path.read_text())
    free = {
        "freeze_bias_hh",
        "fastseq_version",
        "card",
        "embed_dropout",
        "output_dropout",
        "attention_scale",
        "attention_size",
    }
    for name, right in stored.items():
        for wrong in (*WRONG, "missing"):
            path.write_text(json.dumps({n: v for n, v in (stored | {name: wrong}).items() if v != "missing"}))
            sentence = refusal(TrainedModel.from_pretrained, saved)
            assert name in free or wrong in ("missing", right) if sentence is None else len(sentence) < 1000


@pytest.mark.parametrize(
    "facts", [{"a": 1}, {"data": 1}, {"metrics": [1]}, {"metrics": {"a": "b"}}, [], {"license": []}]
)
def test_a_hostile_card(saved, facts):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"card": facts}))
    with pytest.raises(UserError, match="card"):
        TrainedModel.from_pretrained(saved)


def rewritten(path: Path, change) -> None:
    """Change the header of a safetensors file, a dictionary, and keep its data."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header = json.dumps(change(header)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


NAME = "decoder.output.bias"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {name: value for name, value in header.items() if name != NAME},
        lambda header: header | {NAME: header[NAME] | {"shape": [10**9]}},
        lambda header: header | {NAME: header[NAME] | {"shape": [3, 3]}},
        lambda header: header | {NAME: header[NAME] | {"dtype": "I32"}},
        lambda header: header | {NAME: header[NAME] | {"dtype": "F8_E4M3"}},
        lambda header: header | {NAME: header[NAME] | {"data_offsets": [0, 36]}},
        lambda header: {name if name != NAME else "other": value for name, value in header.items()},
    ],
)
def test_weights_that_do_not_fit(saved, change):
    rewritten(saved / "model.safetensors", change)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        TrainedModel.from_pretrained(saved)


def test_a_model_larger_than_its_weights_is_not_built(saved, monkeypatch):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 10**8}))
    monkeypatch.setattr("fastseq.training.checkpoint.Seq2Seq", None)
    with pytest.raises(UserError, match="does not fit the configuration"):
        TrainedModel.from_pretrained(saved)


@pytest.mark.parametrize("kept", ["config.json", "model.safetensors"])
def test_no_checkpoint_is_read_beside_safetensors(run, saved, tmp_path, monkeypatch, kept):
    """Neither where both are complete, nor where a file of the saved model is missing."""
    for path in (run / "checkpoints", run / "config.yaml"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, saved / path.name)
    monkeypatch.setattr("torch.load", None)
    assert TrainedModel.from_pretrained(saved)(["abc"])
    for name in ("config.json", "model.safetensors"):
        if name != kept:
            (saved / name).unlink()
    with pytest.raises(UserError, match="is missing"):
        TrainedModel.from_pretrained(saved)


def test_saving_spares_runs_and_links(trained, run, tmp_path):
    with pytest.raises(UserError, match="holds a run"):
        trained.save_pretrained(run)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match="symbolic link"):
        trained.save_pretrained(tmp_path / "link")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors").symlink_to(precious)
    trained.save_pretrained(tmp_path / "saved")
    assert precious.read_text() == "mine"


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="neither a run folder"):
        TrainedModel.from_pretrained(tmp_path)


def test_other_vocabularies(trained):
    other = TextTokenizer.train("char", ["abcdefgh"], 100)
    with pytest.raises(UserError, match="the tokenizers have 12 and 9 tokens and no tags, the model 9, 9 and no"):
        TrainedModel(trained.model, other, trained.target_tokenizer)
    assert len(other) == 8 + len(RESERVED)


def test_every_plain_keyword_of_generate_is_a_search_option():
    options = generation_config.search_options()
    assert {"num_beams", "early_stopping", "top_p", "length_penalty_type", "generate_unk"} <= set(options)
    assert not {"src", "generator", "output_attentions", "model"} & set(options)
    assert set(options) <= set(generate.__kwdefaults__)
