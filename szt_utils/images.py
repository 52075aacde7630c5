"""Image files: list, read, crop and resize, convert, save. The one image reader of the project.

Library images are float32 (B, 3, H, W) in [0, 1]. An image read here is upright (EXIF orientation applied),
RGB and 8 bits per channel, whatever its file was; transparent pixels are composited on white, animations give
their first frame.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .errors import InputError
from .files import atomic_path

__all__ = ["contact_sheet", "crop_and_resize", "from_pil", "list_images", "name_results", "read_image",
           "read_upright", "save_png", "to_pil", "to_vae_range"]

# The formats of these suffixes alone are decoded, whatever a file's name: Pillow hands an EPS to Ghostscript,
# which runs the program in it.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Paths of the images in a folder, and in its sub-folders if `recursive`, sorted.

    Hidden files, hidden folders and other files are ignored. InputError when the folder is missing or holds
    no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"The image folder '{folder}' does not exist or is not a folder.")
    paths = sorted(p for p in (folder.rglob("*") if recursive else folder.iterdir())
                   if p.suffix.lower() in _SUFFIXES and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise InputError(f"The image folder '{folder}' holds no image ({', '.join(sorted(_SUFFIXES))}).")
    return paths


def name_results(folder: str | Path, recursive: bool = True) -> dict[str, Path]:
    """The images of a folder (and its sub-folders) by their result's name: the relative path, ending in .png.

    InputError when two images would have the same result.
    """
    named = {}
    for path in list_images(folder, recursive):
        name = path.relative_to(folder).with_suffix(".png").as_posix()
        if name in named:
            raise InputError(f"'{named[name].name}' and '{path.name}' would both become '{name}'; "
                             "rename one.")
        named[name] = path
    return named


def read_upright(path: str | Path) -> Image.Image:
    """Decode one file in its stored mode and apply its EXIF orientation; InputError when that fails."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            file.seek(0)
            file.load()  # a truncated file fails here, not in the middle of a training
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"The image '{path}' does not exist.") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"The image '{path}' cannot be read ({error}); replace or remove it.") from None


def read_image(path: str | Path) -> Image.Image:
    """Read one file as an upright 8-bit RGB image; InputError names the file when it cannot be decoded."""
    image = read_upright(path)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        # Pillow clips 16-bit grays at 255 when it converts them: scale them first.
        values = np.asarray(image, np.float64)
        full_scale = 65535 if values.max() > 255 else 255
        image = Image.fromarray(np.rint(values.clip(0, full_scale) * (255 / full_scale)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_and_resize(image: Image.Image, resolution: int, center_crop: bool = False,
                    resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize to a square of `resolution` pixels, after cutting out the central square if `center_crop`."""
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
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) as Pillow images: clipped to [0, 1] and rounded to the nearest of 256 levels."""
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_vae_range(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] to the [-1, 1] of the VAE.

    This order of operations in float32 equals upstream's float64 `level / 127.5 - 1` bit for bit, for all 256
    levels.
    """
    return (2 * (images * 255) - 255) / 255


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG atomically; a missing folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], tile: int = 128) -> Image.Image:
    """Rows of images on white, each row below its caption; every image is fitted into `tile` pixels."""
    font, caption_height, gap = ImageFont.load_default(15), 24, 4
    columns = max(len(images) for _, images in rows)
    row_height = caption_height + tile + gap
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, len(rows) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (caption, images) in enumerate(rows):
        draw.text((gap, r * row_height + 3), caption, fill="black", font=font)
        for c, image in enumerate(images):
            sheet.paste(ImageOps.pad(image.convert("RGB"), (tile, tile), color="white"),
                        (gap + c * (tile + gap), r * row_height + caption_height))
    return sheet
