"""Figures, the only user of matplotlib: each function writes one PNG."""

from pathlib import Path

__all__ = ["score_sweep", "score_table"]


def score_table(path: str | Path, rows: list[str], columns: list[str], means: list[list[float | None]],
                errors: list[list[float | None]], title: str) -> None:
    """A table of scores coloured by value, `means[row][column]` with its standard error; None stays blank."""
    import numpy as np

    figure, axes = _figure(1.0 + 0.85 * len(columns), 1.3 + 0.42 * len(rows))
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
    _save(figure, path)


def score_sweep(path: str | Path, settings: list[str], lines: dict[str, list[float | None]],
                errors: dict[str, list[float | None]], title: str, ylabel: str) -> None:
    """Scores over the settings of an ablation, one line per data set with its standard errors; None is a
    gap."""
    figure, axes = _figure(2.5 + 0.55 * len(settings), 3.6)
    for name, values in lines.items():
        axes.errorbar(range(len(settings)), [float("nan") if v is None else v for v in values],
                      [0 if e is None else e for e in errors[name]], marker="o", markersize=4, capsize=2,
                      linewidth=1.5, label=name)
    axes.set_xticks(range(len(settings)), settings, fontsize=9, rotation=45 if len(settings) > 6 else 0)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float):
    """A figure in inches that no window belongs to, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure, path: str | Path) -> None:
    from .records import atomic_path

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
