"""Plots show what they were given."""

import numpy as np
import pytest
from PIL import Image

from szt_utils import plots
from szt_utils.plots import COLORS, band_plot, map_grid, save_figure, score_sweep, score_table, subplots


def test_a_grid_has_a_row_per_token_and_is_bright_where_the_map_is(tmp_path):
    maps = np.zeros((2, 3, 8, 8), np.float32)
    maps[0, :, :4] = 1  # the upper half
    maps[1, :, 4:] = 5  # the lower half, on its own scale
    image = Image.new("RGB", (64, 64), "black")
    map_grid(tmp_path / "new" / "grid.png", image, maps, ["one", "two"], [0, 500, 999], "title")
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("RGB")).astype(int)
    assert grid.shape[1] > grid.shape[0] * 4 / 3
    yellow = (grid[..., 0] > 150) & (grid[..., 2] < grid[..., 0] - 30)  # inferno's bright end over black
    rows = np.flatnonzero(yellow.any(1))
    # One bright band in the upper row of maps, one in the lower, and dark between them.
    gaps = np.flatnonzero(np.diff(rows) > 1)
    assert len(gaps) == 1 and rows[0] < grid.shape[0] / 2 < rows[-1]
    assert abs((gaps[0] + 1) - (len(rows) - gaps[0] - 1)) <= 2  # as bright, whatever their own scales
    map_grid(tmp_path / "math.png", image, maps, ["$\\x$", "<c$^$>"], [0, 500, 999], "a $\\x$ toy")


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the plots that are saved."""
    axes = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi=110: axes.append(figure.axes[0]))
    return axes


def test_a_table_shows_scores_and_errors_and_its_colors_begin_at_0(drawn):
    means, errors = [[0.5, None], [0.9, 1.0]], [[0.01, None], [None, 0.2]]
    score_table("table.png", ["a", "b"], ["x", "y"], means, errors, "t")
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in drawn[0].texts}
    assert cells == {(0, 0): ("0.50\n± 0.01", "black"), (0, 1): ("0.90", "white"),
                     (1, 1): ("1.00\n± 0.20", "white")}
    assert drawn[0].images[0].get_clim() == (0, 1)
    score_table("table.png", ["a"], ["x", "y"], [[-0.2, 0.5]], [[None, None]], "t")
    assert drawn[1].images[0].get_clim() == (-0.2, 0.5)


def test_a_sweep_shows_each_data_sets_points_beside_each_other(drawn):
    lines = {"clean": [0.1, None, 0.3], "ea": [0.4, 0.5, 0.6]}
    errors = {"clean": [0.01, None, None], "ea": [0.02, 0.02, 0.02]}
    score_sweep("sweep.png", ["a", "b", "c"], lines, errors, "t")
    clean, ea = drawn[0].containers
    assert [point.get_color() for point in (clean[0], ea[0])] == [COLORS["clean"], COLORS["ea"]]
    assert np.allclose(clean[0].get_xdata(), [-0.15, 0.85, 1.85])
    assert np.allclose(ea[0].get_xdata(), [0.15, 1.15, 2.15])
    assert np.allclose(np.array(clean[0].get_ydata(), float), [0.1, np.nan, 0.3], equal_nan=True)
    ends = clean[2][0].get_segments()
    assert np.allclose([end[:, 1] for end in (ends[0], ends[2])], [[0.09, 0.11], [0.3, 0.3]])


def test_bands_are_quantiles(tmp_path):
    samples = np.stack([np.linspace(0, 1, 1001), np.linspace(0, 2, 1001)], 1)
    figure, axes = subplots()
    band_plot(axes[0, 0], [0, 1], samples, "x", "black")
    assert np.allclose(axes[0, 0].lines[0].get_ydata(), [0.5, 1])
    outer, inner = (band.get_paths()[0].vertices for band in axes[0, 0].collections)
    assert np.isclose(outer[:, 1].max(), 1.95) and np.isclose(inner[:, 1].max(), 1.5)
    assert np.isclose(outer[:, 1].min(), 0.025) and np.isclose(inner[:, 1].min(), 0.25)
    save_figure(figure, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 300
