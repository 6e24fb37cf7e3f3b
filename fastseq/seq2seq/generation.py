"""Greedy decoding, beam search and sampling for encoder-decoder models, batched over sentences, on the model's device.

A model has the protocol of :class:`fastseq.Seq2Seq`: ``config`` with ``pad_id``, ``bos_id``, ``eos_id``;
``encode(src, src_lengths)``; ``start(enc)``; ``decode_step(tokens, state, enc, need_weights=...)``; an encoder output
with ``lengths`` and ``repeat_interleave(k)``; a state with ``index_select(rows)``.

Shapes: B sentences, K beams, R returned sequences per sentence, N decoder rows (B * K or B * R, one sentence's
side by side), V target vocabulary, S source positions, T decoding steps, L longest returned sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LENGTH_PENALTY_TYPES = ("avg", "wu", "none")
EXTRA_TOKENS = 10  # the default limit is ceil(max_length_ratio * source length) + EXTRA_TOKENS
STEPS_BETWEEN_CHECKS = 8  # on a GPU the check "all sentences done" synchronises; on the CPU every step checks
MINUS_INFINITY = float("-inf")


class GenerateOutput(NamedTuple):
    """Rows ``b * R`` to ``b * R + R - 1`` belong to sentence b: best first in beam search, as drawn in sampling."""

    sequences: Tensor  # (B * R, L) int64: no bos; eos kept; pad after it
    sequences_scores: Tensor  # (B * R,) log-probability, eos included, divided by the length penalty; float32 or wider
    lengths: Tensor  # (B * R,) int64: number of tokens, eos included
    cross_attentions: Tensor | None  # (B * R, L, S) weights behind each token, 0 past the length; None unless requested


class _Options(NamedTuple):
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
    output_attentions: bool
    generator: torch.Generator | None


class _Step(NamedTuple):
    """One step of beam search. A candidate is a beam with one more token; each sentence keeps its 2K best."""

    parents: Tensor  # (B, 2K) the beam (0..K-1) that each candidate extends
    tokens: Tensor  # (B, 2K) the token that it adds
    survivors: Tensor  # (B, K) the candidates that are the beams of the next step
    attention: Tensor | None  # (B * K, S) weights of the beams before the step


class _Pool(NamedTuple):
    """The K best finished hypotheses of each sentence, best first; a free place has the score -inf."""

    scores: Tensor  # (B, K) divided by the length penalty
    lengths: Tensor  # (B, K) hypothesis ended in step lengths - 1 ...
    candidates: Tensor  # (B, K) ... as this candidate


def generate(
    model: nn.Module,
    src: Tensor,
    src_lengths: Tensor | Sequence[int] | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length_ratio: float = 2.0,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length_penalty: float = 1.0,
    length_penalty_type: str = "avg",
    no_repeat_ngram_size: int = 0,
    early_stopping: bool | str = False,
    generate_unk: bool = True,
    output_attentions: bool = False,
    generator: torch.Generator | None = None,
) -> GenerateOutput:
    """Decode each source: greedily (default), by beam search (``num_beams > 1``) or by sampling (``do_sample=True``).

    Names and meanings follow Hugging Face ``generate``, except that ``top_k`` is off unless given. The model is
    in eval mode during the call and gets every training flag back afterwards, also after an exception; no gradient is
    recorded. A result does not depend on the other sentences of the batch, except that all samples are drawn from one
    stream of random numbers. The tokens pad and bos are never generated; unk may be.

    Args:
        src: (B, S) tokens or (B, S, F) features, as the model's ``encode`` takes them.
        src_lengths: (B,) valid positions of each source, 0 allowed; None means all S.
        max_new_tokens: limit on the tokens of a sequence, eos included. Default: each sentence's own limit,
            ``ceil(max_length_ratio * source length) + 10``, or ``min_new_tokens`` where that is more. Beam search lets
            the hypotheses cut off at the limit compete with the finished ones.
        min_new_tokens: tokens that must come before eos.
        num_beams: width of the beam; 1 is greedy decoding.
        num_return_sequences: the n best of a beam search (at most ``num_beams``), or that many samples per sentence.
            Where fewer sequences are possible, the others are empty: length 0, all pad, score -inf.
        temperature: sampling draws from ``softmax(log_probs / temperature)``.
        top_k: sampling keeps the k most likely tokens; 0 keeps all (Fan et al. 2018).
        top_p: sampling keeps the smallest set of most likely tokens that has at least this probability, after ``top_k``
            (nucleus sampling, Holtzman et al. 2020).
        length_penalty: exponent p of the penalty that divides the log-probability; 0: off; more favours longer output.
        length_penalty_type: "avg": ``length ** p``; "wu": ``((5 + length) / 6) ** p`` (Wu et al. 2016); "none": 1.
        no_repeat_ngram_size: no n-gram of this size occurs twice in a sequence (Paulus et al. 2018); 0: off. Where this
            and ``min_new_tokens`` together forbid every token, the sequence ends with eos.
        early_stopping: when the search of a sentence with ``num_beams`` finished hypotheses ends. False (default, as in
            Hugging Face): when no beam beats the worst of them at its present length. True: at once, which may drop the
            best beam. "never": when no beam can beat the worst of them at any length up to the limit. The best score
            never falls from True to False to "never".
        generate_unk: False forbids the unknown token, ``config.unk_id``, as well.
        output_attentions: return the attention weights too.
        generator: source of random numbers for sampling, on the device of ``src``; default: torch's own.

    Returns:
        GenerateOutput. Scores are log-probabilities under the model itself in every mode: temperature, top-k, top-p and
        forbidden tokens change the choice of tokens, not the score of a sequence.

    Raises:
        ValueError: an option out of its range, options that exclude each other, an empty batch, or
            ``output_attentions`` for a model without attention.
    """
    ids = model.config.pad_id, model.config.bos_id, model.config.eos_id
    forbidden_ids = {*ids[:2], *(() if generate_unk else (model.config.unk_id,))} - {model.config.eos_id}
    options = _Options(
        *ids,
        forbidden_ids=tuple(forbidden_ids),
        max_new_tokens=max_new_tokens,
        max_length_ratio=max_length_ratio,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        length_penalty=length_penalty,
        length_penalty_type=length_penalty_type,
        no_repeat_ngram_size=no_repeat_ngram_size,
        early_stopping=early_stopping,
        output_attentions=output_attentions,
        generator=generator,
    )
    _check(options)
    if src.shape[0] == 0:
        raise ValueError("generate: the batch is empty; expected src with at least one sentence.")
    with torch.no_grad(), _eval_mode(model):
        enc = model.encode(src, src_lengths)
        limits = _limits(enc.lengths.to(src.device), options)
        if num_beams > 1:
            return _beam_search(model, enc, limits, options)
        return _decode_rows(model, enc, limits, options)


def _check(o: _Options) -> None:
    """Raise ValueError for the first invalid option."""
    infinity = float("inf")
    limit = infinity if o.max_new_tokens is None else o.max_new_tokens
    sampling = f"temperature={o.temperature}, top_k={o.top_k}, top_p={o.top_p}"
    beams, samples = f"num_beams={o.num_beams}", f"num_return_sequences={o.num_return_sequences}"
    types = ", ".join(LENGTH_PENALTY_TYPES)
    requirements = [
        (o.num_beams >= 1, f"num_beams must be at least 1 (got {o.num_beams})"),
        (o.num_return_sequences >= 1, f"num_return_sequences must be at least 1 (got {o.num_return_sequences})"),
        (limit >= 1, f"max_new_tokens must be at least 1, or None for the default (got {o.max_new_tokens})"),
        (0 <= o.max_length_ratio < infinity, f"max_length_ratio must be finite and >= 0 (got {o.max_length_ratio})"),
        (o.min_new_tokens >= 0, f"min_new_tokens must be >= 0 (got {o.min_new_tokens})"),
        (0 < o.temperature < infinity, f"temperature must be finite and > 0 (got {o.temperature})"),
        (o.top_k >= 0, f"top_k must be >= 0 (got {o.top_k}); 0 keeps all tokens"),
        (0 < o.top_p <= 1, f"top_p must be > 0 and <= 1 (got {o.top_p}); 1 keeps all tokens"),
        (o.no_repeat_ngram_size >= 0, f"no_repeat_ngram_size must be >= 0 (got {o.no_repeat_ngram_size}); 0 is off"),
        (abs(o.length_penalty) < infinity, f"length_penalty must be finite (got {o.length_penalty})"),
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


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each submodule gets its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _limits(src_lengths: Tensor, options: _Options) -> Tensor:
    """(B,) limit on the tokens of each sentence."""
    if options.max_new_tokens is not None:
        return torch.full_like(src_lengths, options.max_new_tokens)
    limits = (src_lengths * options.max_length_ratio).ceil().to(src_lengths.dtype) + EXTRA_TOKENS
    return limits.clamp(min=options.min_new_tokens)


def _penalised(scores: Tensor, lengths: Tensor, options: _Options) -> Tensor:
    """Log-probabilities divided by the length penalty; lengths broadcast against scores."""
    if options.length_penalty_type == "none":
        return scores
    lengths = lengths.to(scores.dtype)
    base = lengths if options.length_penalty_type == "avg" else (5 + lengths) / 6
    return scores / base**options.length_penalty


def _all_done(done: Tensor, step: int) -> bool:
    """True if every sentence is done: the only synchronisation of a step. Steps after that change no result."""
    interval = 1 if done.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    return (step + 1) % interval == 0 and bool(done.all())


def _advance(model: nn.Module, tokens: Tensor, state: Any, enc: Any, options: _Options) -> tuple:
    """One step of the model for tokens (N,): logits (N, V), state, attention (N, S) if requested."""
    logits, state, attention = model.decode_step(tokens, state, enc, need_weights=options.output_attentions)
    if options.output_attentions and attention is None:
        raise ValueError("generate: output_attentions=True needs a model with attention; this one has none.")
    return logits, state, attention if options.output_attentions else None


def _log_probs(logits: Tensor, history: Tensor, step: int, options: _Options) -> Tensor:
    """(N, V) log-probabilities of the next token, -inf where forbidden; history (N, T) holds ``step`` tokens so far."""
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    if options.no_repeat_ngram_size:
        forbidden = _repeats(history[:, :step], options.no_repeat_ngram_size, logits.shape[1])
    for token in options.forbidden_ids:
        forbidden[:, token] = True
    if step < options.min_new_tokens:
        forbidden[:, options.eos_id] = True
    forbidden[:, options.eos_id] &= ~forbidden.all(1)
    return log_probs.masked_fill(forbidden, MINUS_INFINITY)


def _with_room(tokens: Tensor, step: int, fill: int) -> Tensor:
    """tokens (N, T) with a column for ``step``: doubled where it is full, since few sequences reach their limit."""
    if step < tokens.shape[1]:
        return tokens
    return torch.cat([tokens, tokens.new_full((len(tokens), max(step, 32)), fill)], 1)


def _repeats(history: Tensor, size: int, vocab_size: int) -> Tensor:
    """(N, V) bool: the tokens that would complete an n-gram which history (N, step) already holds."""
    rows, step = history.shape
    forbidden = history.new_zeros(rows, vocab_size + 1, dtype=torch.bool)
    if step >= size:
        ngrams = history.unfold(1, size, 1)  # (N, step - size + 1, size)
        begun = history[:, None, step - size + 1 :]  # (N, 1, size - 1) start of the n-gram to come
        same = (ngrams[..., :-1] == begun).all(-1)
        forbidden.scatter_(1, ngrams[..., -1].where(same, vocab_size), True)  # column V takes those that do not match
    return forbidden[:, :vocab_size]


def _sample(log_probs: Tensor, options: _Options) -> Tensor:
    """(N,) tokens drawn from (N, V) log-probabilities after temperature, top-k and top-p."""
    vocab_size = log_probs.shape[1]
    temperature = max(options.temperature, torch.finfo(log_probs.dtype).tiny)  # its reciprocal is finite
    log_probs = (log_probs - log_probs.amax(1, keepdim=True)) / temperature
    if not options.top_k and options.top_p == 1:
        return log_probs.softmax(1).multinomial(1, generator=options.generator)[:, 0]
    log_probs, tokens = log_probs.topk(min(options.top_k or vocab_size, vocab_size))  # most likely first
    probs = log_probs.softmax(1)
    if options.top_p < 1:
        probs = probs.masked_fill(probs.cumsum(1) - probs >= options.top_p, 0.0)  # the tokens before make up top_p
    return tokens.gather(1, probs.multinomial(1, generator=options.generator))[:, 0]


def _decode_rows(model: nn.Module, enc: Any, limits: Tensor, options: _Options) -> GenerateOutput:
    """Greedy decoding and sampling: rows are independent. limits (B,)."""
    if options.num_return_sequences > 1:
        enc = enc.repeat_interleave(options.num_return_sequences)
        limits = limits.repeat_interleave(options.num_return_sequences)
    state = model.start(enc)
    tokens = torch.full_like(limits, options.bos_id)
    scores, lengths = torch.zeros_like(limits, dtype=torch.float32), torch.zeros_like(limits)
    done = torch.zeros_like(limits, dtype=torch.bool)
    sequences = limits.new_empty(len(limits), 0)  # (N, T), T > step
    attentions = []
    for step in range(int(limits.max())):
        sequences = _with_room(sequences, step, options.pad_id)
        logits, state, attention = _advance(model, tokens, state, enc, options)
        log_probs = _log_probs(logits, sequences, step, options)
        tokens = _sample(log_probs, options) if options.do_sample else log_probs.argmax(1)
        scores = torch.where(done, scores, scores + log_probs.gather(1, tokens[:, None])[:, 0])
        tokens = tokens.masked_fill(done, options.pad_id)
        sequences[:, step] = tokens
        lengths += ~done
        if attention is not None:
            attentions.append(attention.masked_fill(done[:, None], 0.0))
        done = done | (tokens == options.eos_id) | (limits == step + 1)
        if _all_done(done, step):
            break
    longest = int(lengths.max())
    attentions = torch.stack(attentions[:longest], 1) if attentions else None
    return GenerateOutput(sequences[:, :longest], _penalised(scores, lengths, options), lengths, attentions)


def _beam_search(model: nn.Module, enc: Any, limits: Tensor, options: _Options) -> GenerateOutput:
    """Beam search over all sentences at once; limits (B,). A sentence that is done keeps its pool from then on."""
    batch, beams = len(limits), options.num_beams
    enc = enc.repeat_interleave(beams)
    state = model.start(enc)
    first_rows = torch.arange(0, batch * beams, beams, device=limits.device)[:, None]  # (B, 1) rows of the first beams
    tokens = limits.new_full((batch * beams,), options.bos_id)
    scores = torch.full((batch, beams), MINUS_INFINITY, device=limits.device)
    scores[:, 0] = 0.0  # the beams are equal before the first step: extend one of them
    zeros = limits.new_zeros(batch, beams)
    pool = _Pool(torch.full_like(scores, MINUS_INFINITY), zeros, zeros)
    done = torch.zeros_like(limits, dtype=torch.bool)
    history = limits.new_empty(batch * beams, 0)  # (B * K, T), T > step, kept up to date for n-gram blocking only
    steps = []
    for step in range(int(limits.max())):
        if options.no_repeat_ngram_size:
            history = _with_room(history, step, options.pad_id)
        logits, state, attention = _advance(model, tokens, state, enc, options)
        log_probs = _log_probs(logits, history, step, options).view(batch, beams, -1)
        candidates, flat = (scores[:, :, None] + log_probs).flatten(1).topk(2 * beams)  # (B, 2K), best first
        parents, new_tokens = flat // log_probs.shape[2], flat % log_probs.shape[2]
        is_eos, at_limit = new_tokens == options.eos_id, limits == step + 1
        scores, survivors = candidates.masked_fill(is_eos, MINUS_INFINITY).topk(beams)  # at most K of the 2K are eos
        steps.append(_Step(parents, new_tokens, survivors, attention))

        ended = (is_eos | at_limit[:, None]) & ~done[:, None]
        lengths = torch.full_like(pool.lengths, step + 1)
        pool = _collect(pool, candidates.masked_fill(~ended, MINUS_INFINITY)[:, :beams], lengths, options)
        done = done | at_limit | _decided(pool, scores[:, 0], lengths[:, 0], limits, options)
        if _all_done(done, step):
            break
        rows = (first_rows + parents.gather(1, survivors)).flatten()
        state = state.index_select(rows)
        tokens = new_tokens.gather(1, survivors).flatten()
        if options.no_repeat_ngram_size:
            history = history.index_select(0, rows)
            history[:, step] = tokens
    return _trace_back(steps, pool, options)


def _collect(pool: _Pool, scores: Tensor, lengths: Tensor, options: _Options) -> _Pool:
    """Put the K best candidates of a step, scores (B, K) and lengths (B, K), into the pool; -inf: not finished."""
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(lengths)
    scores = torch.cat([pool.scores, _penalised(scores, lengths, options)], 1)  # (B, 2K)
    scores, order = scores.sort(dim=1, descending=True, stable=True)  # stable: equals stay, free places keep length 0
    scores, order = scores[:, : places.shape[1]], order[:, : places.shape[1]]
    lengths = torch.cat([pool.lengths, lengths], 1).gather(1, order)
    return _Pool(scores, lengths, torch.cat([pool.candidates, places], 1).gather(1, order))


def _decided(pool: _Pool, best: Tensor, lengths: Tensor, limits: Tensor, options: _Options) -> Tensor:
    """(B,) bool: by ``early_stopping`` the sentence is done. best, lengths (B,): its best beam."""
    worst = pool.scores[:, -1]  # -inf while a place is free
    if options.early_stopping != "never" and options.early_stopping:
        return worst > MINUS_INFINITY
    if options.early_stopping == "never" and options.length_penalty > 0:
        lengths = limits  # log-probabilities only fall: none gets better than today's over the largest penalty
    return _penalised(best, lengths, options) <= worst


def _trace_back(steps: list[_Step], pool: _Pool, options: _Options) -> GenerateOutput:
    """Follow the best hypotheses of the pool from their last token to their first."""
    scores = pool.scores[:, : options.num_return_sequences]  # (B, R)
    lengths = pool.lengths[:, : options.num_return_sequences]
    last = pool.candidates[:, : options.num_return_sequences]
    beam = torch.zeros_like(last)  # (B, R) beam before step + 1 that the hypothesis came through
    tokens, attentions = [], []
    for number in range(int(lengths.max()), 0, -1):
        step = steps[number - 1]
        candidate = torch.where(lengths == number, last, step.survivors.gather(1, beam))
        outside = lengths < number
        tokens.append(step.tokens.gather(1, candidate).masked_fill(outside, options.pad_id))
        beam = step.parents.gather(1, candidate)
        if step.attention is not None:
            weights = step.attention.unflatten(0, pool.scores.shape)  # (B, K, S)
            weights = weights.gather(1, beam[..., None].expand(-1, -1, weights.shape[2]))
            attentions.append(weights.masked_fill(outside[..., None], 0.0))
    tokens, attentions = tokens[::-1], attentions[::-1]
    return GenerateOutput(
        torch.stack(tokens, 2).flatten(0, 1),
        scores.flatten(),
        lengths.flatten(),
        torch.stack(attentions, 2).flatten(0, 1) if attentions else None,
    )
