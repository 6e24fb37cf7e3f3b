"""The decoder op: T steps with input feeding, beside its reference in float64; gradients of first and second order."""

import operator_calls as calls
import pytest
import torch

from fastseq import _native
from fastseq.ops.decoder import reference
from fastseq.ops.decoder.api import decoder
from fastseq.ops.decoder.function import DecoderFunction
from fastseq.ops.decoder.spec import Sequence
from fastseq.testing.numerics import assert_all_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
CASES = {
    "additive": {},
    "dot": dict(dot=True),
    "one layer, one step": dict(L=1, T=1),
    "three layers, dropout": dict(L=3, masked=True),
    "dropout, dot": dict(masked=True, dot=True),
    "two rows a sentence": dict(rows_each=2),
    "two rows a sentence, dot": dict(rows_each=2, dot=True),
    "no lengths": dict(lengths=False, H=33, A=20),
    "one row": dict(B=1, H=70),
    "many positions": dict(B=7, P=300, H=70, L=1),
    "many positions, dot": dict(B=7, P=300, H=70, L=1, dot=True),
    "not prepared": dict(prepared=False),
    "many rows": dict(B=40, T=3, H=20, masked=True),
    "saturated": dict(spread=30.0),
}
NAMES = ("vectors", "attention", "h_n", "c_n")


def make(
    T=4,
    B=3,
    rows_each=1,
    L=2,
    H=8,
    A=7,
    P=5,
    dot=False,
    masked=False,
    lengths=True,
    prepared=True,
    spread=1.0,
    dtype=torch.float64,
    seed=0,
) -> Sequence:
    """Random inputs. Sentence 1 has length 0, and its padding is finite."""
    generator = torch.Generator().manual_seed(seed)
    N, A = B * rows_each, H if dot else A

    def draw(*shape, factor=1.0):
        x = factor * torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.float().to(dtype).requires_grad_()

    keys = draw(B, P, A, factor=H**-0.5 if dot else 1.0)  # well-conditioned: T steps magnify no rounding
    ends = torch.tensor([P, 0, 2, 1] * B)[:B] if lengths else None
    ready = None
    if prepared and not dot:
        ready = torch.ops.fastseq.attention_prepare(keys.detach(), ends)
    masks = None
    if masked:
        masks = (torch.rand(L - 1, T, N, H, generator=generator, dtype=torch.float64) < 0.7).to(dtype) / 0.75
    scores = (None,) * 3 if dot else (draw(A, H, factor=H**-0.5), draw(A), draw(A))
    return Sequence(
        draw(T, N, 4 * H, factor=spread),
        draw(L, N, H),
        draw(L, N, H),
        draw(N, H),
        draw(H, 2 * H, factor=H**-0.5),
        *scores,
        keys,
        draw(B, P, H),
        masks,
        ends,
        ready,
        tuple(draw(4 * H, H, factor=H**-0.5) for _ in range(2 * L)),
        tuple(draw(4 * H) for _ in range(2 * L - 2)),
        0.7,
    )


def leaves(s: Sequence) -> dict[str, torch.Tensor]:
    return {str(k): t for k, t in enumerate(s.tensors()) if t is not None and t.requires_grad}


def results(run, s: Sequence, wanted=NAMES) -> tuple[dict, dict]:
    """The results by name, and the gradients of a random loss on those in ``wanted``."""
    outputs = dict(zip(NAMES, run(s), strict=True))
    generator = torch.Generator().manual_seed(1)
    upstream = {k: torch.randn(t.shape, generator=generator, dtype=torch.float64) for k, t in outputs.items()}
    given = [upstream[k].float().to(outputs[k].dtype) for k in wanted]
    named = leaves(s)
    grads = torch.autograd.grad([outputs[k] for k in wanted], list(named.values()), given, materialize_grads=True)
    return outputs, dict(zip(named, grads, strict=True))


def plain(s: Sequence) -> tuple:
    return reference.forward(s)[:4]


@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_reference(case):
    s = make(**CASES[case])
    for actual, expected in zip(results(decoder, s), results(plain, s), strict=True):
        for name, x in expected.items():
            scale = float(x.detach().abs().max())
            torch.testing.assert_close(actual[name], x, rtol=1e-9, atol=1e-11 * max(scale, 1), msg=name)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_accurate_as_the_reference(case):
    """Over several draws: torch may be exact in a few numbers."""
    sides = {"ours": (decoder, torch.float32), "exact": (plain, torch.float64), "theirs": (plain, torch.float32)}
    draws = {}
    for name, (run, dtype) in sides.items():
        drawn = [results(run, make(**CASES[case], dtype=dtype, seed=seed)) for seed in range(8)]
        draws[name] = [{k: torch.stack([d[part][k] for d in drawn]) for k in drawn[0][part]} for part in (0, 1)]
    assert_all_accurate(*(side[0] for side in draws.values()))
    assert_all_accurate(*(side[1] for side in draws.values()), factor=3)


@pytest.mark.parametrize("wanted", [("vectors",), ("attention",), ("h_n",), ("c_n",)], ids="".join)
def test_a_loss_on_one_result(wanted):
    s = make(L=2, rows_each=2)
    expected = results(plain, s, wanted)[1]
    for name, grad in results(decoder, s, wanted)[1].items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("dot", [False, True], ids=["additive", "dot"])
def test_an_empty_batch(dot):
    s = make(B=0, lengths=False, dot=dot)
    for actual, expected in zip(results(decoder, s), results(plain, s), strict=True):
        for name, x in expected.items():
            assert torch.equal(actual[name], x), name


def test_gradcheck_of_first_and_second_order():
    s = make(T=2, B=2, L=2, H=3, A=2, P=3, masked=True, prepared=False)  # of the keys that gradcheck moves
    tensors = s.tensors()
    inputs = tuple(t for t in tensors if t is not None and t.requires_grad)

    def run(*given):
        rest = iter(given)
        replaced = [next(rest) if t is not None and t.requires_grad else t for t in tensors]
        return DecoderFunction.apply(s.layers(), s.scale, *replaced)[:4]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_nan_in_the_padding_reaches_nothing():
    s = make()
    padding = torch.arange(5) >= s.lengths[:, None]
    dirty = s._replace(
        keys=s.keys.detach().masked_fill(padding[..., None], float("nan")).requires_grad_(),
        memory=s.memory.detach().masked_fill(padding[..., None], float("nan")).requires_grad_(),
    )
    for actual, expected in zip(results(decoder, dirty), results(decoder, s), strict=True):
        for name, x in expected.items():
            assert torch.equal(actual[name], x), name


def transposed(t):
    """A copy whose last dimension is not the innermost in memory."""
    return t.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()


def test_strided_inputs_and_threads_change_no_bit():
    s = make(T=3, B=16, H=64, P=9, L=2)
    strided = s._replace(**{name: transposed(getattr(s, name)) for name in s._fields[:10]})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(decoder, s)[0]
        alone = s._replace(**{n: getattr(s, n)[..., :1, :].detach() for n in ("gates", "h0", "c0")})
        alone = alone._replace(
            feed=s.feed[:1].detach(), keys=s.keys[:1].detach(), memory=s.memory[:1].detach(), lengths=s.lengths[:1]
        )._replace(prepared=s.prepared[:1])
        one = decoder(alone)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for given in (s, strided):
                for name, x in zip(NAMES, decoder(given), strict=True):
                    assert torch.equal(x, expected[name]), name
            assert all(torch.equal(a, b) for a, b in zip(decoder(alone), one, strict=True))
            torch.autograd.grad(decoder(alone)[0].sum(), s.combine)
    finally:
        torch.set_num_threads(before)


def test_no_gradients_without_grad_mode():
    s = make()
    with torch.no_grad():
        actual = decoder(s)
    assert all(torch.equal(a, b) for a, b in zip(actual, decoder(s), strict=True))
    assert not any(t.requires_grad for t in actual)


def test_batched_gradients_and_vmap():
    s = make(T=2)
    vectors = decoder(s)[0]
    upstream = torch.randn(3, *vectors.shape, dtype=torch.float64)
    expected = [torch.autograd.grad(vectors, s.combine, g, retain_graph=True)[0] for g in upstream]
    batched = torch.autograd.grad(vectors, s.combine, upstream, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack(expected))

    def run(gates):
        return DecoderFunction.apply(s.layers(), s.scale, gates, *s.tensors()[1:])[0]

    gates = torch.stack((s.gates.detach(), s.gates.detach() * 0.5))
    torch.testing.assert_close(torch.func.vmap(run)(gates), torch.stack([run(g) for g in gates]))


OPERATORS = {"additive": {}, "dot": dict(dot=True), "no masks": dict(masked=False)}


@pytest.mark.parametrize("kind", OPERATORS)
def test_opcheck(kind):
    for name in ("decoder_forward", "decoder_backward"):
        arguments = getattr(calls, name)(**OPERATORS[kind])
        torch.library.opcheck(getattr(torch.ops.fastseq, name).default, arguments)


@pytest.mark.parametrize("operator", ["decoder_forward", "decoder_backward"])
def test_every_tensor_of_another_kind_gets_a_sentence(operator):
    op = getattr(torch.ops.fastseq, operator).default
    arguments = getattr(calls, operator)()
    for k, argument in enumerate(op._schema.arguments):
        if not isinstance(arguments[k], torch.Tensor):
            continue
        for wrong in (arguments[k][..., :0], arguments[k].to(torch.bfloat16)):
            with pytest.raises(RuntimeError, match=f"{operator}: .* must have"):
                op(*arguments[:k], wrong, *arguments[k + 1 :])
        assert argument.name
