"""Find a folder's image files, and files of unsupported formats that a user may take for images."""

import contextlib
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import some_of

__all__ = ["SUFFIXES", "describe_skipped", "formats", "sort_files"]

# The formats of these suffixes alone are decoded, whatever a file's name: Pillow hands an EPS to Ghostscript,
# which runs the program in it.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_OTHER_SUFFIXES = {".apng", ".jfif", ".jpe"}  # of PNG and JPEG, where the content is one
_HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# What people take for images, and how files begin that are images, also under another suffix or none.
_SKIPPED_SUFFIXES = _OTHER_SUFFIXES | _HEIF_SUFFIXES | {f".{name}" for name in (
    "3fr ai arw cr2 cr3 crw dcr dds dib dng emf eps erf exr fff hdr icns ico iiq j2k jp2 jpf jpx jxl jxr "
    "kdc kra mef mos mpo mrw nef nrw orf pbm pcx pef pgm pnm ppm psb psd raf raw rw2 rwl sgi sr2 srf srw svg "
    "svgz tga wmf x3f xcf").split()}
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
_KINDS = (b"WEBP", b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"mif1", b"msf1")  # at 8


@functools.cache
def _reads_heif() -> bool:
    """Whether pillow-heif is installed; Pillow reads HEIC from then on."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are decoded."""
    return (*_FORMATS, "HEIF") if _reads_heif() else _FORMATS


def sort_files(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The files that are read as images, and those that are not but that a user may take for images."""
    others = _OTHER_SUFFIXES | (_HEIF_SUFFIXES if _reads_heif() else set())
    paths, skipped = [], []
    for path in files:
        suffix = path.suffix.lower()
        if not path.is_file():  # a link that leads nowhere, mostly
            skipped += [path] if suffix in SUFFIXES | _SKIPPED_SUFFIXES else []
        elif suffix in SUFFIXES or (suffix in others and _begins_as_image(path)):
            paths.append(path)
        elif suffix in _SKIPPED_SUFFIXES or _begins_as_image(path):
            skipped.append(path)
    return paths, skipped


def _begins_as_image(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(12)
        return start.startswith(_BEGINNINGS) or start[8:] in _KINDS
    return False


def describe_skipped(skipped: Sequence[Path]) -> str:
    """A sentence about the files that look like images and are not read; nothing without any."""
    if not skipped:
        return ""
    heif = any(path.suffix.lower() in _HEIF_SUFFIXES for path in skipped)
    hint = ", or install pillow-heif for HEIC" if heif and not _reads_heif() else ""
    return f"Not read: {some_of(skipped)}; convert what is an image to PNG or JPEG{hint}."
