"""The loops behind ``generate``: greedy decoding, sampling and beam search, on the model's device.

Shapes: B sentences, b of them still decoded, K decoder rows of a sentence (beams or returned samples, side by side),
N = b * K, R returned sequences per sentence, V target vocabulary, S source positions, T decoding steps, L longest
returned sequence.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq.ops.candidates.api import Candidates, candidates
from fastseq.ops.decoder.api import Search
from fastseq.seq2seq.coverage import Coverage
from fastseq.seq2seq.options import MINUS_INFINITY, Options
from fastseq.seq2seq.prefix import Prefix, force_candidates
from fastseq.seq2seq.sampling import choose, log_probs_of, processed_candidates

STEPS_BETWEEN_CHECKS = 8  # on a GPU the check "how many sentences are done" synchronises; on the CPU every step checks
DONE_BEFORE_LEAVING = 0.25  # of the sentences: fewer stay in the batch, since selecting the others copies their sources
STEPS_OF_A_CALL = 256  # of the model's own greedy loop, which no signal interrupts
FEW_ROWS = 256  # their tokens are read faster one by one than by tensor operations


class GenerateOutput(NamedTuple):
    """Rows ``b * R`` to ``b * R + R - 1`` belong to sentence b: best first in beam search, as drawn in sampling."""

    sequences: Tensor  # (B * R, L) int64: no bos; eos kept; pad after it
    sequences_scores: Tensor  # (B * R,) log-probability, eos included, divided by the length penalty; float32 or wider
    lengths: Tensor  # (B * R,) int64: number of tokens, eos included
    cross_attentions: Tensor | None  # (B * R, L, S) weights behind each token, 0 past the length; None unless requested
    token_scores: Tensor | None  # (B * R, L) log-probability of each token, 0 past the length; None unless requested


class Batch:
    """The sentences that are still decoded: encoder output, decoder state, limits, and which of their rows are done.

    Attributes:
        sentences: (b,) their numbers in the batch of ``generate``.
        limits: (b,) limit on the tokens of each.
        prefix: the first tokens of each, or None.
        forced_steps: steps in which the token of a sentence is given.
        done: (b, K) in sampling, (b, 1) in beam search.
        rows: K, 1 until ``widen``.
    """

    def __init__(self, model: nn.Module, enc: Any, limits: Tensor, prefix: Prefix | None, options: Options):
        self.model, self.enc, self.limits, self.options = model, enc, limits, options
        self.prefix, self.forced_steps = prefix, 0 if prefix is None else prefix.tokens.shape[1]
        self.needs_weights = options.output_attentions or options.coverage_penalty != 0
        self.state, self.rows = model.start(enc), 1
        self.sentences = torch.arange(len(limits), device=limits.device)
        self.done = limits.new_zeros(len(limits), 1, dtype=torch.bool)
        self.ends = set(limits.tolist())  # steps at which a sentence reaches its limit
        self.history = limits[:, None][:, :0]  # (N, T), T > step, kept where keeps_history
        self.keeps_history = bool(options.no_repeat_ngram_size) or options.logits_processor is not None
        self.always = self.at_first = limits.new_tensor(options.forbidden_ids)
        if options.min_new_tokens:
            self.at_first = limits.new_tensor((*options.forbidden_ids, options.eos_id))
        self.repeated = False

    def __len__(self) -> int:
        return len(self.limits)

    def widen(self, rows: int) -> None:
        """Let each sentence have ``rows`` decoder rows. The caller selects them from the state."""
        self.rows = rows
        self.repeated = rows > 1 and not getattr(self.model, "rows_share_sources", False)
        if self.repeated:
            self.enc = self.enc.repeat_interleave(rows)

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step of the model for tokens (N,): logits (N, V), attention (N, S) if requested."""
        wanted = self.needs_weights
        logits, self.state, attention = self.model.decode_step(tokens, self.state, self.enc, need_weights=wanted)
        if wanted and attention is None:
            option = "output_attentions=True" if self.options.output_attentions else "coverage_penalty"
            raise ValueError(f"generate: {option} needs a model with attention; this one has none.")
        return logits, attention if wanted else None

    def greedy_steps(self, tokens: Tensor, step: int) -> "_Chosen | None":
        """Steps from tokens (N,) by the model, up to one after which sentences may leave; None where it has no loop."""
        loop, eos = getattr(self.model, "greedy_steps", None), self.options.eos_id
        if loop is None or self.prefix is not None or not self.options.plain_greedy():
            return None
        leave = hasattr(self.enc, "index_select")
        search = Search(
            limits=self.limits - step,
            done=self.done.view(-1),
            forbidden=self.limits.new_tensor((*self.options.forbidden_ids, eos)),
            early_steps=max(self.options.min_new_tokens - step, 0),
            end_token=eos,
            enough_done=math.ceil(DONE_BEFORE_LEAVING * len(self)) if leave else len(self),
            steps=min(max(self.ends) - step, STEPS_OF_A_CALL),
        )
        result = loop(tokens, self.state, self.enc, search)
        if result is None:
            return None
        chosen, log_probs, done, self.state = result
        self.done = done.view_as(self.done)
        return _Chosen(chosen, log_probs, None)

    def forbidden(self, step: int) -> Tensor:
        """(F,) or (N, F) tokens that may not follow the ``step`` tokens so far; -1 forbids nothing."""
        fixed = self.at_first if step < self.options.min_new_tokens else self.always
        if self.prefix is not None and self.options.min_new_tokens:
            early = self.prefix.lengths + self.options.min_new_tokens > step  # (b,)
            eos = torch.where(early, self.options.eos_id, -1).repeat_interleave(self.rows)[:, None]
            fixed = torch.cat([self.always.expand(len(eos), -1), eos], 1)
        size = self.options.no_repeat_ngram_size
        if not size:
            return fixed
        repeats = _repeats(self.history[:, :step], size)
        return torch.cat([fixed.expand(len(repeats), -1), repeats], 1)

    def input_ids(self, step: int) -> Tensor | None:
        """(N, 1 + step) bos and the tokens so far, for logits processors; None without them."""
        if self.options.logits_processor is None:
            return None
        bos = self.limits.new_full((len(self) * self.rows, 1), self.options.bos_id)
        return torch.cat([bos, self.history[:, :step]], 1)

    def append(self, tokens: Tensor, step: int) -> None:
        """Remember tokens (N,), the ones of this step."""
        if self.keeps_history:
            self.history = _with_room(self.history, step, self.options.pad_id)
            self.history[:, step] = tokens

    def at_limit(self, step: int) -> Tensor:
        """(b, 1) bool: this step is the last one of the sentence."""
        return (self.limits == step + 1)[:, None]

    def end(self, tokens: Tensor, step: int) -> bool:
        """Mark the rows that end with tokens (N,) of this step. False if there are none, without a tensor operation."""
        few = tokens.is_cpu and len(tokens) <= FEW_ROWS
        if few and step + 1 not in self.ends and self.options.eos_id not in tokens.tolist():
            return False
        self.done |= (tokens == self.options.eos_id).view_as(self.done)
        if step + 1 in self.ends:
            self.done |= self.at_limit(step)
        return True

    def row_numbers(self, sentences: Tensor) -> Tensor:
        """The numbers of the rows of ``sentences`` (n,), side by side: (n * K,)."""
        return (sentences[:, None] * self.rows + torch.arange(self.rows, device=sentences.device)).flatten()

    def remaining(self, step: int) -> Tensor | None:
        """The places (0..b-1) of the sentences that are not done; None while too few are done to let them leave."""
        number = _number_done(self.done, step)
        leave = number >= DONE_BEFORE_LEAVING * len(self) and hasattr(self.enc, "index_select")
        leave = leave and self.options.logits_processor is None  # a processor may count on the rows of all sentences
        return (~self.done.all(1)).nonzero()[:, 0] if number == len(self) or (number and leave) else None

    def keep(self, places: Tensor) -> None:
        """Let all sentences leave but those at ``places`` (n,). The caller selects the rows of the state."""
        self.enc = self.enc.index_select(self.row_numbers(places) if self.repeated else places)
        self.sentences, self.limits = self.sentences.index_select(0, places), self.limits.index_select(0, places)
        self.done = self.done.index_select(0, places)
        self.prefix = None if self.prefix is None else self.prefix.index_select(places)

    def select(self, rows: Tensor) -> None:
        """Let the decoder go on with ``rows`` (M,) of its state, in that order, repeats allowed."""
        self.state = self.state.index_select(rows)
        if self.keeps_history:
            self.history = self.history.index_select(0, rows)


def _number_done(done: Tensor, step: int) -> int:
    """The number of sentences whose rows are all done: the only synchronisation of a step. On a GPU 0 in most steps."""
    if done.device.type != "cpu" and (step + 1) % STEPS_BETWEEN_CHECKS:
        return 0
    return int((done if done.shape[1] == 1 else done.all(1)).sum())


def _with_room(tokens: Tensor, step: int, fill: int) -> Tensor:
    """tokens (N, T) with a column for ``step``: doubled where it is full, since few sequences reach their limit."""
    if step < tokens.shape[1]:
        return tokens
    return torch.cat([tokens, tokens.new_full((len(tokens), max(step, 32)), fill)], 1)


def _repeats(history: Tensor, size: int) -> Tensor:
    """(N, step - size + 1) the tokens that would complete an n-gram which history (N, step) already holds, or -1."""
    if history.shape[1] < size:
        return history[:, :0]
    ngrams = history.unfold(1, size, 1)  # (N, step - size + 1, size)
    begun = history[:, None, history.shape[1] - size + 1 :]  # (N, 1, size - 1) start of the n-gram to come
    return ngrams[..., -1].where((ngrams[..., :-1] == begun).all(-1), -1)


class _Chosen(NamedTuple):
    """Steps of decoding without beams. A row that is done goes on; its later tokens are dropped at the end."""

    tokens: Tensor  # (N, R)
    log_probs: Tensor  # (N, R)
    attention: Tensor | None  # (N, S), R = 1


def decode_rows(model: nn.Module, enc: Any, limits: Tensor, prefix: Prefix | None, options: Options) -> GenerateOutput:
    """Greedy decoding and sampling: rows are independent. limits (B,)."""
    batch, returned = Batch(model, enc, limits, prefix, options), options.num_return_sequences
    if returned > 1:
        batch.select(batch.sentences.repeat_interleave(returned))
        batch.widen(returned)
        batch.done = batch.done.expand(-1, returned).clone()
        limits = limits.repeat_interleave(returned)
    tokens = torch.full_like(limits, options.bos_id)
    steps, parts = [], []  # parts: row numbers and steps between two changes of the batch
    step, last = 0, max(batch.ends)
    while step < last:
        chosen = batch.greedy_steps(tokens, step)
        ended = chosen is not None
        if chosen is None:
            chosen = _one_step(batch, tokens, step)
            ended = batch.end(chosen.tokens.view(-1), step)
        steps.append(chosen)
        step += chosen.tokens.shape[1]
        tokens = chosen.tokens[:, -1]
        places = batch.remaining(step - 1) if ended else None
        if places is None:
            continue
        if len(places) == 0:
            break
        parts.append((batch.row_numbers(batch.sentences), steps))
        steps, rows = [], batch.row_numbers(places)
        batch.select(rows)
        batch.keep(places)
        tokens = tokens.index_select(0, rows)
    if steps:
        parts.append((batch.row_numbers(batch.sentences), steps))
    return _finish(parts, limits, options)


def _one_step(batch: Batch, tokens: Tensor, step: int) -> _Chosen:
    """The step after tokens (N,)."""
    logits, attention = batch.advance(tokens)
    log_probs, chosen = choose(logits, batch.forbidden(step), batch.options, batch.input_ids(step))
    if step < batch.forced_steps:
        forced, given = batch.prefix.at(step, batch.rows)
        log_probs, chosen = log_probs_of(logits, given).where(forced, log_probs), given.where(forced, chosen)
    batch.append(chosen.view(-1), step)
    return _Chosen(chosen, log_probs, attention)


def _finish(parts: list[tuple[Tensor, list[_Chosen]]], limits: Tensor, options: Options) -> GenerateOutput:
    """Put the parts of the rows together; limits (B * R,). Each row ends at its first eos or at its limit."""
    sequences = _join(parts, [torch.cat([step.tokens for step in steps], 1) for _, steps in parts])
    log_probs = _join(parts, [torch.cat([step.log_probs for step in steps], 1) for _, steps in parts])
    is_eos = sequences == options.eos_id
    lengths = torch.where(is_eos.any(1), is_eos.byte().argmax(1) + 1, sequences.shape[1]).minimum(limits)
    longest, last = int(lengths.max()), lengths[:, None] - 1
    outside = torch.arange(longest, device=limits.device) > last  # (B * R, L)
    attentions = None
    if options.output_attentions:
        weights = _join(parts, [torch.stack([step.attention for step in steps], 1) for _, steps in parts])
        attentions = weights[:, :longest].masked_fill(outside[..., None], 0.0)
    return GenerateOutput(
        sequences[:, :longest].masked_fill(outside, options.pad_id),
        _penalised(log_probs.cumsum(1).gather(1, last).view(-1), lengths, options),
        lengths,
        attentions,
        log_probs[:, :longest].masked_fill(outside, 0.0) if options.output_scores else None,
    )


def _join(parts: list[tuple[Tensor, list[_Chosen]]], values: list[Tensor]) -> Tensor:
    """values (rows of the part, steps of the part, ...) of each part -> (B * R, T, ...), 0 after a row has left."""
    first = values[0]  # of all rows
    if len(parts) == 1:
        return first
    joined, start = first.new_zeros(len(first), sum(v.shape[1] for v in values), *first.shape[2:]), 0
    for (rows, _), part in zip(parts, values, strict=True):
        joined[rows, start : start + part.shape[1]] = part
        start += part.shape[1]
    return joined


class _Step(NamedTuple):
    """One step of beam search. A candidate is a beam with one more token; each sentence keeps its 2K best."""

    beams: Tensor  # (b, 2K) the beam (0..K-1) that each candidate extends
    tokens: Tensor  # (b, 2K) the token that it adds
    totals: Tensor  # (b, 2K) its log-probability
    survivors: Tensor  # (b, K) the candidates that are the beams of the next step
    attention: Tensor | None  # (b * K, S) weights of the beams before the step; (b, S) before the first one
    places: Tensor | None  # (B,) the place of each sentence, 0 for those that have left; None: all are there, in order

    def of_all(self, t: Tensor) -> Tensor:
        """The rows of t (b, ...) for all B sentences; those that have left get the rows of another one."""
        return t if self.places is None else t.index_select(0, self.places)


class _Pool(NamedTuple):
    """The K best finished hypotheses of each sentence, best first; a free place has the score -inf."""

    scores: Tensor  # (b, K) divided by the length penalty
    lengths: Tensor  # (b, K) hypothesis ended in step lengths - 1 ...
    candidates: Tensor  # (b, K) ... as this candidate

    def index_select(self, places: Tensor) -> "_Pool":
        """The sentences at ``places`` (n,)."""
        return _Pool(*(t.index_select(0, places) for t in self))


def beam_search(model: nn.Module, enc: Any, limits: Tensor, prefix: Prefix | None, options: Options) -> GenerateOutput:
    """Beam search over all sentences at once; limits (B,). A sentence that is done keeps its pool from then on.

    Before the first step the beams of a sentence are equal, so that step runs one row a sentence, unless there are
    logits processors.
    """
    batch, beams = Batch(model, enc, limits, prefix, options), options.num_beams
    tokens, scores, steps = limits.new_full((len(limits),), options.bos_id), None, []
    coverage = Coverage(options.coverage_penalty, enc.lengths.to(limits.device))
    if options.logits_processor is not None:  # a processor sees all beams from the first step on
        tokens, scores = tokens.repeat_interleave(beams), tokens.new_zeros(len(batch), beams).float()
        scores[:, 1:] = MINUS_INFINITY
        batch.select(batch.sentences.repeat_interleave(beams))
        batch.widen(beams)
    free = limits.new_zeros(len(limits), beams)
    pool = _Pool(free.float() + MINUS_INFINITY, free, free)
    pools, places = [], None  # pools: numbers and pools of the sentences that have left, and at the end of all others
    for step in range(max(batch.ends)):
        logits, attention = batch.advance(tokens)
        best = _candidates(batch, logits, scores, step)
        is_eos, at_limit = best.tokens == options.eos_id, batch.at_limit(step)
        scores, survivors = best.totals.masked_fill(is_eos, MINUS_INFINITY).topk(beams)  # at most K of the 2K are eos
        kept = attention if options.output_attentions else None
        steps.append(_Step(best.beams, best.tokens, best.totals, survivors, kept, places))

        ended = (is_eos | at_limit) & ~batch.done
        lengths = torch.full_like(pool.lengths, step + 1)
        finished = _penalised(best.totals.masked_fill(~ended, MINUS_INFINITY)[:, :beams], lengths, options)
        pool = _collect(pool, coverage.scored(finished, attention, best.beams[:, :beams]), lengths)
        batch.done |= at_limit | _decided(pool, scores[:, 0], lengths[:, 0], batch.limits, options)[:, None]
        rest = batch.remaining(step)
        if rest is not None and len(rest) == 0:
            break
        first_rows = torch.arange(len(batch), device=limits.device)[:, None] * batch.rows
        surviving_beams = best.beams.gather(1, survivors)  # (b, K)
        rows = first_rows + surviving_beams
        next_tokens = best.tokens.gather(1, survivors)
        coverage.keep(surviving_beams, rest)
        if rest is not None:
            pools.append((batch.sentences, pool))
            rows, next_tokens, scores = (t.index_select(0, rest) for t in (rows, next_tokens, scores))
            batch.keep(rest)
            pool, places = pool.index_select(rest), torch.zeros_like(limits)
            places[batch.sentences] = torch.arange(len(batch), device=limits.device)
        batch.select(rows.flatten())
        if batch.rows < beams:
            batch.widen(beams)
        tokens = next_tokens.flatten()
        batch.append(tokens, step)
    pools.append((batch.sentences, pool))
    return _trace_back(steps, _join_pools(pools), options)


def _candidates(batch: Batch, logits: Tensor, scores: Tensor | None, step: int) -> Candidates:
    """The 2K best continuations of each sentence, from logits (N, V) and the scores (b, K) of its beams."""
    options, forbidden = batch.options, batch.forbidden(step)
    if options.logits_processor is not None:
        best = processed_candidates(logits, scores, forbidden, options, batch.input_ids(step))
    else:
        best = candidates(logits, 2 * options.num_beams, scores, forbidden=forbidden, last_resort=options.eos_id)
    return force_candidates(best, logits, scores, batch.prefix, step) if step < batch.forced_steps else best


def _join_pools(pools: list[tuple[Tensor, _Pool]]) -> _Pool:
    """The pool of each sentence as it was when the sentence left: the last one that it appears in. -> (B, K)."""
    joined = pools[0][1]  # of all sentences
    for sentences, pool in pools[1:]:
        joined = _Pool(*(t.index_copy(0, sentences, part) for t, part in zip(joined, pool, strict=True)))
    return joined


def _penalised(scores: Tensor, lengths: Tensor, options: Options) -> Tensor:
    """Log-probabilities divided by the length penalty; lengths broadcast against scores."""
    if options.length_penalty_type == "none":
        return scores
    lengths = lengths.to(scores.dtype)
    base = lengths if options.length_penalty_type == "avg" else (5 + lengths) / 6
    return scores / base**options.length_penalty


def _collect(pool: _Pool, scores: Tensor, lengths: Tensor) -> _Pool:
    """Put the K best candidates of a step, scores (B, K) and lengths (B, K), into the pool; -inf: not finished."""
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(lengths)
    scores = torch.cat([pool.scores, scores], 1)  # (B, 2K)
    scores, order = scores.sort(dim=1, descending=True, stable=True)  # stable: equals stay, free places keep length 0
    scores, order = scores[:, : places.shape[1]], order[:, : places.shape[1]]
    lengths = torch.cat([pool.lengths, lengths], 1).gather(1, order)
    return _Pool(scores, lengths, torch.cat([pool.candidates, places], 1).gather(1, order))


def _decided(pool: _Pool, best: Tensor, lengths: Tensor, limits: Tensor, options: Options) -> Tensor:
    """(B,) bool: by ``early_stopping`` the sentence is done. best, lengths (B,): its best beam."""
    worst = pool.scores[:, -1]  # -inf while a place is free
    if options.early_stopping != "never" and options.early_stopping:
        return worst > MINUS_INFINITY
    if options.early_stopping == "never" and options.length_penalty > 0:
        lengths = limits  # log-probabilities only fall: none gets better than today's over the largest penalty
    return _penalised(best, lengths, options) <= worst


def _trace_back(steps: list[_Step], pool: _Pool, options: Options) -> GenerateOutput:
    """Follow the best hypotheses of the pool from their last token to their first."""
    scores = pool.scores[:, : options.num_return_sequences]  # (B, R)
    lengths = pool.lengths[:, : options.num_return_sequences]
    last = pool.candidates[:, : options.num_return_sequences]
    beam = torch.zeros_like(last)  # (B, R) beam before step + 1 that the hypothesis came through
    tokens, totals, attentions = [], [], []
    for number in range(int(lengths.max()), 0, -1):
        step = steps[number - 1]
        candidate = torch.where(lengths == number, last, step.of_all(step.survivors).gather(1, beam))
        outside = lengths < number
        tokens.append(step.of_all(step.tokens).gather(1, candidate).masked_fill(outside, options.pad_id))
        if options.output_scores:
            totals.append(step.of_all(step.totals).gather(1, candidate).masked_fill(outside, 0.0))
        beam = step.of_all(step.beams).gather(1, candidate)
        if step.attention is not None:
            weights = step.of_all(step.attention.unflatten(0, (len(step.tokens), -1)))  # (B, K, S)
            weights = weights.gather(1, beam[..., None].expand(-1, -1, weights.shape[2]))
            attentions.append(weights.masked_fill(outside[..., None], 0.0))
    tokens, totals, attentions = tokens[::-1], totals[::-1], attentions[::-1]
    return GenerateOutput(
        torch.stack(tokens, 2).flatten(0, 1),
        scores.flatten(),
        lengths.flatten(),
        torch.stack(attentions, 2).flatten(0, 1) if attentions else None,
        _differences(torch.stack(totals, 2).flatten(0, 1), lengths.flatten()) if totals else None,
    )


def _differences(totals: Tensor, lengths: Tensor) -> Tensor:
    """Running sums (M, L) over ``lengths`` (M,) tokens -> the summands, 0 past the length."""
    outside = torch.arange(totals.shape[1], device=totals.device) >= lengths[:, None]
    return totals.diff(dim=1, prepend=totals.new_zeros(len(totals), 1)).masked_fill(outside, 0.0)
