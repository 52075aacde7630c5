"""A local page for making masks by clicking and painting: what it answers (`local_server` serves it).

GET                  the page
GET state            the images, their masks' versions, clicks and notes, the tools, the training's settings
GET image/<n>        image n as JPEG
GET thumbnail/<n>    a small one
POST mask            {"image": n, ...}: layers of the mask that "..." makes, or of the saved mask if it is
                     empty; and of what training makes of it, squares to be drawn over the whole image, or
                     over its central square with center_crop
POST save            {"images": {"<n>": {..., "version": ...}}}: save the masks that "..." makes; refused when
                     a mask is no longer the version that the browser has seen

"..." is one of three: clicks, {"include": [[x, y]], "exclude": [[x, y]]}; a painted mask, {"painted": PNG};
or what GrabCut finds, {"concept": PNG, "background": PNG, "box": [left, top, right, bottom]}, each of which
may be missing. A PNG is a data URL, opaque where it is painted, of any size up to `LARGEST_SIDE`.
"""

import base64
import dataclasses
import functools
import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import InputError, first_line
from .grabcut import BACKGROUND, CONCEPT, grabcut, is_available, seeds_of
from .images import png_bytes
from .local_server import Conflict
from .mask_preview import mask_area, shrink, trained_masks
from .safe_zone import SafeZone
from .sam_prompts import SamPrompt, prompt_from_json
from .segment import EmbeddedImage, Segmenter, segment

__all__ = ["LARGEST_SIDE", "MaskPage", "PageImage", "SavedMask"]

LARGEST_SIDE = 1024  # pixels of a painted mask
_THUMBNAIL = 256  # pixels of a small image
_LAYERS = {"mask": (0, 205, 120, 255), "dilated": (255, 190, 0, 110), "grid": (70, 130, 255, 120)}  # RGBA


@dataclass
class PageImage:
    """An RGB image on the page, of `size`, (width, height); `read` reads it."""

    name: str
    size: tuple[int, int]
    read: Callable[[], Image.Image]
    embedded: EmbeddedImage | None = None  # from the first click on


@dataclass(frozen=True)
class SavedMask:
    """A mask as it is in its folder: "L" of 0 and 255, or None without one that can be used; the clicks that
    it was made from, as in a points file; a note for the user; and its version, "" when there is none."""

    mask: Image.Image | None = None
    clicks: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    version: str = ""


class MaskPage:
    """The state of the page and the answers to its requests.

    `read(index)` reads an image's mask. `save(index, mask, prompt, score)` writes a mask, bool (H, W), and
    returns a warning or None; the prompt of a painted mask is empty, its score None. Without a segmenter,
    there are no clicks. The page shows the notice.
    """

    def __init__(self, segmenter: Segmenter | None, images: Sequence[PageImage],
                 read: Callable[[int], SavedMask],
                 save: Callable[[int, torch.Tensor, SamPrompt, float | None], str | None], zone: SafeZone,
                 resolution: int, center_crop: bool = False, notice: str = ""):
        self.segmenter, self.images, self.read, self.write = segmenter, images, read, save
        self.notice = notice
        self.zone, self.resolution, self.center_crop = zone, resolution, center_crop
        self.lock = threading.Lock()  # one click at a time, however many connections a browser opens
        self.open = functools.lru_cache(maxsize=4)(lambda index: images[index].read())  # all may be too much
        self.thumbnail = functools.cache(lambda index: _jpeg(shrink(self.open(index), _THUMBNAIL)))

    def state(self) -> dict[str, Any]:
        """The answer to GET state."""
        images = []
        for index, page_image in enumerate(self.images):
            saved = self.read(index)
            clicks = saved.clicks if saved.mask and self.segmenter else {}
            images.append({"name": page_image.name, "width": page_image.size[0],
                           "height": page_image.size[1], "masked": saved.mask is not None,
                           "note": saved.note, "version": saved.version,
                           **{name: clicks.get(name, []) for name in ("include", "exclude")}})
        return {"resolution": self.resolution, "dilation": self.zone.mask_dilation,
                "center_crop": self.center_crop, "notice": self.notice, "largest_side": LARGEST_SIDE,
                "clicks": self.segmenter is not None, "grabcut": is_available(), "images": images}

    def mask(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The layers of an image's mask; none if the entry is empty and there is no saved mask."""
        if any(entry.values()):
            mask, _, score = self._make(index, entry)
            mask = Image.fromarray(mask.numpy()).convert("L")
        else:
            mask, score = self.read(index).mask, None
        if mask is None:
            return {"layers": {}}
        dilated, grid, grid_area = trained_masks(mask, self.zone, self.resolution, self.center_crop)
        layers = {"mask": mask, "dilated": dilated, "grid": grid}
        return {"layers": {name: _data_url(layers[name], color) for name, color in _LAYERS.items()},
                "area": mask_area(mask), "grid_area": grid_area, "score": score}

    def save(self, entries: Any) -> dict[str, Any]:
        """Save the masks of these images; all entries are checked before any mask is written.

        Conflict names the images whose mask has another version than the entry.
        """
        entries = {self._index(n): dict(_object(entry)) for n, entry in _object(entries).items()}
        behind = [self.images[index].name for index, entry in entries.items()
                  if entry.pop("version", "") != self.read(index).version]
        if behind:
            raise Conflict(f"{', '.join(behind)} changed meanwhile, in another tab or program")
        results = {index: self._make(index, entry) for index, entry in entries.items()}
        warnings = [self.write(index, *result) for index, result in results.items()]
        return {"saved": [self.images[index].name for index in results],
                "versions": {index: self.read(index).version for index in results},
                "warnings": [warning for warning in warnings if warning]}

    def _make(self, index: int, entry: dict[str, Any]) -> tuple[torch.Tensor, SamPrompt, float | None]:
        """The mask of an entry, its clicks and its score."""
        page_image = self.images[index]
        if "painted" in entry:
            _check_names(entry, {"painted"})
            return torch.from_numpy(_painted(entry["painted"], page_image.size)), SamPrompt(), None
        if "concept" in entry or "background" in entry or "box" in entry:
            return self._grabcut(index, entry), SamPrompt(), None
        if self.segmenter is None:
            raise InputError("clicks need a Segment Anything model; paint, or start the script with one")
        prompt = prompt_from_json(entry, page_image.size)
        if page_image.embedded is None:
            page_image.embedded = dataclasses.replace(self.segmenter.embed(self.open(index)), image=None)
        mask, score = segment(self.segmenter, page_image.embedded, prompt)
        return mask, prompt, score

    def _grabcut(self, index: int, entry: dict[str, Any]) -> torch.Tensor:
        _check_names(entry, {"concept", "background", "box"})
        if not is_available():
            raise InputError("GrabCut needs opencv-python-headless; install it, and start the script again")
        box, size = {"box": entry["box"]} if entry.get("box") else None, self.images[index].size
        seeds = seeds_of(prompt_from_json(box, size) if box else SamPrompt(), size)
        for name, value in (("concept", CONCEPT), ("background", BACKGROUND)):
            if entry.get(name):
                seeds[_painted(entry[name], size)] = value
        return grabcut(self.open(index), seeds)

    def _index(self, value: Any) -> int:
        text = str(value)[:9]
        if not text.isdecimal() or int(text) >= len(self.images):
            raise InputError(f"there is no image {text}")
        return int(text)

    def get(self, path: str) -> tuple[str, bytes]:
        """Content type and content of a GET; KeyError for an unknown path."""
        if path == "":
            page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
            return "text/html; charset=utf-8", page.encode()
        if path == "state":
            return "application/json", json.dumps(self.state()).encode()
        kind, _, index = path.partition("/")
        if kind == "thumbnail":
            return "image/jpeg", self.thumbnail(self._index(index))
        if kind == "image":
            return "image/jpeg", _jpeg(self.open(self._index(index)))
        raise KeyError(path)

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """The answer to a POST; KeyError for an unknown path, InputError for invalid content."""
        with self.lock:
            if path == "mask":
                entry = dict(_object(body))
                return self.mask(self._index(entry.pop("image", None)), entry)
            if path == "save":
                return self.save(_object(body).get("images"))
        raise KeyError(path)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError("expected a JSON object")
    return value


def _check_names(entry: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(entry) - known):
        raise InputError(f"expected {', '.join(sorted(known))}, not '{unknown[0][:80]}'")


def _painted(url: Any, size: tuple[int, int]) -> np.ndarray:
    """Where a PNG in a data URL is opaque, bool (height, width) for an image of (width, height)."""
    start = "data:image/png;base64,"
    if not isinstance(url, str) or not url.startswith(start):
        raise InputError("what is painted must be a PNG in a data URL")
    try:
        content = io.BytesIO(base64.b64decode(url.removeprefix(start), validate=True))
        with Image.open(content, formats=["PNG"]) as png:
            if max(png.size) > LARGEST_SIDE:  # before it is decoded
                raise ValueError(f"larger than {LARGEST_SIDE} x {LARGEST_SIDE} pixels")
            alpha = png.convert("RGBA").getchannel("A")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"what is painted cannot be read ({first_line(error)})") from None
    return np.asarray(alpha.resize(size, Image.Resampling.BILINEAR)) >= 128


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _data_url(mask: Image.Image, color: tuple[int, int, int, int]) -> str:
    """A mask as a transparent PNG of one RGBA color, in a data URL."""
    layer = mask.point(lambda level: level >= 128)
    layer.putpalette((0, 0, 0, *color[:3]))  # two colors: a bit per pixel
    layer.info["transparency"] = bytes((0, color[3]))
    return "data:image/png;base64," + base64.b64encode(png_bytes(layer)).decode()
