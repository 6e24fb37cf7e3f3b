"""The sequence-to-sequence model: encoder, bridge, decoder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastseq.ops.common.checks import as_lengths, readable
from fastseq.ops.decoder.api import Search
from fastseq.seq2seq import generation
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.seq2seq.copying import copies_of
from fastseq.seq2seq.decoder import Decoder, DecoderState
from fastseq.seq2seq.encoder import Bridge, Encoder, EncoderOutput


class Seq2SeqOutput(NamedTuple):
    """The results of :meth:`Seq2Seq.forward`."""

    logits: Tensor  # (B, T, V); extended ones (B, T, V + S) with ``copy``
    attention: Tensor | None  # (B, T, S), if requested
    state: DecoderState  # after the last step


class Seq2Seq(nn.Module):
    """LSTM encoder-decoder with attention.

    The source goes through a stacked, optionally bidirectional :class:`fastseq.LSTM`; a bridge turns its final states
    into the decoder's (Sutskever et al. 2014, Cho et al. 2014). Each decoder step attends to the encoder outputs
    (Bahdanau et al. 2015) and forms the attentional vector, tanh(W [context, h]) (Luong et al. 2015), which the output
    projection reads and which, with input feeding, is part of the next step's input [embedding, feed].

    Token batches are batch-first, states (layers, B, H). No call changes the module: states travel as
    :class:`EncoderOutput` and :class:`DecoderState`.

    Args:
        config: a :class:`Seq2SeqConfig`.
    """

    rows_share_sources = True  # decode_step takes several rows for each sentence of the encoder output

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.bridge = Bridge(config)
        self.decoder = Decoder(config)
        if config.share_all_embeddings:
            self.encoder.embedding.weight = self.decoder.embedding.weight

    def forward(
        self,
        src: Tensor,
        src_lengths: Tensor | Sequence[int] | None,
        tgt_in: Tensor,
        *,
        teacher_forcing_ratio: float = 1.0,
        need_weights: bool = False,
        source_vectors: Tensor | None = None,
    ) -> Seq2SeqOutput:
        """Predict each target token from the source and the tokens before it.

        Args:
            src: (B, S) integer tokens; (B, S, 1 + K) with ``tag_vocab_size``; (B, S, F) floating point with
                ``source_features``; (B, S, 2) integers with ``copy``, see :meth:`encode`.
            src_lengths: (B,) integers in 0..S on any device; None: all S. Positions past the length have no influence.
            tgt_in: (B, T) integer tokens, T >= 1, the target shifted right: it begins with bos. With ``copy`` it may
                hold tokens of the extended vocabulary; the decoder reads those from V on as unk.
            teacher_forcing_ratio: at each step after the first, and for each sentence, the probability that the true
                token is the input; otherwise the most probable token of the step before (scheduled sampling,
                Bengio et al. 2015). Drawn from torch's generator; 1.0 and 0.0 draw nothing. Below 1.0 the target runs
                step by step.
            need_weights: also return the attention weights; there are none with attention="none".
            source_vectors: as in :meth:`encode`.

        Returns:
            Seq2SeqOutput with logits (B, T, V), attention (B, T, S) or None, and the state after step T.

        Raises:
            ValueError: wrong shapes, dtypes, lengths, ratio, or token ids outside the vocabulary (ids are checked
                on the CPU only).
        """
        enc = self._encode_for(tgt_in, src, src_lengths, teacher_forcing_ratio, source_vectors)
        return Seq2SeqOutput(*self.decoder(tgt_in, enc, teacher_forcing_ratio, need_weights))

    if TYPE_CHECKING:  # nn.Module declares __call__ without types
        __call__ = forward

    def loss(
        self,
        src: Tensor,
        src_lengths: Tensor | Sequence[int] | None,
        tgt_in: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        teacher_forcing_ratio: float = 1.0,
        source_vectors: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of the labels, without the logits of all steps in memory; for training and scoring.

        Equals ``F.cross_entropy(model(src, src_lengths, tgt_in).logits.flatten(0, 1).float(), labels.flatten(),
        ignore_index=pad_id, ...)``: see :func:`fastseq.linear_cross_entropy`. The decoder skips the padding after the
        last label of a sentence. Call it within the forward of a module that DDP or FSDP wraps.

        Args:
            src, src_lengths, tgt_in, teacher_forcing_ratio, source_vectors: as in :meth:`forward`.
            labels: (B, T) integer tokens, the target, closed by eos; pad where there is none. With ``copy`` tokens of
                the extended vocabulary: a label from V on must be one that its source names.
            label_smoothing: s in [0, 1], of the target distribution (1 - s) onehot(label) + s / V. With ``copy`` the
                loss is (1 - s) times -log P(label), and s times the mean over the V tokens of -log softmax(logits):
                the smoothing leaves gate and attention alone.
            reduction: "mean" over the labels other than pad, "sum", or "none" for a loss of each label: its negative
                log-probability, without label smoothing.

        Returns:
            The loss, float32 at least: (), or (B, T) for "none" with 0 at pad. With ``coverage`` mean and sum include
            the coverage loss of the steps with a label, times ``config.coverage_loss``.

        Raises:
            ValueError: as :meth:`forward`; labels of another shape; unknown reduction; label_smoothing outside [0, 1].
        """
        _check_tokens("labels", labels, self._target_tokens(src), "(B, T)")
        if labels.shape != tgt_in.shape:
            raise ValueError(
                f"Seq2Seq: labels must have the shape of tgt_in, got {tuple(labels.shape)} and {tuple(tgt_in.shape)}"
            )
        enc = self._encode_for(tgt_in, src, src_lengths, teacher_forcing_ratio, source_vectors)
        lengths = _lengths_to_last(labels != self.config.pad_id)
        _check_copied(labels, enc, self.config.tgt_vocab_size)
        steps = self.decoder.vectors(tgt_in, enc, teacher_forcing_ratio, False, lengths)
        options = {
            "ignore_index": self.config.pad_id,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
        }
        return self.decoder.loss(steps, enc, labels, **options)

    def _target_tokens(self, src: Tensor) -> int:
        """The number of target tokens: V, or V + S with copying."""
        return self.config.tgt_vocab_size + (src.size(1) if self.config.copy and src.dim() > 1 else 0)

    def source_vectors(self, src: Tensor) -> Tensor:
        """The vectors that the encoder reads for src: embeddings (B, S, E) without dropout; features as they are.

        Changed ones go back in as ``source_vectors``: for gradients with respect to the input, and perturbations.
        """
        if self.config.copy:
            src, _ = _split(src, self.config)
        self._check_source(src)
        return self.encoder.vectors(src)

    def _encode_for(
        self,
        tgt_in: Tensor,
        src: Tensor,
        src_lengths: Tensor | Sequence[int] | None,
        teacher_forcing_ratio: float,
        source_vectors: Tensor | None,
    ) -> EncoderOutput:
        """Check the target, and encode the source for one pass over it."""
        if not 0 <= teacher_forcing_ratio <= 1:
            raise ValueError(f"Seq2Seq: teacher_forcing_ratio must lie in [0, 1], got {teacher_forcing_ratio}")
        _check_tokens("tgt_in", tgt_in, self._target_tokens(src), "(B, T)")
        by_steps = self.decoder.by_steps(teacher_forcing_ratio)
        enc = self.encode(src, src_lengths, single_steps=by_steps, source_vectors=source_vectors)
        if tgt_in.size(0) != src.size(0) or tgt_in.size(1) == 0:
            raise ValueError(
                "Seq2Seq: tgt_in must have the batch size of src and at least one step, "
                f"got tgt_in {tuple(tgt_in.shape)} for src {tuple(src.shape)}"
            )
        return enc

    def encode(
        self,
        src: Tensor,
        src_lengths: Tensor | Sequence[int] | None = None,
        *,
        single_steps: bool = True,
        source_vectors: Tensor | None = None,
    ) -> EncoderOutput:
        """Compute everything that does not depend on the target.

        Args:
            src, src_lengths: as in :meth:`forward`. With ``copy`` src is (B, S, 2): src[..., 0] are source tokens, and
                src[..., 1] the target token that copying this position yields, in the extended vocabulary of V + S
                tokens: a word that the target vocabulary lacks gets V if it is the first such word of its sentence,
                V + 1 if it is the second, and so on; equal words get equal numbers.
            single_steps: many calls of :meth:`decode_step` will follow: see :meth:`fastseq.Attention.project_keys`.
                In a traced graph it has no effect; pass False for an example input of torch.export.
            source_vectors: (B, S, E) read in place of the ones of src, see :meth:`source_vectors`.

        Returns:
            EncoderOutput with memory (B, S, H), keys (opaque) or None, lengths (B,), and the decoder's first h and c
            (L, B, H). With ``frame_stack`` or ``pyramid``, S and lengths belong to the reduced source.
        """
        copies = None
        if self.config.copy:
            src, columns = _split(src, self.config)
            copies = copies_of(columns)
        self._check_source(src)
        if source_vectors is not None:
            self._check_vectors(source_vectors, src)
        src_lengths = None if src_lengths is None else as_lengths(src_lengths)
        memory, h, c, src_lengths = self.encoder(src, src_lengths, source_vectors)
        h, c = self.bridge(h, c)
        if src_lengths is None:
            lengths = torch.full((src.size(0),), memory.size(1), dtype=torch.int64, device=src.device)
        else:
            lengths = src_lengths.to(src.device, torch.int64)
        keys = None
        if self.decoder.attention is not None:
            keys = self.decoder.attention.project_keys(memory, lengths, single_steps=single_steps)
        return EncoderOutput(memory, keys, lengths, h, c, copies)

    def _check_source(self, src: Tensor) -> None:
        if self.config.tag_vocab_size is not None:
            _check_tagged(src, self.config)
        elif self.config.source_features is None:
            _check_tokens("src", src, self.config.src_vocab_size, "(B, S)")
        elif src.dim() != 3 or src.size(2) != self.config.source_features or not src.is_floating_point():
            raise ValueError(
                f"Seq2Seq: src must hold features (B, S, {self.config.source_features}), "
                f"got {tuple(src.shape)} {src.dtype}"
            )
        if src.size(1) == 0:
            raise ValueError(f"Seq2Seq: src must have at least one position (S >= 1), got {tuple(src.shape)}")

    def _check_vectors(self, vectors: Tensor, src: Tensor) -> None:
        expected = (*src.shape[:2], self.config.source_features or self.config.embedding_dim)
        if tuple(vectors.shape) != expected or not vectors.is_floating_point():
            raise ValueError(
                f"Seq2Seq: source_vectors must be floating point numbers {expected} for this src, "
                f"got {tuple(vectors.shape)} {vectors.dtype}"
            )

    def start(self, enc: EncoderOutput) -> DecoderState:
        """The decoder's state before the first step: the bridged encoder states, and zeros as the feed."""
        return self.decoder.start(enc)

    def decode_step(
        self, tokens: Tensor, state: DecoderState, enc: EncoderOutput, *, need_weights: bool = True
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Advance every row by one token: exactly what :meth:`forward` computes at that step.

        Row n belongs to sentence n // K of B sentences, where N = B * K and K >= 1: the K rows of a sentence (beams,
        samples) share its keys and memory, which are not repeated.

        Args:
            tokens: (N,) integers, the tokens just chosen (bos at the first step). Those from V on are read as unk with
                ``copy``.
            state: of N rows, from :meth:`start` or from the step before.
            enc: from :meth:`encode`, with B sentences.
            need_weights: return the attention weights; without them a faster kernel may run.

        Returns:
            logits (N, V), or extended ones (N, V + S) with ``copy``; the next state; attention (N, S) or None.

        Raises:
            ValueError: shapes that do not fit, or token ids outside the vocabulary (checked on the CPU only).
        """
        rows, sentences = state.h.size(1), enc.memory.size(0)
        fits = rows == sentences or (0 < sentences < rows and rows % sentences == 0)
        if tokens.dim() != 1 or tokens.size(0) != rows or not fits:
            raise ValueError(
                "Seq2Seq: decode_step needs one token and one state per row, and K >= 1 rows per sentence, got tokens "
                f"{tuple(tokens.shape)}, a state of {rows} rows and an encoder output of {sentences} sentences"
            )
        try:
            return self.decoder.step(tokens, state, enc, need_weights)
        except (IndexError, RuntimeError):  # of the look-up; a check before each step would cost more
            _check_ids("tokens", tokens, self.config.tgt_vocab_size)
            raise

    def greedy_steps(
        self, tokens: Tensor, state: DecoderState, enc: EncoderOutput, search: Search
    ) -> tuple[Tensor, Tensor, Tensor, DecoderState] | None:
        """Several steps of :meth:`decode_step`, each from the most likely token of the step before; for ``generate``.

        Args:
            tokens: (N,) integers, N = B.
            state, enc: as in :meth:`decode_step`.
            search: see ``fastseq.ops.decoder.spec``.

        Returns:
            tokens (N, R) and log-probabilities (N, R) of R >= 1 steps, done (N,), the next state. None where steps have
            to run one by one: other devices and dtypes, autocast, a replaced ``decode_step`` or submodule.
        """
        replaced = "decode_step" in self.__dict__ or type(self).decode_step is not Seq2Seq.decode_step
        if replaced or type(self.decoder) is not Decoder:
            return None
        return self.decoder.greedy_steps(tokens, state, enc, search)

    generate = generation.generate  # the function's first parameter is the model


def build_seq2seq_model(vocab_size: int, embedding_dim: int, hidden_units: int) -> Seq2Seq:
    """The classic encoder-decoder of the Keras example: two LSTMs, joined by the final state alone.

    An encoder LSTM reads the embedded source; a decoder LSTM starts from its final state (h and c) and reads the
    embedded target. One vocabulary size, an embedding each, one layer, one direction, no attention, no dropout
    (Sutskever et al. 2014, Cho et al. 2014). Unlike that example the source's padding is skipped (``src_lengths``),
    and the model ends in the output projection, so that it returns logits.

    Args:
        vocab_size: number of source tokens, and of target tokens; ids 0 to 3 are pad, bos, eos, unk.
        embedding_dim: size of the embeddings.
        hidden_units: size of the LSTM states.
    """
    return Seq2Seq(
        Seq2SeqConfig(
            src_vocab_size=vocab_size,
            tgt_vocab_size=vocab_size,
            embedding_dim=embedding_dim,
            hidden_size=hidden_units,
            bidirectional=False,
            attention="none",
            input_feeding=False,
            bridge="concat",
            dropout=0.0,
        )
    )


def _split(src: Tensor, config: Seq2SeqConfig) -> tuple[Tensor, Tensor]:
    """src (B, S, 2) of a model that copies -> source tokens and target tokens, (B, S) each."""
    if src.dim() != 3 or src.size(2) != 2:
        raise ValueError(
            "Seq2Seq: with copy, src must hold source tokens and the target tokens of their copies, (B, S, 2), got "
            f"{tuple(src.shape)}"
        )
    tokens, columns = src.unbind(2)
    _check_tokens("src[..., 1]", columns, config.tgt_vocab_size + src.size(1), "(B, S)")
    return tokens, columns


def _check_copied(labels: Tensor, enc: EncoderOutput, vocab_size: int) -> None:
    """ValueError for a label past the vocabulary that its source does not name, where labels can be read."""
    if enc.copies is None or not readable(labels):
        return
    copied = labels >= vocab_size
    if copied.any() and not ((enc.copies.columns[:, None] == labels[..., None]).any(-1) | ~copied).all():
        raise ValueError(
            f"Seq2Seq: a label from {vocab_size} on, the size of the target vocabulary, is no word of its source; "
            "number the words as in src[..., 1], and map all others to unk_id"
        )


def _lengths_to_last(present: Tensor) -> Tensor | None:
    """present (B, T) bool -> the number of steps up to the last True, (B,); None if that is T in every row."""
    steps = torch.arange(1, present.size(1) + 1, device=present.device)
    lengths = (present * steps).amax(1)
    return None if readable(lengths) and bool((lengths == present.size(1)).all()) else lengths


def _check_tokens(name: str, tokens: Tensor, vocab_size: int, shape: str) -> None:
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"Seq2Seq: {name} must hold tokens {shape}, int64 or int32, got {tuple(tokens.shape)} {tokens.dtype}"
        )
    _check_ids(name, tokens, vocab_size)


def _check_tagged(src: Tensor, config: Seq2SeqConfig) -> None:
    if src.dim() != 3 or src.size(2) == 0:
        raise ValueError(f"Seq2Seq: src must hold a token and its tags (B, S, 1 + K), got {tuple(src.shape)}")
    _check_tokens("src", src[..., 0], config.src_vocab_size, "and tags (B, S, 1 + K)")
    _check_ids("src (tags)", src[..., 1:], config.tag_vocab_size)


def _check_ids(name: str, tokens: Tensor, vocab_size: int) -> None:
    """ValueError for ids outside the vocabulary, where they can be read."""
    if tokens.numel() and readable(tokens):
        low, high = (int(x) for x in torch.aminmax(tokens))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Seq2Seq: {name} holds token ids from {low} to {high}, but the vocabulary has {vocab_size}; "
                "map unknown tokens to unk_id first"
            )
