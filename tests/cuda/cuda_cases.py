"""Shared by the CUDA tests: places to run kernels, cases of the LSTM recurrence, oracles in plain torch."""

from typing import NamedTuple

import emulator
import pytest
import torch
from torch import Tensor

from fastseq import _native
from fastseq.testing.numerics import Results, compare, evaluate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("host", "cuda")
GIVEN = ("output", "h_n", "c_n", "cell_states")  # results of a recurrence that may have a gradient


class Place(NamedTuple):
    """A place where kernels run: ``operators`` (a torch.ops namespace) on tensors of ``device``."""

    name: str
    operators: object
    device: str


def place_of(name: str) -> Place:
    """Return the place "host" (the host-side device) or "cuda" (a GPU). Skip the test if it is missing."""
    if name == "host":
        if emulator.compiler() is None:
            pytest.skip("the host-side device needs a C++ compiler")
        return Place(name, emulator.load(), "cpu")
    if not (torch.cuda.is_available() and _native.build_info().get("cuda_architectures")):
        pytest.skip("no GPU, or the library was built without CUDA kernels")
    return Place(name, torch.ops.fastseq, "cuda")


class Recurrence(NamedTuple):
    """A call of lstm_recurrence_forward: gates (T, B, D * 4H), h0, c0 (D, B, H), weight_hh (D, 4H, H), lengths (B,)."""

    gates: Tensor
    h0: Tensor
    c0: Tensor
    weight_hh: Tensor
    lengths: Tensor | None
    reverse: bool = False
    tf32: bool = False


def recurrence(T, B, H, D=1, dtype=torch.float32, lengths=None, reverse=False, tf32=False, scale=1.0) -> Recurrence:
    """Draw a random case. lengths="mixed": random in 0 .. T; the first is T, the last 0 (B > 1)."""
    mixed = None
    if lengths == "mixed":
        mixed = torch.randint(0, T + 1, (B,))
        mixed[0], mixed[-1] = T, 0
    return Recurrence(
        (scale * torch.randn(T, B, D * 4 * H)).to(dtype),
        torch.randn(D, B, H).to(dtype),
        torch.randn(D, B, H).to(dtype),
        (torch.randn(D, 4 * H, H) / H**0.5).to(dtype),
        mixed,
        reverse,
        tf32,
    )


def plain(case: Recurrence, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the recurrence step by step in torch, in ``dtype`` -> results and differentiable leaves, by name.

    Results: output (T, B, D * H), h_n, c_n (D, B, H), cell_states (T, B, D * H). Zero past the lengths.
    """
    leaves = {n: getattr(case, n).detach().to(dtype).requires_grad_() for n in ("gates", "h0", "c0")}
    outputs, cells, h_n, c_n = [], [], [], []
    for d in range(case.c0.size(0)):
        H = case.c0.size(2)
        gates = leaves["gates"][..., 4 * H * d : 4 * H * (d + 1)]
        weight = case.weight_hh[d].to(dtype)
        run = _one_direction(case, gates, leaves["h0"][d], leaves["c0"][d], weight, case.reverse or d == 1)
        for results, one in zip((outputs, cells, h_n, c_n), run, strict=True):
            results.append(one)
    results = {"output": torch.cat(outputs, -1), "h_n": torch.stack(h_n), "c_n": torch.stack(c_n)}
    return results | {"cell_states": torch.cat(cells, -1)}, leaves


def _one_direction(case, gates, h, c, weight, backwards: bool):
    rounded = _to_tf32 if case.tf32 and gates.dtype == torch.float32 else (lambda x: x)
    weight = rounded(weight)
    hs, cs = [], []
    steps = range(gates.size(0))
    for t in reversed(steps) if backwards else steps:
        i, f, g, o = (gates[t] + rounded(h) @ weight.T).chunk(4, dim=1)
        c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        valid = torch.ones(len(c), 1, dtype=torch.bool) if case.lengths is None else (t < case.lengths).unsqueeze(1)
        h, c = torch.where(valid, h_t, h), torch.where(valid, c_t, c)
        hs.append(torch.where(valid, h_t, 0))
        cs.append(torch.where(valid, c_t, 0))
    hs, cs = (hs[::-1], cs[::-1]) if backwards else (hs, cs)
    return torch.stack(hs), torch.stack(cs), h, c


class _RoundToTF32(torch.autograd.Function):
    """Rounds values and gradients to TF32 (10 bits of mantissa)."""

    @staticmethod
    def forward(ctx, x):
        return _round(x)

    @staticmethod
    def backward(ctx, grad):
        return _round(grad)


def _round(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _to_tf32(x: Tensor) -> Tensor:
    return _RoundToTF32.apply(x)


def oracle_and_baseline(case: Recurrence, gradients: bool) -> tuple[Results, Results]:
    """Return the results of plain torch in float64 and in the dtype of the case."""
    results = []
    for dtype in (torch.float64, case.gates.dtype):
        outputs, leaves = plain(case, dtype)
        results.append(evaluate(outputs, leaves if gradients else {}))
    return results[0], results[1]


def check(actual: Results, case: Recurrence, gradients: bool) -> None:
    """Check every result by the float64 rule, except cell_states past the lengths."""
    oracle, baseline = oracle_and_baseline(case, gradients)
    if case.lengths is not None:
        valid = (torch.arange(case.gates.size(0)).unsqueeze(1) < case.lengths).unsqueeze(-1)
        actual.outputs["cell_states"] = torch.where(valid, actual.outputs["cell_states"], 0)
    actual.outputs["cell_states"] = actual.outputs["cell_states"].to(case.gates.dtype)
    wrong = [str(c) for c in compare(actual, oracle, baseline) if not c.ok]
    assert not wrong, "\n".join(wrong)


def on(place: Place, *tensors: Tensor | None) -> list[Tensor | None]:
    """Copy the tensors to the device of ``place``."""
    return [t if t is None else t.to(place.device) for t in tensors]


def forward(place: Place, case: Recurrence, activations=True, cell_states=True, beside=False) -> list[Tensor]:
    """Call lstm_recurrence_forward -> output, h_n, c_n, activations, cell_states, on the CPU."""
    call = case._replace(**dict(zip(case._fields[:5], on(place, *case[:5]), strict=True)))
    outputs = place.operators.lstm_recurrence_forward(*call, activations, cell_states, beside)
    return [t.cpu() for t in outputs]


def check_forward(place: Place, case: Recurrence, beside=False) -> None:
    """Check every result of the forward by the float64 rule."""
    output, h_n, c_n, _, cell_states = forward(place, case, beside=beside)
    check(Results({"output": output, "h_n": h_n, "c_n": c_n, "cell_states": cell_states}, {}), case, gradients=False)


def check_gradients(place: Place, case: Recurrence, given=GIVEN, beside=False) -> list[Tensor]:
    """Check forward and backward; fastseq.testing.evaluate draws the gradients of the results ``given``."""
    call = case._replace(**dict(zip(case._fields[:5], on(place, *case[:5]), strict=True)))
    output, h_n, c_n, activations, cells = place.operators.lstm_recurrence_forward(*call, True, True, beside)
    results = {"output": output, "h_n": h_n, "c_n": c_n, "cell_states": cells}
    generator, grads = torch.Generator().manual_seed(3), {}
    for name in given:
        factors = torch.randn(results[name].shape, generator=generator).bfloat16()
        grads[name] = factors.to(place.device, case.gates.dtype)
    saved = (activations, cells, call.c0, call.weight_hh, call.lengths)
    outputs = place.operators.lstm_recurrence_backward(
        *(grads.get(name) for name in GIVEN), *saved, case.reverse, case.tf32, beside
    )
    named = dict(zip(("gates", "h0", "c0"), (t.cpu() for t in outputs), strict=True))
    oracle, baseline = (_gradients(case, given, dtype) for dtype in (torch.float64, case.gates.dtype))
    wrong = [str(c) for c in compare(Results({}, named), oracle, baseline) if not c.ok]
    assert not wrong, "\n".join(wrong)
    return outputs


def _gradients(case: Recurrence, given, dtype: torch.dtype) -> Results:
    results, leaves = plain(case, dtype)
    outputs = evaluate({name: results[name] for name in given}, leaves)
    return Results({}, outputs.gradients)
