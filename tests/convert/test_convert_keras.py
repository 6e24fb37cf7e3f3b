"""Keras models as fastseq models: equal outputs, files of Keras alone, and a sentence for each part that we lack."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch
from keras_models import FILES, MODELS, batch, one_hot, outputs, with_weights
from toy_runs import refused

import fastseq
from fastseq.cli import main
from fastseq.convert.main import read
from fastseq.convert.port import Given
from fastseq.errors import UserError

pytest.importorskip("h5py", reason="Keras files need h5py")
PAD = "<pad>"
SOURCE = [PAD, *"abcdef"]
TARGET = [PAD, "\t", "\n", *"uvwxyz"]
SOURCE_IDS = torch.tensor([0, *range(4, 10)])  # of fastseq, by Keras' id
TARGET_IDS = torch.tensor([0, 1, 2, *range(4, 10)])


@pytest.fixture
def given(tmp_path):
    (tmp_path / "source.json").write_text(json.dumps(SOURCE))
    (tmp_path / "target.json").write_text(json.dumps({token: i for i, token in enumerate(TARGET)}))
    return Given(tmp_path / "source.json", tmp_path / "target.json", reserved={"bos": "\t", "eos": "\n"})


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip(
        "keras", reason="the check against Keras itself; the files in keras_files/ stand in for it"
    )


def results(model, name):
    """The port's logits for the same batch, in the order of Keras' ids; probabilities for "one_hot"."""
    source, target = (torch.from_numpy(ids) for ids in batch())
    lengths = (source != 0).sum(1) if name == "embedded" else None
    with torch.no_grad():
        logits = model(SOURCE_IDS[source], lengths, TARGET_IDS[target]).logits
    return (logits.softmax(-1) if name == "one_hot" else logits)[..., TARGET_IDS]


def assert_equal(port, expected, name):
    model = port.trained().model
    torch.testing.assert_close(results(model, name), torch.from_numpy(expected), atol=1e-5, rtol=0)
    return model


@pytest.mark.parametrize("file", ["one_hot.keras", "embedded.keras", "embedded.h5", "both_directions.keras"])
def test_a_file_of_keras_gives_its_outputs(file, given):
    name = file.partition(".")[0]
    model = assert_equal(read("keras", FILES / file, given), np.load(FILES / f"{name}.npy"), name)
    assert model.config.freeze_bias_hh
    assert not any(p.requires_grad for n, p in model.named_parameters() if "bias_hh" in n)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", MODELS)
def test_keras_itself_gives_the_same_outputs(name, suffix, given, keras, tmp_path):
    model = with_weights(MODELS[name](keras), seed=1)
    model.save(tmp_path / f"model.{suffix}")
    assert_equal(read("keras", tmp_path / f"model.{suffix}", given), outputs(model, name), name)


def test_logits_of_keras(given, keras, tmp_path):
    model = with_weights(one_hot(keras, activation="linear"), seed=2)
    model.save(tmp_path / "model.keras")
    assert_equal(read("keras", tmp_path / "model.keras", given), outputs(model, "one_hot"), "one_hot, logits")


def test_inbound_nodes_of_keras_2(given, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "model.h5"
    path.write_bytes((FILES / "embedded.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            for i, call in enumerate(layer["inbound_nodes"]):
                data = call["args"][0]["config"]["keras_history"]
                states = [state["config"]["keras_history"] for state in call["kwargs"].get("initial_state", [])]
                layer["inbound_nodes"][i] = [[*data, {}]] + [[*state, {}] for state in states]
        config["config"]["layers"] = [c for c in config["config"]["layers"] if c["class_name"] != "NotEqual"]
        file.attrs["model_config"] = json.dumps(config)
    assert_equal(read("keras", path, given), np.load(FILES / "embedded.npy"), "embedded")


def test_a_missing_token_is_never_likely(given):
    model = read("keras", FILES / "one_hot.keras", given).trained().model
    source, target = (torch.from_numpy(ids) for ids in batch())
    with torch.no_grad():
        logits = model(SOURCE_IDS[source], None, TARGET_IDS[target]).logits
    assert (logits[..., 3] < logits[..., TARGET_IDS].amin(-1) - 29).all()  # unk


def test_the_command_writes_a_folder_that_predicts_and_trains(given, tmp_path, capsys):
    out = tmp_path / "port"
    vocabularies = ["--source-vocab", str(given.source), "--target-vocab", str(given.target)]
    main(["convert", "--from", "keras", str(FILES / "embedded.keras"), str(out), *vocabularies, "--bos", "\t",
          "--eos", "\n"])  # fmt: skip
    assert "2 encoder and 2 decoder layers of 6 units, attention none, vocabularies of 10 and 10" in (
        capsys.readouterr().out
    )
    trained = fastseq.TrainedModel.from_pretrained(out)
    assert trained(["abc", "fed"]) == read("keras", FILES / "embedded.keras", given).trained()(["abc", "fed"])
    assert all(not p.requires_grad for n, p in trained.model.named_parameters() if "bias_hh" in n)
    sentence = refused(capsys, "convert", "--from", "keras", FILES / "embedded.keras", out, *vocabularies)
    assert "holds a model already" in sentence


def test_a_model_that_reads_padding_is_told_how_far(given, tmp_path, capsys):
    """Keras' one-hot example fills sources up; the port's tokenizer then does."""
    arguments = ["convert", "--from", "keras", FILES / "one_hot.keras", tmp_path / "port", "--bos", "\t", "--eos", "\n"]
    arguments += ["--source-vocab", given.source, "--target-vocab", given.target]
    assert "needs the token that filled the sources up" in refused(capsys, *arguments, "--pad-to", "5")
    assert "no effect without --pad-to" in refused(capsys, *arguments, "--pad-with", "a")
    main([*map(str, arguments), "--pad-to", "5", "--pad-with", "<pad>"])
    assert "note" not in capsys.readouterr().out
    trained = fastseq.TrainedModel.from_pretrained(tmp_path / "port")
    assert trained.source_tokenizer.encode(["ab"]) == [[4, 5, 0, 0, 0]]
    ids = torch.tensor([[4, 5, 0, 0, 0]])
    expected = trained.model.generate(ids, max_new_tokens=6).sequences.tolist()
    assert trained(["ab"], max_new_tokens=6) == trained.target_tokenizer.decode(expected)
    with pytest.raises(UserError, match="masks the padding of the sources, so --pad-to has no effect"):
        read("keras", FILES / "embedded.keras", dataclasses.replace(given, padding=(5, PAD)))


def changed(path, tmp_path, change):
    """A copy of a `.keras` file whose configuration ``change`` has edited."""
    copy = tmp_path / "changed.keras"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "config.json":
                config = json.loads(content)
                layers = {layer["class_name"]: layer for layer in config["config"]["layers"]}  # the last of each class
                change(config, layers)
                content = json.dumps(config)
            written.writestr(name, content)
    return copy


def one_state(config, layers):
    del layers["LSTM"]["inbound_nodes"][0]["kwargs"]["initial_state"][1]


REFUSED = {
    "activation": (lambda c, n: n["LSTM"]["config"].update(activation="relu"), "lstm_1 has activation='relu'"),
    "recurrent": (
        lambda c, n: n["LSTM"]["config"].update(recurrent_activation="hard_sigmoid"),
        "recurrent_activation='hard_sigmoid'",
    ),
    "bias": (lambda c, n: n["LSTM"]["config"].update(use_bias=False), "use_bias=False"),
    "backwards": (lambda c, n: n["LSTM"]["config"].update(go_backwards=True), "go_backwards=True"),
    "units": (
        lambda c, n: n["LSTM"]["config"].update(units=5),
        r"LSTM: kernel has shape \(9, 24\), expected \(any, 20\)",
    ),
    "output": (lambda c, n: n["Dense"]["config"].update(activation="relu"), "dense has activation='relu'"),
    "cell": (lambda c, n: n["LSTM"].update(class_name="GRU"), "lstm_1 is a GRU"),
    "states": (one_state, r"lstm_1 \(LSTM, 1 initial states\) must be"),
    "subclass": (lambda c, n: c.update(class_name="Sequential"), "'Sequential', expected a functional"),
    "two outputs": (
        lambda c, n: c["config"].update(output_layers=[["dense", 0, 0], ["lstm", 0, 0]]),
        "2 outputs, expected one",
    ),
    "another layer": (
        lambda c, n: c["config"]["layers"].append(
            dict(name="extra", class_name="Dense", config={"name": "extra"}, inbound_nodes=[])
        ),
        "layers extra lie outside",
    ),
    "no such layer": (lambda c, n: c["config"].update(output_layers=["dance", 0, 0]), "names a layer 'dance'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_part_that_fastseq_lacks_is_named(what, given, tmp_path):
    change, sentence = REFUSED[what]
    with pytest.raises(UserError, match=sentence):
        read("keras", changed(FILES / "one_hot.keras", tmp_path, change), given)


def test_vocabularies_that_do_not_fit(given, tmp_path):
    file = FILES / "one_hot.keras"
    with pytest.raises(UserError, match="holds no vocabulary"):
        read("keras", file)
    with pytest.raises(UserError, match="has no token '<bos>'; name the one that serves as bos with --bos"):
        read("keras", file, Given(given.source, given.target))
    given.source.write_text(json.dumps([*SOURCE, "g"]))
    with pytest.raises(UserError, match="source vocabulary has 8 tokens, but the model embeds 7"):
        read("keras", file, given).trained()
    given.source.write_text(json.dumps([*"gabcdef"]))
    with pytest.raises(UserError, match="masks id 0; name that token with --pad 'g'"):
        read("keras", FILES / "embedded.keras", given)
    given.source.write_text(json.dumps({"a": 1, "b": 3}))
    with pytest.raises(UserError, match="list of tokens, or an object"):
        read("keras", file, given)
    given.source.write_text(json.dumps([*"aabcdef"]))
    with pytest.raises(UserError, match="'a' twice"):
        read("keras", file, given)
    given.source.write_text(json.dumps([*"abcdef", "gh"]))
    with pytest.raises(UserError, match="'gh' of 2 characters"):
        read("keras", file, given).trained()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"neither a \.keras nor an \.h5"):
        read("keras", path)
    with pytest.raises(UserError, match="is not a file"):
        read("keras", tmp_path / "none.keras")
    with pytest.raises(UserError, match="unknown source 'caffe'"):
        read("caffe", path)
