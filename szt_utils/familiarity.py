"""How far images are from the drawn scenes that the bundled Segment Anything model was trained on.

Its features vary over a drawn scene in a few typical ways. Over a photograph or a painting they vary in other
ways, and then the model's masks mean nothing, however sure it is of them.
"""

import functools
import statistics
from collections.abc import Iterable

import torch
from safetensors.torch import load_file

from .pocket import familiarity_path

__all__ = ["MOST_FAMILIAR", "distance", "fit", "is_unfamiliar", "spread"]

# Folders of five pocket scenes, poisoned, compressed or noisy ones too, have medians up to 0.9; folders of
# photographs and paintings from 1.9 on.
MOST_FAMILIAR = 1.35


def spread(features: torch.Tensor) -> torch.Tensor:
    """The standard deviation over an image of each of its features (C, h, w): (C,)."""
    return features.flatten(1).std(1)


def fit(spreads: torch.Tensor, count: int = 16, floor: float = 0.01) -> dict[str, torch.Tensor]:
    """The "mean" (C,) of the spreads (N, C) of scenes, and the "directions" (count, C) in which they vary
    least, each scaled to variance 1; `floor` is added to the variances, as a share of their mean."""
    covariance = torch.cov(spreads.T)
    noise = floor * covariance.diagonal().mean() * torch.eye(len(covariance))
    variances, directions = torch.linalg.eigh(covariance + noise)
    scaled = directions[:, :count] / variances[:count].sqrt()
    return {"mean": spreads.mean(0), "directions": scaled.T.contiguous()}


@functools.cache
def _scenes() -> dict[str, torch.Tensor]:
    return load_file(familiarity_path())


def distance(features: torch.Tensor) -> float:
    """The distance of an image from the pocket scenes, by its features (C, h, w) of the bundled model.

    It is the root mean square over the directions in which the scenes vary least: Mahalanobis' distance
    there. A scene has about 0.7.
    """
    scenes = _scenes()
    return (scenes["directions"] @ (spread(features) - scenes["mean"])).square().mean().sqrt().item()


def is_unfamiliar(images: Iterable[torch.Tensor]) -> bool:
    """Whether the median distance of images, by their features, is above `MOST_FAMILIAR`; not for none."""
    distances = [distance(features) for features in images]
    return bool(distances) and statistics.median(distances) > MOST_FAMILIAR
