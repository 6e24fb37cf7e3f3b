"""Seq2SeqConfig as a configuration of transformers."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

import fastseq
from fastseq.seq2seq.config import Seq2SeqConfig

OPTIONS = tuple(field.name for field in dataclasses.fields(Seq2SeqConfig))
DEFAULTS = {"src_vocab_size": 8000, "tgt_vocab_size": 8000}  # transformers makes configurations without arguments
STORED = ("architectures", "dtype", "transformers_version")  # of transformers, beside ours


class FastseqConfig(PreTrainedConfig):
    """The options of :class:`fastseq.Seq2SeqConfig`, under its names and flat, as in the config.json of a saved model.

    ``pad_token_id``, ``bos_token_id``, ``eos_token_id``, ``decoder_start_token_id`` and ``vocab_size`` are other names
    of ``pad_id``, ``bos_id``, ``eos_id``, ``bos_id`` and ``tgt_vocab_size``.

    Raises:
        ValueError: an option out of range, or one that contradicts another.
    """

    model_type = "fastseq"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "pad_token_id": "pad_id",
        "bos_token_id": "bos_id",
        "eos_token_id": "eos_id",
        "decoder_start_token_id": "bos_id",
        "vocab_size": "tgt_vocab_size",
    }
    is_encoder_decoder: bool = True

    def __post_init__(self, **given: Any) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in given.items()}
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        for name, value in Seq2SeqConfig(**(options or DEFAULTS)).to_dict().items():
            setattr(self, name, value)
        given["tie_word_embeddings"] = self.to_seq2seq().tied
        super().__post_init__(**given)

    def to_seq2seq(self) -> Seq2SeqConfig:
        """The options of :class:`fastseq.Seq2Seq`."""
        return Seq2SeqConfig(**{name: getattr(self, name) for name in OPTIONS})

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: the file that :meth:`fastseq.TrainedModel.save_pretrained` writes."""
        everything = self.to_dict()
        ours = {"model_type": self.model_type, "fastseq_version": fastseq.__version__}
        ours |= {name: everything[name] for name in OPTIONS}
        ours |= {name: everything[name] for name in STORED if everything.get(name) is not None}
        card = getattr(self, "card", None)
        return ours | ({} if card is None else {"card": card})
