"""Random calls of the native LSTM and cell against float64: ``python tests/fuzz_native.py --cases 500 --seed 0``.

Outputs and every gradient, through the public modules and ops. A case that fails is printed as a call that repeats it.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastseq import LSTM, LSTMCell, _native, ops
from fastseq.ops.lstm import layout
from fastseq.testing import assert_all_accurate, max_error

DTYPES = ("float32", "bfloat16", "float64", "float16")
SIZES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 70, 100, 128, 130, 200, 257)
BUDGET = 40_000_000  # multiply-adds of one case: about a tenth of a second


@dataclass(frozen=True)
class Case:
    """One call. T, B, I, H: steps, batch, input and hidden size; form: "full", "lengths" or "packed"."""

    op: str  # lstm or cell
    seed: int
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    reverse: bool = False  # through the op; then one layer and direction
    bias: bool = True
    form: str = "full"
    strided: bool = False
    dtype: str = "float32"
    threads: int = 1


def draw(rng: random.Random, op: str, budget: int = BUDGET) -> Case:
    """A case within the budget; small and awkward sizes are as likely as large ones."""
    seed = rng.randrange(10**6)
    while True:
        case = Case(
            op,
            seed,
            T=1 if op == "cell" else rng.choice((1, 2, 3, 7, 20, 50, 130, 300)),
            B=rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 30, 65, 130)),
            I=rng.choice(SIZES),
            H=rng.choice(SIZES),
            layers=rng.choice((1, 1, 2)),
            bidirectional=rng.random() < 0.5,
            reverse=rng.random() < 0.2,
            bias=rng.random() < 0.8,
            form="full" if op == "cell" else rng.choice(("full", "lengths", "packed")),
            strided=rng.random() < 0.3,
            dtype=rng.choice((*DTYPES, "float32", "bfloat16")),
            threads=rng.choice((1, 2, 3)),
        )
        if case.T * case.B * case.H * (case.I + case.H) * 4 * case.layers <= budget:
            return case


def randn(*shape: int, strided: bool = False, dtype: torch.dtype) -> torch.Tensor:
    """Normal values rounded to ``dtype``; ``strided``: every second element of something twice as large."""
    if not strided:
        return torch.randn(shape).to(dtype)
    return torch.randn([2 * n for n in shape]).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]


class Problem:
    """The tensors of a case and how it is called with them."""

    def __init__(self, case: Case):
        torch.manual_seed(case.seed)
        self.case, dtype = case, getattr(torch, case.dtype)
        T, B, H = case.T, case.B, case.H
        one_way = case.reverse or case.op == "cell"
        self.options = dict(num_layers=1 if one_way else case.layers, bidirectional=case.bidirectional and not one_way)
        self.options |= dict(bias=case.bias)
        module = LSTM(case.I, H, **self.options)
        with torch.no_grad():  # gates of order 1: saturated ones hide errors
            for name, weight in module.named_parameters():
                if name.startswith("weight_ih_l0"):
                    weight.mul_((H / case.I) ** 0.5)
        self.weights = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
        self.lengths, self.batch_sizes, rows = None, None, (T, B)
        if case.form == "lengths":
            self.lengths = torch.randint(0, T + 1, (B,))
        if case.form == "packed":
            lengths = torch.randint(1, T + 1, (B,))
            self.batch_sizes = layout.valid_steps(lengths, int(lengths.max())).sum(1)
            rows = (int(lengths.sum()),)
        if case.op == "cell":
            rows = (B,)
        states = self.options["num_layers"] * (2 if self.options["bidirectional"] else 1)
        self.x = randn(*rows, case.I, strided=case.strided, dtype=dtype)
        self.h0, self.c0 = (randn(states, B, H, strided=case.strided, dtype=dtype) for _ in range(2))

    def call(self, x, h0, c0, weights: dict, backend: str) -> dict[str, torch.Tensor]:
        case = self.case
        if case.op == "cell":
            weights = {name.removesuffix("_l0"): w for name, w in weights.items()}
            module = LSTMCell(case.I, case.H, case.bias, dtype=x.dtype, backend=backend)
            h_n, c_n = torch.func.functional_call(module, weights, (x, (h0[0], c0[0])))
            return {"h_n": h_n, "c_n": c_n}
        sizes = {"lengths": self.lengths, "batch_sizes": self.batch_sizes}
        if case.reverse:
            hx = (h0[0], c0[0])
            output, states = ops.lstm(x, hx, *weights.values(), **sizes, reverse=True, backend=backend)
        else:
            output, states = self.through_the_module(x, h0, c0, weights, backend)
        return {"output": output, "h_n": states[0], "c_n": states[1]}

    def through_the_module(self, x, h0, c0, weights: dict, backend: str):
        module = LSTM(self.case.I, self.case.H, **self.options, dtype=x.dtype, backend=backend)
        if self.batch_sizes is not None:
            x = torch.nn.utils.rnn.PackedSequence(x, self.batch_sizes)
        lengths = {} if self.lengths is None else {"lengths": self.lengths}
        output, states = torch.func.functional_call(module, weights, (x, (h0, c0)), lengths)
        return (output if self.batch_sizes is None else output.data), states

    def run(self, backend: str, dtype: torch.dtype) -> tuple[dict, dict]:
        """Named results, and the gradients of all leaves for random gradients of all results."""
        leaves = {"input": self.x, "h0": self.h0, "c0": self.c0, **self.weights}
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
        results = self.call(*list(leaves.values())[:3], dict(list(leaves.items())[3:]), backend)
        generator = torch.Generator().manual_seed(self.case.seed)
        upstream = [torch.randn(t.shape, generator=generator).to(self.x.dtype).to(dtype) for t in results.values()]
        grads = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
        return results, dict(zip(leaves, grads, strict=True))


def check(case: Case) -> None:
    """AssertionError unless the native backend is as accurate as torch's own kernels."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads)
        problem = Problem(case)
        native = problem.run("native", problem.x.dtype)
        torch.set_num_threads(1)
        oracle = problem.run("reference", torch.float64)
        baselines = [problem.run(backend, problem.x.dtype) for backend in ("torch", "reference")]
    finally:
        torch.set_num_threads(before)
    for kind, factor in ((0, 2.0), (1, 3.0)):
        baseline = {name: _less_lucky([b[kind][name] for b in baselines], want) for name, want in oracle[kind].items()}
        assert_all_accurate(native[kind], oracle[kind], baseline, factor=factor)


def _less_lucky(results: list[torch.Tensor], oracle: torch.Tensor) -> torch.Tensor:
    """Of torch's two ways to compute one thing, the vendor's kernel and op by op, the one that is further off.

    In one case of some hundreds the rounding errors of either happen to cancel.
    """
    return max(results, key=lambda result: max_error(result, oracle))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    parser.add_argument("--op", choices=("lstm", "cell"), help="only this one (default: nine of ten are lstm)")
    parser.add_argument("--library", type=Path, help="stop unless the compiled operators come from this folder")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first case that fails")
    args = parser.parse_args()
    loaded = sys.modules["fastseq._C"].__file__ if _native.available() else _native.why_not()
    if not _native.available() or (args.library and not Path(loaded).is_relative_to(args.library.resolve())):
        parser.error(f"expected the compiled operators of {args.library or 'this environment'}, got: {loaded}")
    rng, failures, start = random.Random(args.seed), 0, time.monotonic()
    for done in range(args.cases):
        case = draw(rng, args.op or rng.choices(("lstm", "cell"), (9, 1))[0])
        print(f"\r[{done + 1}/{args.cases}] {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)
        try:
            check(case)
        except (AssertionError, RuntimeError) as error:
            failures += 1
            print(f"\n{error}\ncd tests && python -c 'from fuzz_native import *; check({case!r})'".replace("'", '"'))
            if not args.keep_going:
                break
    print(file=sys.stderr)
    print(f"{failures} of {done + 1} cases failed" if failures else f"{args.cases} cases passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
