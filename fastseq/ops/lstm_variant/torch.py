"""The ``torch`` backend of ``lstm_variant``: none, since oneDNN and cuDNN have the plain LSTM alone."""


def unsupported(call) -> str | None:
    """The sentence for every call."""
    return (
        "lstm_variant: the torch backend has no recurrent dropout, zoneout or layer normalisation (oneDNN and cuDNN "
        "run the plain LSTM alone); use backend='native' or 'reference', or set these options to 0 or False."
    )
