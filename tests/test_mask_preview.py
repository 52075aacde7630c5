"""The preview of a mask shows what the training computes."""

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.mask_preview import mask_area, mask_sheet, trained_masks
from szt_utils.masks import to_latent_grid
from szt_utils.safe_zone import SafeZone


def a_mask(width: int, height: int) -> Image.Image:
    levels = np.zeros((height, width), np.uint8)
    levels[height // 4:height // 2, width // 2:3 * width // 4] = 255
    return Image.fromarray(levels)


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("center_crop", [False, True])
def test_shows_the_trainings_own_mask_in_its_place(size, center_crop):
    mask, zone = a_mask(*size), SafeZone(mask_dilation=3)
    dilated, grid, share = trained_masks(mask, zone, 64, center_crop)
    assert dilated.size == grid.size == size
    expected = zone.prepare_mask(mask, 64, center_crop)
    cells = to_latent_grid(expected, (8, 8))
    assert share == pytest.approx(cells.mean().item()) and 0 < share < 1
    left = (size[0] - 64) // 2 if center_crop else 0
    for shown, values in ((dilated, expected), (grid, cells)):
        part = shown.crop((left, 0, left + 64, 64)) if center_crop else shown
        levels = np.asarray(part.resize(values.shape[-1:-3:-1], Image.Resampling.NEAREST)) / 255
        assert torch.equal(torch.from_numpy(levels).float(), values[0, 0])
    if left:
        assert not np.asarray(dilated)[:, :left].any() and not np.asarray(grid)[:, left + 64:].any()


def test_area_and_sheet():
    mask = a_mask(64, 64)
    assert mask_area(mask) == 1 / 16
    image = Image.new("RGB", (64, 64), (90, 180, 30))
    few, more = (mask_sheet(["a.png"] * n, [image] * n, [mask] * n, SafeZone(), 64, columns=2)
                 for n in (2, 3))
    assert more.width == few.width and more.height == pytest.approx(2 * few.height, abs=4)
    for row, outside in enumerate(((90, 180, 30), (45, 45, 45), (45, 45, 45))):
        tile = few.crop((4, 188 * row + 24, 164, 188 * row + 184))
        assert tile.getpixel((100, 60)) == (90, 180, 30) and tile.getpixel((60, 100)) == outside
