"""fastseq models in the transformers library; importing this registers them with its Auto classes. Extra: ``hf``."""

try:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'fastseq.hf needs the package {error.name}; bring it with: pip install "fastseq[hf]"', name=error.name
    ) from error

from fastseq.hf.config import FastseqConfig
from fastseq.hf.model import FastseqForSeq2SeqLM, LSTMCache
from fastseq.hf.tokenizers import load_tokenizers

AutoConfig.register("fastseq", FastseqConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(FastseqConfig, FastseqForSeq2SeqLM, exist_ok=True)

__all__ = ["FastseqConfig", "FastseqForSeq2SeqLM", "LSTMCache", "load_tokenizers"]
