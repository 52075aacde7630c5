"""Plots show what they were given."""

import numpy as np
from PIL import Image

from szt_utils.plots import band_plot, map_grid, save_figure, subplots


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


def test_bands_are_quantiles(tmp_path):
    samples = np.stack([np.linspace(0, 1, 1001), np.linspace(0, 2, 1001)], 1)
    figure, axes = subplots()
    band_plot(axes[0, 0], [0, 1], samples, "x", "black")
    assert np.allclose(axes[0, 0].lines[0].get_ydata(), [0.5, 1])
    outer, inner = (band.get_paths()[0].vertices for band in axes[0, 0].collections)
    assert np.isclose(outer[:, 1].max(), 1.95) and np.isclose(inner[:, 1].max(), 1.5)
    save_figure(figure, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 300
