"""A local page for making masks by clicking: what it answers (`local_server` serves it).

GET                  the page
GET state            the images, their masks' versions, clicks and notes, and the training's settings
GET image/<n>        image n as JPEG
POST mask            {"image": n, "include": [[x, y]], "exclude": [[x, y]]}: layers of the mask of these
                     clicks, or of the saved mask if there are none, and of what training makes of it
POST save            {"images": {"<n>": {"include": ..., "exclude": ..., "version": ...}}}: save the masks of
                     these clicks; refused when a mask is no longer the version that the browser has seen
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import InputError
from .local_server import Conflict
from .mask_preview import mask_area, trained_masks
from .safe_zone import SafeZone
from .sam_prompts import SamPrompt, prompt_from_json
from .segment import EmbeddedImage, SamCheckpoint, SamModel, segment

__all__ = ["MaskPage", "PageImage", "SavedMask"]

_LAYERS = {"mask": (0, 205, 120, 140), "dilated": (255, 190, 0, 110), "grid": (70, 130, 255, 120)}  # RGBA


@dataclass
class PageImage:
    """An RGB image on the page."""

    name: str
    image: Image.Image
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
    returns a warning or None.
    """

    def __init__(self, segmenter: SamCheckpoint | SamModel, images: Sequence[PageImage],
                 read: Callable[[int], SavedMask],
                 save: Callable[[int, torch.Tensor, SamPrompt, float], str | None], zone: SafeZone,
                 resolution: int, center_crop: bool = False):
        self.segmenter, self.images, self.read, self.write = segmenter, images, read, save
        self.zone, self.resolution, self.center_crop = zone, resolution, center_crop
        self.lock = threading.Lock()  # one click at a time, however many connections a browser opens

    def state(self) -> dict[str, Any]:
        """The answer to GET state."""
        images = []
        for index, page_image in enumerate(self.images):
            saved = self.read(index)
            images.append({"name": page_image.name, "width": page_image.image.width,
                           "height": page_image.image.height, "masked": saved.mask is not None,
                           "note": saved.note, "version": saved.version,
                           **{name: saved.clicks.get(name, []) for name in ("include", "exclude")}})
        return {"resolution": self.resolution, "dilation": self.zone.mask_dilation,
                "center_crop": self.center_crop, "images": images}

    def image(self, index: int) -> bytes:
        """An image as JPEG."""
        buffer = io.BytesIO()
        self.images[index].image.save(buffer, format="JPEG", quality=92)
        return buffer.getvalue()

    def mask(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The layers of an image's mask; none if it has neither clicks nor a saved mask."""
        if entry.get("include") or entry.get("box"):
            mask, _, score = self._segment(index, entry)
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
        """Save the masks of these images' clicks; all entries are checked before any mask is written.

        Conflict names the images whose mask has another version than the entry.
        """
        entries = {self._index(n): dict(_object(entry)) for n, entry in _object(entries).items()}
        behind = [self.images[index].name for index, entry in entries.items()
                  if entry.pop("version", "") != self.read(index).version]
        if behind:
            raise Conflict(f"{', '.join(behind)} changed meanwhile, in another tab or program")
        results = {index: self._segment(index, entry) for index, entry in entries.items()}
        warnings = [self.write(index, *result) for index, result in results.items()]
        return {"saved": [self.images[index].name for index in results],
                "versions": {index: self.read(index).version for index in results},
                "warnings": [warning for warning in warnings if warning]}

    def _segment(self, index: int, entry: dict[str, Any]) -> tuple[torch.Tensor, SamPrompt, float]:
        page_image = self.images[index]
        prompt = prompt_from_json(entry, page_image.image.size)
        if page_image.embedded is None:
            page_image.embedded = self.segmenter.embed(page_image.image)
        mask, score = segment(self.segmenter, page_image.embedded, prompt)
        return mask, prompt, score

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
        if path.startswith("image/"):
            return "image/jpeg", self.image(self._index(path.removeprefix("image/")))
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


def _data_url(mask: Image.Image, color: tuple[int, int, int, int]) -> str:
    """A mask as a transparent PNG of one RGBA color, in a data URL."""
    layer = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    layer.paste(color, mask=mask.point(lambda level: 255 * (level >= 128)))
    buffer = io.BytesIO()
    layer.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
