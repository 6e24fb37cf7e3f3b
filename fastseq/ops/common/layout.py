"""The padded and the packed layout of a batch of sequences, and the index arithmetic between them.

Padded: (T, B, ...), with ``lengths`` (B,). Packed, as in ``PackedSequence.data``: (N, ...), N valid steps, time-major,
with ``batch_sizes`` (T,) int64 on the CPU; rows of step t: the first ``batch_sizes[t]`` sequences, longest first.
"""

import torch
from torch import Tensor


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """batch_sizes (T,) -> lengths (B,), non-increasing."""
    sequence = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    return (sequence < batch_sizes.unsqueeze(1)).sum(0)


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """lengths (B,) -> bool (T, B), True where the step lies within the sequence."""
    return torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths


def zero_padding(padded: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, X) with zeros past the lengths, also in place of NaN: padding must reach no weight gradient."""
    return torch.where(valid_steps(lengths, padded.size(0)).unsqueeze(-1), padded, 0)


def pad(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Packed (N, X) -> padded (T, B, X), zeros past the end, and lengths (B,) on its device. Differentiable."""
    valid = valid_steps(lengths_of(batch_sizes), batch_sizes.size(0)).to(data.device)
    padded = data.new_zeros(*valid.shape, data.size(-1))
    return padded.masked_scatter(valid.unsqueeze(-1), data), valid.sum(0)


def pack(padded: Tensor, batch_sizes: Tensor) -> Tensor:
    """Padded (T, B, X) -> packed (N, X). Differentiable. Rows are counted on the CPU: no device synchronisation."""
    valid = valid_steps(lengths_of(batch_sizes), batch_sizes.size(0))
    rows = valid.flatten().nonzero().squeeze(1)
    return padded.flatten(0, 1).index_select(0, rows.to(padded.device, non_blocking=True))


def flip(padded: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse (T, B, X) in time; with lengths, each sequence within its length, and the padding stays in place."""
    if lengths is None:
        return padded.flip(0)
    step = torch.arange(padded.size(0), device=padded.device).unsqueeze(1)
    source = torch.where(step < lengths, lengths - 1 - step, step)  # (T, B)
    return padded.gather(0, source.unsqueeze(-1).expand_as(padded))


def previous_states(
    output: Tensor, h0: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, reverse: bool
) -> Tensor:
    """The hidden state before each step, in the layout of ``output``.

    output: (T, B, P) or packed (N, P); h0: (B, P). Steps past the length hold arbitrary finite values.
    """
    if batch_sizes is not None:
        return _previous_packed(output, h0, batch_sizes, reverse)
    if not reverse:
        return torch.cat((h0.unsqueeze(0), output[:-1]))
    shifted = torch.cat((output[1:], h0.unsqueeze(0)))
    if lengths is None:
        return shifted
    step = torch.arange(output.size(0), device=output.device).unsqueeze(1)
    return torch.where((step == lengths - 1).unsqueeze(-1), h0, shifted)


def hidden_before(
    activations: Tensor, cell_states: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """h before each step (T, B, H), from the saved tensors of one direction of a padded forward.

    activations: (T, B, 4H); cell_states: (T, B, H); past the lengths both may hold anything, and the result is finite.
    h is recomputed, because users may change the returned output in place.
    """
    output = (activations[..., 3 * h0.size(1) :] * cell_states.tanh()).to(h0.dtype)
    if lengths is not None:
        output = zero_padding(output, lengths)
    return previous_states(output, h0, lengths, None, reverse)


def _previous_packed(output: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    offsets = batch_sizes.cumsum(0) - batch_sizes  # (T,) first row of each step
    step = torch.repeat_interleave(batch_sizes, output_size=output.size(0))  # (N,)
    sequence = torch.arange(output.size(0), device=batch_sizes.device) - offsets[step]  # (N,)
    source_step = step + 1 if reverse else step - 1
    inside = (source_step >= 0) & (source_step < batch_sizes.size(0))
    source_step = source_step.clamp(0, batch_sizes.size(0) - 1)
    inside &= sequence < batch_sizes[source_step]
    rows = torch.where(inside, offsets[source_step] + sequence, output.size(0) + sequence)
    return torch.cat((output, h0))[rows.to(output.device)]


def contiguous(t: Tensor | None) -> Tensor | None:
    """``t.contiguous()``, or None for None."""
    return None if t is None else t.contiguous()
