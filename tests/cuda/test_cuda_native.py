"""``backend="native"`` for CUDA tensors: whole modules through the kernels, on the host-side device."""

import contextlib
from collections import Counter

import emulator
import operator_calls as calls
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import dispatch
from fastseq.dispatch import first_rule, objection
from fastseq.ops.lstm import native_cuda
from fastseq.ops.lstm.spec import LSTMCall
from fastseq.testing.numerics import compare, evaluate

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="the host-side device needs a C++ compiler")


@pytest.fixture
def as_native(monkeypatch):
    """Run native kernels with exact float32 products, as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with emulator.as_native():
        yield


def results(module, input, hx, packed=None, **options):
    """Return outputs and gradients of input, states and parameters, by name."""
    input, hx = input.clone().requires_grad_(), tuple(h.clone().requires_grad_() for h in hx)
    given = input if packed is None else pack_padded_sequence(input, packed, enforce_sorted=False)
    output, (h_n, c_n), *rest = module(given, hx, **options)
    outputs = {"output": output if packed is None else output.data, "h_n": h_n, "c_n": c_n}
    outputs |= {"cell_states": rest[0]} if rest else {}
    return evaluate(
        outputs,
        {"input": input, "h0": hx[0], "c0": hx[1], **dict(getattr(module, "_orig_mod", module).named_parameters())},
    )


def check(
    T,
    B,
    I,  # noqa: E741
    H,
    dtype=torch.float32,
    packed=None,
    lengths=None,
    layers=1,
    bidirectional=False,
    bias=True,
    compiler=None,
):
    """Compare the native module, compiled by ``compiler`` if given, with nn.LSTM in the same dtype and in float64."""
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    directions = layers * (2 if bidirectional else 1)
    input, hx = torch.randn(T, B, I).to(dtype), [torch.randn(directions, B, H).to(dtype) for _ in range(2)]
    plain = torch.nn.LSTM(I, H, **options).to(dtype)
    ours = fastseq.LSTM(I, H, **options, backend="native").to(dtype)
    oracle = fastseq.LSTM(I, H, **options, backend="reference").double()
    extra = {} if lengths is None else {"lengths": lengths}
    for module in (ours, oracle):
        module.load_state_dict(plain.state_dict())
    baseline = plain if lengths is None else fastseq.LSTM(I, H, **options, backend="torch").to(dtype)
    baseline.load_state_dict(plain.state_dict())
    ours = ours if compiler is None else torch.compile(ours, fullgraph=True, backend=compiler)
    runs = [
        results(module, input.to(kind), [h.to(kind) for h in hx], packed, **extra)
        for module, kind in ((ours, dtype), (oracle, torch.float64), (baseline, dtype))
    ]
    wrong = [str(c) for c in compare(*runs) if not c.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_and_directions(as_native, dtype):
    check(4, 3, 5, 16, dtype, layers=2, bidirectional=True)


def test_without_bias_and_for_one_sequence(as_native):
    check(3, 1, 4, 7, bias=False)


@pytest.mark.parametrize("capability", [80, 90])
def test_no_sequences_in_two_directions(as_native, capability):
    module = fastseq.LSTM(4, 8, bidirectional=True, backend="native")
    with emulator.device(capability=capability):
        output, (h_n, _) = module(torch.randn(3, 0, 4, requires_grad=True))
        output.sum().backward()
    assert (output.shape, h_n.shape) == ((3, 0, 16), (2, 0, 8))
    assert module.weight_hh_l0.grad.abs().sum() == 0


def test_packed_input(as_native):
    check(5, 4, 3, 8, packed=torch.tensor([2, 5, 1, 4]), bidirectional=True)


def test_lengths_with_an_empty_sequence(as_native):
    check(5, 4, 3, 8, lengths=torch.tensor([2, 0, 5, 4]), bidirectional=True)


@pytest.mark.parametrize("kernel", ["grid", "cluster"])
def test_padding_changes_no_bit(as_native, kernel, monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", kernel)
    module = fastseq.LSTM(6, 24, bidirectional=True, backend="native").bfloat16()
    lengths = torch.tensor([5, 0, 3, 1])
    padding = torch.arange(5).unsqueeze(1) >= lengths  # (T, B)
    x, grad = torch.randn(5, 4, 6).bfloat16(), torch.randn(5, 4, 48).bfloat16()

    def run(garbage):
        input = x.masked_fill(padding.unsqueeze(-1), garbage).requires_grad_()
        output, (h_n, c_n) = module(input, lengths=lengths)
        grads = (grad.masked_fill(padding.unsqueeze(-1), garbage), torch.ones_like(h_n), torch.ones_like(c_n))
        return output, h_n, c_n, *torch.autograd.grad((output, h_n, c_n), (input, *module.parameters()), grads)

    for clean, dirty in zip(run(0.0), run(torch.nan), strict=True):
        assert torch.equal(clean, dirty)


def test_cell_states(as_native):
    input = torch.randn(4, 3, 5)
    ours = fastseq.LSTM(5, 8, backend="native")
    lengths = torch.tensor([4, 0, 2])
    *_, cells = ours(input, lengths=lengths, return_cell_states=True)
    ours.backend = "reference"
    *_, expected = ours(input, lengths=lengths, return_cell_states=True)
    torch.testing.assert_close(cells, expected)


class Products(TorchDispatchMode):
    """Count calls of torch by name. Products of matrices: "tf32_product" is ours, "mm" and "addmm" are torch's."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def matmul_tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32  # no attribute that monkeypatch could restore
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("cudnn", "matmul"), [(True, False), (True, True), (False, False), (False, True)])
def test_products_have_the_precision_of_cudnn(as_native, monkeypatch, cudnn, matmul):
    """torch's default is (True, False): then nn.LSTM computes in TF32, and so do all four products of a layer."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", cudnn)
    module, input = fastseq.LSTM(5, 8, backend="native"), torch.randn(4, 3, 5, requires_grad=True)
    with matmul_tf32(matmul), Products() as products:
        module(input)[0].sum().backward()
        assert torch.backends.cuda.matmul.allow_tf32 is matmul, "the flag of the process stays as it is"
    ours = products.seen["tf32_product"]
    assert (ours, ours + products.seen["mm"] + products.seen["addmm"]) == (4 if cudnn and not matmul else 0, 4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_weights_of_one_direction_are_not_copied(as_native, bidirectional):
    module = fastseq.LSTM(5, 8, bidirectional=bidirectional, backend="native")
    with Products() as calls_of_torch:
        module(torch.randn(4, 3, 5))[0].sum().backward()
    assert calls_of_torch.seen["stack"] == (2 if bidirectional else 0), "once in the forward, once in the backward"


def test_weights_that_are_not_contiguous(as_native):
    module, other = (fastseq.LSTM(5, 8, backend=name) for name in ("native", "reference"))
    other.load_state_dict(module.state_dict())
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.detach().t().contiguous().t())
    assert not module.weight_hh_l0.is_contiguous()
    input = torch.randn(4, 3, 5)
    torch.testing.assert_close(module(input)[0], other(input)[0])


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_tf32_product(as_native, monkeypatch, transpose_a, transpose_b, bias):
    """Operands with 10 bits of mantissa are exact in TF32; sums are in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    a, b = (torch.randn(shape).bfloat16().float() for shape in ((6, 40), (40, 7)))
    added = torch.randn(7) if bias else None
    expected = a.double() @ b.double() + (added.double() if bias else 0)

    def laid_out(t, transposed):
        return t.t().contiguous() if transposed else t

    options = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    result = native_cuda.product(laid_out(a, transpose_a), laid_out(b, transpose_b), added, **options)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    nearly = a * (1 + 2.0**-13)  # a quarter of a rounding step of TF32
    rounded = native_cuda.product(laid_out(nearly, transpose_a), laid_out(b, transpose_b), added, **options)
    assert torch.equal(rounded, result)


def test_tf32_follows_the_flag_of_torch(as_native, monkeypatch):
    module, input = fastseq.LSTM(5, 8, backend="native"), torch.randn(4, 3, 5)
    exact = module(input)[0]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    rounded = module(input)[0]
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=1e-3)


def test_directions_run_one_after_the_other_if_the_weights_of_both_do_not_fit(as_native, monkeypatch):
    """A GPU does so at large hidden sizes."""
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "grid")
    with emulator.device(multiprocessors=1):
        check(3, 2, 5, 8, bidirectional=True)


def test_a_layer_runs_step_by_step_where_that_is_demanded(as_native, monkeypatch):
    monkeypatch.setenv("FASTSEQ_LSTM_KERNEL", "steps")
    with emulator.device(multiprocessors=1, capability=80):
        check(3, 2, 5, 40, bidirectional=True)


def test_fits_checks_the_gpu_of_the_tensors(as_native, monkeypatch):
    indices = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: indices.append(index) or contextlib.nullcontext())
    assert native_cuda.unsupported(LSTMCall("cuda", torch.bfloat16, 4, 8, batch=2, device_index=1)) is None
    assert indices == [1]


def test_double_backward(as_native):
    module = fastseq.LSTM(3, 4, backend="native")
    input = torch.randn(3, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), input)
    assert torch.isfinite(second).all() and second.abs().max() > 0


def test_the_whole_model_trains(as_native):
    """Loss and gradients of a seq2seq model (encoder, decoder, attention) match the reference backend."""
    config = fastseq.Seq2SeqConfig(
        src_vocab_size=12, tgt_vocab_size=11, embedding_dim=6, hidden_size=8, attention="additive"
    )
    model = fastseq.Seq2Seq(config).eval()
    src, lengths, tgt = torch.randint(4, 11, (3, 5)), torch.tensor([5, 3, 1]), torch.randint(4, 11, (3, 4))
    runs = []
    for backend in ("native", "reference"):
        with fastseq.use_backend(backend):
            logits = model(src, lengths, tgt).logits
            model.zero_grad()
            logits.square().mean().backward()
        runs.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, reference in zip(*runs, strict=True):
        torch.testing.assert_close(ours, reference)


def test_sizes_that_do_not_fit_are_refused_with_a_way_out(as_native):
    with pytest.raises(RuntimeError, match=r"hidden_size=4096 .* use backend='torch' or 'triton'"):
        fastseq.LSTM(4, 4096, backend="native")(torch.randn(2, 3, 4))
    with pytest.raises(RuntimeError, match="float64"):
        fastseq.LSTM(4, 5, backend="native").double()(torch.randn(2, 3, 4).double())


@pytest.fixture(scope="module")
def fakes():
    """Shapes of the results of the host-side device's operators."""
    emulator.load()
    native_cuda.register_fakes("fastseq_sim")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["lstm_recurrence_forward", "lstm_recurrence_backward", "tf32_product"])
def test_opcheck(name):
    torch.library.opcheck(getattr(emulator.load(), name).default, getattr(calls, name)())


@pytest.mark.usefixtures("fakes")
def test_torch_compile_keeps_one_graph(as_native):
    module = fastseq.LSTM(3, 4, backend="native")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(3, 2, 3, requires_grad=True)
    torch.testing.assert_close(compiled(input)[0], module(input)[0])
    (grad,) = torch.autograd.grad(compiled(input)[0].sum(), input)
    torch.testing.assert_close(grad, torch.autograd.grad(module(input)[0].sum(), input)[0])


SMALL = {"an L4": {"multiprocessors": 58, "capability": 89, "shared_memory": 99 << 10}, "a MIG slice": {"resident": 16}}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("limits", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(("hidden_size", "dtype"), [(512, torch.float32), (1100, torch.bfloat16)], ids=str)
def test_a_compiled_module_runs_on_a_small_device(as_native, limits, hidden_size, dtype):
    """The graph is traced without a device; where it runs, no kernel keeps the weights of both directions."""
    torch._dynamo.reset()
    with emulator.device(**limits):
        check(2, 3, 4, hidden_size, dtype, bidirectional=True, compiler="aot_eager")


CALL = LSTMCall("cuda", torch.bfloat16, 512, 512, batch=32, steps=100)


def test_auto_takes_the_kernels_where_cudnn_is_weak_and_marks_them_as_not_measured(as_native, monkeypatch):
    """CUDA rules say "not measured yet" until measured on a GPU."""
    autocast, tf32 = CALL._replace(autocast=True, fused=True), CALL._replace(dtype=torch.float32, tf32=True)
    for call in (CALL, autocast, tf32, CALL._replace(dtype=torch.float16, packed=True)):
        backend, why = first_rule("lstm", call)
        assert backend == "native" and "not measured yet" in why
    small, half = CALL._replace(hidden_size=128), CALL._replace(dtype=torch.float16)
    for call in (small, half, half._replace(autocast=True, fused=True), CALL._replace(hidden_size=2048)):
        assert first_rule("lstm", call)[0] == "torch"
    monkeypatch.setattr(native_cuda, "fits", lambda *_, **__: False)
    assert first_rule("lstm", CALL)[0] == "torch"
    assert "use backend='torch' or 'triton'" in objection("lstm", "native", CALL)


# H, B, dtype or TF32 where our step is modelled at or beyond break-even with cuDNN's, forward or backward.
BEYOND = [
    *((512, 128, kind) for kind in ("tf32", torch.float32)),
    *((768, 64, kind) for kind in (torch.float32,)),
    *((768, 128, kind) for kind in ("tf32", torch.float32)),
    *((1024, 64, kind) for kind in ("tf32", torch.float32)),
    *((1024, 128, kind) for kind in (torch.bfloat16, "tf32", torch.float32)),
    *((2048, batch, torch.bfloat16) for batch in (64, 128)),
    *((1000, 1024, kind) for kind in (torch.bfloat16, "tf32", torch.float32)),
    *((512, 4096, kind) for kind in (torch.bfloat16, "tf32", torch.float32)),
]


def _call(hidden_size, batch, kind, **options):
    dtype = torch.float32 if kind == "tf32" else kind
    return CALL._replace(hidden_size=hidden_size, batch=batch, dtype=dtype, tf32=kind == "tf32", **options)


@pytest.mark.parametrize("options", [{}, {"requires_grad": True}, {"packed": True}, {"lengths": True}], ids=str)
@pytest.mark.parametrize("multiprocessors", [132, 112], ids=["8 clusters of 16", "7 clusters of 16"])
def test_auto_leaves_what_is_modelled_at_break_even_to_cudnn(as_native, options, multiprocessors):
    dispatch.forget()
    with emulator.device(multiprocessors=multiprocessors):
        for row in BEYOND:
            assert first_rule("lstm", _call(*row, **options))[0] == "torch", (row, options)
    dispatch.forget()


def test_auto_asks_for_the_backward_in_training(as_native):
    """TF32, H = 1024, B = 48: the forward is modelled as faster than cuDNN's, the backward is not."""
    dispatch.forget()
    call = _call(1024, 48, "tf32")
    assert first_rule("lstm", call)[0] == "native"
    assert first_rule("lstm", call._replace(requires_grad=True))[0] == "torch"
    dispatch.forget()


@pytest.mark.parametrize("kind", [torch.bfloat16, "tf32", torch.float32], ids=str)
@pytest.mark.parametrize("hidden_size", [200, 256, 512, 768, 1000])
@pytest.mark.parametrize("options", [{}, {"requires_grad": True}, {"packed": True}], ids=str)
def test_auto_is_bounded_in_the_batch(as_native, hidden_size, kind, options):
    """From some batch size on every larger one goes to cuDNN, and none comes back."""
    dispatch.forget()
    batches = [2**k for k in range(1, 15)]
    taken = [first_rule("lstm", _call(hidden_size, batch, kind, **options))[0] == "native" for batch in batches]
    assert taken == sorted(taken, reverse=True) and not taken[-1]
