"""``generate``: greedy decoding, beam search and sampling for encoder-decoder models, batched over sentences.

A model has the protocol of :class:`fastseq.Seq2Seq`: ``config`` with ``pad_id``, ``bos_id``, ``eos_id``;
``encode(src, src_lengths)``; ``start(enc)``; ``decode_step(tokens, state, enc, need_weights=...)``; an encoder output
with ``lengths`` and ``repeat_interleave(k)``; a state with ``index_select(rows)``, repeats allowed. Three more are
optional:

* ``rows_share_sources = True`` on the model: ``decode_step`` takes N = B * K tokens and states beside an encoder output
  of B sentences, where row n belongs to sentence n // K. Then the encoder output is never repeated. Without it,
  ``decode_step`` gets as many sentences as rows, by ``repeat_interleave``.
* ``index_select(rows)`` on the encoder output: then sentences that are done leave the batch.
* ``greedy_steps(tokens, state, enc, search)`` on the model: several greedy steps in one call, or None where it has no
  loop of its own; see :meth:`fastseq.Seq2Seq.greedy_steps`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastseq.seq2seq.options import Options, check
from fastseq.seq2seq.prefix import read_prefix
from fastseq.seq2seq.search import GenerateOutput, beam_search, decode_rows

EXTRA_TOKENS = 10  # the default limit is ceil(max_length_ratio * source length) + EXTRA_TOKENS


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
    coverage_penalty: float = 0.0,
    early_stopping: bool | str = False,
    generate_unk: bool = True,
    prefix_tokens: Tensor | Sequence[Sequence[int]] | None = None,
    output_scores: bool = False,
    output_attentions: bool = False,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
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
        max_new_tokens: limit on the tokens after the prefix, eos included. Default: each sentence's own limit,
            ``ceil(max_length_ratio * source length) + 10``, or ``min_new_tokens`` where that is more. Beam search lets
            the hypotheses cut off at the limit compete with the finished ones.
        min_new_tokens: tokens that must come between the prefix and eos.
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
        coverage_penalty: beta of the term ``beta * sum over s of log(min(sum over t of attention[t, s], 1))`` that is
            added to the score of a finished hypothesis: it loses rank for source positions that it has hardly looked at
            (Wu et al. 2016, equation 14, with their values 0 to 0.4). 0: off. Beam search of a model with attention.
        early_stopping: when the search of a sentence with ``num_beams`` finished hypotheses ends. False (default, as in
            Hugging Face): when no beam beats the worst of them at its present length. True: at once, which may drop the
            best beam. "never": when no beam can beat the worst of them at any length up to the limit. The best score
            never falls from True to False to "never".
        generate_unk: False forbids the unknown token, ``config.unk_id``, as well.
        prefix_tokens: the first tokens of each sequence, without bos and eos: (B, P) filled up with pad, or B lists.
            Empty for a sentence: none. They are part of the sequence and of its score, and may be forbidden tokens.
        output_scores: return the log-probability of each token too.
        output_attentions: return the attention weights too.
        logits_processor: changes the scores of the next tokens: a ``transformers.LogitsProcessorList``, or any function
            of input_ids (N, T), bos and the tokens so far, and scores (N, V) that returns scores (N, V). As in Hugging
            Face the scores are logits in greedy decoding and sampling, which apply temperature, top-k and top-p after
            it, and log-probabilities in beam search, which ranks by the ones returned. N = B * K rows, the K of a
            sentence side by side; all B sentences stay until the last is done. Slower: no fused kernel serves it.
        generator: source of random numbers for sampling, on the device of ``src``; default: torch's own.

    Returns:
        GenerateOutput. Scores are log-probabilities under the model itself in every mode: temperature, top-k, top-p,
        prefixes and forbidden tokens change the choice of tokens, not the score of a sequence. Only in beam search with
        a ``logits_processor`` they are the scores that it returned.

    Raises:
        ValueError: an option out of its range, options that exclude each other, an empty batch, a prefix that holds
            eos or unknown ids, or ``output_attentions`` or ``coverage_penalty`` for a model without attention.
    """
    ids = model.config.pad_id, model.config.bos_id, model.config.eos_id
    forbidden_ids = {*ids[:2], *(() if generate_unk else (model.config.unk_id,))} - {model.config.eos_id}
    options = Options(
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
        coverage_penalty=coverage_penalty,
        output_scores=output_scores,
        output_attentions=output_attentions,
        generator=generator,
        logits_processor=logits_processor,
    )
    check(options)
    if src.shape[0] == 0:
        raise ValueError("generate: the batch is empty; expected src with at least one sentence.")
    prefix = read_prefix(prefix_tokens, src, model.config)
    with torch.no_grad(), _eval_mode(model):
        enc = model.encode(src, src_lengths)
        limits = _limits(enc.lengths.to(src.device), options)
        if prefix is not None:
            limits = limits + prefix.lengths
        return (beam_search if num_beams > 1 else decode_rows)(model, enc, limits, prefix, options)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each submodule gets its own training flag back."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _limits(src_lengths: Tensor, options: Options) -> Tensor:
    """(B,) limit on the tokens of each sentence."""
    if options.max_new_tokens is not None:
        return torch.full_like(src_lengths, options.max_new_tokens)
    limits = (src_lengths * options.max_length_ratio).ceil().to(src_lengths.dtype) + EXTRA_TOKENS
    return limits.clamp(min=options.min_new_tokens)
