"""``fastseq warmup``: compile the Triton kernels of a hidden size ahead of time, so that no training step waits for it.

Compiles for this machine's GPU, or with ``--chip`` for the GPU of another machine. The kernels go to Triton's cache
(``TRITON_CACHE_DIR``, else ``~/.triton/cache``), which may be copied to the same path of another machine.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence
from functools import partial

import torch

from fastseq import ops
from fastseq.console import Bar
from fastseq.errors import SuggestingParser, UserError
from fastseq.ops.common.triton.runtime import CHIPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("recurrent_dropout", "zoneout_hidden", "zoneout_cell", "layer_norm")  # options of fastseq.LSTM


def warmup(
    hidden_size: int,
    dtype: torch.dtype,
    *,
    attention_size: int | None = None,
    classes: int | None = None,
    variant: Sequence[str] = (),
    coverage: bool = False,
    chip: str | None = None,
) -> None:
    """Run forward and backward of each Triton op on zeros, in every variant that training can reach.

    Losses on all results, on the outputs only, on the last states only. float32 products follow torch's current
    setting of TF32.

    Args:
        hidden_size: H of ``lstm`` and ``lstm_cell``; D of ``attention``.
        dtype: float32, bfloat16 or float16.
        attention_size: A of ``attention``; default: the hidden size.
        classes: V of ``linear_cross_entropy``; None: leave it out.
        variant: the options of ``VARIANTS`` that the LSTM combines, for ``lstm_variant``; none: leave it out.
        coverage: additive attention with coverage too.
        chip: a key of ``fastseq.ops.common.triton.runtime.CHIPS``, to compile for without running. Default: this GPU.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: no GPU and no ``chip``.
    """
    from fastseq.ops.common.triton.compile import compiling_for

    device = "cuda" if chip is None else "cpu"
    runs = {"lstm_cell": partial(_cell, hidden_size, dtype, device)}
    for reverse, with_lengths in itertools.product((False, True), repeat=2):
        name = "lstm" + ", reverse" * reverse + ", lengths" * with_lengths
        runs[name] = partial(_lstm, hidden_size, dtype, device, reverse, with_lengths)
    for score in ("dot", "additive"):
        sizes = attention_size or hidden_size, hidden_size
        runs[f"{score} attention"] = partial(_attention, score, *sizes, dtype, device)
    if coverage:
        runs["attention with coverage"] = partial(_attention, "additive", *sizes, dtype, device, coverage=True)
    if variant:
        runs["lstm_variant"] = partial(_variant, hidden_size, dtype, device, frozenset(variant))
    if classes is not None:
        runs["linear_cross_entropy"] = partial(_loss, classes, hidden_size, dtype, device)
    bar = Bar(len(runs))
    with contextlib.nullcontext() if chip is None else compiling_for(CHIPS[chip]), torch.enable_grad():
        for name, run in runs.items():
            bar.show(name)
            run()
            bar.step()
    bar.close()


def _zeros(dtype, device, *shapes) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def _cell(H: int, dtype, device) -> None:
    for wanted in ((0, 1), (0,), (1,)):  # h and c; the last step has a loss on h alone
        states = ops.lstm_cell(*_zeros(dtype, device, (1, 4 * H), (1, H)), backend="triton")
        sum(states[k].sum() for k in wanted).backward()


def _lstm(H: int, dtype, device, reverse: bool, with_lengths: bool) -> None:
    shapes = ((2, 1, H), (1, H), (1, H), (4 * H, H), (4 * H, H), (4 * H,), (4 * H,))
    lengths = torch.ones(1, dtype=torch.int64, device=device) if with_lengths else None

    def run(with_cells):
        input, h0, c0, *weights = _zeros(dtype, device, *shapes)
        options = {"lengths": lengths, "reverse": reverse, "return_cell_states": with_cells, "backend": "triton"}
        output, (h_n, c_n), *cells = ops.lstm(input, (h0, c0), *weights, **options)
        return output, h_n, c_n, *cells

    for with_cells in (False, True):
        sum(t.sum() for t in run(with_cells)).backward()
        for alone in (0, 1):  # a loss on the outputs (an encoder's), on the last h
            run(with_cells)[alone].sum().backward()
        with torch.no_grad():
            run(with_cells)


def _variant(H: int, dtype, device, names: frozenset[str]) -> None:
    """Training draws masks; evaluation has rates, which compile to one kernel with and without zoneout."""
    shapes = ((2, 1, 4 * H), (1, H), (1, H), (4 * H, H), (4 * H,), (H,), (H,))

    def run(train: bool, lengths, with_cells: bool):
        gates, h0, c0, weight, *norms = _zeros(dtype, device, *shapes)
        options = {"lengths": lengths, "return_cell_states": with_cells, "backend": "triton"}
        if train:
            options |= {
                name: torch.ones(2, 1, H, dtype=torch.bool, device=device) for name in names if "zoneout" in name
            }
        if train and "recurrent_dropout" in names:
            options["hidden_mask"] = torch.ones(1, H, device=device)
        if "layer_norm" in names:
            options["norms"] = tuple(norms)
        output, (h_n, c_n), *cells = ops.lstm_variant(gates, (h0, c0), weight, **options)
        return output, h_n, c_n, *cells

    for lengths, with_cells in itertools.product(
        (None, torch.ones(1, dtype=torch.int64, device=device)), (False, True)
    ):
        sum(t.sum() for t in run(True, lengths, with_cells)).backward()
        for alone in (0, 1):
            run(True, lengths, with_cells)[alone].sum().backward()
        with torch.no_grad():
            run(False, lengths, with_cells)


def _attention(score: str, A: int, D: int, dtype, device, coverage: bool = False) -> None:
    query, keys, values, v, b, c, w = _zeros(
        dtype, device, (1, 2, A), (1, 2, A), (1, 2, D), (A,), (A,), (1, 2, 2), (A,)
    )
    covered = {"coverage": c, "coverage_weight": w} if coverage else {}
    lengths, mask = (
        torch.ones(1, dtype=torch.int64, device=device),
        torch.ones(1, 2, 2, dtype=torch.bool, device=device),
    )
    paddings = ({}, {"lengths": lengths}, {"mask": mask[:, 0]}, {"mask": mask})
    for more in ({"weight": v}, {"weight": v, "bias": b}) if score == "additive" else ({},):
        for need_weights, padding in itertools.product((False, True), paddings):
            options = covered | {"score": score, "need_weights": need_weights, "backend": "triton"}
            context, weights = ops.attention(query, keys, values, **more, **padding, **options)
            (context.sum() if weights is None else context.sum() + weights.sum()).backward()


def _loss(V: int, H: int, dtype, device) -> None:
    target = torch.zeros(2, dtype=torch.int64, device=device)
    for reduction in ("sum", "none"):
        input, weight, bias = _zeros(dtype, device, (2, H), (V, H), (V,))
        options = {"label_smoothing": 0.1, "reduction": reduction, "backend": "triton"}
        ops.linear_cross_entropy(input, weight, target, bias, **options).sum().backward()
        with torch.no_grad():
            ops.linear_cross_entropy(input, weight, target, bias, **options)


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq warmup``."""
    example = "example: fastseq warmup --hidden-size 512 --dtype bf16 --chip sm_90"
    parser = SuggestingParser(prog="fastseq warmup", description=__doc__.replace("``", ""), epilog=example)
    parser.add_argument("--hidden-size", type=int, required=True, metavar="H", help="of the LSTMs (required)")
    parser.add_argument("--attention-size", type=int, metavar="A", help="default: the hidden size")
    parser.add_argument("--classes", type=int, metavar="V", help="vocabulary of the loss; default: leave the loss out")
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=[], help="options that the LSTM combines; default: none"
    )
    parser.add_argument("--coverage", action="store_true", help="additive attention with coverage too")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the calls; default: %(default)s")
    parser.add_argument("--tf32", action="store_true", help="for set_float32_matmul_precision('high'): fp32 in TF32")
    parser.add_argument(
        "--chip", choices=sorted(CHIPS), help="compile for the GPU of another machine; default: this one's"
    )
    args = parser.parse_args(argv)
    if min(args.hidden_size, args.attention_size or 1, 1 if args.classes is None else args.classes) < 1:
        parser.error("sizes must be at least 1")
    if args.chip is None and not torch.cuda.is_available():
        raise UserError(f"this machine has no GPU; name one to compile for: --chip {', '.join(sorted(CHIPS))}")
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    try:
        options = {name: getattr(args, name) for name in ("attention_size", "classes", "variant", "coverage", "chip")}
        from fastseq.ops.common.triton.compile import counting

        with counting() as count:
            warmup(args.hidden_size, DTYPES[args.dtype], **options)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("triton"):
            raise
        raise UserError("triton is not installed; pip install triton (CUDA builds of torch bring it)") from error
    where = args.chip or torch.cuda.get_device_name()
    seconds = f"{time.perf_counter() - start:.1f} s"
    found = f"{count[False]} kernels; {count[True]} were in the cache"
    print(f"compiled for {where}, H={args.hidden_size}, {args.dtype}: {seconds}, {found}")
