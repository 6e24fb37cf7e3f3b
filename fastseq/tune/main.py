"""``fastseq tune``: measure this machine once; ``auto`` then takes the faster backend for these and similar calls."""

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from fastseq import dispatch
from fastseq.bench.cases import SHORT, BenchCase, parse_shape
from fastseq.bench.own import load
from fastseq.bench.timing import Setup, measure
from fastseq.console import Bar, markdown_table, quiet_torch
from fastseq.errors import SuggestingParser, UserError
from fastseq.nn import accelerate
from fastseq.tune import record
from fastseq.tune.record import Entry

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SHORT}
WORTH = 1.03  # native must be this much faster: less is within noise
SHAPES = tuple((25, batch, hidden, hidden) for hidden in (128, 256, 512) for batch in (1, 4, 16, 64))
EPILOG = """\
examples:
  fastseq tune                                    # usual sizes in float32, about a minute
  fastseq tune --shape 50,32,40,650 --dtype bfloat16
  fastseq tune --model mymodels:translator        # the calls of a model; the function returns the model and its inputs
  fastseq tune --forget                           # remove the measurements

An entry serves padded calls whose T, B, I and H are each within a factor of 2; the nearest one decides. New entries are
added to earlier ones. They hold for this processor, instruction set, number of threads, torch and fastseq.
`fastseq info` and fastseq.explain name them; FASTSEQ_TUNING=0 ignores them. Run nothing else meanwhile.
"""


def model_shapes(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, (T, B, I, H)) of every padded LSTM call of a forward of a user's model.

    name: "module:function"; the function takes no arguments and returns the model and a tuple of its inputs.

    Raises:
        UserError: no such function, a result of another kind, or no LSTM call.
    """
    model, inputs = load(name)
    model = copy.deepcopy(model)
    accelerate(model)
    with dispatch.record() as choices, torch.no_grad():
        model(*inputs)
    calls = [
        choice.call for choice in choices if choice.op == "lstm" and not (choice.call.packed or choice.call.lengths)
    ]
    if not calls:
        raise UserError(f"--model {name}: its forward makes no padded LSTM call, for which alone backends are measured")
    shapes = [(str(c.dtype).removeprefix("torch."), (c.steps, c.batch, c.input_size, c.hidden_size)) for c in calls]
    return list(dict.fromkeys(shapes))


def measured(shapes: Iterable[tuple[str, tuple[int, ...]]], seconds: float) -> list[Entry]:
    """Time torch and native for each dtype and shape, in inference and training."""
    found, todo = [], list(itertools.product(shapes, (False, True)))
    bar = Bar(len(todo))
    for (dtype, shape), training in todo:
        bar.show(f"{shape} {dtype}, {'training' if training else 'inference'}")
        timings, remarks = measure(
            Setup(BenchCase("", "lstm", *shape, dtype=DTYPES[dtype])), ("native",), training, seconds
        )
        if len(timings) < 2:
            raise UserError(remarks[0])
        ratio = timings[1].ratio
        found.append(Entry(dtype, training, *shape, "native" if ratio >= WORTH else "torch", round(ratio, 3)))
        bar.step()
    bar.close()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="fastseq tune",
        description=__doc__.replace("``", ""),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = "steps, sequences, input and hidden size of an LSTM; may be repeated; default: usual sizes"
    parser.add_argument("--shape", action="append", type=parse_shape, metavar="T,B,I,H", help=shape)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the sizes (default: %(default)s)")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="measure the calls of this model")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per call and mode (default: %(default)s)")
    parser.add_argument("--forget", action="store_true", help="remove the measurements of this machine")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line of ``fastseq tune``."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    file = record.path()
    if args.forget:
        file.unlink(missing_ok=True)
        print(f"{file} is removed")
        return
    known = _known(file)
    if args.model:
        shapes = model_shapes(args.model)
    else:
        shapes = [(args.dtype, shape) for shape in args.shape or SHAPES]
    with quiet_torch():
        found = measured(shapes, args.seconds)
    record.write(file, tuple(({entry[:6]: entry for entry in (*known, *found)}).values()))
    header = ("T, B, I, H", "dtype", "mode", "torch / native", "auto takes")
    print(markdown_table(header, [_line(entry) for entry in found]))
    print(
        f"\nWritten to {file}. Programs with {torch.get_num_threads()} torch threads use it from their next start on."
    )


def _known(file: Path) -> tuple[Entry, ...]:
    """Earlier entries; a damaged or foreign file is named and replaced."""
    try:
        return record.read(file) if file.exists() else ()
    except ValueError as error:
        print(f"fastseq tune: {error}; it is replaced", file=sys.stderr)
        return ()


def _line(entry: Entry) -> tuple[str, ...]:
    mode = "training" if entry.training else "inference"
    return ", ".join(map(str, entry[2:6])), entry.dtype, mode, f"{entry.ratio:.2f}", entry.backend
