"""Explanations from Python and by `fastseq generate --explain`."""

import json

import pytest
import torch
from toy_runs import refused

import fastseq
from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training.trained import TrainedModel

METHODS = ("attention", "gradient_x_input", "integrated_gradients")


@pytest.fixture(scope="module")
def trained(barely_trained) -> TrainedModel:
    return TrainedModel.from_pretrained(barely_trained)


def test_explanations_have_a_number_for_each_pair_of_tokens(trained):
    words = ["abcd", "e", "dcbae"]
    found = trained.explain(words, max_tokens=1)
    together = trained.explain(words)
    for word, one, other in zip(words, found, together, strict=True):
        (best,) = trained.predict([word], attention=True)[0]
        assert one.source == [*word, "<eos>"]
        assert one.target == trained.target_tokenizer.tokens(best.ids)
        assert tuple(one.attributions) == METHODS
        for name, weights in one.attributions.items():
            assert weights.shape == (len(one.target), len(one.source))
            torch.testing.assert_close(weights, other.attributions[name])
        torch.testing.assert_close(one.attributions["attention"], best.attention)
        assert max(map(abs, one.residual)) < 1e-3
        assert sum(one.log_probs) == pytest.approx(best.score * len(best.ids), rel=1e-4)  # length penalty 1


def test_given_targets_options_and_refusals(trained):
    (given,) = trained.explain(["abc"], ["c b a"])
    assert given.target == ["c", "b", "a", "<eos>"]
    assert given.log_probs == pytest.approx(trained.score([("abc", "c b a")])[0].token_scores, rel=1e-4)
    coarse = trained.explain(["abc"], ["c b a"], steps=1)[0]
    assert not torch.equal(coarse.attributions["integrated_gradients"], given.attributions["integrated_gradients"])
    limited = trained.explain(["abc"], max_new_tokens=2)[0]
    assert len(limited.target) <= 2
    assert trained.explain([]) == []
    for arguments, options, sentence in (
        ((["ab"], ["a", "b"]), {}, "expected a list of 1 targets, one for each source, got 2"),
        ((["ab"], ["a"]), {"num_beams": 2}, "num_beams decide a prediction; with targets there is none"),
        ((["ab"],), {"steps": 0}, "steps are points of an integral, expected 1 to 10000, got 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            trained.explain(*arguments, **options)
    with pytest.raises(TypeError, match="expected a list of texts"):
        trained.explain("ab")
    with pytest.raises(UserError, match="choose one of attention, gradient_x_input, integrated_gradients"):
        given.alignment("saliency")


def test_alignment_takes_the_largest_attribution(trained):
    (one,) = trained.explain(["abc"], ["c b a"])
    weights = one.attributions["integrated_gradients"][:3, :3]  # without both ends
    expected = list(zip(weights.argmax(1).tolist(), range(3), strict=True))
    assert one.alignment() == expected
    assert one.pharaoh() == " ".join(f"{s}-{t}" for s, t in expected)
    assert len(one.alignment("attention")) == 3
    to_the_end = torch.tensor([[0.0, 1, 0, 5]] * 4)
    assert one._replace(attributions={"attention": to_the_end}).pharaoh("attention") == "1-0 1-1 1-2"


def test_generate_writes_explanations(trained, barely_trained, tmp_path):
    (tmp_path / "in").write_text("abc\n\nde\n")
    folder = tmp_path / "explained"
    command = ["generate", str(barely_trained), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    for _ in range(2):  # a second run replaces the files
        main([*command, "--explain", str(folder), "--batch_lines", "2"])
    lines = [json.loads(line) for line in (folder / "explanations.jsonl").read_text().splitlines()]
    first, _, last = trained.explain(["abc"])[0], None, trained.explain(["de"])[0]
    assert [line["line"] for line in lines] == [1, 2, 3] and set(lines[1]) == {"line"}
    assert lines[0]["source"] == first.source and lines[2]["target"] == last.target
    for name in METHODS:
        assert torch.tensor(lines[0][name]).shape == first.attributions[name].shape
        assert (folder / f"{name}.align").read_text() == f"{first.pharaoh(name)}\n\n{last.pharaoh(name)}\n"
    assert sorted(path.name for path in folder.glob("*.png")) == ["0001.png", "0003.png"]
    main([*command, "--explain", str(folder), "--explain_steps", "1"])
    assert json.loads((folder / "explanations.jsonl").read_text().splitlines()[0])["residual"] != lines[0]["residual"]


def test_an_ensemble_is_refused(barely_trained, tmp_path, capsys):
    with pytest.raises(UserError, match="explain one of them"):
        TrainedModel.from_pretrained([barely_trained] * 2).explain(["ab"])
    runs = [barely_trained, barely_trained]
    assert "--explain needs one model" in refused(capsys, "generate", *runs, "--explain", tmp_path / "x")


def test_features_are_explained_by_position(tmp_path):
    torch.manual_seed(0)
    text = fastseq.training.tokenizer.TextTokenizer.train("char", ["ab"], 10)
    reader = fastseq.training.features.Features(5, 8000.0, torch.zeros(5), torch.ones(5))
    sizes = {"embedding_dim": 8, "hidden_size": 8, "frame_stack": 2}
    config = fastseq.Seq2SeqConfig(source_features=5, tgt_vocab_size=len(text), **sizes)
    trained = TrainedModel(fastseq.Seq2Seq(config), reader, text)
    for one, steps in zip(trained.explain([torch.randn(7, 5), torch.randn(4, 5)], ["ab", "b"]), (7, 4), strict=True):
        assert one.source == [str(k) for k in range(steps)]
        assert one.attributions["integrated_gradients"].shape == (len(one.target), steps)
        assert one.attributions["attention"].shape == (len(one.target), -(-steps // 2))
        assert len(one.alignment()) == len(one.target) - 1
        one.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_copied_words_have_their_names():
    torch.manual_seed(0)
    source, target = (fastseq.training.tokenizer.TextTokenizer.train("whitespace", ["a b"], 10) for _ in range(2))
    sizes = {"src_vocab_size": len(source), "tgt_vocab_size": len(target), "embedding_dim": 8, "hidden_size": 8}
    model = fastseq.Seq2Seq(fastseq.Seq2SeqConfig(copy=True, **sizes))
    reader = fastseq.training.copying.CopyTokenizer.of(source, target)
    (one,) = TrainedModel(model, reader, target).explain(["a zebra b"], ["zebra a"])
    assert one.source == ["a", "zebra", "b", "<eos>"] and one.target == ["zebra", "a", "<eos>"]
    assert max(map(abs, one.residual)) < 1e-3
