"""The public LSTM op: one layer, one direction, the whole sequence."""

import torch
from torch import Tensor

from fastseq.dispatch import LSTMCall, select
from fastseq.ops.common.autocast import autocast_enabled, cast_inputs, without_autocast
from fastseq.ops.common.layout import zero_padding
from fastseq.ops.lstm.function import apply


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
    backend: str | None = None,
):
    """One layer and direction of ``torch.nn.LSTM`` over a sequence (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

    Per step: ``i, f, g, o = x W_ih^T + b_ih + h W_hh^T + b_hh``, ``c = sigmoid(f) c + sigmoid(i) tanh(g)``,
    ``h = sigmoid(o) tanh(c)``, and with ``weight_hr`` ``h = h W_hr^T`` (Sak et al. 2014). Differentiable twice in every
    tensor.

    Args:
        input: (T, B, I), or packed (N, I) if ``batch_sizes`` is given.
        hx: h0 (B, P) and c0 (B, H); P = H without ``weight_hr``.
        weight_ih: (4H, I). weight_hh: (4H, P). bias_ih, bias_hh: (4H,), both or neither. weight_hr: (P, H).
        lengths: (B,) integers in 0..T on any device. Outputs past the length are 0, final states are those of the last
            valid step, ``reverse`` starts there; a row of length 0 returns its initial state. On CUDA, and in a
            traced graph, the values are clamped to 0..T instead of checked, since checking would wait for the device.
        batch_sizes: (T,) int64 on the CPU, as in ``PackedSequence``; B = batch_sizes[0].
        reverse: run from the last step to the first.
        return_cell_states: also return the cell state after every step.
        backend: "auto" (None), "reference", "torch", "native" or "triton".

    Returns:
        output (T, B, P) or (N, P), (h_n (B, P), c_n (B, H)) and, if asked for, cell states (T, B, H) or (N, H); past
        the length they are 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; or the backend asked for cannot serve this call.
        ValueError: unknown backend name; lengths and batch_sizes both given; lengths out of range.
    """
    if len(hx) != 2:
        raise RuntimeError(f"lstm: hx must be two tensors, h0 and c0, got {len(hx)}")
    tensors = (input, *hx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.size(0))
    _check_shapes(*tensors, batch_sizes)
    if lengths is not None:
        if batch_sizes is not None:
            raise ValueError("lstm: give lengths (padded input) or batch_sizes (packed input), not both")
        lengths = check_lengths(lengths, input.size(0), input.size(1), input.device)
    tensors = cast_inputs(*tensors)
    call = describe(
        tensors[0],
        tensors[1:3],
        tensors[3:],
        batch_sizes,
        proj_size=0 if weight_hr is None else weight_hr.size(0),
        lengths=lengths is not None,
        reverse=reverse,
        return_cell_states=return_cell_states,
    )
    chosen = select("lstm", backend, call)
    with without_autocast(input.device.type):
        x, h0, c0, *weights = tensors
        x = without_padding(x, lengths, chosen)
        output, h_n, c_n, cell_states = apply(
            chosen, x, h0[None], c0[None], [tuple(weights)], lengths, batch_sizes, reverse, return_cell_states
        )
    h_n, c_n = h_n.squeeze(0), c_n.squeeze(0)
    return (output, (h_n, c_n), cell_states) if return_cell_states else (output, (h_n, c_n))


def without_padding(input: Tensor, lengths: Tensor | None, backend: str) -> Tensor:
    """The input with zeros past the lengths, for backends that compute on the padding: NaN must reach no gradient."""
    return input if lengths is None or backend == "native" else zero_padding(input, lengths)


def check_lengths(lengths: Tensor, steps: int, batch: int, device: torch.device) -> Tensor:
    """Lengths as int64 (B,) on ``device``: checked on the CPU; clamped to 0..T elsewhere, and while tracing."""
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != batch:
        raise ValueError(
            f"lengths must have shape ({batch},), one per sequence of the batch, got {tuple(lengths.shape)}"
        )
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return lengths.to(device, torch.int64).clamp(0, steps)
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"lengths must lie in 0..{steps} (the number of time steps), got {int(lengths.min())}..{int(lengths.max())}"
        )
    return lengths.to(device, torch.int64)


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """RuntimeError unless these are batch sizes of a PackedSequence of ``rows`` rows; values go unseen in a trace."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "lstm: batch_sizes must be one int64 per time step on the CPU, as in PackedSequence, "
            f"got {tuple(batch_sizes.shape)} {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.numel() == 0:
        raise RuntimeError("lstm: expected at least one time step, got empty batch_sizes")
    if torch.compiler.is_compiling():
        return
    if int(batch_sizes.sum()) != rows or int(batch_sizes[-1]) < 1 or bool((batch_sizes.diff() > 0).any()):
        raise RuntimeError(
            f"lstm: batch_sizes must be positive, not increase, and sum to the {rows} rows of the packed input, "
            f"got {batch_sizes.tolist()}"
        )


def describe(input, hx, weights, batch_sizes, *, batch_dim: int = 1, autocast: bool = False, **options) -> LSTMCall:
    """The LSTMCall of these arguments: ``hx`` (..., B, H) each; ``batch_dim`` of a padded input."""
    compiling = torch.compiler.is_compiling()
    packed = batch_sizes is not None
    steps = batch_sizes.size(0) if packed else input.size(1 - batch_dim)
    return LSTMCall(
        device=input.device.type,
        dtype=torch.get_autocast_dtype(input.device.type) if autocast else input.dtype,
        input_size=input.size(-1),
        hidden_size=hx[1].size(-1),
        packed=packed,
        autocast=autocast,
        requires_grad=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (input, *hx, *weights)),
        batch=None if compiling else hx[1].size(-2),
        steps=None if compiling else steps,
        compiling=compiling,
        device_index=input.device.index,
        **options,
    )


def _check_shapes(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes) -> None:
    rank = 3 if batch_sizes is None else 2
    if input.dim() != rank:
        raise RuntimeError(
            f"lstm: input must have {rank} dimensions, {'(T, B, I)' if rank == 3 else '(N, I) when packed'}, "
            f"got {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"lstm: input must be floating point, got {input.dtype}")
    if input.size(0) == 0:
        raise RuntimeError("lstm: expected at least one time step, got none")
    if c0.dim() != 2:
        raise RuntimeError(f"lstm: c0 must have shape (B, H), got {tuple(c0.shape)}")
    batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
    hidden = c0.size(-1)
    projected = hidden if weight_hr is None else weight_hr.size(0)
    expected = {
        "h0": (h0, (batch, projected)),
        "c0": (c0, (batch, hidden)),
        "weight_ih": (weight_ih, (4 * hidden, input.size(-1))),
        "weight_hh": (weight_hh, (4 * hidden, projected)),
        "bias_ih": (bias_ih, (4 * hidden,)),
        "bias_hh": (bias_hh, (4 * hidden,)),
        "weight_hr": (weight_hr, (projected, hidden)),
    }
    autocast = autocast_enabled(input.device.type)
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"lstm: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise RuntimeError(
                f"lstm: {name} is on {tensor.device}, the input on {input.device}; move them to one device"
            )
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"lstm: {name} is {tensor.dtype}, the input {input.dtype}; convert one of them with .to()"
            )
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("lstm: give both bias_ih and bias_hh, or neither")
