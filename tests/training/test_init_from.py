"""`fastseq train --init_from`: weights, tokenizers and model options of another run; growing and freezing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from toy_runs import SMALL, TOY, refused, rows, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.folder import RunFolder
from fastseq.training.init_from import freeze, take_over
from fastseq.training.tokenizer import RESERVED, TextTokenizer
from fastseq.training.trained import TrainedModel

SHORT = [option for option in SMALL if not option.startswith("--model") and option not in ("16", "32")]


def fine_tune(run: Path, start: Path, *options: str) -> None:
    main(["train", *SHORT, "--run_dir", str(run), "--init_from", str(start), "--trainer.max_epochs", "1", *options])


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return RunFolder(run).load_model(name).state_dict()


@pytest.fixture(scope="module")
def new_words(tmp_path_factory) -> Path:
    """Pairs with letters and capitals that the toy does not have."""
    path = tmp_path_factory.mktemp("words") / "new.tsv"
    path.write_text("".join(f"{word}\t{' '.join(reversed(word.upper()))}\n" for word in ("xyz", "zyx", "abx") * 9))
    return path


def test_the_first_weights_are_the_ones_of_the_start(barely_trained, tmp_path):
    """With a learning rate of 0 the new run ends with the weights it started from, of best.ckpt."""
    fine_tune(tmp_path / "run", barely_trained, "--optim.lr", "0")
    expected = weights(barely_trained, "best")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())
    for name in ("source_tokenizer.json", "target_tokenizer.json"):
        assert (tmp_path / "run" / name).read_text() == (barely_trained / name).read_text()
    config = RunFolder(tmp_path / "run").load_config()
    assert (config.model.hidden_size, config.model.embedding_dim, config.init_from) == (32, 16, str(barely_trained))


def test_training_goes_on_from_there(barely_trained, tmp_path):
    fine_tune(tmp_path / "run", barely_trained)
    before, after = rows(barely_trained)[-1], rows(tmp_path / "run")[-1]
    assert float(after["valid_loss"]) < float(before["valid_loss"])


def test_a_saved_model_is_a_start_too(barely_trained, tmp_path):
    TrainedModel.from_pretrained(barely_trained).save_pretrained(tmp_path / "saved")
    fine_tune(tmp_path / "a", barely_trained)
    fine_tune(tmp_path / "b", tmp_path / "saved")
    assert all(torch.equal(tensor, weights(tmp_path / "a")[name]) for name, tensor in weights(tmp_path / "b").items())


def test_options_that_may_change(barely_trained, tmp_path):
    fine_tune(tmp_path / "run", barely_trained, "--model.dropout", "0.5", "--model.backend", "reference")
    config = RunFolder(tmp_path / "run").load_config()
    assert (config.model.dropout, config.model.backend) == (0.5, "reference")


@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("model.hidden_size", "64", "32"),
        ("model.attention", "dot", "additive"),
        ("model.input_feeding", "false", "true"),
        ("model.attention_size", "8", "null"),
        ("data.source_tokenizer", "bpe", "char"),
        ("data.shared_vocabulary", "true", "false"),
    ],
)
def test_options_that_the_weights_fix(barely_trained, tmp_path, capsys, option, value, stored):
    arguments = ("--run_dir", tmp_path / "run", "--init_from", barely_trained, f"--{option}", value)
    sentence = refused(capsys, "train", *SHORT, *arguments)
    assert f"--{option} is {stored} in {barely_trained}" in sentence
    assert f"cannot change to {value}" in sentence
    assert not (tmp_path / "run").exists()


def test_without_growing_new_tokens_are_unknown(barely_trained, new_words, tmp_path, capsys):
    fine_tune(tmp_path / "run", barely_trained, "--train", str(new_words))
    assert "tokens are not in the vocabulary" in capsys.readouterr().out
    assert len(RunFolder(tmp_path / "run").load_tokenizers()[0]) == 9


def test_grown_vocabularies(barely_trained, new_words, tmp_path, capsys):
    options = ("--train", str(new_words), "--grow_vocabulary", "true", "--optim.lr", "0", "--data.max_tokens", "50")
    fine_tune(tmp_path / "run", barely_trained, *options)
    assert f"{new_words}" not in capsys.readouterr().out  # no unknown tokens
    old, new = RunFolder(barely_trained).load_tokenizers(), RunFolder(tmp_path / "run").load_tokenizers()
    assert [len(tokenizer) for tokenizer in new] == [12, 14]  # x, y, z; X, Y, Z, A, B
    assert new[0].encode(["abcdexyz"])[0][:5] == old[0].encode(["abcde"])[0]
    assert set(new[1].tokens(range(9, 14))) == set("XYZAB")
    start, found = weights(barely_trained, "best"), weights(tmp_path / "run")
    for name, tensor in start.items():
        assert torch.equal(found[name][tuple(map(slice, tensor.shape))], tensor)
    fresh = found["decoder.embedding.weight"][9:]
    assert fresh.shape == (5, 16) and (fresh != 0).all()
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*_tokenizer.json")}
    main(["train", "--resume", str(tmp_path / "run"), "--trainer.max_epochs", "2"])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_limit_of_a_grown_vocabulary(barely_trained, new_words, tmp_path):
    options = ("--train", str(new_words), "--grow_vocabulary", "true", "--data.vocab_size", "10")
    fine_tune(tmp_path / "run", barely_trained, *options)
    source, target = RunFolder(tmp_path / "run").load_tokenizers()
    assert source.tokens(range(9, 10)) == ["x"]  # the most frequent one
    assert (len(source), len(target)) == (10, 10)


@pytest.mark.parametrize("kind", ["char", "whitespace", "bpe"])
def test_grown_tokenizers_keep_their_ids(kind, tmp_path):
    old = TextTokenizer.train(kind, ["ab ab cd", "abc d"], 30)
    new = old.grown(["ab xy", "xy é", f"{RESERVED[0]} ab"], 100)
    assert new.encode(["ab ab cd"]) == old.encode(["ab ab cd"])
    assert new.decode(new.encode(["xy é"])) == ["xy é"]
    assert old.decode(old.encode(["xy é"])) != ["xy é"]
    assert new == new.grown(["xy ab"], 100) != old
    new.save(tmp_path / "t.json")
    assert TextTokenizer.load(tmp_path / "t.json") == new
    assert old.grown(["xy"], 1) == old


def test_a_tied_model_grows(tmp_path):
    sizes = {"embedding_dim": 8, "hidden_size": 8, "share_all_embeddings": True}
    small = Seq2Seq(Seq2SeqConfig(src_vocab_size=9, tgt_vocab_size=9, **sizes))
    large = take_over(Seq2Seq(Seq2SeqConfig(src_vocab_size=12, tgt_vocab_size=12, **sizes)), small)
    assert torch.equal(large.decoder.output.weight[:9], small.encoder.embedding.weight)
    assert large.encoder.embedding.weight is large.decoder.output.weight


FROZEN = {
    "encoder": ("encoder.lstm",),
    "src_embedding": ("encoder.embedding",),
    "decoder,attention": ("decoder.lstm", "decoder.combine", "decoder.attention"),
    "bridge,output": ("bridge", "decoder.output"),
}


@pytest.mark.parametrize(("names", "prefixes"), FROZEN.items())
def test_frozen_parts_stay_and_the_others_move(barely_trained, tmp_path, capsys, names, prefixes):
    fine_tune(tmp_path / "run", barely_trained, "--freeze", names)
    start, found = weights(barely_trained, "best"), weights(tmp_path / "run")
    still = {name for name, tensor in found.items() if torch.equal(tensor, start[name])}
    assert still == {name for name in found if name.startswith(prefixes)}
    assert f", {sum(found[name].numel() for name in still):,} of them frozen" in capsys.readouterr().out


def test_a_frozen_run_resumes_as_if_it_had_not_stopped(barely_trained, tmp_path, capsys):
    options = ("--freeze", "encoder,embedding", "--optim.schedule", "constant", "--optim.warmup", "0")
    fine_tune(tmp_path / "whole", barely_trained, *options, "--trainer.max_epochs", "2")
    fine_tune(tmp_path / "parts", barely_trained, *options)
    moved = barely_trained.rename(barely_trained.with_name("moved"))  # the start is not read again
    main(["train", "--resume", str(tmp_path / "parts"), "--trainer.max_epochs", "2"])
    moved.rename(barely_trained)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())
    sentence = refused(capsys, "train", "--resume", tmp_path / "parts", "--freeze", "output")
    assert "--freeze is encoder,embedding in the run that is resumed" in sentence


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--freeze", "encodr"), "unknown part 'encodr' (did you mean encoder?)"),
        (("--freeze", "encoder,decoder,attention,bridge,output,embedding"), "leaves nothing to train"),
        (("--init_from", "nowhere"), "nowhere is not a run folder"),
        (("--grow_vocabulary", "true"), "--init_from, which is missing"),
    ],
)
def test_bad_options(tmp_path, capsys, options, reason):
    assert reason in refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_part_without_weights_is_refused():
    options = {"attention": "dot", "bridge": "zeros", "embedding_dim": 8, "hidden_size": 8}
    model = Seq2Seq(Seq2SeqConfig(src_vocab_size=9, tgt_vocab_size=9, **options))
    for part in ("attention", "bridge"):
        with pytest.raises(UserError, match=f"--freeze {part}: this model has no weights there"):
            freeze(model, part)


def test_a_hostile_start(barely_trained, tmp_path, capsys):
    copy = Path(shutil.copytree(barely_trained, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps({"model_type": "fastseq", "hidden_size": [1]}))
    arguments = ("--run_dir", tmp_path / "run", "--init_from", copy)
    assert "hidden_size must be int, got '[1]'" in refused(capsys, "train", *SHORT, *arguments)
    shutil.copytree(barely_trained, tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "best.ckpt").write_bytes(b"x")
    arguments = ("--run_dir", tmp_path / "run", "--init_from", tmp_path / "damaged")
    assert "is damaged" in refused(capsys, "train", *SHORT, *arguments)


def test_freezing_does_not_need_a_start(tmp_path):
    train(tmp_path / "run", "--trainer.max_epochs", "1", "--freeze", "embedding")
    train(tmp_path / "free", "--trainer.max_epochs", "1")
    found, free = weights(tmp_path / "run"), weights(tmp_path / "free")
    assert not torch.equal(found["encoder.embedding.weight"], free["encoder.embedding.weight"])
    assert (TOY / "train.tsv").is_file()
