"""Is a picture poisoned? Signals that the analysis offers (paper Sec. 4),
and a score calibrated on clean pictures.

A poison is what JPEG removes, moves the latent more than its size in pixels warrants, changes the loss at low
timesteps, and fills its budget evenly. Every signal compares a picture with its own JPEG-compressed copy, so
that it depends little on what the picture shows. The score is the Mahalanobis distance of the signals from
those of clean pictures: a poison may move a signal either way.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .diffusion import LatentDiffusion
from .errors import InputError
from .evidence import excess_kurtosis, high_frequency_share
from .jpeg import jpeg_tensor

__all__ = ["SIGNALS", "calibrate", "deviations", "explain", "percentile", "read_calibration", "score",
           "signals"]

SIGNALS = ("pixel_change", "evenness", "latent_gain", "latent_spectrum", "loss_change")
NOISE_LEVELS = (0.05, 0.15, 0.25)  # timesteps as shares of all: low ones, where poisons act
LEVEL = 0.95  # a picture that scores above this share of the clean ones is suspect


@torch.no_grad()
def signals(model: LatentDiffusion, image: torch.Tensor, *, quality: int = 25, draws: int = 2,
            seed: int = 0) -> list[float]:
    """The signals of a picture (1, 3, H, W) of whole levels in [0, 1], in the order of SIGNALS.

    With y the picture x after JPEG of `quality`, and E its latent:
    pixel_change      ln rms(x - y)
    evenness          -ln kurtosis(x - y): what JPEG takes from a photograph sits at its edges
    latent_gain       ln rms(E(x) - E(y)) / rms(x - y)
    latent_spectrum   ln of the latent power's share above half the Nyquist frequency, x against y
    loss_change       ln of the denoising loss at low timesteps, empty prompt, x against y
    The noise, `draws` draws a timestep, is the same for x and y and for all pictures of a size.
    """
    both = torch.cat([image, jpeg_tensor(image, quality)])
    change = (both[0] - both[1]).double().cpu()
    size = max(change.square().mean().sqrt().item(), 1e-6)  # a picture that JPEG leaves as it is
    latents = model.encode(both)
    shift = max((latents[0] - latents[1]).double().square().mean().sqrt().item(), 1e-6)
    share = high_frequency_share(latents.float().cpu()).clamp(min=1e-6).log()
    generator, losses = torch.Generator().manual_seed(seed), 0
    for level in NOISE_LEVELS:
        at = torch.full((2,), int(level * model.scheduler.config.num_train_timesteps), device=latents.device)
        for _ in range(draws):
            noise = torch.randn(latents[:1].shape, generator=generator).to(latents).expand_as(latents)
            states = model.embed_text("").expand(2, -1, -1)
            losses = losses + model.loss(latents, noise, at, states).flatten(1).mean(1).double()
    kurtosis = excess_kurtosis(change.numpy()) + 3 if size > 1e-6 else 3.0
    return [math.log(size), -math.log(kurtosis), math.log(shift / size), (share[0] - share[1]).item(),
            (losses[0] / losses[1]).log().item()]


def _fit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance; a tenth of the variances is added so that few pictures do not overfit."""
    covariance = np.cov(rows, rowvar=False)
    return rows.mean(0), covariance + 0.1 * np.diag(np.diag(covariance)) + 1e-9 * np.eye(rows.shape[1])


def _distance(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    centred = np.atleast_2d(rows) - mean
    return np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred))


def calibrate(rows: np.ndarray) -> dict[str, Any]:
    """What clean pictures' signals (N, 5) look like: mean, covariance,
    and the sorted scores that each had with the calibration of the others; JSON. Needs 10 pictures."""
    rows = np.asarray(rows, np.float64)
    if len(rows) < 10:
        raise InputError(f"A calibration needs at least 10 clean pictures, but there are {len(rows)}.")
    mean, covariance = _fit(rows)
    scores = [_distance(rows[i], *_fit(np.delete(rows, i, 0)))[0] for i in range(len(rows))]
    return {"signals": list(SIGNALS), "mean": mean.tolist(), "covariance": covariance.tolist(),
            "scores": sorted(map(float, scores))}


def read_calibration(path: str | Path) -> dict[str, Any]:
    """A calibration from its JSON file; InputError when it is something else."""
    try:
        calibration = json.loads(Path(path).read_text())
        if tuple(calibration["signals"]) == SIGNALS and len(calibration["scores"]) and calibration["mean"]:
            return calibration
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"The file '{path}' is not a calibration of these signals; make it with --clean_dir.")


def score(calibration: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Distance of signals (N, 5) from the clean ones, (N,): 0 is their mean, the clean are about 2."""
    return _distance(np.asarray(rows), np.array(calibration["mean"]), np.array(calibration["covariance"]))


def deviations(calibration: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Each signal (N, 5) in standard deviations of the clean ones."""
    deviation = np.sqrt(np.diag(np.array(calibration["covariance"])))
    return (np.atleast_2d(rows) - np.array(calibration["mean"])) / deviation


def percentile(calibration: dict[str, Any], scores: np.ndarray) -> np.ndarray:
    """Share of the clean scores below each score, (N,) in [0, 1]."""
    return np.searchsorted(calibration["scores"], scores, side="left") / len(calibration["scores"])


def explain(calibration: dict[str, Any], row: np.ndarray) -> dict[str, Any]:
    """What is said about one picture's signals (5,): score, percentile, suspect, and a sentence."""
    value = score(calibration, row)[0]
    share = percentile(calibration, value)
    away = deviations(calibration, row)[0]
    loudest = int(np.abs(away).argmax())
    suspect = bool(share >= LEVEL)
    clean = len(calibration["scores"])
    sentence = (f"score {value:.1f}, above {100 * share:.0f} % of {clean} clean pictures: "
                + (f"looks poisoned, above all by its {SIGNALS[loudest]} ({away[loudest]:+.1f} standard "
                   "deviations)." if suspect else "looks clean."))
    return {"score": float(value), "percentile": float(share), "suspect": suspect, "sentence": sentence}
