"""The problem of ``ops.lstm_variant``, beside the same loop in plain torch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import ops
from fastseq.testing.problems import Draw, Leaves, Problem, uneven_lengths


def lstm_variant_problem(
    draw: Draw,
    shape: tuple[int, int, int],
    dropout: bool = False,
    zoneout: str = "none",
    layer_norm: bool = False,
    form: str = "full",
    reverse: bool = False,
    cell_states: bool = False,
    spread: float = 1.0,
) -> Problem:
    """``ops.lstm_variant``. ``shape``: T, B, H. ``form``: "full" or "lengths" (the first is 0 if B > 1).

    zoneout: "none", "masks" (as in training), "rates" (as in evaluation), "hidden" or "cell" (one mask).
    """
    steps, batch, hidden = shape
    inputs = {
        "gates": spread * draw(steps, batch, 4 * hidden),
        "h0": draw(batch, hidden),
        "c0": draw(batch, hidden),
        "weight_hh": draw(4 * hidden, hidden) / hidden**0.5,
    }
    if layer_norm:  # a wide cell state, which the forget gates keep: a small deviation would multiply roundings
        inputs["gates"][..., hidden : 2 * hidden] += 2
        inputs["c0"] *= 3
        gains = {"norm_hh": 0.5 + draw(4 * hidden) / 8, "norm_c": 1 + draw(hidden) / 4}
        inputs |= gains | {"norm_c_bias": draw(hidden) / 4}
    generator = torch.Generator().manual_seed(2)
    beside: dict[str, object] = {}
    if dropout:
        beside["hidden_mask"] = (torch.rand(batch, hidden, generator=generator) < 0.7) / 0.7
    for name, rate, mode in (("zoneout_hidden", 0.3, "hidden"), ("zoneout_cell", 0.4, "cell")):
        if zoneout in ("masks", mode):
            beside[name] = torch.rand(steps, batch, hidden, generator=generator) < rate
        elif zoneout == "rates":
            beside[name] = rate
    if form == "lengths":
        beside["lengths"] = uneven_lengths(steps, batch, True)
    options = {"reverse": reverse, "return_cell_states": cell_states}

    def make(backend: str | None, dtype: torch.dtype) -> Callable[..., object]:
        return (
            partial(plain_variant, **options)
            if backend is None
            else partial(ops.lstm_variant, **options, backend=backend)
        )

    def arguments(x: Leaves) -> dict[str, object]:
        norms = tuple(x[name] for name in ("norm_hh", "norm_c", "norm_c_bias")) if layer_norm else None
        placed = {name: t.to(x["gates"].device) if isinstance(t, Tensor) else t for name, t in beside.items()}
        return {"gates": x["gates"], "hx": (x["h0"], x["c0"]), "weight_hh": x["weight_hh"], "norms": norms} | placed

    def named(result: tuple) -> Leaves:
        output, (h_n, c_n), *cells = result
        return {"output": output, "h_n": h_n, "c_n": c_n} | ({"cell_states": cells[0]} if cells else {})

    return Problem(inputs, make, arguments, named)


def plain_variant(
    gates: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_hh: Tensor,
    *,
    hidden_mask: Tensor | None = None,
    zoneout_hidden: Tensor | float = 0.0,
    zoneout_cell: Tensor | float = 0.0,
    norms: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
) -> tuple:
    """The arguments and results of ``ops.lstm_variant``, by the equations of the papers."""
    steps = gates.size(0)

    def rows(chosen: slice, length: int) -> tuple[Tensor, ...]:
        """output, h_n, c_n and cell states of some sequences of one length."""
        h, c = hx[0][chosen], hx[1][chosen]
        outputs, cells = [torch.zeros_like(h)] * steps, [torch.zeros_like(c)] * steps
        for t in reversed(range(length)) if reverse else range(length):
            operand = h if hidden_mask is None else h * hidden_mask[chosen].to(h)
            product = operand @ weight_hh.t()
            if norms is not None:
                product = F.layer_norm(product, product.shape[1:]) * norms[0]
            i, f, g, o = (gates[t, chosen] + product).chunk(4, 1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            inner = new_c if norms is None else F.layer_norm(new_c, new_c.shape[1:]) * norms[1] + norms[2]
            new_h = o.sigmoid() * inner.tanh()
            keeps = (z[t, chosen].to(h) if isinstance(z, Tensor) else z for z in (zoneout_hidden, zoneout_cell))
            h, c = (z * old + (1 - z) * new for z, old, new in zip(keeps, (h, c), (new_h, new_c), strict=True))
            outputs[t], cells[t] = h, c
        return torch.stack(outputs), h, c, torch.stack(cells)

    if lengths is None:
        output, h_n, c_n, cells = rows(slice(None), steps)
    else:
        each = (rows(slice(b, b + 1), length) for b, length in enumerate(lengths.tolist()))
        output, h_n, c_n, cells = (torch.cat(x, x[0].dim() - 2) for x in zip(*each, strict=True))
    return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))
