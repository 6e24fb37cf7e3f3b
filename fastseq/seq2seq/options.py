"""The options of one ``generate`` call, and the sentences for bad ones."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MINUS_INFINITY = float("-inf")
LENGTH_PENALTY_TYPES = ("avg", "wu", "none")


class Options(NamedTuple):
    """The options of one ``generate`` call, with the special tokens of the model."""

    pad_id: int
    bos_id: int
    eos_id: int
    forbidden_ids: tuple[int, ...]
    max_new_tokens: int | None
    max_length_ratio: float
    min_new_tokens: int
    num_beams: int
    num_return_sequences: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    length_penalty: float
    length_penalty_type: str
    no_repeat_ngram_size: int
    early_stopping: bool | str
    coverage_penalty: float
    output_scores: bool
    output_attentions: bool
    generator: torch.Generator | None
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None

    def plain_greedy(self) -> bool:
        """True if every step takes the most likely token that is not forbidden, and returns nothing else."""
        changed = self.no_repeat_ngram_size or self.logits_processor is not None
        return not (self.do_sample or self.num_beams > 1 or changed or self.output_attentions)


def check(o: Options) -> None:
    """Raise ValueError for the first invalid option."""
    infinity = float("inf")
    limit = infinity if o.max_new_tokens is None else o.max_new_tokens
    requirements = [  # formatted where one fails: that would take longer than all checks
        (o.num_beams >= 1, "num_beams must be at least 1 (got {num_beams})"),
        (
            o.logits_processor is None or callable(o.logits_processor),
            "logits_processor must be callable, (input_ids, scores) -> scores (got {logits_processor})",
        ),
        (o.num_return_sequences >= 1, "num_return_sequences must be at least 1 (got {num_return_sequences})"),
        (limit >= 1, "max_new_tokens must be at least 1, or None for the default (got {max_new_tokens})"),
        (0 <= o.max_length_ratio < infinity, "max_length_ratio must be finite and >= 0 (got {max_length_ratio})"),
        (o.min_new_tokens >= 0, "min_new_tokens must be >= 0 (got {min_new_tokens})"),
        (0 < o.temperature < infinity, "temperature must be finite and > 0 (got {temperature})"),
        (o.top_k >= 0, "top_k must be >= 0 (got {top_k}); 0 keeps all tokens"),
        (0 < o.top_p <= 1, "top_p must be > 0 and <= 1 (got {top_p}); 1 keeps all tokens"),
        (o.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must be >= 0 (got {no_repeat_ngram_size}); 0 is off"),
        (abs(o.length_penalty) < infinity, "length_penalty must be finite (got {length_penalty})"),
        (0 <= o.coverage_penalty < infinity, "coverage_penalty must be finite and >= 0 (got {coverage_penalty})"),
        (
            o.coverage_penalty == 0 or o.num_beams > 1,
            "coverage_penalty={coverage_penalty} ranks the hypotheses of a beam search; add num_beams > 1",
        ),
        (
            o.length_penalty_type in LENGTH_PENALTY_TYPES,
            "length_penalty_type={length_penalty_type!r}; valid: " + ", ".join(LENGTH_PENALTY_TYPES),
        ),
        (
            o.early_stopping in (True, False, "never"),
            "early_stopping={early_stopping!r}; valid: True, False, 'never'",
        ),
        (o.min_new_tokens <= limit, "min_new_tokens={min_new_tokens} is more than max_new_tokens={max_new_tokens}"),
        (
            not o.do_sample or o.num_beams == 1,
            "do_sample=True needs num_beams=1 (got num_beams={num_beams}); beams are not sampled",
        ),
        (
            o.do_sample or o.num_return_sequences <= o.num_beams,
            "num_return_sequences={num_return_sequences} is more than num_beams={num_beams}; raise num_beams, or draw "
            "samples with do_sample=True",
        ),
        (
            o.do_sample or (o.temperature, o.top_k, o.top_p) == (1, 0, 1),
            "temperature={temperature}, top_k={top_k}, top_p={top_p} act on sampling only; add do_sample=True or leave "
            "them out",
        ),
    ]
    for holds, sentence in requirements:
        if not holds:
            raise ValueError(f"generate: {sentence.format(**o._asdict())}.")
