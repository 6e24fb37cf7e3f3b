"""Noise, gradient-chosen swaps, and the table of `fastseq evaluate --attack`."""

import itertools
import json
import random

import pytest
import torch
from toy_runs import TOY, refused

import fastseq
from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training.batching import make_batch
from fastseq.training.data import Sequences, encode, read_pairs
from fastseq.training.flips import first_order_gains, flipped
from fastseq.training.noise import KINDS, NEIGHBOURS, noisy
from fastseq.training.scoring import log_probabilities
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.trained import TrainedModel

TEXT = "hello wonderful  world"


@pytest.fixture(scope="module")
def trained(barely_trained) -> TrainedModel:
    return TrainedModel.from_pretrained(barely_trained)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return list(zip(*read_pairs(TOY / "valid.tsv"), strict=True))[:20]


def noise(kind: str, rate: float, text: str = TEXT) -> str:
    return noisy(text, kind, rate, random.Random(0), "xyz")


def test_noise_is_of_its_kind():
    assert noise("swap", 1.0, "abcdef g hi") == "acbedf g hi"
    middle = noise("middle", 1.0)
    assert middle != TEXT and len(middle) == len(TEXT)
    for word, other in zip(TEXT.split(), middle.split(), strict=True):
        assert (word[0], word[-1], sorted(word)) == (other[0], other[-1], sorted(other))
    assert noise("drop", 1.0) == "h w  w"
    assert all(b in NEIGHBOURS[a] for a, b in zip("Keys".lower(), noise("keyboard", 1.0, "Keys").lower(), strict=True))
    assert noise("keyboard", 1.0, "Keys")[0].isupper() and noise("keyboard", 1.0, "é1") == "é1"
    assert set(noise("substitute", 1.0, "abc")) <= set("xyz")
    assert "x" not in noise("substitute", 1.0, "xxxxxxxx")
    assert set("qwsz") == set(NEIGHBOURS["a"]) and set("edrfcxza") >= set(NEIGHBOURS["s"]) - {"w", "a", "d"}


@pytest.mark.parametrize("kind", KINDS)
def test_noise_comes_as_often_as_its_rate(kind):
    text = " ".join(["abcdefgh"] * 2000)
    words = noise(kind, 0.2, text).split()
    changed = sum(word != "abcdefgh" for word in words) / 2000
    chances = {"swap": 5, "middle": 1}.get(kind, 8)  # in a word; after a swap the next pair has no chance
    expected = 1 - 0.8**chances
    assert changed == pytest.approx(expected, abs=0.04 if kind != "swap" else 0.08)
    assert noisy(text, kind, 1e-9, random.Random(0), "xyz") == text


def test_gains_are_the_first_order_of_the_loss(trained):
    sources, _ = encode(trained.source_tokenizer, ["abc"], "")
    targets, _ = encode(trained.target_tokenizer, ["c b a"], "")
    batch = make_batch(sources, targets, torch.tensor([0]), 0)
    gains = first_order_gains(trained.model, batch)[0]
    model, vectors = trained.model, trained.model.source_vectors(batch.source).detach()
    weight = model.encoder.embedding.weight.detach()

    def loss(x) -> float:
        with torch.no_grad():
            return float(model.loss(*batch[:4], reduction="sum", source_vectors=x))

    for s, token in ((0, 5), (2, 4)):
        step = torch.zeros_like(vectors)
        step[0, s] = 1e-2 * (weight[token] - vectors[0, s])
        assert gains[s, token] == pytest.approx(
            (loss(vectors + step) - loss(vectors - step)) / 2e-2, rel=1e-2, abs=1e-4
        )


def test_flips_replace_one_more_token_each_time(trained, pairs):
    clean, _ = encode(trained.source_tokenizer, [source for source, _ in pairs], "")
    targets, _ = encode(trained.target_tokenizer, [target for _, target in pairs], "")
    rows = torch.arange(len(clean))
    before, lengths = clean.padded(rows)
    for generator in (None, torch.Generator().manual_seed(0)):
        arguments = trained.model, clean, targets, trained.source_tokenizer
        several = [*flipped(*arguments, flips=30, generator=generator, max_tokens=50)]
        for number, sources in enumerate(several[:5], start=1):
            after, same_lengths = sources.padded(rows)
            assert torch.equal(lengths, same_lengths) and (after[after != before] > 3).all()
            assert ((after != before).sum(1) == (lengths - 1).clamp(max=number)).all()  # all but the end
        assert torch.equal(several[-1].padded(rows)[0], several[-2].padded(rows)[0])


def test_a_flip_takes_the_best_of_all_allowed_swaps(trained):
    clean, _ = encode(trained.source_tokenizer, ["abc"], "")
    targets, _ = encode(trained.target_tokenizer, ["c b a"], "")
    gains = first_order_gains(trained.model, make_batch(clean, targets, torch.tensor([0]), 0))[0]
    swaps = itertools.product(range(3), range(4, len(trained.source_tokenizer)))
    source = clean.padded(torch.tensor([0]))[0][0]
    position, token = max((s for s in swaps if source[s[0]] != s[1]), key=lambda swap: gains[swap])
    (found,) = flipped(trained.model, clean, targets, trained.source_tokenizer, flips=1, candidates=1)
    source[position] = token
    assert torch.equal(found.padded(torch.tensor([0]))[0][0], source)


def test_a_flip_takes_the_largest_exact_loss_of_its_candidates(trained, pairs):
    clean, _ = encode(trained.source_tokenizer, [source for source, _ in pairs], "")
    targets, _ = encode(trained.target_tokenizer, [target for _, target in pairs], "")
    everything = len(trained.source_tokenizer) * int(clean.lengths.max())
    (found,) = flipped(trained.model, clean, targets, trained.source_tokenizer, flips=1, candidates=everything)
    losses = [-sum(row) for row in log_probabilities(trained.model, found, targets, 4096)]
    for row, loss in list(enumerate(losses))[:3]:
        one = clean.select(torch.tensor([row])), targets.select(torch.tensor([row]))
        source = one[0].padded(torch.tensor([0]))[0][0].tolist()
        swaps = itertools.product(range(len(source) - 1), range(4, len(trained.source_tokenizer)))
        others = [[*source[:s], token, *source[s + 1 :]] for s, token in swaps if source[s] != token]
        repeated = one[1].select(torch.zeros(len(others), dtype=torch.long))
        worst = max(-sum(scores) for scores in log_probabilities(trained.model, Sequences(others), repeated, 4096))
        assert loss == pytest.approx(worst, abs=1e-4)
    (first,) = flipped(trained.model, clean, targets, trained.source_tokenizer, flips=1, candidates=1)
    weaker = [-sum(row) for row in log_probabilities(trained.model, first, targets, 4096)]
    assert all(a >= b - 1e-4 for a, b in zip(losses, weaker, strict=True)) and sum(losses) > sum(weaker) + 1e-2


def test_robustness_lists_every_attack_and_repeats(trained, pairs):
    options = {"kinds": ["drop", "middle"], "rates": [0.3], "flips": 2, "num_beams": 2}
    found = trained.robustness(pairs, **options)
    assert [attack[:2] for attack in found.attacks] == [
        ("none", 0), ("drop", 0.3), ("middle", 0.3),
        *itertools.product(["gradient flips", "random flips"], [1, 2]),
    ]  # fmt: skip
    assert found == trained.robustness(pairs, **options)
    assert found != trained.robustness(pairs, **options | {"seed": 1})
    assert found.attacks[-1].changed == 100 and 0 < found.attacks[1].changed <= 100
    right = [
        sum(a == b for a, b in zip(trained([s for s, _ in pairs], num_beams=2), [t for _, t in pairs], strict=True))
    ]
    assert found.attacks[0].sequence_error_rate == pytest.approx(100 - 100 * right[0] / len(pairs))
    assert found.table().count("\n") == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kinds": ["typo"]}, "unknown noise 'typo'; choose among swap, middle, drop, keyboard, substitute"),
        ({"rates": [0.1, 1.5]}, "a probability above 0, up to 1, got 1.5"),
        ({"flips": -1}, "flips must be at least 0, got -1"),
    ],
)
def test_bad_attacks_are_refused(trained, pairs, options, sentence):
    with pytest.raises(UserError, match=sentence):
        trained.robustness(pairs, **options)


def test_models_that_cannot_be_attacked(trained, barely_trained):
    with pytest.raises(UserError, match="expected at least one"):
        trained.robustness([])
    both = TrainedModel.from_pretrained([barely_trained] * 2)
    with pytest.raises(UserError, match="set flips to 0, or attack one"):
        both.robustness([("ab", "b a")])
    assert len(both.robustness([("ab", "b a")], flips=0, rates=[0.5]).attacks) == 6
    text = TextTokenizer.train("char", ["ab"], 10)
    reader = fastseq.training.features.Features(5, 8000.0, torch.zeros(5), torch.ones(5))
    config = fastseq.Seq2SeqConfig(source_features=5, tgt_vocab_size=len(text), embedding_dim=8, hidden_size=8)
    with pytest.raises(UserError, match="no characters to change"):
        TrainedModel(fastseq.Seq2Seq(config), reader, text).robustness([(torch.zeros(3, 5), "a")])


def test_evaluate_writes_the_attacks(barely_trained, tmp_path, capsys):
    command = ["evaluate", str(barely_trained), "--data", str(TOY / "valid.tsv"), "--pictures", "0", "--attack"]
    sizes = ["--attack_rates", "[0.2]", "--attack_flips", "1", "--attack_sources", "10"]
    main([*command, *sizes, "--output", str(tmp_path / "a")])
    assert "10 sources under attack" in capsys.readouterr().out
    stored = json.loads((tmp_path / "a" / "robustness.json").read_text())
    assert stored["sources"] == 10 and len(stored["attacks"]) == 1 + len(KINDS) + 2
    assert (tmp_path / "a" / "robustness.png").stat().st_size > 1000
    main([*command, *sizes, "--attack_seed", "3", "--output", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "robustness.json").read_text())["attacks"] != stored["attacks"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--attack_rates", "[2]"], "--attack_rates"),
        (["--prefix", "a"], "--attack measures plain predictions; leave out --prefix"),
    ],
)
def test_bad_options_of_an_attack(barely_trained, capsys, options, sentence):
    assert sentence in refused(capsys, "evaluate", barely_trained, "--data", TOY / "valid.tsv", "--attack", *options)


def test_more_noise_changes_more_sources(trained, pairs):
    _, little, much = trained.robustness(pairs, kinds=["drop"], rates=[0.05, 0.9], flips=0).attacks
    assert little.changed < 50 < much.changed
