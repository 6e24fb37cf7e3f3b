"""Swap the LSTMs of ``torch.nn`` for fastseq's in an existing model, and back."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastseq.dispatch import check_name
from fastseq.nn.linear import Linear
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell
from fastseq.ops.common.narrow import check_dtype

# torch's classes, bound at import: a program may replace torch.nn.LSTM later.
_SWAPS = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
_BACK = {LSTM: nn.LSTM, LSTMCell: nn.LSTMCell, Linear: nn.Linear}


class Row(NamedTuple):
    """One module of the model that can be swapped: its path, its class, whether it was swapped, and why."""

    path: str
    kind: str
    swapped: bool
    why: str


class Report(list):
    """Rows of :func:`accelerate` or :func:`restore`; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no LSTM or LSTMCell in this model: nothing to swap"
        header = Row("module", "class", "swapped", "why")
        cells = [header] + [Row(r.path or "(the model)", r.kind, "yes" if r.swapped else "no", r.why) for r in self]
        widths = [max(len(row[k]) for row in cells) for k in range(3)]
        lines = ["  ".join((*(row[k].ljust(widths[k]) for k in range(3)), row.why)).rstrip() for row in cells]
        return "\n".join(lines)


def accelerate(model: nn.Module, backend: str = "auto", *, weight_dtype: torch.dtype | None = None) -> Report:
    """Make every ``nn.LSTM`` and ``nn.LSTMCell`` of ``model`` a fastseq module, in place.

    Only the class of each module changes, and with it ``forward``. Module objects, Parameters, hooks, buffers and
    training flags stay, so existing optimisers, references and tied weights remain valid.

    Args:
        model: any module; it may itself be an ``nn.LSTM``.
        backend: the backend of the swapped modules; see :class:`fastseq.LSTM`.
        weight_dtype: for inference in float32 on the CPU: torch.int8 (one scale for each row) or torch.bfloat16. LSTMs,
            LSTMCells and, with it, every ``nn.Linear`` then read rounded copies of their weights, and calls that would
            record gradients raise a RuntimeError. LSTMs with a projection keep theirs. The float32 Parameters stay;
            :func:`restore` returns to them.

    Returns:
        A report that prints as a table: module path, swapped or not, why. Subclasses of ``nn.LSTM`` may override
        ``forward``; they are left alone and reported, and so are parametrised and scripted LSTMs.

    Raises:
        ValueError: unknown backend or weight_dtype.
    """
    check_name(backend)
    check_dtype(weight_dtype)
    swaps = _SWAPS if weight_dtype is None else _SWAPS | {nn.Linear: Linear}
    report = Report()
    for path, module in model.named_modules():
        why = _why_not_swap(module, swaps)
        if why is None:
            swapped, name = swaps[type(module)], _name(module)
            module.__class__ = swapped
            module._accelerated = True
            options = []
            if swapped is not Linear:
                module.backend = backend
                options.append(f"backend={backend!r}")
            if weight_dtype is not None and getattr(module, "proj_size", 0):
                options.append(_no_projection(module))
            elif weight_dtype is not None:
                module.weight_dtype = weight_dtype
                options.append(f"weight_dtype={weight_dtype}")
            report.append(Row(path, name, True, ", ".join([f"now fastseq.{swapped.__name__}", *options])))
        elif weight_dtype is not None and getattr(module, "variant", None):
            report.append(Row(path, _name(module), False, f"weight_dtype has no {module.variant}"))
        elif weight_dtype is not None and getattr(module, "proj_size", 0) and type(module) in _BACK:
            report.append(Row(path, _name(module), False, _no_projection(module)))
        elif weight_dtype is not None and type(module) in _BACK:
            module.weight_dtype = weight_dtype
            report.append(
                Row(path, _name(module), False, f"is a fastseq module already, now weight_dtype={weight_dtype}")
            )
        elif why:
            report.append(Row(path, _name(module), False, why))
    return report


def _no_projection(module: nn.Module) -> str:
    return f"weight_dtype has no projection (proj_size={module.proj_size}), so the weights stay as they are"


def restore(model: nn.Module) -> Report:
    """Turn the modules that :func:`accelerate` swapped back into torch's, in place; modules made by fastseq stay.

    All read their float32 weights again (``weight_dtype`` of :func:`accelerate`).

    Returns:
        A report that prints as a table.
    """
    report = Report()
    for path, module in model.named_modules():
        if not isinstance(module, tuple(_BACK)):
            continue
        name = _name(module)
        vars(module).pop("weight_dtype", None)
        if not getattr(module, "_accelerated", False):
            report.append(Row(path, name, False, "was made as a fastseq module"))
        elif type(module) not in _BACK:
            report.append(Row(path, name, False, "was parametrised since: remove the parametrisation first"))
        elif getattr(module, "variant", None):
            report.append(Row(path, name, False, f"has {module.variant}, which torch's lacks: set it to 0 first"))
        else:
            vars(module).pop("backend", None)
            del module._accelerated
            module.__class__ = _BACK[type(module)]
            report.append(Row(path, name, True, f"now {_name(module)}"))
    return report


def _name(module: nn.Module) -> str:
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return (
        name.replace("torch.nn.modules.rnn", "nn")
        .replace("torch.nn.modules.linear", "nn")
        .replace("fastseq.nn.linear", "fastseq")
        .replace("fastseq.nn.lstm_cell", "fastseq")
        .replace("fastseq.nn.lstm", "fastseq")
    )


def _why_not_swap(module: nn.Module, swaps: dict) -> str | None:
    """None to swap the module, a sentence to report it, "" if it is of no class in ``swaps``."""
    kind = type(module)
    if kind in swaps:
        replaced = "forward" in vars(module)
        return "this object's forward was replaced; swapping the class would not reach it" if replaced else None
    if isinstance(module, tuple(_BACK)):
        return "is a fastseq module already"
    if isinstance(module, tuple(swaps)):
        if parametrize.is_parametrized(module):
            return "is parametrised: accelerate the model first, then parametrise it"
        return "a subclass of torch's with code of its own: derive it from fastseq's if its forward is nn.LSTM's"
    if getattr(module, "original_name", kind.__name__) in ("LSTM", "LSTMCell"):
        return "not torch.nn's own class (scripted, quantised or another library's)"
    return ""
