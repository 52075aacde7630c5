"""The mask page's answers, without a server. (With one, and in a browser: test_precompute_masks.)"""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.mask_page import MaskPage, PageImage
from szt_utils.safe_zone import SafeZone
from szt_utils.segment import load_segmenter


@pytest.fixture
def page():
    """Two images, of which the second has a mask, and the list of what the page saved."""
    scenes, saved = pocket.scenes.concept_scenes("teal-striped-star", 2), []
    images = [PageImage(f"{i}.png", Image.fromarray(scene.image)) for i, scene in enumerate(scenes)]
    images[1].mask = Image.fromarray(scenes[1].mask).convert("L")
    images[1].clicks = {"include": [[64, 64]], "box": [1, 1, 9, 9]}

    def save(index, mask, prompt, score):
        saved.append((index, mask, prompt))
        return f"{index}.png: odd" if index else None

    return MaskPage(load_segmenter(), images, save, SafeZone(mask_dilation=4), 128), saved


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_state_image_and_saved_mask(page):
    page, _ = page
    state = json.loads(page.get("/state")[1])
    assert (state["resolution"], state["dilation"], state["center_crop"]) == (128, 4, False)
    assert [(image["name"], image["masked"], image["include"]) for image in state["images"]] == [
        ("0.png", False, []), ("1.png", True, [[64, 64]])]
    assert page.get("/")[1].startswith(b"<!DOCTYPE html>")
    kind, content = page.get("/image/1")
    assert kind == "image/jpeg" and Image.open(io.BytesIO(content)).size == (128, 128)
    assert page.post("/mask", {"image": 0}) == {"layers": {}}
    answer = page.post("/mask", {"image": 1})
    assert np.array_equal(decoded(answer["layers"]["mask"])[..., 3] > 0, np.asarray(page.images[1].mask) > 0)
    for path in ("/picture/1", "/nothing"):
        with pytest.raises(KeyError):
            page.get(path)
    with pytest.raises(InputError, match="there is no image 2"):
        page.get("/image/2")


def test_nothing_is_saved_unless_all_entries_are_valid(page):
    page, saved = page
    entries = {"0": {"include": [[64, 64]]}, "1": {"include": [[999, 1]]}}
    with pytest.raises(InputError, match="outside the image"):
        page.post("/save", {"images": entries})
    assert not saved and page.images[0].mask is None
    entries["1"] = {"include": [[64, 64]], "exclude": [[1, 1]]}
    assert page.post("/save", {"images": entries}) == {"saved": ["0.png", "1.png"],
                                                       "warnings": ["1.png: odd"]}
    assert [index for index, *_ in saved] == [0, 1]
    assert page.state()["images"][1]["exclude"] == ((1, 1),) and page.state()["images"][0]["masked"]
