"""What training makes of a mask: its dilation and its cells on the latent grid, on top of the image."""

from collections.abc import Sequence

import torch
from PIL import Image

from .images import contact_sheet, to_pil
from .masks import to_latent_grid
from .safe_zone import SafeZone

__all__ = ["mask_area", "mask_sheet", "trained_masks"]


def mask_area(mask: Image.Image) -> float:
    """Share of an "L" mask of 0 and 255 that is white."""
    return mask.histogram()[255] / (mask.width * mask.height)


def trained_masks(mask: Image.Image, zone: SafeZone, resolution: int, center_crop: bool = False,
                  vae_scale_factor: int = 8) -> tuple[Image.Image, Image.Image, float]:
    """A mask after dilation, and after reduction to the latent grid, as "L" images of the mask's size; and
    the share of the latent grid that is trained on.

    `zone` dilates at the training `resolution`; a latent cell is `vae_scale_factor` pixels wide. With
    `center_crop`, both are black outside the central square.
    """
    dilated = zone.prepare_mask(mask, resolution, center_crop)
    grid = to_latent_grid(dilated, (resolution // vae_scale_factor,) * 2)
    side = min(mask.size)
    size = (side, side) if center_crop else mask.size
    corner = tuple((full - part) // 2 for full, part in zip(mask.size, size, strict=True))

    def to_mask_size(values: torch.Tensor) -> Image.Image:
        canvas = Image.new("L", mask.size)
        small = to_pil(values.expand(1, 3, -1, -1))[0].convert("L")
        canvas.paste(small.resize(size, Image.Resampling.NEAREST), corner)
        return canvas

    return to_mask_size(dilated), to_mask_size(grid), grid.mean().item()


def _highlight(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, dark and gray where the mask is black."""
    dark = image.convert("L").point(lambda level: level // 3).convert("RGB")
    return Image.composite(image, dark, mask)


def mask_sheet(names: Sequence[str], images: Sequence[Image.Image], masks: Sequence[Image.Image],
               zone: SafeZone, resolution: int, center_crop: bool = False, columns: int = 6) -> Image.Image:
    """A contact sheet: the images, their masks, and what of them is trained on."""
    rows = []
    for i in range(0, len(names), columns):
        part = slice(i, i + columns)
        pairs = list(zip(images[part], masks[part], strict=True))
        rows += [(", ".join(names[part]), list(images[part])),
                 ("masks", [_highlight(image, mask) for image, mask in pairs]),
                 (f"trained on: dilated by {zone.mask_dilation} pixels at {resolution}, on the latent grid",
                  [_highlight(image, trained_masks(mask, zone, resolution, center_crop)[1])
                   for image, mask in pairs])]
    return contact_sheet(rows, tile=160)
