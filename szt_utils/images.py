"""Image files: list, read, crop and resize, convert, save. The one image reader of the project.

Library images are float32 (B, 3, H, W) in [0, 1]. An image read here is upright (EXIF orientation applied),
sRGB and 8 bits per channel, whatever its file was; transparent pixels are composited on white, and an
animation gives its first frame.
"""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .color import keep_scale, to_eight_bits, to_srgb
from .errors import InputError, first_line, printable
from .files import atomic_path
from .image_formats import SUFFIXES, describe_skipped, formats, sort_files
from .notices import notice

__all__ = ["MASK_ENDING", "check_resolution", "contact_sheet", "crop_and_resize", "from_pil", "hash_pixels",
           "list_images", "max_pixels", "name_results", "png_bytes", "read_image", "read_upright", "reading",
           "save_png", "to_pil", "to_vae_range"]

MASK_ENDING = "-masklabel"  # of the stem of a mask that lies beside its image
_MAX_PIXELS = 2**26  # 8192 x 8192, unless --max_image_pixels says otherwise


def list_images(folder: str | Path, recursive: bool = False, masks: bool = False) -> list[Path]:
    """Paths of the images in a folder, and in its sub-folders if `recursive`, sorted.

    Hidden files and folders are ignored, and so are other files: those that a user may take for images are
    named in a notice. Masks that lie beside their images (`MASK_ENDING`) are left out, unless `masks` are
    listed. InputError when the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"The image folder '{folder}' does not exist or is not a folder.")
    everything = folder.rglob("*") if recursive else folder.iterdir()
    paths, skipped = sort_files(sorted(path for path in everything if not path.is_dir() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts)))
    paths = [path for path in paths if masks or not path.stem.endswith(MASK_ENDING)]
    if not paths:
        raise InputError(f"The image folder '{folder}' holds no image ({', '.join(sorted(SUFFIXES))}). "
                         f"{describe_skipped(skipped)}")
    if skipped:
        notice(f"'{folder}': {describe_skipped(skipped)}")
    return paths


def name_results(folder: str | Path, recursive: bool = True) -> dict[str, Path]:
    """The images of a folder (and its sub-folders) by their result's name: the relative path, ending in .png.

    InputError when two images would have the same result.
    """
    named, taken = {}, {}
    for path in list_images(folder, recursive):
        name = path.relative_to(folder).with_suffix(".png").as_posix()
        same = taken.setdefault(name.casefold(), path)  # names that differ in case only are one on some disks
        if same != path:
            raise InputError(f"'{same.name}' and '{path.name}' would both become '{name}'; rename one.")
        named[name] = path
    return named


def max_pixels() -> int:
    """The limit of --max_image_pixels, which the flag leaves in the environment."""
    limit = int(os.environ.get("SZT_MAX_IMAGE_PIXELS", _MAX_PIXELS))
    if limit > (Image.MAX_IMAGE_PIXELS or limit):
        Image.MAX_IMAGE_PIXELS = limit  # the user has raised it: Pillow must not keep its own
    return limit


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever decoding an image raises into an InputError that names its file."""
    def refuse(reason: str) -> InputError:
        return InputError(f"The image '{path}' cannot be read ({reason}); replace or remove it.")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata
            yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"The image '{path}' does not exist.") from None
    except Image.DecompressionBombError:
        raise _too_large(f"The image '{path}'") from None
    except UnidentifiedImageError:
        raise refuse(f"it is none of {', '.join(formats())}, or damaged") from None
    except OSError as error:
        raise refuse(error.strerror or first_line(error)) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise refuse(first_line(error)) from None


def _too_large(what: str) -> InputError:
    return InputError(f"{what} has more than {max_pixels():,} pixels; make it smaller, or raise "
                      "--max_image_pixels.")


def read_upright(path: str | Path) -> Image.Image:
    """Decode one file in its stored mode and apply its EXIF orientation.

    InputError when that fails, or when it has more pixels than --max_image_pixels allows.
    """
    limit = max_pixels()
    with reading(path), Image.open(path, formats=formats()) as file:
        if file.width * file.height > limit:
            raise _too_large(f"The image '{path}' ({file.width} x {file.height})")
        file.seek(0)
        file.load()  # a truncated file fails here, not in the middle of a training
        keep_scale(file)
        return ImageOps.exif_transpose(file)


def read_image(path: str | Path) -> Image.Image:
    """Read one file as an upright 8-bit sRGB image; InputError names the file when it cannot be decoded."""
    image = read_upright(path)
    with reading(path):
        image = to_eight_bits(image)
        colors = to_srgb(image)
        if not image.has_transparency_data:
            return colors
        colors.putalpha(image.convert("RGBA").getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colors).convert("RGB")


def check_resolution(resolution: int) -> None:
    """Raise InputError when a square of `resolution` has more pixels than --max_image_pixels allows."""
    if resolution**2 > max_pixels():
        raise _too_large(f"An image at a --resolution of {resolution}")


def hash_pixels(image: Image.Image) -> str:
    """SHA-256 of an image's size and of its pixels in RGB, without its alpha."""
    return hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).hexdigest()


def crop_and_resize(image: Image.Image, resolution: int, center_crop: bool = False,
                    resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize to a square of `resolution` pixels, after cutting out the central square if `center_crop`.

    InputError for a square of more pixels than --max_image_pixels allows.
    """
    check_resolution(resolution)
    if center_crop:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = (width + side) // 2, (height + side) // 2
        image = image.crop((left, top, right, bottom))
    return image.resize((resolution, resolution), resample)


def from_pil(images: Image.Image | list[Image.Image]) -> torch.Tensor:
    """Pillow images of one size as float32 (B, C, H, W) in [0, 1]."""
    images = [images] if isinstance(images, Image.Image) else images
    arrays = [np.atleast_3d(np.asarray(image)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(255)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) as Pillow images: clipped to [0, 1] and rounded to the nearest of 256 levels."""
    return [Image.fromarray(image.float().clamp(0, 1).mul_(255).round_().to(torch.uint8)
                            .permute(1, 2, 0).cpu().numpy()) for image in images.detach()]


def to_vae_range(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] to the [-1, 1] of the VAE.

    This order of operations in float32 equals upstream's float64 `level / 127.5 - 1` bit for bit, for all 256
    levels.
    """
    return (2 * (images * 255) - 255) / 255


def png_bytes(image: Image.Image) -> bytes:
    """The content of an image's PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG atomically; a missing folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """An image resized to fit into a square; of the longest, a line is left."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)


def contact_sheet(rows: Sequence[tuple[str | list[str], list[Image.Image]]],
                  tile: int = 128) -> Image.Image:
    """Rows of images on white, each row below its caption; every image is fitted into `tile` pixels.

    A list in the place of a caption has one for each image.
    A notice says how many rows there are when not all of them fit into a sheet of the largest size.
    """
    font, small_font, caption_height, gap = ImageFont.load_default(15), ImageFont.load_default(12), 24, 4
    columns = min(max(len(images) for _, images in rows), 100)
    width, row_height = columns * (tile + gap) + gap, caption_height + tile + gap
    shown = rows[:max(1, _MAX_PIXELS // (width * row_height))]
    if len(shown) < len(rows):
        notice(f"The contact sheet shows the first {len(shown)} of {len(rows)} rows.")
    sheet = Image.new("RGB", (width, len(shown) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (caption, images) in enumerate(shown):
        for c, text in enumerate([caption] if isinstance(caption, str) else caption):
            draw.text((gap + c * (tile + gap), r * row_height + 3), printable(text[:500]), fill="black",
                      font=font if isinstance(caption, str) else small_font)
        for c, image in enumerate(images[:columns]):
            small = _fit(image.convert("RGB"), tile)
            sheet.paste(small, (gap + c * (tile + gap) + (tile - small.width) // 2,
                                r * row_height + caption_height + (tile - small.height) // 2))
    return sheet
