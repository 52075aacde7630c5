"""Plots. The only user of matplotlib: every function takes plain arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import save_png

__all__ = ["COLORS", "band_plot", "map_grid", "save_figure", "score_sweep", "score_table", "step_plot",
           "subplots"]

# Clean is black; hues of one family for a poison and its opposite (the colors of Okabe and Ito).
COLORS = {"clean": "#000000", "adm+": "#D55E00", "adm-": "#E69F00", "sds+": "#0072B2", "sds-": "#56B4E9",
          "ea": "#009E73", "da": "#CC79A7"}


def subplots(rows: int = 1, columns: int = 1, *, width: float = 5.0, height: float = 3.4,
             **kwargs: Any) -> tuple[Any, np.ndarray]:
    """A figure without a display and its axes, an array (rows, columns).

    `width` and `height` are inches per plot; `kwargs` go to matplotlib's `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure: Any, path: str | Path, dpi: int = 110) -> None:
    """Write the figure as a PNG atomically; a missing folder is created."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    save_png(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"), path)


def map_grid(path: str | Path, image: Image.Image | list[Image.Image], maps: np.ndarray, tokens: list[str],
             timesteps: list[int], title: str = "") -> None:
    """Write a PNG of maps (tokens, timesteps, h, w) over the gray image, a row per token, a column per t.

    All maps of a row share one color scale, so that a row shows when its token acts as well as where. The
    label of a row gives the maximum of its scale, the label of a map its mean. `image` is one for all rows or
    one per row.
    """
    rows, columns = maps.shape[:2]
    figure, axes = subplots(rows, columns + 1, width=1.5, height=1.62)
    for r, token in enumerate(tokens):
        photo = image[r] if isinstance(image, list) else image
        top = max(float(np.quantile(maps[r], 0.995)), 1e-12)
        axes[r, 0].imshow(photo)
        axes[r, 0].set_ylabel(f"{token}\nscale to {top:.2g}", fontsize=9, parse_math=False)
        for c, t in enumerate(timesteps):
            axis, extent = axes[r, c + 1], (0, photo.width, photo.height, 0)
            axis.imshow(np.asarray(photo.convert("L")), cmap="gray", vmin=0, vmax=255, extent=extent)
            axis.imshow(maps[r, c], cmap="inferno", vmin=0, vmax=top, alpha=0.72, extent=extent,
                        interpolation="nearest")
            axis.set_xlabel(f"{maps[r, c].mean():.2g}", fontsize=7, labelpad=1)
            if r == 0:
                axis.set_title(f"t = {t}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.supxlabel("below a map: its mean; each row has a color scale of its own", fontsize=8)
    save_figure(figure, path, dpi=80)


def band_plot(axis: Any, x: Sequence[float], samples: np.ndarray, label: str, color: str) -> None:
    """Plot the median of samples (N, len(x)) as a line, and bands of their middle 50 % and 95 %."""
    low, first, middle, third, high = np.quantile(samples, [0.025, 0.25, 0.5, 0.75, 0.975], axis=0)
    axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axis.fill_between(x, first, third, color=color, alpha=0.3, linewidth=0)
    axis.plot(x, middle, color=color, label=label, linewidth=1.6)


def step_plot(axis: Any, edges: np.ndarray, counts: np.ndarray, label: str, color: str) -> None:
    """Plot the outline of a histogram: `edges` (n + 1,), `counts` (n,)."""
    axis.stairs(counts, edges, color=color, label=label, linewidth=1.4)


def score_table(path: str | Path, rows: list[str], columns: list[str], means: list[list[float | None]],
                errors: list[list[float | None]], title: str) -> None:
    """Write a PNG of a table of scores, colored by value.

    A cell shows `means[row][column]` and its standard error; None leaves it blank. Colors begin at 0, so that
    close scores look alike.
    """
    figure, ((axes,),) = subplots(width=1.0 + 0.85 * len(columns), height=1.3 + 0.42 * len(rows))
    values = np.array(means, dtype=float)
    low, high = min(0.0, np.nanmin(values)), np.nanmax(values)
    axes.imshow(values, cmap="YlGn", aspect="auto", vmin=low, vmax=high)
    for r, c in np.argwhere(~np.isnan(values)):
        error = "" if errors[r][c] is None else f"\n± {errors[r][c]:.2f}"
        is_light = (values[r, c] - low) / ((high - low) or 1) < 0.7
        axes.text(c, r, f"{values[r, c]:.2f}{error}", ha="center", va="center", fontsize=8,
                  color="black" if is_light else "white")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def score_sweep(path: str | Path, settings: list[str], lines: dict[str, list[float | None]],
                errors: dict[str, list[float | None]], title: str) -> None:
    """Write a PNG of scores over the settings of an ablation: points with standard errors, a color per data
    set, side by side.

    None leaves a point out.
    """
    figure, ((axes,),) = subplots(width=2.5 + 0.55 * len(settings), height=3.6)
    for i, (name, values) in enumerate(lines.items()):
        places = np.arange(len(settings)) + 0.6 * (i - (len(lines) - 1) / 2) / len(lines)
        axes.errorbar(places, [float("nan") if v is None else v for v in values],
                      [0 if e is None else e for e in errors[name]], fmt="o", markersize=4, capsize=2,
                      color=COLORS.get(name), label=name)
    axes.set_xticks(range(len(settings)), settings, fontsize=9, rotation=45 if len(settings) > 6 else 0)
    axes.set_xticks(np.arange(len(settings) + 1) - 0.5, minor=True)
    axes.grid(alpha=0.3, axis="y")
    axes.grid(alpha=0.3, axis="x", which="minor")
    axes.tick_params(axis="x", which="both", length=0)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)
