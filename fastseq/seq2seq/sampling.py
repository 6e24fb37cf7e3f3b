"""The choice of the next tokens: the most likely one, a sample, or the candidates of beams after logits processors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.ops.candidates.api import Candidates, candidates, forbidden_mask
from fastseq.seq2seq.options import MINUS_INFINITY, Options


def choose(logits: Tensor, forbidden: Tensor, options: Options, input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log-probability of the next token of each row of logits (N, V), and that token: (N, 1) each."""
    limits = {"forbidden": forbidden, "last_resort": options.eos_id}
    if options.logits_processor is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = _processed(logits.to(wide, copy=True), forbidden, options, input_ids)
        tokens = _sample_top_k(scores, options) if options.do_sample else scores.argmax(1, keepdim=True)
        return log_probs_of(logits, tokens), tokens
    if not options.do_sample:
        log_probs, _, tokens = candidates(logits, 1, **limits)
        return log_probs, tokens
    if options.top_k:
        log_probs, _, tokens = candidates(logits, min(options.top_k, logits.shape[1]), **limits)
        drawn = _sample(log_probs, options)
        return log_probs.gather(1, drawn), tokens.gather(1, drawn)
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log_probs.masked_fill_(forbidden_mask(logits.shape[1], **limits), MINUS_INFINITY)
    tokens = _sample(log_probs, options)
    return log_probs.gather(1, tokens), tokens


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities (N, 1) of tokens (N, 1) under logits (N, V), in float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).gather(1, tokens)


def processed_candidates(
    logits: Tensor, scores: Tensor, forbidden: Tensor, options: Options, input_ids: Tensor
) -> Candidates:
    """:func:`candidates` for beams with scores (b, K), where logits processors change the log-probabilities.

    Returns totals, beams and tokens (b, 2K). Of equal totals any may come first.
    """
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    values = _processed(log_probs, forbidden, options, input_ids)  # (N, V)
    totals = (scores[..., None] + values.view(*scores.shape, -1)).flatten(1)  # (b, K * V)
    count = 2 * options.num_beams
    best, flat = totals.topk(min(count, totals.shape[1]))
    free = (0, count - best.shape[1])
    best, flat = F.pad(best, free, value=MINUS_INFINITY), F.pad(flat, free)
    return Candidates(best, flat // logits.shape[1], flat % logits.shape[1])


def _processed(values: Tensor, forbidden: Tensor, options: Options, input_ids: Tensor | None) -> Tensor:
    """``options.logits_processor`` of values (N, V), -inf at forbidden tokens; eos where nothing else is left.

    They are forbidden before, for processors that keep the best tokens, and after, for those that set scores.
    """
    eos, shape, mask = values[:, options.eos_id].clone(), values.shape, forbidden_mask(values.shape[1], forbidden)
    scores = options.logits_processor(input_ids, values.masked_fill_(mask, MINUS_INFINITY))
    if not isinstance(scores, Tensor) or scores.shape != shape:
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"generate: logits_processor must return scores of shape {tuple(shape)}, got {given}.")
    scores = scores.masked_fill(mask, MINUS_INFINITY)
    left = (scores > MINUS_INFINITY).any(1)
    scores[:, options.eos_id] = scores[:, options.eos_id].where(left, eos)
    return scores


def _sample_top_k(scores: Tensor, options: Options) -> Tensor:
    """(N, 1) columns drawn from unnormalised log-probabilities (N, V) after top-k, temperature and top-p."""
    if not options.top_k:
        return _sample(scores, options)
    scores, tokens = scores.topk(min(options.top_k, scores.shape[1]))
    return tokens.gather(1, _sample(scores, options))


def _sample(log_probs: Tensor, options: Options) -> Tensor:
    """(N, 1) columns drawn from log-probabilities (N, C) after temperature and top-p."""
    temperature = max(options.temperature, torch.finfo(log_probs.dtype).tiny)  # its reciprocal is finite
    log_probs = (log_probs - log_probs.amax(1, keepdim=True)) / temperature
    if options.top_p == 1:
        return log_probs.softmax(1).multinomial(1, generator=options.generator)
    log_probs, columns = log_probs.sort(1, descending=True)
    probs = log_probs.softmax(1)
    probs = probs.masked_fill(probs.cumsum(1) - probs >= options.top_p, 0.0)  # the tokens before make up top_p
    return columns.gather(1, probs.multinomial(1, generator=options.generator))
