"""Seq2Seq as a model of transformers: its ``generate``, its ``Trainer``, its Auto classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from fastseq.hf.config import FastseqConfig
from fastseq.seq2seq.decoder import DecoderState
from fastseq.seq2seq.encoder import EncoderOutput
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.generation_config import NAME, search_options
from fastseq.training.saved import tied_names

IGNORED_LABEL = -100  # of transformers' collators


class LSTMCache:
    """The decoder's state between two steps, in the place of a cache of keys and values."""

    is_compileable = False
    is_linear = (True,)  # its size does not grow with the sequence

    def __init__(self, state: DecoderState, length: int) -> None:
        self.state, self.length = state, length

    def get_seq_length(self, *_: Any) -> int:
        """The number of tokens that the state has read."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` (N,), in that order, repeats allowed."""
        self.state = self.state.index_select(beam_idx)


@dataclass
class Encoded(ModelOutput):
    """The encoder's results."""

    last_hidden_state: Tensor | None = None  # (B, S, H); transformers repeats it for beams, which nothing reads
    encoded: EncoderOutput | None = None  # of B sentences, whose beams and samples share it


@dataclass
class FastseqOutput(ModelOutput):
    """The results of :meth:`FastseqForSeq2SeqLM.forward`."""

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (N, T, V)
    cache: LSTMCache | None = None
    cross_attentions: tuple[Tensor, ...] | None = None  # one of (N, 1, T, S)
    encoder_last_hidden_state: Tensor | None = None  # (B, S, H)
    decoder_attentions: None = None  # transformers' generate reads it; an LSTM has no self-attention


class _EncoderCall:
    """``get_encoder()``: encodes by ``Seq2Seq.encode``, which also projects the keys of the attention."""

    main_input_name = "input_ids"

    def __init__(self, model: "FastseqForSeq2SeqLM") -> None:
        self.model = model

    def forward(self, input_ids=None, attention_mask=None, input_features=None, return_dict=None, **_: Any) -> Encoded:
        enc = self.model.encode(input_ids if input_features is None else input_features, attention_mask)
        return Encoded(last_hidden_state=enc.memory, encoded=enc)

    __call__ = forward


class FastseqForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """:class:`fastseq.Seq2Seq` as a model of transformers. Its parameters have the same names.

    The LSTM state takes the place of the key-value cache, and all beams of a sentence share its encoder output. Sources
    must be padded on the right. ``seq2seq`` is the fastseq model, on the same parameters.
    """

    config_class = FastseqConfig
    base_model_prefix = "seq2seq"
    _is_stateful = True

    def __init__(self, config: FastseqConfig) -> None:
        if config.copy:
            raise ValueError(
                "FastseqForSeq2SeqLM: a model with copy reads the words of its sources, and transformers hands over "
                "token ids alone; use fastseq.TrainedModel"
            )
        super().__init__(config)
        inner = Seq2Seq(config.to_seq2seq())
        self._inner = (inner,)  # a tuple: its modules are registered below, without a prefix
        self.encoder, self.bridge, self.decoder = inner.encoder, inner.bridge, inner.decoder
        self.main_input_name = "input_ids" if config.source_features is None else "input_features"
        self.encoder.main_input_name = self.main_input_name
        self._tied_weights_keys = tied_names(inner.config)
        self.post_init()
        _complete(self.generation_config, config)

    @property
    def seq2seq(self) -> Seq2Seq:
        """The fastseq model, on the same parameters."""
        self._inner[0].train(self.training)
        return self._inner[0]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Read a folder of :meth:`fastseq.TrainedModel.save_pretrained`, or of this class."""
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _complete(model.generation_config, model.config)
        return loaded

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write config.json, model.safetensors and generation_config.json, as :class:`fastseq.TrainedModel` does.

        With the two tokenizer files of the folder that the model came from, ``TrainedModel.from_pretrained`` reads it.
        """
        super().save_pretrained(save_directory, **options)
        path = Path(save_directory) / NAME
        if path.exists():
            stored = json.loads(path.read_text())
            path.write_text(json.dumps({n: v for n, v in stored.items() if n in search_options()}, indent=2) + "\n")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: Any) -> None:
        """Leave the initial values of the modules, which are the ones of fastseq."""

    def get_encoder(self, modality: str | None = None) -> _EncoderCall:
        """A function of input_ids and attention_mask with the encoder's results."""
        return _EncoderCall(self)

    def get_input_embeddings(self) -> torch.nn.Module | None:
        return self.encoder.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.output

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        """Raises NotImplementedError: source and target have vocabularies of their own."""
        raise NotImplementedError(
            "FastseqForSeq2SeqLM has a source and a target vocabulary and cannot resize them; train with larger ones"
        )

    def encode(self, inputs: Tensor, attention_mask: Tensor | None) -> EncoderOutput:
        """The encoder output of sources (B, S) or (B, S, F), whose mask (B, S) is 1 up to the length, then 0."""
        lengths = None
        if attention_mask is not None:
            if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
                raise ValueError("FastseqForSeq2SeqLM: attention_mask has 0 before 1; pad the sources on the right")
            lengths = attention_mask.sum(1)
        return self.seq2seq.encode(inputs, lengths)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Encoded | None = None,
        cache: LSTMCache | None = None,
        *,
        use_cache: bool | None = None,
        input_features: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FastseqOutput | tuple:
        """Predict each target token from the source and the tokens before it.

        Args:
            input_ids: (B, S) source tokens, padded on the right; (B, S, 1 + K) with ``tag_vocab_size``.
            attention_mask: (B, S), 1 for tokens and 0 for padding; None: no padding.
            decoder_input_ids: (N, T) target tokens shifted right, N = B * K; default: from labels.
            labels: (B, T) target tokens closed by eos; pad or -100 where there is none. For the loss.
            encoder_outputs: of ``get_encoder()``, in place of input_ids.
            cache: the state after the tokens before decoder_input_ids.
            use_cache: decode step by step and return the state; False: return none.
            input_features: (B, S, F), in place of input_ids, for a model with ``source_features``.
            decoder_attention_mask: accepted and not read: padding stands behind the tokens and cannot reach them.
            output_attentions: return cross_attentions.
            output_hidden_states: must not be True: the LSTM has none to return.

        Returns:
            FastseqOutput. In training with labels logits are None: the loss is computed without them.
        """
        if output_hidden_states:
            raise ValueError("FastseqForSeq2SeqLM: has no hidden states of layers to return; leave the option out")
        if labels is not None:
            labels = labels.masked_fill(labels == IGNORED_LABEL, self.config.pad_id)
            if decoder_input_ids is None:
                bos = torch.full_like(labels[:, :1], self.config.bos_id)
                decoder_input_ids = torch.cat([bos, labels[:, :-1]], 1)
        if decoder_input_ids is None:
            raise ValueError("FastseqForSeq2SeqLM: give labels or decoder_input_ids")
        inputs, model = input_ids if input_features is None else input_features, self.seq2seq
        if self.training and labels is not None and encoder_outputs is None and not output_attentions:
            lengths = None if attention_mask is None else attention_mask.sum(1)
            return _returned(FastseqOutput(loss=model.loss(inputs, lengths, decoder_input_ids, labels)), return_dict)
        enc = self.encode(inputs, attention_mask) if encoder_outputs is None else encoder_outputs["encoded"]
        whole = cache is None and not use_cache and len(decoder_input_ids) == len(enc.lengths)
        if whole:
            logits, weights, _ = model.decoder(decoder_input_ids, enc, 1.0, bool(output_attentions))
        else:
            logits, weights, cache = _by_steps(model, decoder_input_ids, enc, cache, bool(output_attentions))
        loss = None if labels is None else _loss(logits, labels, self.config.pad_id)
        output = FastseqOutput(
            loss=loss,
            logits=logits,
            cache=None if whole or use_cache is False else cache,
            cross_attentions=None if weights is None else (weights[:, None],),
            encoder_last_hidden_state=enc.memory,
        )
        return _returned(output, return_dict)


def _by_steps(
    model: Seq2Seq, tokens: Tensor, enc: EncoderOutput, cache: LSTMCache | None, need_weights: bool
) -> tuple[Tensor, Tensor | None, LSTMCache]:
    """tokens (N, T), N = B * K -> logits (N, T, V), attention (N, T, S) or None, the state after them."""
    read = 0 if cache is None else cache.length
    if cache is None:
        sentences = torch.arange(len(enc.lengths), device=tokens.device)
        state = model.start(enc).index_select(sentences.repeat_interleave(len(tokens) // len(sentences)))
    else:
        state = cache.state
    steps = []
    for column in tokens.unbind(1):
        logits, state, weights = model.decode_step(column, state, enc, need_weights=need_weights)
        steps.append((logits, weights))
    attention = torch.stack([weights for _, weights in steps], 1) if need_weights and steps[0][1] is not None else None
    return torch.stack([logits for logits, _ in steps], 1), attention, LSTMCache(state, read + tokens.size(1))


def _loss(logits: Tensor, labels: Tensor, pad_id: int) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), ignore_index=pad_id)


def _returned(output: FastseqOutput, return_dict: bool | None) -> FastseqOutput | tuple:
    return output.to_tuple() if return_dict is False else output


def _complete(generation: GenerationConfig, config: FastseqConfig) -> None:
    """Put the special tokens where the folder's generation_config.json says nothing; pad and bos never come."""
    ids: dict[str, Any] = {
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.bos_id,
        "suppress_tokens": [config.pad_id, config.bos_id],
    }
    for name, value in ids.items():
        if getattr(generation, name, None) is None:
            setattr(generation, name, value)
