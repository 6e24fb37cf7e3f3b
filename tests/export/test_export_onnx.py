"""`fastseq export --format onnx`: graphs for every batch and length, and equal text from onnxruntime."""

import shutil

import numpy as np
import pytest
from exported_models import sources, texts, trained
from toy_runs import refused

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.export.graphs import Encode, encoder_inputs, examples
from fastseq.export.main import export, load
from fastseq.training.saved import SavedFolder

pytest.importorskip("onnx", reason="torch.onnx writes with it")
onnxruntime = pytest.importorskip("onnxruntime")
VARIANTS = {
    "additive": dict(embedding_dim=8),
    "general, two layers": dict(attention="general", encoder_layers=2, decoder_layers=2, bridge="concat"),
    "dot, no feeding": dict(attention="dot", input_feeding=False, attention_scale=0.5),
    "no attention": dict(attention="none", input_feeding=False, bidirectional=False),
    "normed, pyramid": dict(attention="normed_additive", encoder_layers=2, pyramid=True),
    "coverage": dict(coverage=True),
    "bias, no tanh": dict(attention="general", combine_bias=True, combine_activation="none", bridge="linear_h"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_beam_search_over_the_graphs_gives_equal_text(variant, tmp_path):
    model = trained(**VARIANTS[variant])
    assert export(model, tmp_path / "x", "onnx") < 1e-5
    lines = sources(200)
    expected = texts(model, lines, num_beams=4, n_best=2)
    assert texts(load(tmp_path / "x"), lines, num_beams=4, n_best=2) == expected
    assert len(set(map(tuple, expected))) > 20


def test_the_graphs_without_fastseq(tmp_path):
    """onnxruntime and numpy alone: the loop of the documentation."""
    model = trained()
    export(model, tmp_path, "onnx")
    encoder, step = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("encoder", "step"))
    ids = model.source_tokenizer.encode(["abcde"])[0] + [2]
    memory, lengths, h, c, keys = encoder.run(None, {"source": np.array([ids]), "lengths": np.array([len(ids)])})
    feed, token, found = np.zeros_like(h[0]), np.array([1]), []
    for _ in range(8):
        inputs = dict(tokens=token, h=h, c=c, feed=feed, memory=memory, memory_lengths=lengths, keys=keys)
        logits, h, c, feed, attention = step.run(None, inputs)
        logits[:, :2] = -np.inf  # pad and bos
        token = logits.argmax(-1)
        found.append(int(token[0]))
        assert attention.shape == (1, len(ids))
        if found[-1] == 2:
            break
    assert model.target_tokenizer.decode([found]) == model(["abcde"], max_new_tokens=8)


def test_the_command(tmp_path, capsys):
    trained().save_pretrained(tmp_path / "saved")
    main(["export", "--format", "onnx", str(tmp_path / "saved"), str(tmp_path / "out")])
    assert "encoder.onnx (0.0 MiB), step.onnx (0.0 MiB); largest difference from the model" in capsys.readouterr().out
    assert not SavedFolder(tmp_path / "out").weights.exists()
    sentence = refused(capsys, "export", "--format", "onnx", tmp_path / "saved", tmp_path / "out")
    assert "holds a model already" in sentence
    with pytest.raises(UserError, match="holds no exported model"):
        load(tmp_path / "saved")
    with pytest.raises(UserError, match="unknown format 'caffe'"):
        export(trained(), tmp_path / "other", "caffe")
    with pytest.raises(UserError, match="packages of a model with coverage are not supported yet; use --format onnx"):
        export(trained(coverage=True), tmp_path / "other", "torch")
    with pytest.raises(UserError, match="backend 'native'; ONNX needs"):
        export(trained(backend="native"), tmp_path / "other", "onnx")


def test_graphs_of_another_model_are_refused(tmp_path, monkeypatch):
    """The command compares the files with the model before it reports success."""
    model, other = trained(), trained(attention="general")
    export(other, tmp_path / "other", "onnx")
    write = Encode.forward
    monkeypatch.setattr(Encode, "forward", lambda self, *inputs: tuple(2 * t for t in write(self, *inputs)))
    from fastseq.export import onnx

    monkeypatch.setattr(onnx, "write", lambda *args: shutil.copy(tmp_path / "other" / args[-1].name, args[-1]))
    with pytest.raises(UserError, match="differ from the model by"):
        export(other, tmp_path / "x", "onnx")
    assert model is not other


def test_examples_have_padding():
    (_, lengths), step = examples(trained().model, batch=5, positions=9)
    assert lengths.max() == 9 > lengths.min() >= 1
    assert [axis.name for axis in encoder_inputs(trained().model.config)] == ["source", "lengths"]
    assert len(step) == 7
