"""The ``triton`` backend of ``lstm_variant``: none yet."""


def unsupported(call) -> str | None:
    """The sentence for every call."""
    return "lstm_variant: the triton backend has no kernel for it; use backend='native' on CPUs, or 'reference'."
