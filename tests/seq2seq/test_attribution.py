"""Attributions by gradients, and the sanity checks of Adebayo et al. 2018."""

import copy

import pytest
import torch

import fastseq
from fastseq.seq2seq.attribution import attribute

SIZES = {"src_vocab_size": 12, "tgt_vocab_size": 11, "embedding_dim": 8, "hidden_size": 12, "dropout": 0.2}
SRC = torch.tensor([[4, 5, 6, 7, 2], [8, 9, 2, 0, 0]])
LENGTHS = torch.tensor([5, 3])
LABELS = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0]])
TGT_IN = torch.tensor([[1, 5, 6, 7], [1, 9, 2, 0]])
VARIANTS = {
    "dot": {"attention": "dot", "input_feeding": False},
    "additive": {},
    "none": {"attention": "none", "input_feeding": False},
    "features": {"src_vocab_size": None, "source_features": 6, "encoder_layers": 2, "pyramid": True},
}


def model_of(**options) -> fastseq.Seq2Seq:
    torch.manual_seed(3)
    return fastseq.Seq2Seq(fastseq.Seq2SeqConfig(**(SIZES | options))).eval().double()


def source_of(model: fastseq.Seq2Seq) -> torch.Tensor:
    features = model.config.source_features
    return SRC if features is None else torch.randn(*SRC.shape, features, dtype=torch.float64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_attributions_are_the_ones_of_their_definitions(options):
    """Each target token alone, each sentence alone, by the plain sum over the line."""
    model = model_of(**options)
    src = source_of(model)
    found = attribute(model, src, LENGTHS, TGT_IN, LABELS, 24)
    assert found.residual.abs().max() < 1e-6  # completeness: the attributions sum up to log p(x) - log p(0)
    x = model.source_vectors(src).detach()

    def gradient(vectors, row, t):
        vectors = vectors.clone().requires_grad_()
        logits = model(src[row : row + 1], LENGTHS[row : row + 1], TGT_IN[row : row + 1], source_vectors=vectors).logits
        value = logits.log_softmax(-1)[0, t, LABELS[row, t]]
        return value.detach(), torch.autograd.grad(value, vectors)[0]

    for row, t in ((0, 0), (0, 3), (1, 1)):
        value, plain = gradient(x[row : row + 1], row, t)
        assert torch.allclose(found.log_probs[row, t], value)
        assert torch.allclose(found.gradient_x_input[row, t], (plain * x[row : row + 1]).sum(-1)[0])
        points = (torch.arange(400) + 0.5) / 400
        mean = sum(gradient(x[row : row + 1] * float(p), row, t)[1] for p in points) / 400
        assert torch.allclose(found.integrated_gradients[row, t], (mean * x[row : row + 1]).sum(-1)[0], atol=1e-5)
    assert (found.integrated_gradients[1, :, 3:] == 0).all()  # past the length
    assert (found.integrated_gradients[1, 2:] == 0).all()  # pad


def test_fewer_points_are_less_exact():
    model = model_of()
    errors = [attribute(model, SRC, LENGTHS, TGT_IN, LABELS, n).residual.abs().max() for n in (1, 4, 16)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


def test_source_vectors_replace_the_source():
    model = model_of().train()
    other = torch.where(SRC == 5, 6, SRC)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(other, LENGTHS, TGT_IN).logits
        torch.manual_seed(0)
        assert torch.equal(model(SRC, LENGTHS, TGT_IN, source_vectors=model.source_vectors(other)).logits, expected)
    with pytest.raises(
        ValueError, match=r"source_vectors must be floating point numbers \(2, 5, 8\) for this src, got"
    ):
        model(SRC, LENGTHS, TGT_IN, source_vectors=torch.zeros(2, 5, 7))


def ranks_agree(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two maps."""
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_maps_depend_on_every_layer():
    """Randomise the layers one after the other, from the output down: the maps of the gradients must change.

    Adebayo et al. 2018, cascading randomisation. Attention with given targets cannot see the output layer.
    """
    model = model_of(attention="dot", embedding_dim=16, hidden_size=24)
    torch.manual_seed(1)
    src = torch.randint(4, 12, (8, 9))
    tgt_in, labels = torch.randint(4, 11, (8, 7)), torch.randint(4, 11, (8, 7))
    maps = attribute(model, src, None, tgt_in, labels, 8)
    attention = model(src, None, tgt_in, need_weights=True).attention
    changed = copy.deepcopy(model)
    decoder = changed.decoder
    layers = [decoder.output, decoder.combine, decoder.lstm, changed.bridge, changed.encoder.lstm]
    for layer in [*layers, changed.encoder.embedding]:
        before = attribute(changed, src, None, tgt_in, labels, 8)
        torch.manual_seed(9)
        for parameter in layer.parameters():
            parameter.data = torch.randn_like(parameter) * parameter.std()
        after = attribute(changed, src, None, tgt_in, labels, 8)
        for name in ("gradient_x_input", "integrated_gradients"):
            assert ranks_agree(getattr(after, name), getattr(before, name)) < 0.999, layer  # this layer counts
            assert abs(ranks_agree(getattr(after, name), getattr(maps, name))) < 0.6, (
                layer
            )  # nothing of the map is left
        same = torch.equal(changed(src, None, tgt_in, need_weights=True).attention, attention)
        assert same == (layer is decoder.output)
