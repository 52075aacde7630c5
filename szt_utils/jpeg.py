"""JPEG as a purifier (paper Sec. 4.4): the real codec, on an image and on a batch with a gradient."""

import io

import torch
from PIL import Image

from .errors import InputError
from .images import from_pil, to_pil

__all__ = ["check_quality", "jpeg", "jpeg_straight_through", "jpeg_tensor"]

_LONGEST = 65500  # pixels of libjpeg


def check_quality(quality: int) -> None:
    """Raise InputError unless 1 <= quality <= 100."""
    if not 1 <= quality <= 100:
        raise InputError(f"The JPEG quality must be from 1 to 100, but is {quality}.")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compress an RGB image in memory and decode it again, with the 4:2:0 chroma subsampling of common
    encoders.

    InputError for an image that is longer than JPEG allows.
    """
    check_quality(quality)
    if max(image.size) > _LONGEST:
        raise InputError(f"An image of {image.width} x {image.height} pixels is too long for JPEG, which "
                         f"ends at {_LONGEST}; crop it.")
    buffer = io.BytesIO()
    # libjpeg would choose 4:4:4 above quality 95: one rule for every quality keeps sweeps comparable.
    image.save(buffer, format="JPEG", quality=quality, subsampling=2)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def jpeg_tensor(images: torch.Tensor, quality: int) -> torch.Tensor:
    """JPEG round trip of (B, 3, H, W) in [0, 1]; same shape, device and dtype, no gradient."""
    return from_pil([jpeg(image, quality) for image in to_pil(images)]).to(images)


def jpeg_straight_through(images: torch.Tensor, quality: int) -> torch.Tensor:
    """The JPEG round trip forward and the identity backward (Bengio et al. 2013), for adaptive attacks."""
    return images + (jpeg_tensor(images, quality) - images).detach()
