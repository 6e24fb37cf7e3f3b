"""`fastseq evaluate`: error rates of a run on a test file, its predictions, attention heat maps."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from fastseq.errors import UserError
from fastseq.training import metrics
from fastseq.training.data import CopySequences, Sequences, group_references, read_pairs
from fastseq.training.decode import LEAST_LENGTH_RATIO, Hypothesis
from fastseq.training.decoding import Decoding
from fastseq.training.features import Features, Source, encode_sources
from fastseq.training.files import refuse_links, write_text
from fastseq.training.folder import RunFolder
from fastseq.training.options import Count, CountOrZero, Flips, Rate, ReferenceResult, Seed, command_parser, parsed
from fastseq.training.plots import plot_attention, plot_attention_over
from fastseq.training.reading import PairFile
from fastseq.training.robustness import FLIPS, RATES
from fastseq.training.saved import is_saved
from fastseq.training.search_options import add_search_options, given_search
from fastseq.training.tagged import Tagged
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.trained import TrainedModel

Tokenizers = tuple[Source, TextTokenizer]


def evaluate_parser() -> ArgumentParser:
    """The options of `fastseq evaluate`."""
    parser = command_parser(
        "evaluate",
        "Measure a run on a test file. Writes evaluation.json, predictions.tsv and attention/*.png.",
        "fastseq evaluate runs/mine --data test.tsv --num-beams 5",
    )
    parser.add_argument("run", type=str, nargs="+", help="run or saved model; several make an ensemble")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--data", type=str, required=True, help="lines of the form of the training file, several per source"
    )
    parser.add_argument("--targets", type=str | None, help="target file; --data then holds sources alone")
    parser.add_argument("--source_column", type=str, default="source", help="of JSONL, CSV, Parquet and Arrow")
    parser.add_argument("--target_column", type=str, default="target", help="of JSONL, CSV, Parquet and Arrow")
    parser.add_argument("--tag_column", type=str, default="tags", help="the same, for a run with tags")
    parser.add_argument(
        "--output",
        type=str | None,
        help="folder to write to, default the run folder; one for each setting keeps all results",
    )
    add_search_options(parser)
    parser.add_argument("--checkpoint", type=Literal["best", "last"] | None, help="weights of a run, default best")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto: cuda where there is one")
    parser.add_argument(
        "--text_metrics",
        type=bool | None,
        help="BLEU, chrF, word and character error rates as well; default: as in training, and with a bpe target",
    )
    parser.add_argument(
        "--metrics", type=str | None, help=f"these values alone, joined by commas: {', '.join(metrics.NAMES)}"
    )
    parser.add_argument("--max_tokens", type=Count, default=4096, help="source tokens times beams in a batch")
    parser.add_argument(
        "--pictures", type=CountOrZero, default=4, help="attention heat maps, of sources spread over the file"
    )
    parser.add_argument(
        "--attack",
        action="store_true",
        help="error rates under noise on the characters and under swapped tokens as well: robustness.json and .png",
    )
    parser.add_argument("--attack_rates", type=list[Rate], default=list(RATES), help="probabilities of a change")
    parser.add_argument(
        "--attack_flips", type=Flips, default=FLIPS, help="most tokens of a source that are swapped; 0 for none"
    )
    parser.add_argument("--attack_sources", type=Count, default=1000, help="attacked sources, spread over the file")
    parser.add_argument("--attack_seed", type=Seed, default=0, help="of the noise")
    return parser


def attack(trained: TrainedModel, options: Namespace, references: dict[str, list[str]], output: Path) -> None:
    """Measure the robustness on sources spread over the file; print and write it."""
    n = min(int(options.attack_sources), len(references))
    lines = list(references)
    chosen = [lines[row] for row in (torch.arange(n) + 0.5).mul(len(lines) / n).long().tolist()]
    pairs = [(line, target) for line in chosen for target in references[line]]
    found = trained.robustness(
        pairs,
        rates=[float(rate) for rate in options.attack_rates],
        flips=int(options.attack_flips),
        seed=int(options.attack_seed),
        max_tokens=int(options.max_tokens),
        **given_search(options),
    )
    facts = {"data": options.data, "seed": int(options.attack_seed)}
    write_text(output / "robustness.json", json.dumps(facts | found.to_dict(), indent=2) + "\n")
    found.plot(output / "robustness.png")
    print(f"\n{found.sources:,} sources under attack\n{found.table()}\n\nrobustness: {output / 'robustness.png'}")


def check_attack(options: Namespace, source: Source) -> None:
    """Raise UserError for an attack on features or tags, and for options that it does not take."""
    if not options.attack:
        return
    if isinstance(source, Features):
        raise UserError("--attack changes characters, and the model reads features; leave it out")
    if isinstance(source, Tagged):
        raise UserError("--attack changes characters, and would change the tags beside the source, too; leave it out")
    given = {"--prefix": options.prefix, "--prefix-file": options.prefix_file, "--replace-unk": options.replace_unk}
    if taken := [name for name, value in given.items() if value]:
        raise UserError(f"--attack measures plain predictions; leave out {taken[0]}, or --attack")


def write_predictions(
    path: Path, references: dict[str, list[str]], predictions: Sequence[Hypothesis], tokenizers: Tokenizers
) -> None:
    """Write one line for each source: source, prediction, references joined by " | ", and correct as 1 or 0.

    Tags are a second column. With token scores, the score and they are two more.
    """
    tagged, tokenizer = isinstance(tokenizers[0], Tagged), tokenizers[1]
    scored = predictions[0].token_scores is not None
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    names = ["source", *(["tags"] if tagged else []), "prediction", "references", "correct"]
    writer.writerow([*names, "score", "token_scores"] if scored else names)
    for (source, refs), prediction in zip(references.items(), predictions, strict=True):
        correct = tokenizer.units(prediction.text) in [tokenizer.units(ref) for ref in refs]
        scores = " ".join(f"{score:.4f}" for score in prediction.token_scores or ())
        columns = [f"{prediction.score:.4f}", scores] if scored else []
        sides = source.split("\t") if tagged else [source.replace("\t", " ")]
        writer.writerow([*sides, prediction.text, " | ".join(refs), int(correct), *columns])
    write_text(path, file.getvalue())


def picture(
    hypothesis: Hypothesis, source: Sequences, row: int, tokenizers: Tokenizers, reduction: int, path: Path
) -> None:
    """Draw the attention of one hypothesis for source number `row`; below features, if the source has these.

    `reduction` source positions make one of the encoder's output.
    """
    positions, _ = source.padded(torch.tensor([row]))
    target = tokenizers[1].tokens(hypothesis.ids, hypothesis.copied)
    if isinstance(tokenizers[0], Features):
        plot_attention_over(hypothesis.attention, positions[0], target, reduction, path)
    else:
        if isinstance(source, CopySequences):
            names = tokenizers[1].tokens(positions[0, :, 1].tolist(), source.words[row])
        else:
            names = tokenizers[0].tokens(positions[0].tolist())
        names = ["".join(names[i : i + reduction]) for i in range(0, len(names), reduction)]
        plot_attention(hypothesis.attention, names, target, path)


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


def write_pictures(
    folder: Path, decoding: Decoding, sources: Sequences, lines: list[str], max_tokens: int, n: int
) -> None:
    """Draw the attention for `n` sources spread over the file, in place of the pictures of an earlier evaluation."""
    refuse_links([folder])
    for old in folder.glob("[0-9][0-9][0-9][0-9].png"):
        old.unlink()
    if n == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = (torch.arange(n) + 0.5).mul(len(sources) / n).long()
    chosen = [lines[row] for row in rows.tolist()]
    found = decoding(sources.select(rows), chosen, rows.tolist(), attention=True, max_tokens=max_tokens)
    reduction = decoding.model.config.time_reduction
    for number, (row, (hypothesis,)) in enumerate(zip(rows.tolist(), found, strict=True), start=1):
        picture(hypothesis, sources, row, decoding.tokenizers, reduction, folder / f"{number:04d}.png")


def cut_off_note(cut_off: int, search: dict[str, Any]) -> str:
    """A sentence on the number of predictions that the limit on tokens ended."""
    ratio = search.get("max_length_ratio", LEAST_LENGTH_RATIO)
    limit = search.get("max_new_tokens") or f"{ratio:g} x source + 10"
    return f"{cut_off:,} predictions were cut off at the limit of {limit} tokens; --max-new-tokens sets another one"


def metrics_of(options: Namespace, config: Namespace | None, tokenizers: Tokenizers) -> tuple[str, ...]:
    """The names of the metrics to measure. Raises UserError for an unknown one, and for two options that choose."""
    given, text, data = options.metrics, options.text_metrics, None if config is None else config.data
    if given is not None and text is not None:
        raise UserError("--metrics names all values; leave out --text_metrics")
    if given is None and text is None and data is not None and data.metrics is not None:
        return metrics.chosen(data.metrics, "data.metrics of the run", text=False, rates=False)
    if text is None:
        text = (data is not None and data.text_metrics) or tokenizers[1].kind == "bpe"
    return metrics.chosen(given, "--metrics", text=text, rates=text or isinstance(tokenizers[0], Features))


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq evaluate`; `argv` without the command's own name."""
    options = parsed(evaluate_parser(), sys.argv[1:] if argv is None else argv)
    if len(options.run) > 1 and options.output is None:
        raise UserError("--output is missing: the results of an ensemble belong to none of its folders")
    trained = TrainedModel.from_pretrained(options.run, checkpoint=options.checkpoint, device=options.device)
    check_attack(options, trained.source_tokenizer)
    tag_column = options.tag_column if isinstance(trained.source_tokenizer, Tagged) else None
    columns = options.source_column, options.target_column, tag_column
    pairs = read_pairs(PairFile(options.data, options.targets, *columns))
    references = group_references(pairs)
    config = None if is_saved(options.run[0]) else RunFolder(options.run[0]).load_config()
    names = metrics_of(options, config, (trained.source_tokenizer, trained.target_tokenizer))
    decoding, lines = Decoding(options, trained, n_best=1), list(references)
    decoding.check_number(len(lines))
    tokenizers = decoding.tokenizers
    numbers = {source: number for number, source in reversed(list(enumerate(pairs.sources, start=1)))}
    sources, note = encode_sources(tokenizers[0], [(numbers[line], line) for line in lines], options.data)
    if note:
        print(note)
    batching = {"max_tokens": options.max_tokens, "progress": sys.stderr.isatty()}
    best = [hypothesis for (hypothesis,) in decoding(sources, lines, range(len(lines)), **batching)]
    predictions = [hypothesis.text for hypothesis in best]
    values = metrics.score(predictions, list(references.values()), tokenizers[1], names)

    output = Path(options.output or options.run[0])
    output.mkdir(parents=True, exist_ok=True)
    write_predictions(output / "predictions.tsv", references, best, tokenizers)
    beams, checkpoint = int(decoding.search.get("num_beams", 1)), options.checkpoint or "best"
    facts = {"data": options.data, "sources": len(references), "num_beams": beams}
    cut_off = sum(hypothesis.cut_off for hypothesis in best)
    facts |= {"checkpoint": checkpoint, "cut_off": cut_off, "search": decoding.facts()}
    write_text(output / "evaluation.json", json.dumps(facts | values, indent=2) + "\n")
    pictures = 0 if trained.model.config.attention == "none" else min(options.pictures, len(references))
    write_pictures(output / "attention", decoding, sources, lines, options.max_tokens, pictures)

    print(f"{options.data}: {len(references):,} sources, checkpoint {checkpoint}, {beams} beam(s)")
    print(metrics.table(values))
    if cut_off:
        print(cut_off_note(cut_off, decoding.search))
    if config is not None and config.reference_results and {"ser", "per"} <= set(names):
        print("\n" + comparison(values, config.reference_results))
    written = f"predictions: {output / 'predictions.tsv'}"
    print(f"\n{written}; pictures: {output / 'attention'}" if pictures else f"\n{written}")
    if options.attack:
        attack(trained, options, references, output)
