"""Several models as one: the mean of their log-probabilities in the search and in scores."""

import pytest
import torch
from generation_models import EOS, LENGTHS, SOURCES, real_model, rows, slow_beam_search

from fastseq.seq2seq.ensemble import Ensemble


@pytest.fixture(scope="module")
def members():
    torch.manual_seed(3)
    return (
        real_model(attention="additive"),
        real_model(attention="none", input_feeding=False),
        real_model(encoder_layers=2),
    )


def mean_log_probs(members, src, src_lengths, prefix):
    """(V,) after a prefix, computed from the logits of whole targets."""
    with torch.no_grad():
        given = torch.tensor([prefix])
        parts = [member(src, src_lengths, given).logits[0, -1].log_softmax(-1) for member in members]
    return (sum(parts) / len(parts)).log_softmax(-1)


def test_each_step_is_the_mean(members):
    ensemble, source = Ensemble(members), SOURCES[:1]
    enc = ensemble.encode(source)
    state, prefix = ensemble.start(enc), [1]
    for token in (4, 6, 3):
        log_probs, state, attention = ensemble.decode_step(torch.tensor(prefix[-1:]), state, enc)
        torch.testing.assert_close(log_probs[0], mean_log_probs(members, source, None, prefix))
        assert attention.shape == (1, 6)
        torch.testing.assert_close(attention.sum(1), torch.ones(1, dtype=torch.float64))
        prefix.append(token)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_search_finds_what_a_slow_one_finds(members, beams):
    ensemble = Ensemble(members)
    output = ensemble.generate(SOURCES, LENGTHS, num_beams=beams, max_new_tokens=5, length_penalty=0.0)
    found = rows(output)
    for number, (source, length) in enumerate(zip(SOURCES, LENGTHS, strict=True)):
        if length == 0:
            continue
        alone = source[None, :length]
        best = slow_beam_search(ensemble, alone, None, 5, beams, lambda n: 1.0, False, False)[0]
        assert found[number] == best[1]
        assert float(output.sequences_scores[number]) == pytest.approx(best[0])


def test_the_loss_is_the_log_probability_of_the_steps(members):
    ensemble = Ensemble(members)
    labels = torch.tensor([[4, 5, EOS], [3, EOS, 0]])
    given = torch.tensor([[1, 4, 5], [1, 3, 2]])
    with torch.no_grad():
        losses = ensemble.loss(SOURCES[:2], LENGTHS[:2], given, labels, reduction="none")
    for row, length in ((0, 3), (1, 2)):
        source = SOURCES[row : row + 1, : LENGTHS[row]]
        for step in range(length):
            expected = mean_log_probs(members, source, None, given[row, : step + 1].tolist())
            assert float(losses[row, step]) == pytest.approx(-float(expected[labels[row, step]]))
    assert losses[1, 2] == 0
    with pytest.raises(ValueError, match="is not trained"):
        ensemble.loss(SOURCES[:2], LENGTHS[:2], given, labels, reduction="mean")


def test_one_model_and_its_double_are_that_model(members):
    expected = members[0].generate(SOURCES, LENGTHS, num_beams=3, output_attentions=True)
    for count in (1, 2):
        output = Ensemble(members[:1] * count).generate(SOURCES, LENGTHS, num_beams=3, output_attentions=True)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)
        torch.testing.assert_close(output.cross_attentions, expected.cross_attentions)


def test_models_that_do_not_fit(members):
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
    other = real_model(pad_id=3, unk_id=0)
    with pytest.raises(ValueError, match=r"pad_id must be the same for all models, got \[0, 3\]"):
        Ensemble([members[0], other])
