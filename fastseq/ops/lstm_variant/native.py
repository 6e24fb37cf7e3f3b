"""The ``native`` backend of ``lstm_variant``: none yet."""


def unsupported(call) -> str | None:
    """The sentence for every call."""
    return "lstm_variant: the native backend has no kernel for it; use backend='reference'."
