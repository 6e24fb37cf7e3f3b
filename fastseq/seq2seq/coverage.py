"""The coverage term of beam search (Wu et al. 2016, equation 14)."""

import torch
from torch import Tensor


class Coverage:
    """The attention that the beams of b sentences have spent on each source position. Does nothing if beta is 0.

    Attributes:
        spent: (b, K, S) of each beam, summed over the steps so far; None before the first one.
        src_lengths: (b,) valid positions of each source.
    """

    def __init__(self, beta: float, src_lengths: Tensor) -> None:
        self.beta, self.src_lengths = beta, src_lengths
        self.spent: Tensor | None = None

    def scored(self, scores: Tensor, attention: Tensor | None, beams: Tensor) -> Tensor:
        """Add the attention of a step, and the term of the beams ``beams`` (b, M) to scores (b, M).

        attention (N, S): of the rows before the step, N = b * K, or b at the first step.
        """
        if not self.beta:
            return scores
        weights = attention.unflatten(0, (len(beams), -1)).to(torch.promote_types(attention.dtype, torch.float32))
        self.spent = weights if self.spent is None else self.spent + weights
        return scores + self.beta * self._logs(_of_beams(self.spent, beams))

    def keep(self, beams: Tensor, places: Tensor | None) -> None:
        """Go on with the beams ``beams`` (b, K), and with the sentences at ``places`` (n,) alone unless it is None."""
        if not self.beta:
            return
        self.spent = _of_beams(self.spent, beams)
        if places is not None:
            self.spent, self.src_lengths = self.spent.index_select(0, places), self.src_lengths.index_select(0, places)

    def _logs(self, spent: Tensor) -> Tensor:
        """``sum over s of log(min(spent, 1))`` of spent (b, M, S): (b, M)."""
        logs = spent.clamp(torch.finfo(spent.dtype).tiny, 1.0).log()  # tiny: weights may underflow to 0
        outside = torch.arange(spent.shape[2], device=spent.device) >= self.src_lengths[:, None, None]
        return logs.masked_fill(outside, 0.0).sum(2)


def _of_beams(spent: Tensor, beams: Tensor) -> Tensor:
    """The rows ``beams`` (b, M) of spent (b, K, S): (b, M, S)."""
    return spent.gather(1, beams[..., None].expand(-1, -1, spent.shape[2]))
