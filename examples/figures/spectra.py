"""Appendix D: power spectra of latents, of clean and poisoned images, before and after JPEG.

    python examples/figures/spectra.py --data_dir figures --output_dir results/figures

The claim (Sec. 4.4): poisons bend the latent's spectrum away from that of natural images, and JPEG bends it
back.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import estimate

from szt_utils.jpeg import jpeg_tensor
from szt_utils.plots import COLORS, save_figure, subplots
from szt_utils.statistics import radial_spectrum


@dataclass(frozen=True)
class Settings(common.Settings):
    jpeg_quality: int = 25
    bands: int = 8


@torch.no_grad()
def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Logarithms of the radial spectra of each image's latent, (images, bands), before and after JPEG."""
    model, resolution = settings.load_model()
    spectra, names = {"before": [], "after": []}, []
    for concept in settings.concepts_in(data):
        for path in settings.image_paths(data, concept):
            image = common.load_images([path], resolution)
            latents = model.encode(torch.cat([image, jpeg_tensor(image, settings.jpeg_quality)]))
            before, after = radial_spectrum(latents.float().cpu(), settings.bands).log().tolist()
            spectra["before"].append(before)
            spectra["after"].append(after)
            names.append(f"{concept}/{path.stem}")
    return {**spectra, "names": names}


def distance(rows: np.ndarray, which: int) -> float:
    """Mean distance of row `which` of (N, 3, bands) from row 0, after a mean over N; ln 2 is a factor 2."""
    return np.abs((rows[:, which] - rows[:, 0]).mean(0)).mean()


def claims(results: dict[str, Any]) -> dict[str, Any]:
    found, clean = {}, results["clean"]
    for data, result in results.items():
        rows = np.concatenate([common.paired(clean, result, "before"),
                               common.paired(clean, result, "after")[:, 1:]], 1)  # (N, 3, bands)
        names = common.pair_names(clean, result, "before")
        if data != "clean":
            found[f"{data}: distance to clean, ln, before JPEG"] = estimate(
                rows, lambda r: distance(r, 1), names)
        found[f"{data}: distance to clean, ln, after JPEG"] = estimate(
            rows, lambda r: distance(r, 2), names)
        if data != "clean":
            found[f"{data}: share of the distance that JPEG removes"] = estimate(
                rows, lambda r: 1 - distance(r, 2) / distance(r, 1), names)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = subplots(1, 2, sharey=True)
    for axis, when in zip(axes[0], ("before", "after"), strict=True):
        for data, result in results.items():
            spectrum = np.exp(np.mean(result[when], axis=0))
            middle = (np.arange(len(spectrum)) + 0.5) / len(spectrum)
            axis.plot(middle, spectrum, "o-", color=COLORS[data], label=data, markersize=3)
        axis.set(title=f"{when} JPEG", xlabel="spatial frequency of the latent, of Nyquist's",
                 ylabel="power", yscale="log")
    axes[0, 1].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    common.run_figure("spectra", __doc__, measure, claims, plot, Settings)
