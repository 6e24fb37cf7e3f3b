"""Projections (``proj_size``) through the CUDA kernels, which have none, on the host-side device: the fold of W_hr."""

import emulator
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import dispatch, ops
from fastseq.dispatch import first_rule
from fastseq.ops.lstm import native_cuda
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.parity import main as parity
from fastseq.parity.cases import ParityCase

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")
T, B, I, H, P = 5, 4, 3, 8, 3  # noqa: E741
LENGTHS = torch.tensor([2, 0, 5, 1])


@pytest.fixture
def as_native(monkeypatch):
    """Run native kernels with exact float32 products, as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with emulator.as_native():
        yield


OP = [
    dict(shape=(1, 1, 1, 2), proj_size=1),
    dict(shape=(1, 3, 4, 7), proj_size=3, form="lengths", reverse=True, cell_states=True),
    *(
        dict(shape=(5, 3, 4, 7), proj_size=6, form=form, reverse=reverse, cell_states=form != "full")
        for form in ("full", "lengths", "packed")
        for reverse in (False, True)
    ),
    dict(shape=(4, 17, 6, 24), proj_size=8, form="lengths", reverse=True, bias=False),
    dict(shape=(3, 2, 5, 257), proj_size=64),
]
MODULE = [
    dict(shape=(5, 3, 4, 7), proj_size=2, num_layers=2, bidirectional=True, form=form, batch_first=form == "full")
    for form in ("full", "lengths", "packed")
] + [
    dict(shape=(5, 3, 4, 7), proj_size=2, bidirectional=True, states=False),
    dict(shape=(1, 1, 4, 7), proj_size=2, form="unbatched", bias=False, states=False),
]
CASES = [ParityCase("lstm", options) for options in OP] + [ParityCase("LSTM", options) for options in MODULE]
CASES += [ParityCase("lstm", OP[3], slices=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_accuracy(case, dtype):
    """Results and every gradient against float64; W = W_hh W_hr is rounded to 16 bits."""
    with emulator.as_native():
        (row,) = parity.check(case, dtype, ("native",))
    assert row.ok and not row.refusal, row.failure or row.refusal or [str(c) for c in row.comparisons if not c.ok]


def tensors(dtype=torch.float32, projected=P):
    """input, h0, c0 and the weights, without bias, by the names of ops.lstm."""
    shapes = {"input": (T, B, I), "h0": (B, projected), "c0": (B, H), "weight_ih": (4 * H, I)}
    shapes |= {"weight_hh": (4 * H, projected), "weight_hr": (projected, H)}
    return {name: (torch.randn(shape) / 2).to(dtype).requires_grad_() for name, shape in shapes.items()}


def lstm(x, backend, **options):
    """output, h_n, c_n of ops.lstm."""
    weights = {name: t for name, t in x.items() if name.startswith("weight")}
    output, states = ops.lstm(x["input"], (x["h0"], x["c0"]), **weights, backend=backend, **options)
    return output, *states


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_of_length_0_return_h0_and_its_gradient(as_native, reverse):
    x = tensors()
    _, h_n, _ = lstm(x, "native", lengths=LENGTHS, reverse=reverse)
    assert torch.equal(h_n[1], x["h0"][1])
    grad = torch.randn(B, P)
    (grad_h0,) = torch.autograd.grad(h_n, x["h0"], grad)
    assert torch.equal(grad_h0[1], grad[1])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=["output", "h_n", "c_n"])
@pytest.mark.parametrize("name", ["input", "h0", "c0", "weight_ih", "weight_hh", "weight_hr"])
def test_one_result_and_one_gradient(as_native, wanted, name):
    """A backward computes what is requested, and no more is needed for it."""
    x = {n: t.detach().requires_grad_(n == name) for n, t in tensors().items()}
    grads = []
    for backend in ("native", "reference"):
        results = lstm(x, backend, lengths=LENGTHS)
        grads.append(torch.autograd.grad([results[k].square().sum() for k in wanted], x[name])[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_no_bit(as_native, bidirectional):
    module = fastseq.LSTM(I, H, proj_size=P, bidirectional=bidirectional, backend="native")
    padding = (torch.arange(T).unsqueeze(1) >= LENGTHS).unsqueeze(-1)
    rows = 2 if bidirectional else 1
    x, grad = torch.randn(T, B, I), torch.randn(T, B, rows * P)
    hx = torch.randn(rows, B, P, requires_grad=True), torch.randn(rows, B, H, requires_grad=True)

    def run(garbage):
        input = x.masked_fill(padding, garbage).requires_grad_()
        output, (h_n, c_n) = module(input, hx, lengths=LENGTHS)
        grads = (grad.masked_fill(padding, garbage), torch.ones_like(h_n), torch.ones_like(c_n))
        return output, h_n, c_n, *torch.autograd.grad((output, h_n, c_n), (input, *hx, *module.parameters()), grads)

    for clean, dirty in zip(run(0.0), run(torch.nan), strict=True):
        assert torch.equal(clean, dirty)


def test_without_hx_the_input_gets_no_columns(as_native, monkeypatch):
    """hx given, even of zeros, may need a gradient; None adds no product."""
    widths, product = [], native_cuda.product

    def spy(a, b, bias=None, **options):
        if bias is not None:  # the product with W_ih
            widths.append(b.size(1))
        return product(a, b, bias, **options)

    monkeypatch.setattr(native_cuda, "product", spy)
    module, input = fastseq.LSTM(I, H, proj_size=P, bidirectional=True, backend="native"), torch.randn(T, B, I)
    zeros = torch.zeros(2, B, P, requires_grad=True), torch.zeros(2, B, H)
    torch.testing.assert_close(module(input)[0], module(input, zeros)[0])
    assert widths == [I, I + 2 * P]
    (grad,) = torch.autograd.grad(module(input, zeros)[0].square().sum(), zeros[:1])
    module.backend = "reference"
    torch.testing.assert_close(grad, *torch.autograd.grad(module(input, zeros)[0].square().sum(), zeros[:1]))


def test_double_backward(as_native):
    seconds = []
    x = tensors()
    for backend in ("native", "reference"):
        results = lstm(x, backend, lengths=LENGTHS, reverse=True)
        grads = torch.autograd.grad(sum(r.square().sum() for r in results), list(x.values()), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(x.values())))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "weights of each sample"])
def test_vmap(as_native, shared):
    x, many = {n: t.detach() for n, t in tensors().items()}, 3
    batched = [n for n in x if not (shared and n.startswith("weight"))]
    samples = {n: torch.randn(many, *t.shape) / 4 if n in batched else t for n, t in x.items()}
    dims = {n: 0 if n in batched else None for n in x}

    def loss(values):
        return sum(r.square().sum() for r in lstm(values, "native"))

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(dims,))(samples)
    for k in range(many):
        sample = {n: t[k] if n in batched else t for n, t in samples.items()}
        torch.testing.assert_close({n: g[k] for n, g in grads.items()}, torch.func.grad(loss)(sample))


@pytest.fixture(scope="module")
def fakes():
    """Shapes of the results of the host-side device's operators."""
    emulator.load()
    native_cuda.register_fakes("fastseq_sim")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("given", ["nothing", "hx and lengths"])
def test_torch_compile_keeps_one_graph(as_native, given):
    torch._dynamo.reset()
    module = fastseq.LSTM(I, H, 2, proj_size=P, bidirectional=True, backend="native")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(T, B, I, requires_grad=True)
    hx, options = None, {}
    if given != "nothing":
        hx, options = (torch.randn(4, B, P), torch.randn(4, B, H)), {"lengths": LENGTHS}
    of_both = []
    for run in (compiled, module):
        output, (h_n, c_n) = run(input, hx, **options)
        loss = output.square().sum() + h_n.square().sum() + c_n.square().sum()
        of_both.append((output, h_n, c_n, *torch.autograd.grad(loss, (input, *module.parameters()))))
    torch.testing.assert_close(*of_both)


@pytest.mark.usefixtures("fakes")
def test_torch_export_keeps_steps_and_batch_dynamic(as_native):
    module = fastseq.LSTM(I, H, proj_size=P, backend="native").eval()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (torch.randn(T, B, I),), dynamic_shapes=({0: steps, 1: batch},))
    input = torch.randn(T + 2, B + 1, I)
    torch.testing.assert_close(program.module()(input)[0], module(input)[0])


@pytest.mark.parametrize("flags", [(True, False), (False, False)], ids=["torch's default", "full float32"])
def test_products_have_the_precision_of_cudnn(as_native, monkeypatch, flags):
    """Four of a plain layer and nine of the projection have the precision of nn.LSTM."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flags[0])
    seen, x = [], tensors()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__.split(".")[0])
            return func(*args, **kwargs or {})

    with Counting():
        sum(r.sum() for r in lstm(x, "native")).backward()
    ours, torchs = seen.count("tf32_product"), seen.count("mm") + seen.count("addmm")
    assert (ours, torchs) == ((13, 0) if flags[0] else (0, 13))


def test_auto_takes_the_fold_where_it_is_modelled_to_win(as_native):
    """W = W_hh W_hr is a product of each call, so short calls stay with cuDNN; so do large batches."""
    dispatch.forget()
    call = LSTMCall("cuda", torch.bfloat16, 512, 1024, proj_size=512, batch=16, steps=100)
    for taken in (call, call._replace(requires_grad=True), call._replace(packed=True)):
        backend, why = first_rule("lstm", taken)
        assert backend == "native" and "not measured yet" in why
    for left in (call._replace(steps=1), call._replace(batch=256), call._replace(proj_size=16, batch=128)):
        assert first_rule("lstm", left)[0] == "torch"
    assert native_cuda.modelled_gain(call) < native_cuda.modelled_gain(call._replace(proj_size=0))
    for served in (dict(return_cell_states=True), dict(compiling=True, batch=None, steps=None), dict(vmapped=True)):
        assert first_rule("lstm", call._replace(**served))[0] == "native"
    dispatch.forget()
