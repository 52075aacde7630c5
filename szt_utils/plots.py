"""Pictures of numbers. The only user of matplotlib: every function takes plain arrays and writes one PNG."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import save_png

__all__ = ["band_plot", "bar_plot", "line_plot", "map_grid", "save_figure", "score_sweep", "score_table",
           "step_plot", "subplots"]

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


def score_table(path: str | Path, rows: list[str], columns: list[str], means: list[list[float | None]],
                errors: list[list[float | None]], title: str) -> None:
    """A table of scores coloured by value, `means[row][column]` with its standard error; None stays blank."""
    figure, ((axes,),) = subplots(width=1.0 + 0.85 * len(columns), height=1.3 + 0.42 * len(rows))
    values = np.array(means, dtype=float)
    axes.imshow(values, cmap="RdYlGn", aspect="auto")
    low, high = np.nanmin(values), np.nanmax(values)
    for r, c in np.argwhere(~np.isnan(values)):
        error = "" if errors[r][c] is None else f"\n± {errors[r][c]:.2f}"
        middle = 0.2 < (values[r, c] - low) / ((high - low) or 1) < 0.8
        axes.text(c, r, f"{values[r, c]:.2f}{error}", ha="center", va="center", fontsize=8,
                  color="black" if middle else "white")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def score_sweep(path: str | Path, settings: list[str], lines: dict[str, list[float | None]],
                errors: dict[str, list[float | None]], title: str, ylabel: str) -> None:
    """Scores over the settings of an ablation, one line per data set with its standard errors; None is a
    gap."""
    figure, ((axes,),) = subplots(width=2.5 + 0.55 * len(settings), height=3.6)
    for name, values in lines.items():
        axes.errorbar(range(len(settings)), [float("nan") if v is None else v for v in values],
                      [0 if e is None else e for e in errors[name]], marker="o", markersize=4, capsize=2,
                      linewidth=1.5, label=name)
    axes.set_xticks(range(len(settings)), settings, fontsize=9, rotation=45 if len(settings) > 6 else 0)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)
