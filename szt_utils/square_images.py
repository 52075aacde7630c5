"""Images as a model takes them: their central squares, at its resolution."""

from pathlib import Path

import torch
from PIL import Image

from .errors import InputError
from .images import crop_and_resize, from_pil, read_image
from .models import Model

__all__ = ["check_size", "read_square", "resolution_for"]


def read_square(path: str | Path, resolution: int) -> tuple[Image.Image, torch.Tensor]:
    """The central square of an image file, as a Pillow image and as float32 (1, 3, R, R) in [0, 1]."""
    image = crop_and_resize(read_image(path), resolution, center_crop=True)
    return image, from_pil(image)


def resolution_for(model: Model, resolution: int | None = None) -> int:
    """The resolution in pixels, or the model's own; InputError for one that the model cannot divide."""
    multiple = model.vae_scale_factor * model.patch
    resolution = resolution or model.resolution
    if resolution % multiple:
        raise InputError(f"The model needs a --resolution that is a multiple of {multiple}, "
                         f"but it is {resolution}.")
    check_size(model, resolution, resolution)
    return resolution


def check_size(model: Model, height: int, width: int) -> None:
    """InputError for an image in pixels that has more patches a side than the model has positions for."""
    config = model.network.config
    positions = getattr(config, "pos_embed_max_size", None)  # of Stable Diffusion 3
    if positions is None:
        return
    most = positions * config.patch_size * model.vae_scale_factor
    if max(height, width) > most:
        raise InputError(f"The model takes at most {most} pixels a side, but would get "
                         f"{width} x {height}; give a smaller --resolution.")
