"""Adversarial training: the loss and its gradients, and the options."""

import pytest
import torch
from toy_runs import SMALL, refused, rows, train

import fastseq
from fastseq.training.adversarial import adversarial_loss, vector_length

SRC = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]])
TARGET = torch.tensor([[5, 6, 2], [4, 2, 0]])


def model_of(**options) -> fastseq.Seq2Seq:
    torch.manual_seed(0)
    sizes = {"src_vocab_size": 9, "tgt_vocab_size": 8, "embedding_dim": 6, "hidden_size": 8, "dropout": 0.0}
    return fastseq.Seq2Seq(fastseq.Seq2SeqConfig(**(sizes | options))).double()


def loss_of(model: fastseq.Seq2Seq, src=SRC):
    def loss(source_vectors):
        return model.loss(src, torch.tensor([4, 2]), TARGET, TARGET, reduction="sum", source_vectors=source_vectors)

    return loss


def worst(model, src=SRC):
    """The clean loss, the gradient (B, S, E), and its norm in each sentence (B,)."""
    vectors = model.source_vectors(src).detach().requires_grad_()
    clean = loss_of(model, src)(vectors)
    (gradient,) = torch.autograd.grad(clean, vectors)
    return clean, vectors.detach(), gradient, gradient.flatten(1).norm(dim=1)


@pytest.mark.parametrize("options", [{}, {"attention": "dot", "input_feeding": False}], ids=["additive", "dot"])
def test_perturbation_moves_each_source_along_its_gradient(options):
    model = model_of(**options)
    clean, x, gradient, norms = worst(model)
    unit = model.encoder.embedding.weight[1:].norm(dim=1).mean().item()
    assert vector_length(model) == pytest.approx(unit)
    moved = x + 0.5 * unit * gradient / norms[:, None, None]
    expected = (clean + loss_of(model)(moved)) / 2
    found = adversarial_loss(model, SRC, loss_of(model), 0.5, "perturbation")
    assert torch.allclose(found, expected) and found > clean
    found.backward()
    step = moved - x  # a constant
    model_of(**options)
    other = model_of(**options)
    vectors = other.source_vectors(SRC)
    ((loss_of(other)(vectors) + loss_of(other)(vectors + step)) / 2).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad), name


@pytest.mark.parametrize("options", [{}, {"attention": "dot", "input_feeding": False}], ids=["additive", "dot"])
def test_penalty_is_the_first_order_of_it_and_differentiable(options):
    model = model_of(**options)
    clean, _, _, norms = worst(model)
    radius = 0.5 * vector_length(model)
    found = adversarial_loss(model, SRC, loss_of(model), 0.5, "penalty")
    assert torch.allclose(found, clean + radius / 2 * norms.sum())
    small = [adversarial_loss(model, SRC, loss_of(model), 1e-4, form) - clean for form in ("penalty", "perturbation")]
    assert small[0].item() == pytest.approx(small[1].item(), rel=1e-3)
    found.backward()
    weight = model.encoder.lstm.weight_hh_l0  # unit of length is constant, so weights of the embedding are left out
    direction = torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        weight.data += sign * 1e-5 * direction
        clean, _, _, norms = worst(model)
        values.append((clean + radius / 2 * norms.sum()).item())
        weight.data -= sign * 1e-5 * direction
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((weight.grad * direction).sum()), rel=1e-5)


def test_frozen_embeddings_features_and_a_sentence_without_loss():
    frozen = model_of()
    frozen.encoder.embedding.weight.requires_grad_(False)
    features = model_of(src_vocab_size=None, source_features=5)
    assert vector_length(features) == 5**0.5
    for model, src in ((frozen, SRC), (features, torch.randn(2, 4, 5, dtype=torch.float64))):
        for form in ("perturbation", "penalty"):
            loss = adversarial_loss(model, src, loss_of(model, src), 0.5, form)
            assert loss > worst(model, src)[0]
            loss.backward()
            assert model.encoder.lstm.weight_hh_l0.grad.isfinite().all()
    nothing = torch.zeros_like(TARGET)
    for form in ("perturbation", "penalty"):
        silent = model_of()

        def loss(source_vectors, silent=silent):
            return silent.loss(SRC, None, TARGET, nothing, reduction="sum", source_vectors=source_vectors)

        adversarial_loss(silent, SRC, loss, 1.0, form).backward()
        assert all(p.grad is None or (p.grad == 0).all() for p in silent.parameters())


def test_options_change_the_run(tmp_path):
    losses = {}
    for name, options in (("plain", ()), ("moved", ("1",)), ("far", ("2",)), ("penalty", ("1", "penalty"))):
        flags = zip(("--optim.adversarial", "--optim.adversarial_form"), options, strict=False)
        train(tmp_path / name, "--trainer.max_epochs", "1", *(x for pair in flags for x in pair))
        losses[name] = [row["train_loss"] for row in rows(tmp_path / name) if row["train_loss"]]
    assert len({tuple(values) for values in losses.values()}) == 4
    assert float(losses["plain"][0]) < float(losses["moved"][0]) < float(losses["far"][0])


def test_a_form_without_a_length_is_refused(tmp_path, capsys):
    sentence = refused(capsys, "train", *SMALL, "--run_dir", tmp_path / "r", "--optim.adversarial_form", "penalty")
    assert "--optim.adversarial_form penalty needs --optim.adversarial" in sentence
    assert "--optim.adversarial" in refused(capsys, "train", *SMALL, "--run_dir", tmp_path, "--optim.adversarial", "-1")
