"""Fig. 4: the denoising loss over timesteps, clean and poisoned: median, middle 50 % and 95 % of images.

    python examples/figures/fig4.py --data_dir figures figures-more --output_dir results/figures

The claim (Sec. 4.2): the loss falls from t = 0 to nothing at the end, and poisons raise it at lower and
middle timesteps only.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import estimate

from szt_utils.models import expand, residual, tokenize
from szt_utils.plots import COLORS, band_plot, save_figure


@dataclass(frozen=True)
class Settings(common.Settings):
    timesteps: int = 21
    prompt: str = "a photo"
    seed: int = 0


@torch.no_grad()
def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Losses (images, timesteps); an image has the same noise in every data set, by its name."""
    model, resolution = settings.load_model()
    timesteps = torch.linspace(0, model.num_timesteps - 1, settings.timesteps).round().long()
    condition = expand(model.condition(tokenize(model, settings.prompt)), len(timesteps))
    losses, images = [], settings.named_images(data)
    for name, path in images.items():
        latents = model.encode(common.load_images([path], resolution))
        generator = torch.Generator().manual_seed(settings.seed + zlib.crc32(name.encode()))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        error = residual(model, latents.expand(len(timesteps), -1, -1, -1),
                         noise.expand(len(timesteps), -1, -1, -1), timesteps.to(model.device), condition)
        losses.append([round(value, 6) for value in error.square().flatten(1).mean(1).tolist()])
    return {"timesteps": timesteps.tolist(), "log_snr": common.log_snr(model, timesteps), "losses": losses,
            "names": list(images)}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    clean, timesteps = results["clean"], np.array(results["clean"]["timesteps"])
    losses = np.array(clean["losses"])
    ranks = np.median(losses, 0).argsort().argsort()
    found = {"images": float(len(losses)),
             "clean: Spearman correlation of median loss and timestep":
                 float(np.corrcoef(ranks, np.arange(len(timesteps)))[0, 1]),
             "clean: mean loss at the last timestep over that at the first":
                 estimate(losses, lambda rows: rows[:, -1].mean() / rows[:, 0].mean(),
                          common.names_of(clean, "losses"))}
    for data, result in results.items():
        if data == "clean":
            continue
        pairs, names = (take(clean, result, "losses") for take in (common.paired, common.pair_names))

        def below(rows):  # (N, 2, timesteps)
            """The timestep below which 90 % of the absolute change of the mean loss lies, interpolated."""
            change = np.abs((rows[:, 1] - rows[:, 0]).mean(0)).cumsum()
            return np.interp(0.9 * change[-1], change, timesteps)

        def increase(rows, low, high):
            at = (timesteps >= low) & (timesteps < high)
            return rows[:, 1, at].mean() / rows[:, 0, at].mean() - 1
        found[f"{data}: timestep below which 90 % of the loss change lies"] = estimate(pairs, below, names)
        found |= {f"{data}: relative loss increase at {where}": estimate(
                      pairs, lambda rows, ends=ends: increase(rows, *ends), names)
                  for where, ends in (("t = 0", (0, 1)), ("t < 500", (0, 500)), ("t >= 700", (700, 10_000)))}
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    names = [data for data in results if data != "clean"] or ["clean"]
    figure, axes = common.plot_grid(len(names), sharey=True)
    for axis, data in zip(axes, names, strict=False):
        for name in dict.fromkeys(["clean", data]):
            band_plot(axis, results[name]["timesteps"], np.array(results[name]["losses"]),
                      f"{name} ({len(results[name]['losses'])})", COLORS[name])
        axis.set(xlabel="timestep", ylabel="denoising loss", yscale="log", title=data)
        axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    common.run_figure("fig4", __doc__, measure, claims, plot, Settings)
