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


def check(o: Options) -> None:
    """Raise ValueError for the first invalid option."""
    infinity = float("inf")
    limit = infinity if o.max_new_tokens is None else o.max_new_tokens
    sampling = f"temperature={o.temperature}, top_k={o.top_k}, top_p={o.top_p}"
    beams, samples = f"num_beams={o.num_beams}", f"num_return_sequences={o.num_return_sequences}"
    types = ", ".join(LENGTH_PENALTY_TYPES)
    requirements = [
        (o.num_beams >= 1, f"num_beams must be at least 1 (got {o.num_beams})"),
        (
            o.logits_processor is None or callable(o.logits_processor),
            f"logits_processor must be callable, (input_ids, scores) -> scores (got {type(o.logits_processor)})",
        ),
        (o.num_return_sequences >= 1, f"num_return_sequences must be at least 1 (got {o.num_return_sequences})"),
        (limit >= 1, f"max_new_tokens must be at least 1, or None for the default (got {o.max_new_tokens})"),
        (0 <= o.max_length_ratio < infinity, f"max_length_ratio must be finite and >= 0 (got {o.max_length_ratio})"),
        (o.min_new_tokens >= 0, f"min_new_tokens must be >= 0 (got {o.min_new_tokens})"),
        (0 < o.temperature < infinity, f"temperature must be finite and > 0 (got {o.temperature})"),
        (o.top_k >= 0, f"top_k must be >= 0 (got {o.top_k}); 0 keeps all tokens"),
        (0 < o.top_p <= 1, f"top_p must be > 0 and <= 1 (got {o.top_p}); 1 keeps all tokens"),
        (o.no_repeat_ngram_size >= 0, f"no_repeat_ngram_size must be >= 0 (got {o.no_repeat_ngram_size}); 0 is off"),
        (abs(o.length_penalty) < infinity, f"length_penalty must be finite (got {o.length_penalty})"),
        (0 <= o.coverage_penalty < infinity, f"coverage_penalty must be finite and >= 0 (got {o.coverage_penalty})"),
        (
            o.coverage_penalty == 0 or o.num_beams > 1,
            f"coverage_penalty={o.coverage_penalty} ranks the hypotheses of a beam search; add num_beams (got {beams})",
        ),
        (
            o.length_penalty_type in LENGTH_PENALTY_TYPES,
            f"length_penalty_type={o.length_penalty_type!r}; valid: {types}",
        ),
        (
            o.early_stopping in (True, False, "never"),
            f"early_stopping={o.early_stopping!r}; valid: True, False, 'never'",
        ),
        (o.min_new_tokens <= limit, f"min_new_tokens={o.min_new_tokens} is more than max_new_tokens={limit}"),
        (not o.do_sample or o.num_beams == 1, f"do_sample=True needs num_beams=1 (got {beams}); beams are not sampled"),
        (
            o.do_sample or o.num_return_sequences <= o.num_beams,
            f"{samples} is more than {beams}; raise num_beams, or draw samples with do_sample=True",
        ),
        (
            o.do_sample or (o.temperature, o.top_k, o.top_p) == (1, 0, 1),
            f"{sampling} act on sampling only; add do_sample=True or leave them out",
        ),
    ]
    for holds, sentence in requirements:
        if not holds:
            raise ValueError(f"generate: {sentence}.")
