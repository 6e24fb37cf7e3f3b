"""The tokenizers of a saved model as tokenizers of transformers."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastseq.errors import UserError
from fastseq.training.saved import SavedFolder
from fastseq.training.tokenizer import EOS, RESERVED, TextTokenizer


def load_tokenizers(path: str | Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The source and the target tokenizer of a saved model's folder, or a run folder.

    They close a text with eos where training did, which some ports do not, and pad on the right;
    ``decode(ids, skip_special_tokens=True)`` gives the text.

    Raises:
        UserError: a missing or damaged file; a model with tags; the port of a model that reads padding, which
            transformers sets anew.
    """
    folder = SavedFolder(path)
    if folder.source_tags.exists():
        raise UserError(
            "this model reads tags beside its source, which tokenizers of transformers do not keep; encode sources by "
            "TrainedModel.from_pretrained(path).source_tokenizer"
        )
    return tuple(_fast(TextTokenizer.load(file)) for file in (folder.source_tokenizer, folder.target_tokenizer))


def _fast(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tokenizer.to_json())
    if copy.padding is not None:
        raise UserError("this model reads sources padded to one length, which tokenizers of transformers do not keep")
    if tokenizer.closed:
        copy.post_processor = TemplateProcessing(single=f"$A {RESERVED[EOS]}", special_tokens=[(RESERVED[EOS], EOS)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), RESERVED, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
