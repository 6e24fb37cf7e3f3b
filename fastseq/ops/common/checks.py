"""Checks that several ops and modules share, with the messages of ``torch.nn``."""


def check_pair(hx) -> None:
    """RuntimeError unless ``hx`` holds two states, h and c."""
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, h_0 and c_0, got {len(hx)}")
