"""``fastseq.LSTM`` against ``nn.LSTM`` and the float64 oracle: outputs, final states and every gradient."""

import itertools
import random
from dataclasses import dataclass, fields

import pytest
import torch
from backends import serving_lstm
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq import LSTM
from fastseq.testing.numerics import assert_all_accurate

BACKENDS = serving_lstm()


@dataclass(frozen=True)
class Case:
    """One combination of options; the fields are the axes of the grid."""

    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    proj_size: int = 0
    form: str = "padded"  # padded, sorted (packed), unsorted (packed), lengths, unbatched
    hx: bool = True
    input_size: int = 7
    hidden_size: int = 7
    steps: int = 5
    batch: int = 3
    sliced: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self):
        default = Case()
        parts = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        ]
        return ",".join(parts).replace("torch.", "") or "default"


AXES = {
    "layers": [1, 2, 3],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "proj_size": [0, 3],
    "form": ["padded", "sorted", "unsorted", "lengths", "unbatched"],
    "hx": [True, False],
    "input_size": [1, 7, 64, 257],
    "hidden_size": [1, 7, 64, 257],
    "steps": [1, 5],
    "batch": [1, 3],
    "sliced": [False, True],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
}


def pairwise() -> list[Case]:
    """Cases in which every pair of values of every two axes occurs: greedy, deterministic."""
    names = list(AXES)
    open_pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(AXES[names[a]]))
        for y in range(len(AXES[names[b]]))
    }
    cases = []
    while open_pairs:
        row = dict(sorted(open_pairs)[0])
        for axis, name in enumerate(names):
            if axis not in row:
                gains = [
                    sum(tuple(sorted(((axis, v), chosen))) in open_pairs for chosen in row.items())
                    for v in range(len(AXES[name]))
                ]
                row[axis] = max(range(len(gains)), key=lambda v: (gains[v], (v + len(cases)) % len(gains)))
        open_pairs -= set(itertools.combinations(sorted(row.items()), 2))
        cases.append(Case(**{name: AXES[name][row[axis]] for axis, name in enumerate(names)}))
    return [fix(case) for case in cases]


def fix(case: Case) -> Case:
    """Make the combination legal: a projection is narrower than the hidden state, unbatched means one sequence."""
    changes = {}
    if case.proj_size >= case.hidden_size:
        changes["proj_size"] = 0
    if case.form == "unbatched":
        changes["batch"] = 1
    return Case(**{**{f.name: getattr(case, f.name) for f in fields(case)}, **changes})


def lengths_for(case: Case) -> torch.Tensor:
    lengths = torch.randint(1, case.steps + 1, (case.batch,))
    lengths[-1] = case.steps
    return lengths.sort(descending=True)[0] if case.form == "sorted" else lengths


def build(case: Case, cls, **extra):
    options = dict(
        bias=case.bias, batch_first=case.batch_first, bidirectional=case.bidirectional, proj_size=case.proj_size
    )
    return cls(case.input_size, case.hidden_size, case.layers, **options, **extra)


def draw(case: Case):
    """Input (T, B, I) or (B, T, I) and hx, rounded to the case's dtype."""
    shape = (case.batch, case.steps, case.input_size) if case.batch_first else (case.steps, case.batch, case.input_size)
    if case.sliced:  # every axis is strided
        x = torch.randn(*(2 * n for n in shape))[tuple(slice(None, None, 2) for _ in shape)].to(case.dtype)
        x = torch.empty_strided(shape, [2 * s for s in torch.empty(shape).stride()], dtype=case.dtype).copy_(x)
    else:
        x = torch.randn(shape, dtype=torch.float32).to(case.dtype)
    rows = case.layers * (2 if case.bidirectional else 1)
    h = torch.randn(rows, case.batch, case.proj_size or case.hidden_size).to(case.dtype)
    c = torch.randn(rows, case.batch, case.hidden_size).to(case.dtype)
    return x, (h, c) if case.hx else None


def run(module, case: Case, x, hx, lengths, dtype, pack: bool):
    """Outputs, and gradients of every input and parameter, by name; the loss depends on all outputs."""
    x = x.detach().to(dtype).requires_grad_() if x.dtype != dtype else x.detach().requires_grad_()
    hx = None if hx is None else tuple(s.detach().to(dtype).requires_grad_() for s in hx)
    leaves = {"input": x, **dict(module.named_parameters())}
    if hx is not None:
        leaves |= {"h0": hx[0], "c0": hx[1]}
    batch_dim = 0 if case.batch_first else 1
    if case.form == "unbatched":
        output, (h, c) = module(x.squeeze(batch_dim), hx and tuple(s.squeeze(1) for s in hx))
    elif case.form == "padded":
        output, (h, c) = module(x, hx)
    elif pack:
        packed = pack_padded_sequence(x, lengths, case.batch_first, enforce_sorted=case.form == "sorted")
        output, (h, c) = module(packed, hx)
        output, _ = pad_packed_sequence(output, case.batch_first, total_length=case.steps)
    else:
        output, (h, c) = module(x, hx, lengths=lengths)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
        for out in (output, h, c)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "h_n": h, "c_n": c}, dict(zip(leaves, grads, strict=True))


def results(case: Case, backend: str, seed: int):
    """One draw: (outputs, gradients) of fastseq, of the oracle and of torch in the same dtype."""
    torch.manual_seed(seed)
    theirs = build(case, nn.LSTM, dtype=torch.float32)
    with torch.no_grad():  # gates of order 1 for every I and H: saturated gates hide errors; test_dropin.py tests them
        theirs.weight_ih_l0.mul_(min(1.0, (case.hidden_size / case.input_size) ** 0.5))
    theirs = theirs.to(case.dtype)
    ours = build(case, LSTM, dtype=case.dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    oracle = build(case, nn.LSTM, dtype=torch.float64)
    oracle.load_state_dict(theirs.state_dict())
    x, hx = draw(case)
    lengths = lengths_for(case)
    return (
        run(ours, case, x, hx, lengths, case.dtype, pack=case.form in ("sorted", "unsorted")),
        run(oracle, case, x, hx, lengths, torch.float64, pack=True),
        run(theirs, case, x, hx, lengths, case.dtype, pack=True),
    )


def check(case: Case, backend: str, seed: int = 0, draws: int = 3) -> None:
    actual, expected, baseline = zip(*(results(case, backend, seed + k) for k in range(draws)), strict=True)
    for kind, factor in ((0, 2), (1, 3)):
        stacked = [
            {name: torch.stack([r[kind][name] for r in side]) for name in expected[0][kind]}
            for side in (actual, expected, baseline)
        ]
        assert_all_accurate(*stacked, factor=factor)


def serves(backend: str, case: Case) -> bool:
    return backend in serving_lstm(proj_size=case.proj_size)


GRID = [(case, backend) for case in pairwise() for backend in BACKENDS if serves(backend, case)]


@pytest.mark.parametrize(("case", "backend"), GRID, ids=lambda value: str(value))
def test_parity(case, backend):
    check(case, backend)


def test_parity_drawn():
    generator = random.Random(0)
    for _ in range(150):
        options = {name: generator.choice(values) for name, values in AXES.items()}
        options |= {name: generator.randint(1, 40) for name in ("input_size", "hidden_size")}
        options |= {name: generator.randint(1, 9) for name in ("steps", "batch")}
        case, backend, seed = fix(Case(**options)), generator.choice(BACKENDS), generator.randint(0, 1000)
        try:
            if serves(backend, case):
                check(case, backend, seed)
        except AssertionError as error:
            raise AssertionError(f"{error}\ncheck({case!r}, {backend!r}, {seed})") from error
