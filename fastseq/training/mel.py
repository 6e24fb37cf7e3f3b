"""Log-mel spectrograms of audio, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, HOP = 0.025, 0.010  # seconds
SMALLEST = 1e-10  # power below which the logarithm is cut off


def mel_filters(bands: int, bins: Tensor, highest: float) -> Tensor:
    """Triangular filters (bands, len(bins)) over `bins` (F,) in Hz, evenly spaced from 0 to `highest` on the mel scale.

    mel(f) = 2595 log10(1 + f / 700) (O'Shaughnessy 1987). Each filter rises from the centre of the one below to 1 at
    its own centre, and falls to 0 at the centre of the one above.
    """
    top = 2595 * torch.log10(torch.tensor(1 + highest / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, bands + 2, dtype=torch.float64) * top / 2595) - 1)  # (bands + 2,)
    low, centre, high = (edges[i : i + bands, None] for i in range(3))
    return torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0).float()


def log_mel(samples: Tensor, rate: int, bands: int, highest: float) -> Tensor:
    """The log-mel spectrogram (S, bands) of `samples` (n,) float32 at `rate` per second: S = n / 10 ms, rounded up.

    Each frame is the logarithm of the power in `bands` mel filters up to `highest` Hz, over a Hann window of 25 ms. The
    power is per sample, so recordings with different rates have comparable values. Requires `highest` <= `rate` / 2.
    """
    window = torch.hann_window(round(WINDOW * rate))
    hop = round(HOP * rate)
    frames = -(-len(samples) // hop)
    size = 1 << (len(window) - 1).bit_length()
    while True:  # a narrow filter between two bins would see nothing
        filters = mel_filters(bands, torch.arange(size // 2 + 1, dtype=torch.float64) * (rate / size), highest)
        if bool(filters.any(1).all()):
            break
        size *= 2
    padded = samples.new_zeros((frames - 1) * hop + len(window))
    start = (len(window) - hop) // 2  # frame s is centred on samples s * hop to (s + 1) * hop
    kept = samples[: len(padded) - start]
    padded[start : start + len(kept)] = kept
    spectrum = torch.fft.rfft(padded.unfold(0, len(window), hop) * window, n=size)  # (S, size / 2 + 1)
    power = spectrum.abs().square() / window.square().sum()
    return (power @ filters.T).clamp(min=SMALLEST).log()
