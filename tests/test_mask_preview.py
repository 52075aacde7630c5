"""The preview of a mask shows what the training computes."""

import numpy as np
import pytest
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
    expected = zone.prepare_mask(mask, 64, center_crop)
    cells = to_latent_grid(expected, (8, 8))
    assert share == pytest.approx(cells.mean().item()) and 0 < share < 1
    for shown, values in ((dilated, expected), (grid, cells)):
        assert shown.mode == "L" and np.array_equal(np.asarray(shown) / 255, values[0, 0].numpy())
    assert trained_masks(mask, zone, 64, center_crop, 16)[1].size == (4, 4)
    # On the sheet: the tile of 160 pixels of an image of 64 or 96, whose height is 64.
    tile = mask_sheet([("a.png", Image.new("RGB", size, (90, 180, 30)), mask)], zone, 64,
                      center_crop).crop((4, 400, 164, 560))
    scale, width = 160 / size[0], 64 if center_crop else size[0]
    for row, column in np.ndindex(8, 8):
        x = (size[0] - width) / 2 + (column + 0.5) * width / 8
        y = 80 + scale * (row * 8 + 4 - 32)
        shown = (90, 180, 30) if cells[0, 0, row, column] else (45, 45, 45)
        assert tile.getpixel((int(x * scale), int(y))) == pytest.approx(shown, abs=2), (row, column)
    if center_crop and size[0] > 64:
        assert tile.getpixel((8, 80)) == tile.getpixel((151, 80)) == (45, 45, 45)


def test_area_and_sheet():
    mask = a_mask(64, 64)
    assert mask_area(mask) == 1 / 16
    image = Image.new("RGB", (64, 64), (90, 180, 30))
    few, more = (mask_sheet(iter([("a.png", image, mask)] * n), SafeZone(), 64, columns=2) for n in (2, 3))
    assert more.width == few.width and more.height == pytest.approx(2 * few.height, abs=4)
    for row, outside in enumerate(((90, 180, 30), (45, 45, 45), (45, 45, 45))):
        tile = few.crop((4, 188 * row + 24, 164, 188 * row + 184))
        assert tile.getpixel((100, 60)) == (90, 180, 30) and tile.getpixel((60, 100)) == outside


def test_a_sheet_takes_images_of_any_size_and_aspect_and_none():
    sheet = mask_sheet([("a.png", Image.new("RGB", size), Image.new("L", size, 255))
                        for size in ((8000, 20), (20, 8000), (2, 3), (900, 700))], SafeZone(), 64)
    assert sheet.width > 640
    assert mask_sheet([], SafeZone(), 64) is None
