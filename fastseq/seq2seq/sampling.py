"""The choice of one token for each row: the most likely one, or a sample."""

import torch
from torch import Tensor

from fastseq.ops.candidates.api import candidates, forbidden_mask
from fastseq.seq2seq.options import MINUS_INFINITY, Options


def choose(logits: Tensor, forbidden: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The next token of each row of logits (N, V) and its log-probability: (N, 1) each."""
    limits = {"forbidden": forbidden, "last_resort": options.eos_id}
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
