"""What training makes of a mask: its dilation and its cells on the latent grid, on top of the image."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from .images import contact_sheet
from .masks import to_latent_grid
from .safe_zone import SafeZone

__all__ = ["mask_area", "mask_sheet", "shrink", "trained_masks"]

_TILE = 160  # pixels of an image on the sheet


def mask_area(mask: Image.Image) -> float:
    """Share of an "L" mask of 0 and 255 that is white."""
    return mask.histogram()[255] / (mask.width * mask.height)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """An image, or a smaller one of its aspect with `side` pixels along the longer side."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


def trained_masks(mask: Image.Image, zone: SafeZone, resolution: int, center_crop: bool = False,
                  vae_scale_factor: int = 8) -> tuple[Image.Image, Image.Image, float]:
    """A mask after dilation, and after reduction to the latent grid, as square "L" images; and the share of
    the latent grid that is trained on.

    `zone` dilates at the training `resolution`; a latent cell is `vae_scale_factor` pixels wide. The squares,
    of a value per pixel and per cell, cover the whole image, or its central square with `center_crop`.
    """
    dilated = zone.prepare_mask(mask, resolution, center_crop)
    grid = to_latent_grid(dilated, (resolution // vae_scale_factor,) * 2)
    squares = [Image.fromarray(np.uint8(255 * values[0, 0].numpy())) for values in (dilated, grid)]
    return *squares, grid.mean().item()


def _onto(size: tuple[int, int], square: Image.Image, center_crop: bool) -> Image.Image:
    """A square of `trained_masks` where it covers an image of (width, height), on black."""
    part = (min(size),) * 2 if center_crop else size
    canvas = Image.new("L", size)
    canvas.paste(square.resize(part, Image.Resampling.NEAREST),
                 tuple((full - covered) // 2 for full, covered in zip(size, part, strict=True)))
    return canvas


def _highlight(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, dark and gray where the mask is black."""
    dark = image.convert("L").point(lambda level: level // 3).convert("RGB")
    return Image.composite(image, dark, mask)


def mask_sheet(masked: Iterable[tuple[str, Image.Image, Image.Image]], zone: SafeZone, resolution: int,
               center_crop: bool = False, columns: int = 6) -> Image.Image | None:
    """A contact sheet of names, images and masks, taken one by one: the images, their masks, and what of them
    is trained on; None without any."""
    tiles = []
    for name, image, mask in masked:
        grid, tile = trained_masks(mask, zone, resolution, center_crop)[1], shrink(image, _TILE)
        tiles.append((name, tile, _highlight(tile, mask.resize(tile.size)),
                      _highlight(tile, _onto(tile.size, grid, center_crop))))
    rows = []
    for i in range(0, len(tiles), columns):
        names, images, masks, trained = map(list, zip(*tiles[i:i + columns], strict=True))
        rows += [(", ".join(names), images), ("masks", masks),
                 (f"trained on: dilated by {zone.mask_dilation} pixels at {resolution}, on the latent grid",
                  trained)]
    return contact_sheet(rows, _TILE) if rows else None
