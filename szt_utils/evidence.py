"""Numbers that carry a claim: intervals by bootstrap, shares, areas under ROC curves,
shapes of distributions, spectra of latents."""

from collections.abc import Callable

import numpy as np
import torch

__all__ = ["bimodality", "bootstrap", "excess_kurtosis", "high_frequency_share", "mass_inside",
           "radial_spectrum", "roc_auc"]


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, *, draws: int = 2000,
              level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """A statistic of values (N, ...) and its percentile interval over resamples of the first axis:
    {"value", "low", "high", "n"}.

    What is drawn again is a whole row: give one row per independent unit (a concept, a picture), and what
    belongs together (clean and poisoned) within it.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}


def mass_inside(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of each map's sum that lies where the mask is 1, shape of `maps` (..., h, w) without h and w;
    `mask` (h, w)."""
    return (maps * mask).sum((-2, -1)) / maps.sum((-2, -1))


def roc_auc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """Area under the ROC curve:
    the probability that a positive's score is above a negative's, ties counting half."""
    difference = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def excess_kurtosis(values: np.ndarray) -> float:
    """Fourth standardized moment less 3:
    0 for a Gaussian, -1.2 for a uniform distribution, -2 for two values."""
    centred = np.asarray(values, np.float64).ravel()
    centred = centred - centred.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2 - 3)


def bimodality(values: np.ndarray) -> float:
    """Sarle's bimodality coefficient, (skewness^2 + 1) / kurtosis, in (0, 1]:
    1/3 for a Gaussian, 5/9 for a uniform distribution, 1 for two values; above 5/9 speaks for two modes."""
    centred = np.asarray(values, np.float64).ravel()
    centred = centred - centred.mean()
    skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
    return float((skewness**2 + 1) / (excess_kurtosis(centred) + 3))


def radial_spectrum(latents: torch.Tensor, bands: int = 8) -> torch.Tensor:
    """Mean power of (B, C, h, w) by spatial frequency, (B, bands), without the mean.

    Bands are of equal width up to the Nyquist frequency of a row; diagonals beyond it count in the last one.
    A band so narrow that no frequency falls into it is nan.
    """
    centred = latents.double() - latents.double().mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square().mean(1)  # (B, h, w)
    height, width = latents.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64).view(-1, 1),
                         torch.fft.fftfreq(width, dtype=torch.float64).view(1, -1))
    band = (radius * 2 * bands).ceil().long().clamp(1, bands) - 1
    band[0, 0] = bands  # the mean
    return torch.stack([power[:, band == i].mean(1) for i in range(bands)], dim=1)


def high_frequency_share(latents: torch.Tensor) -> torch.Tensor:
    """Share of the power, without the mean's, above half the Nyquist frequency, (B,), of (B, C, h, w)."""
    centred = latents.double() - latents.double().mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().sum(1)
    height, width = latents.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64).view(-1, 1),
                         torch.fft.fftfreq(width, dtype=torch.float64).view(1, -1))
    return power[:, radius > 0.25].sum(1) / power.sum((-2, -1))
