"""`fastseq generate`: lines in, predictions out."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from jsonargparse import ArgumentParser, Namespace

from fastseq.errors import UserError
from fastseq.seq2seq.ensemble import Ensemble
from fastseq.training.data import Sequences
from fastseq.training.decode import Hypothesis
from fastseq.training.decoding import Decoding
from fastseq.training.explanation import STEPS, ExplanationFolder, explain
from fastseq.training.features import encode_sources
from fastseq.training.options import Beams, Count, Steps, command_parser, parsed
from fastseq.training.reading import decoded_lines
from fastseq.training.search_options import add_search_options
from fastseq.training.tokenizer import EOS
from fastseq.training.trained import TrainedModel


def generate_parser() -> ArgumentParser:
    """The options of `fastseq generate`."""
    parser = command_parser(
        "generate",
        "Read source lines, write predictions: one line for each, or --n-best lines with their scores "
        "(prediction<TAB>score). --output-scores adds the log-probability of each token, --output-attentions the "
        "alignment, as further columns. An empty line stays empty. A run on features reads the lines of a manifest, "
        "one with tags source<TAB>tags.",
        "echo hello | fastseq generate runs/mine --num-beams 5 --n-best 3",
    )
    parser.add_argument("run", type=str, nargs="+", help="run or saved model; several make an ensemble")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--input", type=str, default="-", help="file of source lines, - for standard input")
    parser.add_argument("--output", type=str, default="-", help="file to write, - for standard output")
    parser.add_argument(
        "--n_best", "--num_return_sequences", type=Beams, default=1, help="predictions for each line, with scores"
    )
    add_search_options(parser)
    parser.add_argument(
        "--output_attentions",
        type=bool,
        default=False,
        help="the alignment as well: source-target pairs of token numbers from 0, by the largest attention",
    )
    parser.add_argument("--plot_attention", type=str | None, help="folder for a heat map of each line (NUMBER.png)")
    parser.add_argument(
        "--explain",
        type=str | None,
        help="folder for explanations of the best prediction of each line: attention, gradient x input and integrated "
        "gradients as heat maps (NUMBER.png), numbers (explanations.jsonl) and alignments (METHOD.align)",
    )
    parser.add_argument(
        "--explain_steps", type=Steps, default=STEPS, help="points of the integral of integrated gradients"
    )
    parser.add_argument("--checkpoint", type=Literal["best", "last"] | None, help="weights of a run, default best")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto: cuda where there is one")
    parser.add_argument("--batch_lines", type=Count, default=256, help="lines read, decoded and written together")
    return parser


def check_beams(options: Namespace) -> Namespace:
    """The options; raises UserError for a beam that is smaller than `--n-best`."""
    if options.num_beams is not None and not options.do_sample and options.n_best > options.num_beams:
        raise UserError(
            f"--n-best {options.n_best} needs a beam of at least that size, got --num-beams {options.num_beams}; "
            f"give --num-beams {options.n_best} or leave it out"
        )
    return options


def opened(path: str, mode: str, standard: IO | None) -> AbstractContextManager[IO]:
    """The file at `path`, or `standard` for "-"; raises UserError when the file cannot be opened."""
    if path == "-":
        if standard is None:
            raise UserError(f"standard {'input' if 'b' in mode else 'output'} is closed; give a file")
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(encoding="utf-8")  # as the input is read, whatever the locale
        return nullcontext(standard)
    try:
        return Path(path).open(mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened: {error.strerror}; give a file or - for standard input/output"
        ) from error


def in_groups(lines: Iterable[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    """Successive lists of at most `size` lines."""
    lines = iter(lines)
    while group := list(islice(lines, size)):
        yield group


class Generator:
    """A loaded run that turns lines into output lines."""

    def __init__(self, options: Namespace) -> None:
        trained = TrainedModel.from_pretrained(options.run, checkpoint=options.checkpoint, device=options.device)
        self.options = options
        self.decoding = Decoding(options, trained, options.n_best)
        self.tokenizers = self.decoding.tokenizers
        self.pictures = Path(options.plot_attention) if options.plot_attention else None
        wanted = {"--plot-attention": self.pictures is not None, "--output-attentions": options.output_attentions}
        self.attention = any(wanted.values())
        if self.attention and trained.model.config.attention == "none":
            name = next(name for name, value in wanted.items() if value)
            raise UserError(f"{name} has nothing to show: the model has attention none; leave it out")
        if options.explain and isinstance(trained.model, Ensemble):
            raise UserError("--explain needs one model, an ensemble is several; give one run")
        self.explanations = ExplanationFolder(options.explain) if options.explain else None
        if self.pictures is not None:
            self.pictures.mkdir(parents=True, exist_ok=True)

    def __call__(self, group: list[tuple[int, str]]) -> Iterator[str]:
        """The output lines for numbered source lines."""
        filled = [(number, line) for number, line in group if line.strip()]
        sources, note = encode_sources(
            self.tokenizers[0], filled, self.options.input, f"lines {group[0][0]}-{group[-1][0]}"
        )
        if note:
            print(note, file=sys.stderr)
        lines, rows = [line for _, line in filled], [number - 1 for number, _ in filled]
        found = self.decoding(sources, lines, rows, attention=self.attention)
        hypotheses = {number: best for (number, _), best in zip(filled, found, strict=True)}
        if self.explanations is not None:
            self._explain(group, filled, sources, hypotheses)
        if self.pictures is not None:
            from fastseq.training.evaluate import picture  # needs matplotlib

            for row, (number, _) in enumerate(filled):
                file = self.pictures / f"{number:04d}.png"
                picture(
                    hypotheses[number][0],
                    sources,
                    row,
                    self.tokenizers,
                    self.decoding.model.config.time_reduction,
                    file,
                )
        for number, _ in group:
            for hypothesis in hypotheses.get(number, []):
                yield "\t".join(self._columns(hypothesis))
            if number not in hypotheses:
                yield from [""] * self.options.n_best

    def _explain(
        self,
        group: list[tuple[int, str]],
        filled: list[tuple[int, str]],
        sources: Sequences,
        hypotheses: dict[int, list[Hypothesis]],
    ) -> None:
        """Write the explanations of the best predictions of `filled`, the lines of `group` that are not empty."""
        targets = Sequences(hypotheses[number][0].ids for number, _ in filled)
        found = explain(self.decoding.model, sources, targets, self.tokenizers, steps=int(self.options.explain_steps))
        numbered = {number: one for (number, _), one in zip(filled, found, strict=True)}
        self.explanations.add([(number, numbered.get(number)) for number, _ in group])

    def _columns(self, hypothesis: Hypothesis) -> Iterator[str]:
        yield hypothesis.text
        if self.options.n_best > 1 or self.options.output_scores:
            yield f"{hypothesis.score:.4f}"
        if self.options.output_scores:
            yield " ".join(f"{score:.4f}" for score in hypothesis.token_scores)
        if self.options.output_attentions:
            pairs = zip(hypothesis.ids, hypothesis.alignment, strict=True)
            yield " ".join(f"{source}-{place}" for place, (token, source) in enumerate(pairs) if token != EOS)


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq generate`; `argv` without the command's own name."""
    options = check_beams(parsed(generate_parser(), sys.argv[1:] if argv is None else argv))
    generator = Generator(options)
    with (
        opened(options.input, "rb", getattr(sys.stdin, "buffer", None)) as source,
        opened(options.output, "w", sys.stdout) as destination,
    ):
        number = 0
        for group in in_groups(decoded_lines(source, options.input), options.batch_lines):
            number = group[-1][0]
            for line in generator(group):
                print(line, file=destination)
            destination.flush()
        generator.decoding.check_number(number)
