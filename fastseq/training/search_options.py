"""The options of the search on the command line, named as the keywords of `Seq2Seq.generate`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastseq.errors import UserError
from fastseq.seq2seq.generation import generate
from fastseq.seq2seq.options import Options, check
from fastseq.training.data import read_pairs
from fastseq.training.options import Beams, CountOrZero, Factor, NewTokens, NewTokensOrZero, Seed
from fastseq.training.reading import decoded_lines

DEFAULTS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(generate).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
# Name -> type and help of each option that generation_config.json may hold too.
SEARCH: dict[str, tuple[Any, str]] = {
    "num_beams": (Beams, "beam size: prefixes kept at each step; 1 is greedy decoding. 4 to 10 finds better sequences"),
    "max_new_tokens": (NewTokens, "most tokens of a prediction after its prefix, in place of max_length_ratio"),
    "max_length_ratio": (Factor, "most tokens of a prediction for each token of its source; 10 more are allowed"),
    "min_new_tokens": (NewTokensOrZero, "tokens that must come before the end, for predictions that stop too early"),
    "length_penalty": (
        float,
        "exponent of the length by which a log-probability is divided in the ranking of beams: above 1 prefers longer "
        "predictions, 0 the shorter ones of the plain sum",
    ),
    "length_penalty_type": (
        Literal["avg", "wu", "none"],
        "what it is an exponent of: the length; (5 + length) / 6 (Wu et al. 2016); nothing, the plain sum",
    ),
    "coverage_penalty": (
        Factor,
        "weight of Wu et al. 2016, equation 14: ranks predictions lower that skip a part of the source. Try 0.2; needs "
        "beams and attention",
    ),
    "early_stopping": (
        bool | Literal["never"],
        "end of a beam search: false, when no beam looks better than the finished ones; true, as soon as num_beams are "
        "finished (faster, may miss the best); never, when none can become better",
    ),
    "no_repeat_ngram_size": (CountOrZero, "no n-gram of this size twice in a prediction, against loops; 0 is off"),
    "generate_unk": (bool, "false: never predict the unknown token, take the next best one"),
    "do_sample": (bool, "draw each token at random by its probability; --n-best then gives that many samples"),
    "temperature": (float, "sampling: below 1 sharpens the probabilities, above 1 flattens them"),
    "top_k": (CountOrZero, "sampling: only among the k most likely tokens; 0 is all"),
    "top_p": (float, "sampling: only among the most likely tokens that make up this probability"),
}


def add_search_options(parser: ArgumentParser) -> None:
    """Add the options of `SEARCH`, the seed, prefixes, and the replacement of unknown tokens."""
    for name, (kind, text) in SEARCH.items():
        default = "what its source allows" if DEFAULTS[name] is None else str(DEFAULTS[name]).lower()
        parser.add_argument(f"--{name}", type=kind | None, help=f"{text}; default: the model's, else {default}")
    parser.add_argument("--seed", type=Seed | None, help="of sampling; without it each run draws anew")
    parser.add_argument("--prefix", type=str, default="", help="text with which every prediction begins")
    parser.add_argument(
        "--prefix_file", type=str | None, help="file with the beginning of each prediction, one line a source line"
    )
    parser.add_argument(
        "--replace_unk",
        type=bool,
        default=False,
        help="put the source token with the most attention in place of each predicted unknown token",
    )
    parser.add_argument(
        "--unk_dictionary",
        type=str | None,
        help="file of source<TAB>target lines: with --replace-unk, the target of that source token, if it is there",
    )
    parser.add_argument("--output_scores", type=bool, default=False, help="the log-probability of each token as well")


def given_search(options: Namespace) -> dict[str, Any]:
    """The options of `SEARCH` that the command line or its YAML file holds."""
    given = {name: _plain(options[name]) for name in SEARCH if options[name] is not None}
    return given | ({"output_scores": True} if options.output_scores else {})


def _plain(value: Any) -> Any:
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def check_search_options(search: dict[str, Any]) -> None:
    """Raise UserError, with the sentence of `generate`, for options out of range or that exclude each other."""
    values = DEFAULTS | search
    values["num_return_sequences"] = search["n_best"]
    known = {name: values[name] for name in Options._fields if name in values}
    try:
        check(Options(pad_id=0, bos_id=1, eos_id=2, forbidden_ids=(), **known))
    except ValueError as error:
        raise UserError(str(error).removeprefix("generate: ")) from error


def read_prefixes(options: Namespace) -> list[str] | None:
    """The lines of `--prefix_file`; None without it. Raises UserError if it cannot be read."""
    if options.prefix_file is None:
        return None
    if options.prefix:
        raise UserError("--prefix and --prefix-file exclude each other; put the text into each line of the file")
    try:
        with Path(options.prefix_file).open("rb") as file:
            return [line for _, line in decoded_lines(file, options.prefix_file)]
    except OSError as error:
        raise UserError(
            f"{options.prefix_file} cannot be read ({error.strerror}); expected a prefix for each source line"
        ) from error


def read_dictionary(options: Namespace) -> dict[str, str] | None:
    """The dictionary of `--replace_unk`: {} without a file, None if unknown tokens stay."""
    if options.unk_dictionary is not None and not options.replace_unk:
        raise UserError("--unk-dictionary has no use without --replace-unk true; add it, or leave the file out")
    if not options.replace_unk:
        return None
    return {} if options.unk_dictionary is None else dict(zip(*read_pairs(options.unk_dictionary), strict=True))
