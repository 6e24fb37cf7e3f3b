"""The ``triton`` backend of ``candidates``: none, since log_softmax and topk are single kernels of torch."""


def unsupported(call) -> str | None:
    """The sentence for every call."""
    return "candidates: the triton backend has no kernel for it; use backend='torch'."
