"""Statistics: bootstrap intervals, area under the ROC curve, shapes of distributions, spectra of latents."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["bimodality", "bootstrap", "chance", "excess_kurtosis", "high_frequency_share", "mass_inside",
           "radial_spectrum", "roc_auc"]


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, *,
              groups: Sequence[str] | None = None, draws: int = 2000, confidence: float = 0.95,
              seed: int = 0) -> dict[str, float]:
    """A statistic of values (N, ...) and its percentile interval: {"value", "low", "high", "n"}.

    Rows are resampled as wholes: give what belongs together (clean and poisoned) in one row. Rows that are
    not independent of each other (images of a concept) have a group (N,) in common, and groups are resampled;
    n counts what is.
    """
    values = np.asarray(values)
    places: dict[Any, list[int]] = {}
    for i, name in enumerate(range(len(values)) if groups is None else groups):
        places.setdefault(name, []).append(i)
    units, rng = [np.array(own) for own in places.values()], np.random.default_rng(seed)
    resampled = [statistic(values[np.concatenate([units[i] for i in drawn])])
                 for drawn in rng.integers(len(units), size=(draws, len(units)))]
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(units)}


def chance(found: int, total: int, rate: float = 0.05) -> float:
    """Probability that `found` or more of `total` clean images are called poisoned, at this rate each."""
    logs = [_log_choose(total, i) + i * math.log(rate) + (total - i) * math.log1p(-rate)
            for i in range(found, total + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def rank_chance(found: int, total: int, count: int, rank: int) -> float:
    """Probability that `found` or more of `total` values exceed the `rank`-th smallest of `count` others.

    All values are drawn independently from one continuous distribution. The number that exceeds it is
    negative hypergeometric, more spread out than a binomial: all values share the one they must exceed.
    """
    logs = [_log_choose(total - above + rank - 1, rank - 1) + _log_choose(above + count - rank, count - rank)
            - _log_choose(total + count, count) for above in range(found, total + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def mass_inside(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of the sum of each map (..., h, w) that lies where the mask (h, w) is 1, shape (...)."""
    return (maps * mask).sum((-2, -1)) / maps.sum((-2, -1))


def roc_auc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative; ties count half."""
    difference = np.asarray(positives)[:, None] - np.asarray(negatives)[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def excess_kurtosis(values: np.ndarray) -> float:
    """Fourth standardized moment minus 3.

    0 for a Gaussian, -1.2 for a uniform distribution, -2 for two equally frequent values.
    """
    centered = _centered(values)
    return float((centered**4).mean() / (centered**2).mean() ** 2 - 3)


def bimodality(values: np.ndarray) -> float:
    """Sarle's bimodality coefficient, (skewness^2 + 1) / kurtosis, in (0, 1].

    1/3 for a Gaussian, 5/9 for a uniform distribution, 1 for two values; more than 5/9 suggests two modes.
    """
    centered = _centered(values)
    skewness = (centered**3).mean() / (centered**2).mean() ** 1.5
    return float((skewness**2 + 1) / (excess_kurtosis(centered) + 3))


def _centered(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64).ravel()
    return values - values.mean()


def radial_spectrum(latents: torch.Tensor, bands: int = 8) -> torch.Tensor:
    """Mean power of latents (B, C, h, w) by spatial frequency, (B, bands), without the mean.

    Bands have equal width up to the Nyquist frequency of a row; the last one includes the diagonals beyond
    it. A band so narrow that no frequency falls into it is nan.
    """
    power, frequency = _power(latents, norm="ortho")
    power = power.mean(1)  # (B, h, w)
    band = (frequency * 2 * bands).ceil().long().clamp(1, bands) - 1
    band[0, 0] = bands  # the mean
    return torch.stack([power[:, band == i].mean(1) for i in range(bands)], dim=1)


def high_frequency_share(latents: torch.Tensor) -> torch.Tensor:
    """Share of the power of latents (B, C, h, w) above half the Nyquist frequency, (B,), without the mean."""
    power, frequency = _power(latents)
    power = power.sum(1)
    whole = power.sum((-2, -1)).clamp(min=torch.finfo(power.dtype).tiny)  # of a single cell it is 0
    return power[:, frequency > 0.25].sum(1) / whole


def _power(latents: torch.Tensor, norm: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Power spectrum without the mean, float64 (B, C, h, w), and the spatial frequencies (h, w)."""
    centered = latents.double() - latents.double().mean((-2, -1), keepdim=True)
    height, width = latents.shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64).view(-1, 1),
                            torch.fft.fftfreq(width, dtype=torch.float64).view(1, -1))
    return torch.fft.fft2(centered, norm=norm).abs().square(), frequency
