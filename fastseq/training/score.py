"""`fastseq score`: log-probability and perplexity of given pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from fastseq.training.data import Pairs, read_pairs
from fastseq.training.features import Features
from fastseq.training.generate import opened
from fastseq.training.options import Count, command_parser, parsed
from fastseq.training.reading import PairFile
from fastseq.training.scoring import PairScore
from fastseq.training.tagged import Tagged
from fastseq.training.trained import TrainedModel


def score_parser() -> ArgumentParser:
    """The options of `fastseq score`."""
    parser = command_parser(
        "score",
        "Score pairs under a model. Writes a line for each pair, log_prob<TAB>perplexity<TAB>source<TAB>target, and "
        "the perplexity of all pairs on standard error.",
        "fastseq score runs/mine --data pairs.tsv > scores.tsv",
    )
    parser.add_argument("run", type=str, nargs="+", help="run or saved model; several make an ensemble")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--data", type=str, required=True, help="source<TAB>target lines, as in training")
    parser.add_argument("--output", type=str, default="-", help="file to write, - for standard output")
    parser.add_argument("--checkpoint", type=Literal["best", "last"] | None, help="weights of a run, default best")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto: cuda where there is one")
    parser.add_argument("--max_tokens", type=Count, default=4096, help="tokens of a batch, padding included")
    return parser


def score_lines(pairs: Pairs, scores: list[PairScore]) -> Iterator[str]:
    """One output line for each pair."""
    for source, target, score in zip(*pairs, scores, strict=True):
        yield f"{score.log_prob:.4f}\t{score.perplexity:.4f}\t{source}\t{target}"


def summary(scores: list[PairScore]) -> str:
    """A sentence on all pairs: their perplexity is per target token, eos included."""
    all_tokens = PairScore([value for score in scores for value in score.token_scores])
    return (
        f"{len(scores):,} pairs, {len(all_tokens.token_scores):,} target tokens: "
        f"log-probability {all_tokens.log_prob:.4f}, perplexity {all_tokens.perplexity:.4f}"
    )


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq score`; `argv` without the command's own name."""
    options = parsed(score_parser(), sys.argv[1:] if argv is None else argv)
    trained = TrainedModel.from_pretrained(options.run, checkpoint=options.checkpoint, device=options.device)
    tagged = isinstance(trained.source_tokenizer, Tagged)
    pairs = read_pairs(PairFile(options.data, tag_column="tags" if tagged else None))
    sources = pairs.sources
    if isinstance(trained.source_tokenizer, Features):
        sources = [str(Path(options.data).parent / source) for source in sources]
    scores = trained.score(list(zip(sources, pairs.targets, strict=True)), max_tokens=options.max_tokens, warn=True)
    with opened(options.output, "w", sys.stdout) as destination:
        for line in score_lines(pairs, scores):
            print(line, file=destination)
        destination.flush()
    print(summary(scores), file=sys.stderr)
