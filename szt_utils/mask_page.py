"""A local page for making masks by clicking: an HTTP server that only this computer can reach.

GET /                the page
GET /state           the images, their clicks, and the training's settings
GET /image/<n>       image n as JPEG
POST /mask           {"image": n, "include": [[x, y]], "exclude": [[x, y]]}: layers of the mask of these
                     clicks, or of the saved mask if there are none, and of what training makes of it
POST /save           {"images": {"<n>": {"include": ..., "exclude": ...}}}: save the masks of these clicks
"""

import base64
import contextlib
import functools
import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import InputError
from .mask_preview import mask_area, trained_masks
from .safe_zone import SafeZone
from .sam_prompts import SamPrompt, prompt_from_json
from .segment import EmbeddedImage, SamCheckpoint, SamModel, segment

__all__ = ["MaskPage", "PageImage", "serve"]

_LAYERS = {"mask": (0, 205, 120, 140), "dilated": (255, 190, 0, 110), "grid": (70, 130, 255, 120)}  # RGBA


@dataclass
class PageImage:
    """An RGB image on the page, its "L" mask if it has one, and the mask's clicks as in a points file."""

    name: str
    image: Image.Image
    mask: Image.Image | None = None
    clicks: dict[str, Any] | None = None
    embedded: EmbeddedImage | None = None  # from the first click on


class MaskPage:
    """The state of the page and the answers to its requests.

    `save(index, mask, prompt, score)` writes a mask, bool (H, W), and returns a warning or None.
    """

    def __init__(self, segmenter: SamCheckpoint | SamModel, images: Sequence[PageImage],
                 save: Callable[[int, torch.Tensor, SamPrompt, float], str | None], zone: SafeZone,
                 resolution: int, center_crop: bool = False):
        self.segmenter, self.images, self.write = segmenter, images, save
        self.zone, self.resolution, self.center_crop = zone, resolution, center_crop
        self.lock = threading.Lock()  # one click at a time, however many connections a browser opens

    def state(self) -> dict[str, Any]:
        """The answer to GET /state."""
        images = [{"name": page_image.name, "width": page_image.image.width,
                   "height": page_image.image.height, "masked": page_image.mask is not None,
                   **{name: (page_image.clicks or {}).get(name, []) for name in ("include", "exclude")}}
                  for page_image in self.images]
        return {"resolution": self.resolution, "dilation": self.zone.mask_dilation,
                "center_crop": self.center_crop, "images": images}

    def image(self, index: int) -> bytes:
        """An image as JPEG."""
        buffer = io.BytesIO()
        self.images[index].image.save(buffer, format="JPEG", quality=92)
        return buffer.getvalue()

    def mask(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The layers of an image's mask; none if it has neither clicks nor a saved mask."""
        mask, score = self.images[index].mask, None
        if entry.get("include") or entry.get("box"):
            mask, _, score = self._segment(index, entry)
            mask = _to_pil(mask)
        if mask is None:
            return {"layers": {}}
        dilated, grid, grid_area = trained_masks(mask, self.zone, self.resolution, self.center_crop)
        layers = {"mask": mask, "dilated": dilated, "grid": grid}
        return {"layers": {name: _data_url(layers[name], color) for name, color in _LAYERS.items()},
                "area": mask_area(mask), "grid_area": grid_area, "score": score}

    def save(self, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Save the masks of these images' clicks; all entries are checked before any mask is written."""
        results = {self._index(n): self._segment(self._index(n), entry) for n, entry in entries.items()}
        warnings = []
        for index, (mask, prompt, score) in results.items():
            warnings.append(self.write(index, mask, prompt, score))
            self.images[index].mask = _to_pil(mask)
            self.images[index].clicks = {"include": prompt.include, "exclude": prompt.exclude}
        return {"saved": [self.images[index].name for index in results],
                "warnings": [warning for warning in warnings if warning]}

    def _segment(self, index: int, entry: dict[str, Any]) -> tuple[torch.Tensor, SamPrompt, float]:
        page_image = self.images[index]
        prompt = prompt_from_json(entry, page_image.image.size)
        if page_image.embedded is None:
            page_image.embedded = self.segmenter.embed(page_image.image)
        mask, score = segment(self.segmenter, page_image.embedded, prompt)
        return mask, prompt, score

    def _index(self, text: Any) -> int:
        index = int(text) if str(text).isdecimal() else -1
        if not 0 <= index < len(self.images):
            raise InputError(f"there is no image {text}")
        return index

    def get(self, path: str) -> tuple[str, bytes]:
        """Content type and content of a GET; KeyError for an unknown path."""
        if path == "/":
            return "text/html; charset=utf-8", Path(__file__).with_suffix(".html").read_bytes()
        if path == "/state":
            return "application/json", json.dumps(self.state()).encode()
        if path.startswith("/image/"):
            return "image/jpeg", self.image(self._index(path.removeprefix("/image/")))
        raise KeyError(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST; KeyError for an unknown path, InputError for invalid content."""
        with self.lock:
            if path == "/mask":
                entry = {name: value for name, value in body.items() if name != "image"}
                return self.mask(self._index(body.get("image")), entry)
            if path == "/save":
                return self.save(body.get("images", {}))
        raise KeyError(path)


def _to_pil(mask: torch.Tensor) -> Image.Image:
    """A bool mask (H, W) as an "L" image of 0 and 255."""
    return Image.fromarray(mask.numpy()).convert("L")


def _data_url(mask: Image.Image, color: tuple[int, int, int, int]) -> str:
    """A mask as a transparent PNG of one RGBA color, in a data URL."""
    layer = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    layer.paste(color, mask=mask.point(lambda level: 255 * (level >= 128)))
    buffer = io.BytesIO()
    layer.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, page: MaskPage, *args: Any):
        self.page = page
        super().__init__(*args)  # which handles the request

    def answer(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, "application/json", json.dumps({"error": message}).encode())

    def is_local(self) -> bool:
        """Whether the request names this computer: a foreign site can point its own name to 127.0.0.1."""
        return self.headers.get("Host", "").rsplit(":", 1)[0] in ("127.0.0.1", "localhost")

    def do_GET(self) -> None:
        if not self.is_local():
            return self.refuse(403, "open the page by its own address")
        try:
            self.answer(200, *self.page.get(self.path))
        except (KeyError, InputError):
            self.refuse(404, "not found")

    def do_POST(self) -> None:
        # Browsers let any site send a form here, but JSON only the page itself.
        if not self.is_local() or self.headers.get("Content-Type") != "application/json":
            return self.refuse(403, "open the page by its own address")
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            if not isinstance(body, dict):
                raise InputError("expected a JSON object")
            self.answer(200, "application/json", json.dumps(self.page.post(self.path, body)).encode())
        except KeyError:
            self.refuse(404, "not found")
        except ValueError as error:  # an InputError, or invalid JSON
            self.refuse(400, str(error))
        except OSError as error:  # a full disk
            self.refuse(500, f"{error.strerror}: {error.filename}")

    def log_message(self, *_: Any) -> None:
        pass


def serve(page: MaskPage, port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C and call `ready` with its address; port 0 is any free one."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Handler, page))
    except OSError as error:
        raise InputError(f"Port {port} cannot be used ({error.strerror}); give another --port.") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()
