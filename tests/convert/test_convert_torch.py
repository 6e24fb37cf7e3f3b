"""Checkpoints of OpenNMT-py, fairseq and JoeyNMT: equal logits, and a sentence for each part that fastseq lacks."""

import argparse

import pytest
import torch
import yaml
from other_libraries import SOURCES, TARGETS, Fairseq, Joey, OpenNMT, large
from toy_runs import refused

import fastseq
from fastseq.cli import main
from fastseq.convert.main import read
from fastseq.errors import UserError

WORDS = {"src": list("abcdefg"), "tgt": list("stuvwxyz")}
SENTENCES = ([4, 9, 5, 6, 7], [8], [10, 5, 4])
PREFIX = [5, 4, 11, 7]


def write_opennmt(folder, model, **options):
    torch.save(model.checkpoint(**options), folder / "model.pt")
    return folder / "model.pt"


def write_fairseq(folder, model, **options):
    torch.save(model.checkpoint(**options), folder / "checkpoint_best.pt")
    source = WORDS["tgt"] if model.shared_all else WORDS["src"]
    for language, words in (("de", source), ("en", WORDS["tgt"])):
        (folder / f"dict.{language}.txt").write_text("".join(f"{word} {i}\n" for i, word in enumerate(words)))
    return folder / "checkpoint_best.pt"


def write_joey(folder, model, **options):
    torch.save(model.checkpoint(), folder / "best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(model.config(**options)))
    for name in ("src", "trg"):
        words = WORDS["src" if name == "src" else "tgt"]
        (folder / f"{name}_vocab.txt").write_text("\n".join(["<unk>", "<pad>", "<s>", "</s>", *words]) + "\n")
    return folder / "best.ckpt"


# Their ids of pad, bos, eos and unk; their first token; the function that writes a checkpoint.
LIBRARIES = {
    "opennmt": ((1, 2, 3, 0), 2, write_opennmt),
    "fairseq": ((1, 0, 2, 3), 2, write_fairseq),
    "joeynmt": ((1, 2, 3, 0), 2, write_joey),
}
MODELS = {
    "opennmt, general": lambda: OpenNMT(),
    "opennmt, dot, one direction, bridge": lambda: OpenNMT("dot", brnn=False, bridge=True, layers=2),
    "opennmt, general, two layers, bridge": lambda: OpenNMT(layers=2, bridge=True),
    "opennmt, mlp": lambda: OpenNMT("mlp", layers=2),
    "opennmt, mlp, no feeding": lambda: OpenNMT("mlp", input_feed=0),
    "opennmt, general, no feeding": lambda: OpenNMT(input_feed=0, layers=2),
    "fairseq": lambda: Fairseq(),
    "fairseq, wide decoder, two layers": lambda: Fairseq(2, narrow=2, units=7),
    "fairseq, equal widths, one direction": lambda: Fairseq(2, bidirectional=False, narrow=4, units=4),
    "fairseq, additional layer": lambda: Fairseq(out=5),
    "fairseq, additional layer, shared": lambda: Fairseq(out=5, shared=True),
    "fairseq, shared": lambda: Fairseq(narrow=3, units=6, shared=True),
    "fairseq, all shared": lambda: Fairseq(narrow=3, units=6, shared_all=True),
    "joeynmt, bahdanau": lambda: Joey(),
    "joeynmt, luong, layers, scale": lambda: Joey("luong", below=2, above=2, scale=True),
    "joeynmt, last, wide decoder": lambda: Joey(start="last", narrow=3, units=6),
    "joeynmt, last of one direction": lambda: Joey(start="last", narrow=4, units=4, above=2),
    "joeynmt, zero, no feeding": lambda: Joey("luong", start="zero", feed=False),
}


def ours(ids, special, vocabulary):
    """fastseq's ids for theirs: reserved ones first, then the words in their order."""
    words = [i for i in range(vocabulary) if i not in special]
    mapping = dict(zip((*special, *words), range(vocabulary), strict=True))
    return torch.tensor([mapping[i] for i in ids])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal(name, tmp_path):
    library = name.partition(",")[0]
    special, first, write = LIBRARIES[library]
    theirs = large(MODELS[name]())
    port = read(library, write(tmp_path, theirs))
    model = port.trained().model
    tokens = TARGETS if getattr(theirs, "shared_all", False) else SOURCES
    width = max(map(len, SENTENCES))
    source = torch.zeros(len(SENTENCES), width, dtype=torch.long)
    for row, ids in enumerate(SENTENCES):
        source[row, : len(ids)] = ours(ids, special, tokens)
    target = ours([first, *PREFIX], special, TARGETS)
    target[0] = 1  # bos, whatever their decoder reads first
    lengths = torch.tensor([len(ids) for ids in SENTENCES])
    with torch.no_grad():
        logits = model(source, lengths, target.expand(len(SENTENCES), -1)).logits
        expected = torch.stack([theirs(torch.tensor(ids), torch.tensor([first, *PREFIX])) for ids in SENTENCES])
    columns = ours(range(TARGETS), special, TARGETS)
    compared = columns != 1 if library == "fairseq" else columns >= 0  # fairseq's <s> is neither input nor label
    found = logits[..., columns[compared]]
    torch.testing.assert_close(found, expected[..., compared], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", ["opennmt, mlp", "fairseq, wide decoder, two layers", "joeynmt, bahdanau"])
def test_the_command_writes_a_folder_that_predicts(name, tmp_path, capsys):
    library = name.partition(",")[0]
    special, first, write = LIBRARIES[library]
    theirs = large(MODELS[name]())
    path = write(tmp_path, theirs)
    main(["convert", "--from", library, str(path), str(tmp_path / "port")])
    assert "wrote" in capsys.readouterr().out
    trained = fastseq.TrainedModel.from_pretrained(tmp_path / "port")
    source = [4, 9, 5, *([special[2]] if library != "opennmt" else [])]
    ids, words = [first], ["<pad>", "<s>", "</s>", "<unk>"]
    for _ in range(6):  # greedy, by their rules: pad and bos are never generated
        with torch.no_grad():
            logits = theirs(torch.tensor(source), torch.tensor(ids))[-1]
        logits[[special[0], special[1]]] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == special[2]:
            break
    names = {i: word for i, word in zip(special, words, strict=True)}
    names |= dict(zip(range(4, TARGETS), WORDS["tgt"], strict=True))
    expected = " ".join(names[i] for i in ids[1:] if i != special[2])
    assert trained(["a f b"], max_new_tokens=6) == [expected]


def test_ties_and_notes(tmp_path):
    port = read("fairseq", write_fairseq(tmp_path, large(MODELS["fairseq, all shared"]()), new=False))
    model = port.trained().model
    assert model.config.share_all_embeddings
    assert model.encoder.embedding.weight is model.decoder.output.weight
    port = read("fairseq", write_fairseq(tmp_path, large(MODELS["fairseq, additional layer, shared"]())))
    assert not port.trained().model.config.tied
    assert "additional_fc is multiplied into the output" in port.parts.notes[0]
    port = read("joeynmt", write_joey(tmp_path, large(Joey(scale=True)), tied_embeddings=False))
    assert "sqrt(embedding_dim)" in port.parts.notes[0]


REFUSED = {
    "opennmt coverage": (OpenNMT, dict(coverage_attn=True), "coverage_attn=True, which fastseq lacks"),
    "opennmt copy": (OpenNMT, dict(copy_attn=True), "copy_attn=True"),
    "opennmt sparsemax": (
        OpenNMT,
        dict(global_attention_function="sparsemax"),
        "global_attention_function='sparsemax'",
    ),
    "opennmt GRU": (OpenNMT, dict(rnn_type="GRU"), "rnn_type='GRU', which fastseq lacks; supported is 'LSTM'"),
    "opennmt gate": (OpenNMT, dict(context_gate="both"), "context_gate='both'"),
    "opennmt transformer": (OpenNMT, dict(encoder_type="transformer"), "encoder_type='transformer'"),
    "opennmt attention": (OpenNMT, dict(global_attention="none"), "attention 'none' has no equal"),
    "opennmt layers": (OpenNMT, dict(enc_layers=2), "no tensor encoder.rnn.weight_hh_l1"),
    "opennmt bridge": (
        lambda: OpenNMT(bridge=True),
        dict(bridge=False),
        r"no place in a fastseq model: encoder\.bridge\.0",
    ),
    "fairseq architecture": (Fairseq, dict(arch="transformer"), "'transformer'; expected 'lstm'"),
    "fairseq attention": (Fairseq, dict(decoder_attention="0"), "decoder_attention=False feeds h"),
    "fairseq option": (Fairseq, dict(encoder_zoneout=0.1), "does not know: encoder_zoneout"),
    "fairseq layers": (Fairseq, dict(decoder_layers=2), "decoder_layers=2"),
    "fairseq direction": (
        lambda: Fairseq(narrow=4),
        dict(encoder_bidirectional=False),
        r"input_proj\.weight has shape \(8, 4\), expected \(4, 4\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_part_that_fastseq_lacks_is_named(what, tmp_path):
    build, options, sentence = REFUSED[what]
    library = what.split()[0]
    with pytest.raises(UserError, match=sentence):
        read(library, LIBRARIES[library][2](tmp_path, build(), **options)).trained()


JOEY_REFUSED = {
    "gru": (("encoder", "rnn_type", "gru"), "rnn_type='gru', which fastseq lacks"),
    "transformer": (("decoder", "type", "transformer"), "type='transformer'"),
    "option": (("decoder", "gate", 1), "the decoder has options that fastseq does not know: gate"),
    "start": (("decoder", "init_hidden", "mean"), "init_hidden='mean'"),
    "direction": (("encoder", "bidirectional", False), "bidirectional=False"),
    "attention": (("decoder", "attention", "monotonic"), "attention 'monotonic' has no equal"),
    "size": (("decoder", "hidden_size", 5), r"decoder\.rnn\.weight_hh_l0 has shape \(16, 4\), expected \(any, 5\)"),
}


@pytest.mark.parametrize("what", JOEY_REFUSED)
def test_a_part_of_joeynmt_that_fastseq_lacks_is_named(what, tmp_path):
    (side, option, value), sentence = JOEY_REFUSED[what]
    path = write_joey(tmp_path, Joey())
    config = Joey().config()
    config["model"][side][option] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=sentence):
        read("joeynmt", path)


class Harmful:
    """An object whose loading runs code."""

    def __reduce__(self):
        return (print, ("ran",))


def test_no_code_of_a_checkpoint_runs(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save({"model": Harmful()}, path)
    sentence = refused(capsys, "convert", "--from", "opennmt", path, tmp_path / "out")
    assert "whose loading would run code" in sentence
    assert "ran" not in sentence
    assert not (tmp_path / "out").exists()
    for content, expected in (
        ([1], "holds a list, expected a dictionary"),
        ({"opt": argparse.Namespace()}, "vocab holds no options"),
        ({"opt": 1}, "opt holds no options"),
        ({"opt": argparse.Namespace(), "vocab": {"src": "abc"}}, "must be a list of tokens"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=expected):
            read("opennmt", path)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"no checkpoint or is damaged|would run code"):
        read("opennmt", path)


def test_files_that_lie_beside_a_checkpoint(tmp_path):
    path = write_fairseq(tmp_path, Fairseq())
    (tmp_path / "dict.de.txt").write_text("a 1\nb\n")
    with pytest.raises(UserError, match="line 2 must be a token and its count"):
        read("fairseq", path)
    (tmp_path / "dict.de.txt").unlink()
    with pytest.raises(UserError, match="give the source dictionary as --source-vocab"):
        read("fairseq", path)
    path = write_joey(tmp_path, Joey())
    (tmp_path / "trg_vocab.txt").unlink()
    with pytest.raises(UserError, match="give the target vocabulary as --target-vocab"):
        read("joeynmt", path)
    (tmp_path / "config.yaml").write_text("model: 3")
    with pytest.raises(UserError, match="is no configuration of a model"):
        read("joeynmt", path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"give the model's config\.yaml as --config"):
        read("joeynmt", path)
