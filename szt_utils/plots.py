"""Pictures of numbers. The only user of matplotlib: every function takes plain arrays and writes one PNG."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import save_png

__all__ = ["band_plot", "bar_plot", "line_plot", "map_grid", "save_figure", "step_plot", "subplots"]

# Clean is black; hues of one family for a poison and its opposite (Okabe and Ito's colours).
COLOURS = {"clean": "#000000", "adm+": "#D55E00", "adm-": "#E69F00", "sds+": "#0072B2", "sds-": "#56B4E9",
           "ea": "#009E73", "da": "#CC79A7"}


def subplots(rows: int = 1, columns: int = 1, *, width: float = 5.0, height: float = 3.4, **kwargs: Any):
    """A figure without a display and its axes, an array (rows, columns); `width` and `height` in inches per
    plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure, path: str | Path, dpi: int = 110) -> None:
    """Write the figure as a PNG, whole or not at all; the folder is made when missing."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    save_png(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"), path)


def map_grid(path: str | Path, picture: Image.Image | list[Image.Image], maps: np.ndarray, tokens: list[str],
             timesteps: list[int], title: str = "") -> None:
    """Maps (tokens, timesteps, h, w) laid over the grey picture: tokens downwards, timesteps to the right.

    All maps of a row share one colour scale, so that a row shows when its token acts as well as where; its
    end stands beside the token, each map's mean below the map. `picture` is one for all rows or one per row.
    """
    rows, columns = maps.shape[:2]
    figure, axes = subplots(rows, columns + 1, width=1.5, height=1.62)
    for r, token in enumerate(tokens):
        image = picture[r] if isinstance(picture, list) else picture
        top = max(float(np.quantile(maps[r], 0.995)), 1e-12)
        axes[r, 0].imshow(image)
        axes[r, 0].set_ylabel(f"{token}\nscale to {top:.2g}", fontsize=9)
        for c, t in enumerate(timesteps):
            axis, extent = axes[r, c + 1], (0, image.width, image.height, 0)
            axis.imshow(np.asarray(image.convert("L")), cmap="gray", vmin=0, vmax=255, extent=extent)
            axis.imshow(maps[r, c], cmap="inferno", vmin=0, vmax=top, alpha=0.72, extent=extent,
                        interpolation="nearest")
            axis.set_xlabel(f"{maps[r, c].mean():.2g}", fontsize=7, labelpad=1)
            if r == 0:
                axis.set_title(f"t = {t}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=80)


def band_plot(axis, x: list[float], samples: np.ndarray, label: str, colour: str) -> None:
    """Median of samples (N, len(x)) as a line within bands of the middle 50 % and 95 %."""
    low, first, middle, third, high = np.quantile(samples, [0.025, 0.25, 0.5, 0.75, 0.975], axis=0)
    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.fill_between(x, first, third, color=colour, alpha=0.3, linewidth=0)
    axis.plot(x, middle, color=colour, label=label, linewidth=1.6)


def line_plot(axis, x: list[float], curves: dict[str, np.ndarray], *, dashes: str = "-", suffix: str = "",
              colours: dict[str, str] = COLOURS) -> None:
    """Lines of one value per x, by name."""
    for name, values in curves.items():
        axis.plot(x, values, dashes, color=colours.get(name, "#777777"), label=f"{name}{suffix}",
                  linewidth=1.6)


def step_plot(axis, edges: np.ndarray, counts: np.ndarray, label: str, colour: str) -> None:
    """A histogram's outline: `edges` (n + 1,), `counts` (n,)."""
    axis.stairs(counts, edges, color=colour, label=label, linewidth=1.4)


def bar_plot(axis, names: list[str], estimates: list[dict[str, float]], colours: list[str]) -> None:
    """Bars with intervals, of estimates {"value", "low", "high"}."""
    values = np.array([estimate["value"] for estimate in estimates])
    ends = np.array([[e["value"] - e["low"], e["high"] - e["value"]] for e in estimates]).T
    axis.bar(names, values, yerr=ends.clip(min=0), color=colours, capsize=3)
