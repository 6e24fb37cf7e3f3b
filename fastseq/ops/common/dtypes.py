"""Dtypes and precision: accumulation, names in messages, TF32."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, activations and cell states in a computation in ``dtype``: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """(torch.float32, torch.bfloat16) -> "float32, bfloat16"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tf32_allowed() -> bool:
    """True if torch lets cuDNN's RNNs round float32 products to TF32: ``torch.backends.cudnn.allow_tf32``.

    ``torch.backends.cudnn.rnn.fp32_precision`` is the same setting in torch's newer interface.
    """
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"
