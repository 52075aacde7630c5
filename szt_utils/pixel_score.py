"""Poisoned, clean, or cannot tell: the verdict on an image from its pixel signals.

Two logistic regressions on the signals and their products share one calibration. The first separates poisons
from clean images and says "poisoned". The second separates poisons and their JPEG copies from clean images
and says "clean": what it leaves open may be a poison that was saved as JPEG.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import read_calibration_json
from .pixel_signals import SIGNALS
from .statistics import chance

__all__ = ["PARTS", "VERDICTS", "explain_pixels", "fit_score", "is_coarse_jpeg", "pixel_calibration_path",
           "read_pixel_calibration", "report_pixels", "score_pixels"]

VERDICTS = ("poisoned", "clean", "cannot tell")
PARTS = ("poison", "trace")  # the two scores: of poisons, and of poisons that JPEG may have weakened
FARTHEST = 4.0  # standard deviations; a signal beyond counts as there, so that no product runs away
COARSE = 12  # mean of a luminance quantization table; the standard one exceeds it below quality 90
NO_SIGNALS = "cannot tell: the image is too small, flat, grey or clipped"


def pixel_calibration_path() -> str:
    """File of the bundled calibration, which `examples/calibrate_pixels.py` makes."""
    return str(Path(__file__).with_name("pixel_calibration.json"))


def fit_score(rows: np.ndarray, poisoned: np.ndarray, weights: np.ndarray, ridge: float = 3e-3) -> dict:
    """Fit a score to signals (N, 9), labels (N,) and weights (N,): {"mean", "deviation", "coefficients"}.

    The logistic regression on the signals and their products of two, by Newton's method, with both
    classes at equal weight and an L2 penalty.
    """
    part = {"mean": rows.mean(0).tolist(), "deviation": (rows.std(0) + 1e-9).tolist()}
    terms, target = _terms(part, rows), np.asarray(poisoned, np.float64)
    share = np.asarray(weights, np.float64)
    share = np.where(target > 0, share / share[target > 0].sum(), share / share[target == 0].sum()) / 2
    found, penalty = np.zeros(terms.shape[1]), ridge * np.eye(terms.shape[1])
    penalty[-1, -1] = 1e-6  # of the constant
    for _ in range(50):
        guess = 1 / (1 + np.exp(-(terms @ found).clip(-30, 30)))
        slope = terms.T @ (share * (guess - target)) + penalty @ found
        curvature = (terms * (share * guess * (1 - guess))[:, None]).T @ terms + penalty
        step = np.linalg.solve(curvature, slope)
        found -= step
        if np.abs(step).max() < 1e-8:
            break
    return {**part, "coefficients": found.tolist()}


def _terms(part: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
    """Standardized signals, their products, and 1: (N, 55) of signals (N, 9)."""
    scaled = (np.atleast_2d(rows) - np.array(part["mean"])) / np.array(part["deviation"])
    scaled = scaled.clip(-FARTHEST, FARTHEST)
    first, second = np.triu_indices(scaled.shape[1])
    return np.hstack([scaled, scaled[:, first] * scaled[:, second], np.ones((len(scaled), 1))])


def score_pixels(part: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
    """The score of signals (N, 9), (N,): the ln odds of a poison, if half of all images were poisoned."""
    return _terms(part, rows) @ np.array(part["coefficients"])


def read_pixel_calibration(path: str | Path | None = None) -> dict[str, Any]:
    """Read a calibration from its JSON file, by default the bundled one; InputError if it is none."""
    path = path or pixel_calibration_path()
    count = len(SIGNALS)
    terms = count + count * (count + 1) // 2 + 1

    def fits(calibration: Any) -> bool:
        return tuple(calibration["signals"]) == SIGNALS and all(
            len(part["mean"]) == len(part["deviation"]) == count and len(part["coefficients"]) == terms
            and min(part["deviation"]) > 0 and math.isfinite(part["threshold"])
            and np.isfinite(score_pixels(part, np.zeros(count))).all()
            for part in (calibration[name] for name in PARTS))
    return read_calibration_json(path, fits, "the pixel signals", "make it with examples/calibrate_pixels.py")


def is_coarse_jpeg(path: str | Path) -> bool:
    """Whether a file is a JPEG of a quality below about 90, at which poisons look like clean images."""
    with Image.open(path) as image:
        tables = getattr(image, "quantization", None) if image.format in ("JPEG", "MPO") else None
        return bool(tables) and float(np.mean(tables[min(tables)])) > COARSE


def explain_pixels(calibration: Mapping[str, Any], row: Sequence[float] | None,
                   coarse: bool = False) -> dict[str, Any]:
    """The verdict on one image from its signals (9,), None without any: verdict, score, trace, sentence.

    score and trace are relative to their thresholds: poisoned if score > 0, else clean if trace < 0 and the
    file is no coarse JPEG.
    """
    if row is None:
        return {"verdict": "cannot tell", "score": None, "trace": None, "sentence": f"{NO_SIGNALS}."}
    score, trace = (float(score_pixels(calibration[name], np.array(row))[0] - calibration[name]["threshold"])
                    for name in PARTS)
    verdict = "poisoned" if score > 0 else "clean" if trace < 0 and not coarse else "cannot tell"
    why = {"poisoned": "the pixels look poisoned", "clean": "the pixels look clean",
           "cannot tell": ("JPEG of this quality could hide a poison" if coarse else
                           "no poison is seen, but JPEG, noise or texture could hide one")}[verdict]
    return {"verdict": verdict, "score": score, "trace": trace,
            "sentence": f"{verdict}: {why} (score {score:+.1f}, trace {trace:+.1f})."}


def report_pixels(calibration: Mapping[str, Any],
                  rows: Mapping[str, Sequence[float] | None],
                  coarse: Collection[str] = ()) -> dict[str, Any]:
    """The diagnosis of a set from its images' signals by name, as JSON: per image and as a whole.

    `coarse` are the names of those that `is_coarse_jpeg` is true of.
    The set is poisoned if so many poisoned images are unlikely (5 %) in a clean set, where each image with
    signals is called poisoned at 5 %. Otherwise it is clean if more than half of its images are.
    """
    images = {name: {**explain_pixels(calibration, row, name in coarse),
                     "signals": None if row is None else dict(zip(SIGNALS, row, strict=True))}
              for name, row in rows.items()}
    counts = {verdict: sum(image["verdict"] == verdict for image in images.values()) for verdict in VERDICTS}
    found, total = counts["poisoned"], len(images)
    judged = sum(row is not None for row in rows.values())
    verdict = ("poisoned" if chance(found, judged) <= 0.05 + 1e-9
               else "clean" if counts["clean"] > total / 2 else "cannot tell")
    sentence = (f"{found} of {total} images look poisoned, {counts['clean']} look clean, of "
                f"{counts['cannot tell']} the pixels cannot tell; the set: {verdict}.")
    return {"verdict": verdict, "counts": counts, "sentence": sentence, "images": images}
