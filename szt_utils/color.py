"""What the numbers of an image file mean: its bit depth and its color profile, brought to 8-bit sRGB."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

__all__ = ["is_deep", "keep_scale", "to_eight_bits", "to_srgb"]

_SAME = 3  # levels: two profiles that differ by less are one; descriptions of sRGB differ by rounding
# The color spaces of ICC profiles and the Pillow modes of their pixels.
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits per channel, which Pillow clips when it converts them."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def keep_scale(file: Image.Image) -> None:
    """Note in `info` the white of an opened deep file: Pillow holds 12 and 16 bits alike, and 16 and 32.

    Of a TIFF it also notes whether 0 is white, which Pillow heeds in 8 bits only.
    """
    if file.mode == "I" or file.mode.startswith("I;"):
        tags = getattr(file, "tag_v2", {})  # of TIFF; a PNG has 16 bits
        signed = tags.get(339, (1,))[0] == 2
        file.info["white"] = 2 ** (tags.get(258, (16,))[0] - signed) - 1
        file.info["white_is_zero"] = tags.get(262) == 0


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A deep image as "L"; others as they are.

    Integers are scaled by their format's white, never by their own maximum. Floating-point values run from 0
    to 1, or from 0 to 255 when they exceed 16. ValueError when values fit neither, or when all integers of 32
    bits would be black.
    """
    if not is_deep(image):
        return image
    white = image.info.get("white", 65535)
    values = np.asarray(image)
    values = (values.view(np.uint32) if white == 2**32 - 1 else values).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode == "F":
        white = 1 if -0.01 <= low and high <= 1.01 else 255 if -1 <= low and 16 < high <= 256 else None
    if white is None or (white > 65535 and 0 < high < white / 510):
        raise ValueError(f"its values run from {low:.6g} to {high:.6g}, so that its white is not known; save "
                         "it with 8 or 16 bits per channel")
    values = values.clip(0, white)
    if image.info.get("white_is_zero"):
        values = white - values
    result = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    result.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return result


def to_srgb(image: Image.Image) -> Image.Image:
    """The colors of an 8-bit image as RGB in sRGB, by its ICC profile; its transparency is dropped.

    A profile that is broken, or made for other kinds of pixels, is ignored.
    """
    space = {"1": "L", "LA": "L"}.get(image.mode, image.mode if image.mode in _MODES.values() else "RGB")
    transform, source = _transform(image.info.get("icc_profile"), space)
    if transform is None:
        return image.convert("RGB")
    if source == "L":  # 256 levels are quicker than all pixels
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        table = np.asarray(ImageCms.applyTransform(levels, transform))[0, :, 1]
        return image.convert("L").point(table.tolist()).convert("RGB")
    return ImageCms.applyTransform(image.convert(source), transform)


@functools.lru_cache(maxsize=16)
def _transform(data: bytes | None, space: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From a profile to sRGB, and the mode that it takes; None when pixels stay as they are."""
    if data is None and space != "LAB":
        return None, space
    try:
        given = ImageCms.createProfile("LAB") if data is None else io.BytesIO(data)
        profile = ImageCms.ImageCmsProfile(given)
        source = _MODES[profile.profile.xcolor_space]
        if source != space and (space, source) != ("L", "RGB"):
            return None, space
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if source == "L":
            flags |= ImageCms.Flags.NOOPTIMIZE  # which would interpolate dark grays
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), source, "RGB",
                                            ImageCms.Intent.RELATIVE_COLORIMETRIC, flags)
    except (OSError, ValueError, TypeError, KeyError, ImportError, ImageCms.PyCMSError):
        return None, space
    return (None if _is_identity(transform, source) else transform), source


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("RGB", "L"):
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    probe = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8).reshape(16, 16))
    change = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"))
    return bool(np.abs(change).max() <= _SAME)
