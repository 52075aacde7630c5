"""What training will make of a mask: grown, on the latent grid, laid over the picture."""

from collections.abc import Sequence

import torch
from PIL import Image

from .images import contact_sheet, to_pil
from .masks import prepare_mask, to_latent_grid

__all__ = ["as_trained", "mask_area", "mask_sheet"]


def mask_area(mask: Image.Image) -> float:
    """Share of an "L" mask of 0 and 255 that is white."""
    return mask.histogram()[255] / (mask.width * mask.height)


def as_trained(mask: Image.Image, resolution: int, dilation: int, center_crop: bool = False,
               factor: int = 8) -> tuple[Image.Image, Image.Image, float]:
    """A mask after dilation by `dilation` pixels at the training resolution, and on the latent grid, whose
    cells are `factor` pixels wide; both laid back onto the picture, as "L" pictures of the mask's size, and
    the share of the grid that counts. Outside of the central square nothing counts with `center_crop`."""
    square = prepare_mask(mask, resolution, center_crop, dilation)
    grid = to_latent_grid(square, (resolution // factor, resolution // factor))
    side = min(mask.size)
    size = (side, side) if center_crop else mask.size
    corner = tuple((whole - part) // 2 for whole, part in zip(mask.size, size, strict=True))

    def laid_back(values: torch.Tensor) -> Image.Image:
        canvas = Image.new("L", mask.size)
        small = to_pil(values.expand(1, 3, -1, -1))[0].convert("L")
        canvas.paste(small.resize(size, Image.Resampling.NEAREST), corner)
        return canvas

    return laid_back(square), laid_back(grid), grid.mean().item()


def _lit(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, dimmed and without colour where the mask is black."""
    dimmed = image.convert("L").point(lambda level: level // 3).convert("RGB")
    return Image.composite(image, dimmed, mask)


def mask_sheet(names: Sequence[str], images: Sequence[Image.Image], masks: Sequence[Image.Image],
               resolution: int, dilation: int, center_crop: bool = False, columns: int = 6) -> Image.Image:
    """A contact sheet: the pictures, their masks, and what training counts of them."""
    rows = []
    for i in range(0, len(names), columns):
        of_row = slice(i, i + columns)
        shown = list(zip(images[of_row], masks[of_row], strict=True))
        rows += [(", ".join(names[of_row]), list(images[of_row])),
                 ("masks", [_lit(image, mask) for image, mask in shown]),
                 (f"what training counts: grown by {dilation} pixels at {resolution}, on the latent grid",
                  [_lit(image, as_trained(mask, resolution, dilation, center_crop)[1])
                   for image, mask in shown])]
    return contact_sheet(rows, tile=160)
