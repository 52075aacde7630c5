"""Fig. 7 and 12: histograms of pixel perturbations, relative to the clean images, before and after JPEG.

    python examples/figures/fig7.py --data_dir figures --output_dir results/figures

The claim (Sec. 4.4): the perturbations of poisons are bimodal, at the ends of their budget; after JPEG they
are unimodal, like a Gaussian.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import estimate

from szt_utils.images import read_image
from szt_utils.jpeg import jpeg_tensor
from szt_utils.plots import save_figure, step_plot

LEVELS = np.arange(-64, 65)  # changes in 1/255; larger ones are counted at the ends


@dataclass(frozen=True)
class Settings(common.Settings):
    jpeg_quality: int = 25


def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Counts of the changes by LEVELS, (images, 129), before and after JPEG, of images with a clean one."""
    counts = {"before": [], "after": [], "names": []}
    for concept in settings.concepts_in(data):
        for path in settings.image_paths(data, concept):
            original = settings.data_dir[0] / "clean" / concept / path.name
            if not original.is_file():
                continue
            resolution = read_image(path).width
            poisoned, clean = (common.load_images([file], resolution) for file in (path, original))
            for name, change in (("before", poisoned - clean),
                                 ("after", jpeg_tensor(poisoned, settings.jpeg_quality) - clean)):
                levels = (change * 255).round().clamp(-64, 64).long().flatten() + 64
                counts[name].append(torch.bincount(levels, minlength=129).tolist())
            counts["names"].append(f"{concept}/{path.stem}")
    return counts


def moments(counts: np.ndarray) -> tuple[float, float]:
    """`statistics.excess_kurtosis` and `bimodality` of a histogram over LEVELS, `counts` (129,)."""
    weights = counts / counts.sum()
    centered = LEVELS - (weights * LEVELS).sum()
    variance = (weights * centered**2).sum()
    kurtosis = (weights * centered**4).sum() / variance**2
    skewness = (weights * centered**3).sum() / variance**1.5
    return kurtosis - 3, (skewness**2 + 1) / kurtosis


def claims(results: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for data, result in results.items():
        for when in ("before", "after") if data != "clean" else ("after",):
            counts, names = np.array(result[when], dtype=float), common.names_of(result, when)
            of = "JPEG of clean" if data == "clean" else f"{data} {when} JPEG"
            found[f"{of}: excess kurtosis"] = estimate(
                counts, lambda rows: moments(rows.sum(0))[0], names)
            found[f"{of}: bimodality coefficient"] = estimate(
                counts, lambda rows: moments(rows.sum(0))[1], names)
            if data != "clean":
                eps = LEVELS[np.flatnonzero(np.array(result["before"]).sum(0))[-1]]
                ends = np.abs(np.abs(LEVELS) - eps) <= 2
                found[f"{of}: share within 2 levels of the budget's ends"] = estimate(
                    counts, lambda rows, ends=ends: rows[:, ends].sum() / rows.sum(), names)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    poisons = [data for data in results if data != "clean"]
    figure, axes = common.plot_grid(len(poisons), sharex=True)
    for axis, data in zip(axes, poisons, strict=False):
        for when, color in (("before", "#D55E00"), ("after", "#009E73")):
            counts = np.array(results[data][when]).sum(0)
            step_plot(axis, np.arange(-64.5, 65), counts / counts.sum(), f"{when} JPEG", color)
        axis.set(title=data, xlabel="change in levels of 255", ylabel="share of values", xlim=(-40, 40))
        axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    common.run_figure("fig7", __doc__, measure, claims, plot, Settings)
