"""Swap ``torch.nn``'s LSTMs for fastseq's in a model that exists, and back."""

from typing import NamedTuple

from torch import nn

from fastseq.backend import check_name
from fastseq.nn.rnn import LSTM, LSTMCell

# The vendor's classes as they are at import: a program may replace torch.nn.LSTM later.
_SWAPS = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_BACK = {LSTM: nn.LSTM, LSTMCell: nn.LSTMCell}


class Row(NamedTuple):
    """One recurrent module of the model: its path, its class, whether it was swapped, and why."""

    path: str
    kind: str
    swapped: bool
    why: str


class Report(list):
    """Rows of :func:`accelerate` or :func:`restore`; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no nn.LSTM or nn.LSTMCell in this model: nothing to swap"
        header = Row("module", "class", "swapped", "why")
        cells = [header] + [Row(r.path or "(the model)", r.kind, "yes" if r.swapped else "no", r.why) for r in self]
        widths = [max(len(row[k]) for row in cells) for k in range(3)]
        lines = ["  ".join((*(row[k].ljust(widths[k]) for k in range(3)), row.why)).rstrip() for row in cells]
        return "\n".join(lines)


def accelerate(model: nn.Module, backend: str = "auto") -> Report:
    """Make every ``nn.LSTM`` and ``nn.LSTMCell`` of ``model`` a fastseq module, in place.

    The module objects stay the same objects, and so do their Parameters, hooks, buffers and training flags: optimisers,
    references and tied weights made before stay valid; only the class, and with it ``forward``, changes.

    Args:
        model: any module; it may itself be an ``nn.LSTM``.
        backend: what the swapped modules use; see :class:`fastseq.LSTM`.

    Returns:
        A report that prints as a table: module path, swapped or not, why. Subclasses of ``nn.LSTM`` are left alone,
            since
        they may have a forward of their own, and reported.

    Raises:
        ValueError: unknown backend.
    """
    check_name(backend)
    report = Report()
    for path, module in model.named_modules():
        kind = type(module)
        name = f"{kind.__module__}.{kind.__qualname__}".replace("torch.nn.modules.rnn", "nn")
        if kind in _SWAPS and "forward" in vars(module):
            report.append(
                Row(path, name, False, "this object's forward was replaced; swapping the class would not reach it")
            )
        elif kind in _SWAPS:
            module.__class__ = _SWAPS[kind]
            module.backend = backend
            report.append(Row(path, name, True, f"now fastseq.{_SWAPS[kind].__name__}, backend={backend!r}"))
        elif kind in _BACK:
            report.append(Row(path, name, False, "is a fastseq module already"))
        elif isinstance(module, tuple(_SWAPS)):
            why = "a subclass of torch's with code of its own: replace it by hand if its forward is nn.LSTM's"
            report.append(Row(path, name, False, why))
    return report


def restore(model: nn.Module) -> Report:
    """Turn every fastseq LSTM and LSTMCell of ``model`` back into torch's, in place; the inverse of :func:`accelerate`.

    Returns:
        A report that prints as a table.
    """
    report = Report()
    for path, module in model.named_modules():
        kind = type(module)
        if kind in _BACK:
            del module.backend
            module.__class__ = _BACK[kind]
            report.append(Row(path, f"fastseq.{kind.__name__}", True, f"now nn.{_BACK[kind].__name__}"))
    return report
