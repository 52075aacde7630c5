"""A local page on which masks are made by clicking: an HTTP server that only this computer can reach.

GET /                the page
GET /state           the pictures, their clicks, and the training's settings
GET /picture/<n>     picture n as JPEG
POST /mask           {"picture": n, "include": [[x, y]], "exclude": [[x, y]]}: the mask of these clicks, or
                     the saved one if there are none, and what training makes of it, as layers
POST /save           {"pictures": {"<n>": {"include": ..., "exclude": ...}}}: save the masks of these clicks
"""

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .errors import InputError
from .mask_preview import as_trained, mask_area
from .prompts import Prompt, prompt_from_json
from .segment import SamCheckpoint, SamModel, segment

__all__ = ["MaskPage", "serve"]

_LAYERS = {"mask": (0, 205, 120, 140), "grown": (255, 190, 0, 110), "grid": (70, 130, 255, 120)}  # RGBA


def _layer(mask: Image.Image, colour: tuple[int, int, int, int]) -> str:
    """A mask as a transparent PNG of one colour, in a data URL."""
    picture = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    picture.paste(colour, mask=mask.point(lambda level: 255 * (level >= 128)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class MaskPage:
    """What the page shows and does. `masks` are those there are, "L" or None; `clicks` what they were made
    of, as in a points file; `save(index, mask, prompt, score)` keeps a mask, bool (H, W), and returns a
    warning or None."""

    def __init__(self, segmenter: SamCheckpoint | SamModel, names: Sequence[str],
                 images: Sequence[Image.Image], masks: Sequence[Image.Image | None],
                 clicks: Sequence[dict[str, Any]],
                 save: Callable[[int, torch.Tensor, Prompt, float], str | None], resolution: int,
                 dilation: int, center_crop: bool = False):
        self.segmenter, self.names, self.images = segmenter, names, images
        self.masks, self.clicks, self.keep = list(masks), list(clicks), save
        self.settings = {"resolution": resolution, "dilation": dilation, "center_crop": center_crop}
        self.seen = {}  # a picture is embedded at its first click, once
        self.lock = threading.Lock()  # one click at a time, however many connections a browser opens

    def state(self) -> dict[str, Any]:
        return {**self.settings, "pictures": [
            {"name": name, "width": image.width, "height": image.height, "masked": mask is not None,
             "include": clicks.get("include", []), "exclude": clicks.get("exclude", [])}
            for name, image, mask, clicks in zip(self.names, self.images, self.masks, self.clicks,
                                                 strict=True)]}

    def picture(self, index: int) -> bytes:
        buffer = io.BytesIO()
        self.images[index].save(buffer, format="JPEG", quality=92)
        return buffer.getvalue()

    def _segment(self, index: int, entry: dict[str, Any]) -> tuple[torch.Tensor, Prompt, float]:
        prompt = prompt_from_json(entry, self.images[index].size)
        if index not in self.seen:
            self.seen[index] = self.segmenter.see(self.images[index])
        mask, score = segment(self.segmenter, self.seen[index], prompt)
        return mask, prompt, score

    def mask(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The layers of a picture's mask; none if there is neither click nor saved mask."""
        score = None
        if entry.get("include") or entry.get("box"):
            mask, _, score = self._segment(index, entry)
            mask = Image.fromarray(mask.numpy()).convert("L")
        else:
            mask = self.masks[index]
        if mask is None:
            return {"layers": {}}
        grown, grid, grid_area = as_trained(mask, **self.settings)
        shown = {"mask": mask, "grown": grown, "grid": grid}
        return {"layers": {name: _layer(shown[name], colour) for name, colour in _LAYERS.items()},
                "area": mask_area(mask), "grid_area": grid_area, "score": score}

    def save(self, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Save the masks of these pictures' clicks; all of them are checked before any is written."""
        results = {self._index(n): self._segment(self._index(n), entry) for n, entry in entries.items()}
        warnings = []
        for index, (mask, prompt, score) in results.items():
            warnings.append(self.keep(index, mask, prompt, score))
            self.masks[index] = Image.fromarray(mask.numpy()).convert("L")
            self.clicks[index] = {"include": prompt.include, "exclude": prompt.exclude}
        return {"saved": [self.names[index] for index in results], "warnings": [w for w in warnings if w]}

    def _index(self, text: Any) -> int:
        index = int(text) if str(text).isdecimal() else -1
        if not 0 <= index < len(self.images):
            raise InputError(f"there is no picture {text}")
        return index

    def get(self, path: str) -> tuple[str, bytes]:
        """Content type and content of a GET; KeyError for an unknown path."""
        if path == "/":
            return "text/html; charset=utf-8", (Path(__file__).with_suffix(".html")).read_bytes()
        if path == "/state":
            return "application/json", json.dumps(self.state()).encode()
        if path.startswith("/picture/"):
            return "image/jpeg", self.picture(self._index(path.removeprefix("/picture/")))
        raise KeyError(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST; KeyError for an unknown path, InputError for what cannot be used."""
        with self.lock:
            if path == "/mask":
                entry = {name: value for name, value in body.items() if name != "picture"}
                return self.mask(self._index(body.get("picture")), entry)
            if path == "/save":
                return self.save(body.get("pictures", {}))
        raise KeyError(path)


def _handler(page: MaskPage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def refuse(self, status: int, message: str) -> None:
            self.answer(status, "application/json", json.dumps({"error": message}).encode())

        def is_local(self) -> bool:
            """Whether the page was asked for by this computer's name. A site elsewhere can point its own name
            here."""
            return self.headers.get("Host", "").rsplit(":", 1)[0] in ("127.0.0.1", "localhost")

        def do_GET(self) -> None:
            if not self.is_local():
                return self.refuse(403, "open the page by its own address")
            try:
                self.answer(200, *page.get(self.path))
            except (KeyError, InputError):
                self.refuse(404, "there is nothing here")

        def do_POST(self) -> None:
            # Browsers let any site send a form, but JSON only to the site it is from.
            if not self.is_local() or self.headers.get("Content-Type") != "application/json":
                return self.refuse(403, "open the page by its own address")
            try:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                if not isinstance(body, dict):
                    raise InputError("expected a JSON object")
                self.answer(200, "application/json", json.dumps(page.post(self.path, body)).encode())
            except KeyError:
                self.refuse(404, "there is nothing here")
            except ValueError as error:  # an InputError, or no JSON
                self.refuse(400, str(error))
            except OSError as error:  # a full disk
                self.refuse(500, f"{error.strerror}: {error.filename}")

        def log_message(self, *_) -> None:
            pass

    return Handler


def serve(page: MaskPage, port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; port 0 is any free one. `ready` is given its address."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(page))
    except OSError as error:
        raise InputError(f"Port {port} cannot be used ({error.strerror}); give another --port.") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()
