"""Parameters without requires_grad: same gradients for the others, and no product for the frozen ones."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import _native
from fastseq.dispatch import use_backend
from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.init_from import PARTS, freeze

SOURCE, TARGET = torch.randint(4, 11, (5, 7)), torch.randint(4, 13, (5, 6))
LENGTHS = torch.tensor([7, 3, 5, 1, 7])
KINDS = {
    "fed": {"attention": "additive"},
    "fed, normed, two layers": {"attention": "normed_additive", "encoder_layers": 2, "decoder_layers": 2},
    "fed, general": {"attention": "general"},
    "whole targets": {"attention": "dot", "input_feeding": False},
}
# All matrices differ in shape, so that the shape of a product tells its weight.
SIZES = {"src_vocab_size": 11, "tgt_vocab_size": 13, "embedding_dim": 6, "hidden_size": 10, "dropout": 0.0}


class Products(TorchDispatchMode):
    """Records the shapes of the results of matrix products, and the calls of fastseq's own operators."""

    def __init__(self):
        super().__init__()
        self.shapes, self.calls = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        if function.namespace == "fastseq":
            self.calls.append((function._schema.name.partition("::")[2], args))
        return result

    def weights_of_layers(self) -> list[bool]:
        """The argument need_weights of each call of lstm_backward."""
        return [args[-1] for name, args in self.calls if name == "lstm_backward"]


def gradients(model) -> tuple[dict[str, torch.Tensor | None], Products]:
    """The gradient of each parameter, and the products of the backward."""
    model.zero_grad()
    loss = model.loss(SOURCE, LENGTHS, TARGET, TARGET.roll(1, 1))
    with Products() as products:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, products


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(**SIZES | request.param))


@pytest.mark.parametrize("part", PARTS)
def test_the_other_gradients_stay(model, part):
    if part == "attention" and model.config.attention == "dot":
        pytest.skip("dot attention has no weights")
    expected, _ = gradients(model)
    freeze(model, part)
    found, _ = gradients(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, grad in found.items() if grad is None} != set()
    for name in found.keys() - frozen:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.skipif(not _native.available(), reason="needs the compiled operators")
@pytest.mark.parametrize("part", ["decoder", "attention"])
def test_no_product_for_a_frozen_weight(model, part):
    """The products of the frozen matrices are missing in the backward; the others stay."""
    _, before = gradients(model)
    if part == "attention" and not list(model.decoder.attention.parameters()):
        with pytest.raises(UserError, match="no weights there"):
            freeze(model, part)
        return
    freeze(model, part)
    _, after = gradients(model)
    skipped = Counter(before.shapes) - Counter(after.shapes)
    frozen = Counter(tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() == 2)
    assert not Counter(after.shapes) - Counter(before.shapes)
    made_by_torch = frozen & Counter(before.shapes)  # the others by an operator, or by two products
    assert made_by_torch - skipped == Counter()
    assert made_by_torch or after.weights_of_layers() == [False]
    assert before.weights_of_layers() == [True] * len(before.weights_of_layers())


@pytest.mark.skipif(not _native.available(), reason="needs the compiled operators")
def test_the_lstm_kernel_skips_frozen_weights(model):
    """need_weights of lstm_backward, for each layer of the encoder; its input still needs a gradient."""
    layers = model.config.encoder_layers
    _, before = gradients(model)
    freeze(model, "encoder")
    _, after = gradients(model)
    assert before.weights_of_layers()[-layers:] == [True] * layers
    assert after.weights_of_layers()[-layers:] == [False] * layers


@pytest.mark.skipif(not _native.available(), reason="needs the compiled operators")
def test_the_loss_kernel_skips_a_frozen_projection(model):
    freeze(model, "output")
    with use_backend("native"), Products() as products:
        model.loss(SOURCE, LENGTHS, TARGET, TARGET.roll(1, 1))
    (needs,) = (args[-3:] for name, args in products.calls if name == "linear_cross_entropy_forward")
    assert needs == (True, False, False)


@pytest.mark.skipif(not _native.available(), reason="needs the compiled operators")
def test_a_frozen_encoder_has_no_backward_at_all(model):
    freeze(model, "encoder,embedding,bridge")
    _, products = gradients(model)
    with_input_feeding = model.config.input_feeding
    assert len(products.weights_of_layers()) == (0 if with_input_feeding else model.config.decoder_layers)
