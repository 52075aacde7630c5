"""Is an image poisoned? Signals of the analysis (paper Sec. 4), and a score calibrated on clean images.

JPEG removes much of a poison. A poison moves the latent more than its size in pixels warrants, changes the
loss at low timesteps, and fills its budget evenly. Every signal compares an image with its own
JPEG-compressed copy, so that it depends little on what the image shows. The score is the Mahalanobis distance
of the signals from those of clean images: a poison may move a signal either way.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .files import read_calibration_json
from .jpeg import jpeg_tensor
from .models import Model, expand, residual, tokenize
from .statistics import excess_kurtosis, high_frequency_share, rank_chance

__all__ = ["SIGNALS", "calibrate", "check_clean_count", "deviations", "explain", "image_signals",
           "percentile", "read_calibration", "report", "score"]

SIGNALS = ("pixel_change", "evenness", "latent_gain", "latent_spectrum", "loss_change")
LOW_TIMESTEPS = (0.05, 0.15, 0.25)  # as shares of all timesteps; poisons act at low ones
SUSPECT_PERCENTILE = 0.95  # an image that scores above this share of the clean ones is suspect
FEWEST_CLEAN = 10


@torch.no_grad()
def image_signals(model: Model, image: torch.Tensor, *, quality: int = 25, draws: int = 2,
                  seed: int = 0) -> list[float]:
    """The signals of an image (1, 3, H, W) of whole levels in [0, 1], in the order of SIGNALS.

    With y the image x after JPEG of `quality`, and E its latents:
    pixel_change      ln rms(x - y)
    evenness          -ln kurtosis(x - y): what JPEG removes from a photograph lies at its edges
    latent_gain       ln rms(E(x) - E(y)) / rms(x - y)
    latent_spectrum   ln of the latent power's share above half the Nyquist frequency, x against y
    loss_change       ln of the denoising loss at low timesteps, empty prompt, x against y
    The noise, `draws` draws a timestep, is the same for x and y and for all images of a size.
    """
    both = torch.cat([image, jpeg_tensor(image, quality)])
    change = (both[0] - both[1]).double().cpu()
    size = max(change.square().mean().sqrt().item(), 1e-6)  # an image that JPEG leaves as it is
    kurtosis = excess_kurtosis(change.numpy()) + 3 if size > 1e-6 else 3.0
    latents = model.encode(both)
    shift = max((latents[0] - latents[1]).double().square().mean().sqrt().item(), 1e-6)
    spectrum = high_frequency_share(latents.float().cpu()).clamp(min=1e-6).log()
    losses = _low_losses(model, latents, draws, seed)
    return [math.log(size), -math.log(kurtosis), math.log(shift / size), (spectrum[0] - spectrum[1]).item(),
            (losses[0] / losses[1]).log().item()]


def _low_losses(model: Model, latents: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """Sum of each sample's denoising losses at low timesteps, float64 (B,); all samples have one noise."""
    generator, losses, count = torch.Generator().manual_seed(seed), 0, len(latents)
    condition = expand(model.condition(tokenize(model, "")), count)
    for share in LOW_TIMESTEPS:
        timesteps = torch.full((count,), int(share * model.num_timesteps), device=latents.device)
        for _ in range(draws):
            noise = torch.randn(latents[:1].shape, generator=generator).to(latents).expand_as(latents)
            loss = residual(model, latents, noise, timesteps, condition).square()
            losses = losses + loss.flatten(1).mean(1).double()
    return losses


def _fit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance; a tenth of the variances is added so that few images do not overfit."""
    covariance = np.cov(rows, rowvar=False)
    return rows.mean(0), covariance + 0.1 * np.diag(np.diag(covariance)) + 1e-9 * np.eye(rows.shape[1])


def _distance(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    centered = np.atleast_2d(rows) - mean
    return np.sqrt(np.einsum("ni,ij,nj->n", centered, np.linalg.inv(covariance), centered))


def check_clean_count(count: int) -> None:
    """InputError when so many clean images are too few for a calibration."""
    if count < FEWEST_CLEAN:
        raise InputError(f"A calibration needs at least {FEWEST_CLEAN} clean images, but there are {count}.")


def calibrate(rows: np.ndarray | Sequence[Sequence[float]]) -> dict[str, Any]:
    """A calibration from the signals of clean images (N, 5), as JSON.

    It holds their mean, covariance and sorted scores; an image's score is by the calibration of the others.
    InputError for fewer than 10 images.
    """
    rows = np.asarray(rows, np.float64)
    check_clean_count(len(rows))
    mean, covariance = _fit(rows)
    scores = [_distance(rows[i], *_fit(np.delete(rows, i, 0)))[0] for i in range(len(rows))]
    return {"signals": list(SIGNALS), "mean": mean.tolist(), "covariance": covariance.tolist(),
            "scores": sorted(map(float, scores))}


def read_calibration(path: str | Path) -> dict[str, Any]:
    """Read a calibration from its JSON file; InputError when it is something else."""
    count = len(SIGNALS)

    def fits(calibration: Any) -> bool:
        mean, covariance, scores = (np.asarray(calibration[name], np.float64)
                                    for name in ("mean", "covariance", "scores"))
        np.linalg.cholesky(covariance)  # LinAlgError, a ValueError, unless distances can be measured with it
        return bool(tuple(calibration["signals"]) == SIGNALS and mean.shape == (count,) and scores.ndim == 1
                    and covariance.shape == (count, count) and len(scores) and (np.diff(scores) >= 0).all())
    return read_calibration_json(path, fits, "these signals", "make it with --clean_dir")


def score(calibration: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Distance of signals (N, 5) from the clean ones, (N,): 0 at their mean, about 2 for clean images."""
    return _distance(np.asarray(rows), np.array(calibration["mean"]), np.array(calibration["covariance"]))


def deviations(calibration: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Deviations of signals (N, 5) from the clean mean, in the clean images' standard deviations."""
    deviation = np.sqrt(np.diag(np.array(calibration["covariance"])))
    return (np.atleast_2d(rows) - np.array(calibration["mean"])) / deviation


def percentile(calibration: dict[str, Any], scores: np.ndarray) -> np.ndarray:
    """Share of the clean scores below each score, (N,) in [0, 1]."""
    return np.searchsorted(calibration["scores"], scores, side="left") / len(calibration["scores"])


def explain(calibration: dict[str, Any], row: np.ndarray | Sequence[float]) -> dict[str, Any]:
    """The diagnosis of one image from its signals (5,): score, percentile, suspect, and a sentence."""
    value = score(calibration, row)[0]
    share = percentile(calibration, value)
    away = deviations(calibration, row)[0]
    loudest = int(np.abs(away).argmax())
    suspect = bool(share >= SUSPECT_PERCENTILE)
    clean = len(calibration["scores"])
    sentence = (f"score {value:.1f}, above {100 * share:.0f} % of {clean} clean images: "
                + (f"looks poisoned, above all by its {SIGNALS[loudest]} ({away[loudest]:+.1f} standard "
                   "deviations)." if suspect else "looks clean."))
    return {"score": float(value), "percentile": float(share), "suspect": suspect, "sentence": sentence}


def report(calibration: dict[str, Any], rows: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The diagnosis of a set from its images' signals (5,) by name, as JSON: per image and as a whole.

    The set is poisoned if so many suspects are unlikely (5 %) in a clean set.
    """
    images = {name: {**explain(calibration, row), "signals": dict(zip(SIGNALS, row, strict=True))}
              for name, row in rows.items()}
    suspects = sum(image["suspect"] for image in images.values())
    clean = len(calibration["scores"])
    rank = next(k for k in range(clean + 1) if k / clean >= SUSPECT_PERCENTILE)  # what a suspect exceeds
    expected = len(images) * (clean + 1 - rank) / (clean + 1)
    poisoned = rank_chance(suspects, len(images), clean, rank) <= 0.05 + 1e-9
    return {"poisoned": bool(poisoned), "suspects": suspects, "images": images, "sentence": (
        f"{suspects} of {len(images)} images look poisoned (of clean ones, about {expected:.1f} would): "
        + ("this set is probably poisoned." if poisoned else "this set is probably clean."))}
