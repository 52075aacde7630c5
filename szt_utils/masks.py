"""Where to train: concept masks (paper Sec. 4.3, 5.2.3). White = the concept = trained on.

Masks are float32 (B, 1, H, W) of 0 and 1. A mask file has the stem of its image: `<mask_dir>/<stem>.png`, or
`<stem>-masklabel.png`, which may lie beside the image itself.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .errors import InputError, check_choice
from .files import nfc
from .images import MASK_ENDING, crop_and_resize, from_pil, list_images, read_upright, reading
from .mask_pixels import white_pixels
from .notices import notice

__all__ = ["MASK_MODES", "NORMALIZATIONS", "dilate", "find_mask", "find_masks", "masked_mean",
           "prepare_mask", "read_mask", "to_grid_of", "to_latent_grid"]

# LM, IM, ZM and LIM of the paper; "none" only records the loss inside and outside.
MASK_MODES = ("loss", "image", "latent", "image_and_loss", "none")
NORMALIZATIONS = ("none", "area")


def find_masks(mask_dir: str | Path, image_paths: list[Path]) -> list[Path]:
    """The mask of every image, in order; InputError names an image without mask or a mask without image.

    Names match whatever the Unicode form of their accents.
    """
    images, masks = {path.resolve() for path in image_paths}, {}
    for path in list_images(mask_dir, masks=True):
        stem = nfc(path.stem).removesuffix(MASK_ENDING)
        if path.resolve() in images:
            notice(f"'{mask_dir}': the masks are the files '<stem>{MASK_ENDING}' beside the images.")
            continue
        if stem in masks:
            raise InputError(f"Both '{masks[stem]}' and '{path}' are masks of '{stem}'; remove one.")
        masks[stem] = path
    stems = [nfc(path.stem) for path in image_paths]
    for path, stem in zip(image_paths, stems, strict=True):
        if stem not in masks:
            raise InputError(f"The image '{path}' has no mask in '{mask_dir}'; expected '{path.stem}.png' or "
                             f"'{path.stem}{MASK_ENDING}.png'.")
        if stems.count(stem) > 1:
            raise InputError(f"Several images are called '{path.stem}', "
                             "so their masks are ambiguous; rename the images.")
        if masks[stem].stem.removesuffix(MASK_ENDING) != path.stem:
            notice(f"'{mask_dir}': names that differ only in the Unicode form of their accents match.")
    for stem, path in masks.items():
        if stem not in stems:
            raise InputError(f"The mask '{path}' has no image of the same name; "
                             "remove it or add the image.")
    return [masks[stem] for stem in stems]


def find_mask(masks: str | Path, path: str | Path) -> Path:
    """The mask of one image: `masks` itself, or if it is a folder, that of the image in it by `find_masks`.

    The other images of the image's folder need their masks, too.
    """
    if not Path(masks).is_dir():
        return Path(masks)
    folder = Path(path).parent
    times = [each.stat().st_mtime_ns for each in (Path(masks), folder)]
    found = _masks_of_folder(Path(masks), folder, *times)
    if Path(path).name not in found:
        raise InputError(f"'{path}' is not an image of its folder; choose from: {', '.join(found)}.")
    return found[Path(path).name]


@functools.lru_cache(maxsize=64)
def _masks_of_folder(mask_dir: Path, folder: Path, *_times: int) -> dict[str, Path]:
    paths = list_images(folder)
    return {path.name: mask for path, mask in zip(paths, find_masks(mask_dir, paths), strict=True)}


def read_mask(path: str | Path, image_size: tuple[int, int]) -> Image.Image:
    """Read a mask as an upright Pillow "L" image of 0 and 255, of the image's (width, height).

    Gray counts as white from 128. InputError when nothing is white, or when the mask has another size of
    another aspect.
    """
    image = read_upright(path)
    with reading(path):
        white, how = white_pixels(image)
    mask = Image.fromarray((white * 255).astype(np.uint8))
    if mask.size != tuple(image_size):
        if abs(mask.width * image_size[1] / (mask.height * image_size[0]) - 1) > 0.01:
            raise InputError(f"The mask '{path}' is {mask.width} x {mask.height} pixels, but its image is "
                             f"{image_size[0]} x {image_size[1]}; make them the same.")
        mask = mask.resize(image_size, Image.Resampling.NEAREST)
        _say(path, "another size than the image, to which it is resized")
    if mask.getextrema()[1] == 0:
        raise InputError(f"The mask '{path}' is all black, so nothing would be trained on; "
                         "white marks the concept.")
    if how:
        _say(path, how)
    return mask


def _say(path: str | Path, how: str) -> None:
    notice(f"'{Path(path).parent}': a mask has {how}.")


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow the ones of (B, 1, H, W) by a square of `radius` pixels: the maximum over (2 radius + 1)^2
    neighbors."""
    if radius < 0:
        raise InputError(f"The mask dilation must not be negative, but is {radius}.")
    return _widen(_widen(mask, radius, -1), radius, -2) if radius else mask


def _widen(mask: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    """Grow the ones along one dimension: where the sum over 2 radius + 1 neighbors is above 0.

    Sums are differences of running sums, so that the cost does not depend on the radius.
    """
    n = mask.shape[dim]
    sums = F.pad(mask.cumsum(dim), (1, 0) if dim == -1 else (0, 0, 1, 0))
    here, radius = torch.arange(n, device=mask.device), min(radius, n)
    after, before = (here + radius + 1).clamp(max=n), (here - radius).clamp(min=0)
    return (sums.index_select(dim, after) > sums.index_select(dim, before)).to(mask)


def to_latent_grid(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize(M_x) of Eq. 7: the mean of (B, 1, H, W) over each cell of the latent grid (h, w), thresholded at
    0.5."""
    return (F.adaptive_avg_pool2d(mask, size) >= 0.5).to(mask)


def to_grid_of(error: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An error, packed tokens (B, L, C) as (B, C, h, w), and its mask (B, 1, H, W) on its grid (h, w).

    InputError when L tokens do not fill a grid of the mask's aspect.
    """
    if error.dim() == 3:
        rows = round(math.sqrt(error.shape[1] * mask.shape[-2] / mask.shape[-1]))
        if rows < 1 or error.shape[1] % rows:
            raise InputError(f"A prediction of {error.shape[1]} tokens does not match the aspect of a mask "
                             f"of {mask.shape[-2]} x {mask.shape[-1]}; unpack it to (B, C, h, w).")
        error = error.transpose(1, 2).unflatten(2, (rows, error.shape[1] // rows))
    return error, to_latent_grid(mask, error.shape[-2:])


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
    check_choice("mask normalization", normalization, NORMALIZATIONS)
    if mask is None:
        return error.mean()
    mask = mask.view(*mask.shape[:2], *[1] * (error.dim() - 4), *mask.shape[2:])
    if normalization == "area":
        return (error * mask).sum() / (mask.sum() * math.prod(error.shape[1:-2])).clamp(min=1)
    return (error * mask).mean()
