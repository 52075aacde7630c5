"""Where to train: concept masks (paper Sec. 4.3, 5.2.3). White = the concept = trained on.

Masks are float32 (B, 1, H, W) of 0 and 1. A mask file has the stem and the size of its image:
`<mask_dir>/<stem>.png`, or `<stem>-masklabel.png`.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import InputError
from .images import crop_and_resize, from_pil, list_images, read_upright

__all__ = ["MASK_MODES", "NORMALIZATIONS", "dilate", "find_masks", "masked_mean", "prepare_mask", "read_mask",
           "to_latent_grid"]

# LM, IM, ZM and LIM of the paper; "none" only records the loss inside and outside.
MASK_MODES = ("loss", "image", "latent", "image_and_loss", "none")
NORMALIZATIONS = ("none", "area")


def find_masks(mask_dir: str | Path, image_paths: list[Path]) -> list[Path]:
    """The mask of every image, in order; InputError names an image without mask or a mask without image."""
    masks = {}
    for path in list_images(mask_dir):
        stem = path.stem.removesuffix("-masklabel")
        if stem in masks:
            raise InputError(f"Both '{masks[stem]}' and '{path}' are masks of '{stem}'; remove one.")
        masks[stem] = path
    stems = [path.stem for path in image_paths]
    for path in image_paths:
        if path.stem not in masks:
            raise InputError(f"The image '{path}' has no mask in '{mask_dir}'; expected '{path.stem}.png'.")
        if stems.count(path.stem) > 1:
            raise InputError(f"Several images are called '{path.stem}', "
                             "so their masks are ambiguous; rename the images.")
    for stem, path in masks.items():
        if stem not in stems:
            raise InputError(f"The mask '{path}' has no image of the same name; "
                             "remove it or add the image.")
    return [masks[stem] for stem in stems]


def read_mask(path: str | Path, image_size: tuple[int, int]) -> Image.Image:
    """Read a mask as an upright Pillow "L" image of 0 and 255; gray counts as white from 128.

    A transparent mask without other content counts by its alpha. `image_size` is the image's (width, height);
    InputError when the mask has another size or is all black.
    """
    image = read_upright(path)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image, np.float64)
        levels = values / (65535 if values.max() > 255 else 255) * 255
    elif image.has_transparency_data:
        gray_alpha = np.asarray(image.convert("RGBA").convert("LA"))
        levels = np.minimum(gray_alpha[..., 0], gray_alpha[..., 1])
        levels = gray_alpha[..., 1] if not levels.any() else levels
    else:
        levels = np.asarray(image.convert("L"))
    if image.size != tuple(image_size):
        raise InputError(f"The mask '{path}' is {image.size[0]} x {image.size[1]} pixels, but its image is "
                         f"{image_size[0]} x {image_size[1]}; make them the same.")
    if not (levels >= 128).any():
        raise InputError(f"The mask '{path}' is all black, so nothing would be trained on; "
                         "white marks the concept.")
    return Image.fromarray(((levels >= 128) * 255).astype(np.uint8))


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow the ones of (B, 1, H, W) by a square of `radius` pixels: the maximum over (2 radius + 1)^2
    neighbors."""
    if radius < 0:
        raise InputError(f"The mask dilation must not be negative, but is {radius}.")
    # A square's maximum is the maximum along rows of the maximum along columns:
    # cost grows with the radius, not its square.
    kernel = 2 * radius + 1
    return F.max_pool2d(F.max_pool2d(mask, (kernel, 1), 1, (radius, 0)),
                        (1, kernel), 1, (0, radius)) if radius else mask


def to_latent_grid(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize(M_x) of Eq. 7: the mean of (B, 1, H, W) over each cell of the latent grid (h, w), thresholded at
    0.5."""
    return (F.adaptive_avg_pool2d(mask, size) >= 0.5).to(mask)


def prepare_mask(mask: Image.Image, resolution: int, center_crop: bool = False,
                 dilation: int = 0) -> torch.Tensor:
    """Crop and resize a mask like its image (nearest), then dilate by `dilation` pixels: (1, 1, R, R)."""
    return dilate(from_pil(crop_and_resize(mask, resolution, center_crop, Image.Resampling.NEAREST)),
                  dilation)


def masked_mean(error: torch.Tensor, mask: torch.Tensor | None = None,
                normalization: str = "none") -> torch.Tensor:
    """Mean over all elements of an error (B, C, ..., h, w) times a mask (B, 1, h, w): the loss of Eq. 7.

    The mask is the same along the dimensions between C and h, such as frames. With normalization "area" the
    sum is divided by the number of elements inside the mask, instead of by that of all.
    """
    if normalization not in NORMALIZATIONS:
        raise InputError(f"Unknown mask normalization '{normalization}'; "
                         f"choose from: {', '.join(NORMALIZATIONS)}.")
    if mask is None:
        return error.mean()
    mask = mask.view(*mask.shape[:2], *[1] * (error.dim() - 4), *mask.shape[2:])
    if normalization == "area":
        return (error * mask).sum() / (mask.sum() * math.prod(error.shape[1:-2])).clamp(min=1)
    return (error * mask).mean()
