"""`fastseq evaluate`: how good a run is on a test file, with predictions and attention pictures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser

from fastseq.training import metrics
from fastseq.training.data import Sequences, encode, group_references, read_pairs
from fastseq.training.decode import Hypothesis, decode
from fastseq.training.folder import RunFolder
from fastseq.training.options import ReferenceResult, underscored
from fastseq.training.plots import plot_attention
from fastseq.training.tokenizer import TextTokenizer


def evaluate_parser() -> ArgumentParser:
    """The options of `fastseq evaluate`."""
    parser = ArgumentParser(
        prog="fastseq evaluate",
        description="Measure a run on a test file. Writes evaluation.json, predictions.tsv and attention/*.png.",
        epilog="Example: fastseq evaluate runs/mine --data test.tsv --num-beams 5",
    )
    parser.add_argument("run", type=str, help="run folder made by `fastseq train`")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--data", type=str, required=True, help="source<TAB>target lines, or several per source")
    parser.add_argument("--output", type=str | None, help="folder to write to, default the run folder")
    parser.add_argument("--num_beams", type=int, default=1, help="beam size, 1 for greedy decoding")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="which weights")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto: cuda where there is one")
    parser.add_argument("--max_tokens", type=int, default=4096, help="source tokens times beams in a batch")
    parser.add_argument("--pictures", type=int, default=4, help="attention heat maps, of sources spread over the file")
    return parser


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def write_predictions(
    path: Path, references: dict[str, list[str]], predictions: Sequence[str], tokenizer: TextTokenizer
) -> None:
    """Write one line for each source: source, prediction, references joined by " | ", and correct as 1 or 0."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(["source", "prediction", "references", "correct"])
        for (source, refs), prediction in zip(references.items(), predictions, strict=True):
            correct = tokenizer.units(prediction) in [tokenizer.units(ref) for ref in refs]
            writer.writerow([source, prediction, " | ".join(refs), int(correct)])


def picture(
    hypothesis: Hypothesis, source: Sequences, row: int, tokenizers: tuple[TextTokenizer, TextTokenizer], path: Path
) -> None:
    """Draw the attention of one hypothesis for source number `row`."""
    tokens, _ = source.padded(torch.tensor([row]))
    names = tokenizers[0].tokens(tokens[0].tolist())
    plot_attention(hypothesis.attention, names, tokenizers[1].tokens(hypothesis.ids), path)


def comparison(ours: dict[str, float], published: Sequence[ReferenceResult]) -> str:
    """A table of our error rates above published ones."""
    rows = [ReferenceResult("this run", ours["sequence_error_rate"], ours["token_error_rate"]), *published]
    width = max(len(row.name) for row in rows)

    def number(value: float | None) -> str:
        return "     –" if value is None else f"{value:6.2f}"

    lines = [f"{'':<{width}}  WER %   PER %"]
    lines += [
        f"{row.name:<{width}} {number(row.sequence_error_rate)}  {number(row.token_error_rate)}  {row.note}".rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq evaluate`; `argv` without the command's own name."""
    options = evaluate_parser().parse_args(underscored(sys.argv[1:] if argv is None else argv))
    folder = RunFolder(options.run)
    config = folder.load_config()
    references = group_references(read_pairs(options.data))
    model = folder.load_model(options.checkpoint).to(pick_device(options.device))
    tokenizers = folder.load_tokenizers()
    sources, note = encode(tokenizers[0], list(references), options.data)
    if note:
        print(note)
    pictures = min(options.pictures, len(references)) if model.config.attention != "none" else 0
    decoding = {"num_beams": options.num_beams, "max_tokens": options.max_tokens}
    best = [h for (h,) in decode(model, sources, tokenizers[1], progress=sys.stderr.isatty(), **decoding)]
    predictions = [hypothesis.text for hypothesis in best]
    values = metrics.score(predictions, list(references.values()), tokenizers[1], text=config.data.text_metrics)

    output = Path(options.output or options.run)
    (output / "attention").mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.tsv", references, predictions, tokenizers[1])
    facts = {"data": options.data, "sources": len(references), "num_beams": options.num_beams}
    facts["checkpoint"] = options.checkpoint
    (output / "evaluation.json").write_text(json.dumps(facts | values, indent=2) + "\n", encoding="utf-8")
    rows = (torch.arange(pictures) + 0.5).mul(len(references) / max(pictures, 1)).long()
    chosen = decode(model, sources.select(rows), tokenizers[1], attention=True, **decoding)
    for number, (row, (hypothesis,)) in enumerate(zip(rows.tolist(), chosen, strict=True), start=1):
        picture(hypothesis, sources, row, tokenizers, output / "attention" / f"{number:04d}.png")

    print(f"{options.data}: {len(references):,} sources, checkpoint {options.checkpoint}, {options.num_beams} beam(s)")
    print(metrics.table(values))
    if config.reference_results:
        print("\n" + comparison(values, config.reference_results))
    print(f"\npredictions: {output / 'predictions.tsv'}; pictures: {output / 'attention'}")
