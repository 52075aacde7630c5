"""The images of a folder to poison, with their masks.

`original` is what is changed and saved, `attacked` is what the model sees: the central square at the training
resolution, or with --keep_size the whole image, scaled to about it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .errors import InputError
from .folder_run import sha256_of
from .images import check_resolution, crop_and_resize, from_pil, name_results, read_image
from .masks import dilate, find_masks, read_mask, to_latent_grid

__all__ = ["AttackInput", "ImageJob", "find_jobs", "read_job", "scale"]

_LONGEST = 8  # times the shorter side, which becomes the resolution: memory grows with the longer one


@dataclass(frozen=True)
class ImageJob:
    """One image to poison: its files, and the name of its result."""

    name: str
    path: Path
    mask_path: Path | None = None
    loss_mask_path: Path | None = None


@dataclass(frozen=True)
class AttackInput:
    """An image as it is changed and as it is attacked, float32 in [0, 1]; no mask is None."""

    original: torch.Tensor  # (1, 3, H, W)
    mask: torch.Tensor | None  # (1, 1, H, W), 1 where it may be changed
    attacked: torch.Tensor  # (1, 3, h, w)
    attacked_mask: torch.Tensor | None
    loss_mask: torch.Tensor | None  # (1, 1, h, w), 1 where errors count

    def sha256(self, *more: torch.Tensor) -> str:
        """The hash of what the result is made of, and of `more` tensors."""
        return sha256_of(self.original, self.mask, self.loss_mask, *more)


def find_jobs(image_dir: str | Path, mask_dir: str | Path | None = None,
              loss_mask_dir: str | Path | None = None) -> list[ImageJob]:
    """All images of a folder and its sub-folders with their masks; InputError when one lacks a mask."""
    root, by_folder, jobs = Path(image_dir), {}, []
    for name, path in name_results(root).items():
        by_folder.setdefault(path.parent.relative_to(root), {})[name] = path
    for folder, named in by_folder.items():
        masks, loss_masks = (find_masks(Path(masks) / folder, list(named.values())) if masks
                             else [None] * len(named) for masks in (mask_dir, loss_mask_dir))
        jobs += map(ImageJob, named, named.values(), masks, loss_masks)
    return jobs


def read_job(job: ImageJob, resolution: int, keep_size: bool = False, mask_dilation: int = 0,
             multiple: int = 8) -> AttackInput:
    """Read an image and its masks; InputError when a file cannot be used.

    The loss mask grows by `mask_dilation` pixels at the training resolution; `multiple` as of `scale`.
    """
    def read_both(path: Path | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """A mask as it limits the change and as it limits the attack."""
        if path is None:
            return None, None
        whole = read_mask(path, image.size)
        part = scale(whole, resolution, keep_size, multiple, Image.Resampling.NEAREST)
        if not part.any():
            raise InputError(f"The mask '{path}' is black within the central square, or too fine for "
                             f"--resolution {resolution}: no pixel of the image would count.")
        return from_pil(whole) if keep_size else part, part

    image = read_image(job.path)
    if keep_size:
        check_resolution(resolution)
        if max(image.size) > _LONGEST * min(image.size):
            raise InputError(f"The image '{job.path}' ({image.width} x {image.height}) is too long for "
                             f"--keep_size, which takes up to {_LONGEST} : 1; crop it, or leave out "
                             "--keep_size.")
    attacked = scale(image, resolution, keep_size, multiple)
    mask, attacked_mask = read_both(job.mask_path)
    _, loss_mask = read_both(job.loss_mask_path)
    if loss_mask is not None:
        loss_mask = dilate(loss_mask, mask_dilation)
        h, w = loss_mask.shape[-2:]
        if not to_latent_grid(loss_mask, (h // 8, w // 8)).any():
            raise InputError(f"The mask '{job.loss_mask_path}' covers less than half of every 8 x 8 "
                             "cell, so no loss would count; give a larger mask or --mask_dilation.")
    return AttackInput(from_pil(image) if keep_size else attacked, mask, attacked, attacked_mask, loss_mask)


def scale(image: Image.Image, resolution: int, keep_size: bool, multiple: int = 8,
          resample: Image.Resampling = Image.Resampling.BICUBIC) -> torch.Tensor:
    """An image or mask as the attack sees it, float32 (1, C, h, w) in [0, 1].

    Its central square, or with `keep_size` the whole of it with sides that are multiples of `multiple`.
    """
    if not keep_size:
        return from_pil(crop_and_resize(image, resolution, True, resample))
    size = [max(multiple, round(side * resolution / min(image.size) / multiple) * multiple)
            for side in image.size]
    return from_pil(image.resize(size, resample))
