"""The mask page's answers, without a server. (With one, and in a browser: test_precompute_masks.)"""

import base64
import dataclasses
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.local_server import Conflict
from szt_utils.mask_page import MaskPage, PageImage, SavedMask
from szt_utils.safe_zone import SafeZone
from szt_utils.segment import load_segmenter


@pytest.fixture
def page():
    """Three images, the second with a mask and the third with an unreadable one, and the masks by index."""
    scenes = pocket.scenes.concept_scenes("teal-striped-star", 3)
    masks = {0: SavedMask(), 2: SavedMask(note="The image '2.png' cannot be read.", version="v2"),
             1: SavedMask(Image.fromarray(scenes[1].mask).convert("L"), {"include": [[64, 64]]}, "", "v1")}

    def save(index, mask, prompt, score):
        clicks = {"include": prompt.include, "exclude": prompt.exclude}
        masks[index] = SavedMask(Image.fromarray(mask.numpy()).convert("L"), clicks, "",
                                 f"{masks[index].version}+")
        return f"{index}.png: odd" if index else None

    images = [PageImage(f"{i}.png", Image.fromarray(scene.image)) for i, scene in enumerate(scenes)]
    return MaskPage(load_segmenter(), images, masks.get, save, SafeZone(mask_dilation=4), 128), masks


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("include, first", [([], "disk"), ([[1, 1]], "clicks [[1,1]]")])
def test_undo_after_save_goes_back_to_the_first_mask(include, first, tmp_path):
    """The page's own functions: what is shown, and what would be saved, is the mask before the stroke."""
    page = (ROOT / "szt_utils" / "mask_page.html").read_text()
    functions = page[page.index("// What the steps amount to."):page.index("// ---- What is shown.")]
    (tmp_path / "run.mjs").write_text("""
const surface = () => ({text: "", canvas: {width: 1, height: 1}, clearRect() { this.text = ""; },
                        drawImage(layer) { this.text += layer; }});
const wrapped = () => { const s = surface(); s.canvas.toDataURL = () => s.text; return s; };
const stroke = (context, step) => { context.text += " - stroke"; };
let current = null, disk = "disk";
const show = () => {}, showMessage = text => { throw new Error(text); }, load = async url => url;
const post = async (path, body) => ({layers: {mask: body.painted ?? (
    body.include ? `clicks ${JSON.stringify(body.include)}` : disk)}});
""" + functions.replace("surface(", "wrapped(") + f"""
const image = {{index: 0, include: {json.dumps(include)}, exclude: [], masked: true, steps: [], undone: [],
                layer: null}};
const shown = () => {{ const s = wrapped(); replay(image, s); return s.text; }};
await refresh(image);
const before = shown();
await add(image, {{kind: "eraser", points: [[0, 0]]}});
disk = entryOf(image).painted;
image.saved = image.steps.at(-1);
image.undone.push(image.steps.pop());
await changed(image);
console.log(JSON.stringify([before, disk, shown(), isChanged(image), isSavable(image), entryOf(image)]));
""")
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, check=True)
    before, disk, after, changed, savable, entry = json.loads(done.stdout)
    assert (before, disk, after) == ("disk", "disk - stroke", first) and changed and savable
    assert entry == ({"include": include, "exclude": []} if include else {"painted": "disk"})


def test_state_image_and_saved_mask(page):
    page, masks = page
    state = json.loads(page.get("state")[1])
    assert (state["resolution"], state["dilation"], state["center_crop"]) == (128, 4, False)
    assert [(image["name"], image["masked"], image["include"], image["note"], image["version"])
            for image in state["images"]] == [
        ("0.png", False, [], "", ""), ("1.png", True, [[64, 64]], "", "v1"),
        ("2.png", False, [], "The image '2.png' cannot be read.", "v2")]
    assert page.get("")[1].startswith(b"<!DOCTYPE html>")
    kind, content = page.get("image/1")
    assert kind == "image/jpeg" and Image.open(io.BytesIO(content)).size == (128, 128)
    assert page.post("mask", {"image": 0}) == page.post("mask", {"image": 2}) == {"layers": {}}
    answer = page.post("mask", {"image": 1})
    assert np.array_equal(decoded(answer["layers"]["mask"])[..., 3] > 0, np.asarray(masks[1].mask) > 0)
    for path in ("picture/1", "nothing", "/"):
        with pytest.raises(KeyError):
            page.get(path)
    for index in ("3", "-1", "", "x", "\u00b2", "9" * 5000, "1.0"):
        with pytest.raises(InputError, match="there is no image"):
            page.get(f"image/{index}")


def test_nothing_is_saved_unless_all_entries_are_valid(page):
    page, masks = page
    before = dict(masks)
    entries = {"0": {"include": [[64, 64]]}, "1": {"include": [[999, 1]], "version": "v1"}}
    with pytest.raises(InputError, match="outside the image"):
        page.post("save", {"images": entries})
    assert masks == before
    entries["1"] = {"include": [[64, 64]], "exclude": [[1, 1]], "version": "v1"}
    assert page.post("save", {"images": entries}) == {
        "saved": ["0.png", "1.png"], "versions": {0: "+", 1: "v1+"}, "warnings": ["1.png: odd"]}
    assert page.state()["images"][1]["exclude"] == ((1, 1),) and page.state()["images"][0]["masked"]


def test_who_has_not_seen_the_newest_mask_does_not_save_over_it(page):
    page, masks = page
    before = dict(masks)
    entries = {"0": {"include": [[64, 64]], "version": ""}, "1": {"include": [[64, 64]], "version": "v0"},
               "2": {"include": [[64, 64]]}}
    with pytest.raises(Conflict, match="^1.png, 2.png changed meanwhile"):
        page.post("save", {"images": entries})
    assert masks == before
    entries["1"]["version"], entries["2"]["version"] = "v1", "v2"
    page.post("save", {"images": entries})
    masks[0] = dataclasses.replace(masks[0], version="of a painting program")
    with pytest.raises(Conflict, match="^0.png changed"):
        page.post("save", {"images": {"0": {"include": [[1, 1]], "version": "+"}}})


@pytest.mark.parametrize("body", [
    None, [], 7, "x", {}, {"images": None}, {"images": []}, {"images": {"0": None}}, {"images": {"0": 7}},
    {"images": {"x": {"include": [[1, 1]]}}}, {"images": {"0": {}}}, {"images": {"0": {"include": 7}}},
    {"images": {"0": {"include": [7]}}}, {"images": {"0": {"include": [["1", "2"]]}}},
    {"images": {"0": {"include": [[True, 1]]}}}, {"images": {"0": {"include": [[1, 1]], "box": {}}}},
    {"images": {"0": {"include": [[1, 1]] * 20_000}}}, {"images": {"0": {"include": [[1, 1]], "a": 1}}},
    {"images": {"0": {"include": [[1, 1]], "version": ["v"]}}}])
def test_a_bad_save_is_refused_in_a_sentence(page, body):
    page, masks = page
    before = dict(masks)
    with pytest.raises(InputError):
        page.post("save", body)
    assert masks == before


@pytest.mark.parametrize("body", [
    None, [], {}, {"image": None}, {"image": 3}, {"image": -1}, {"image": 0, "include": 7},
    {"image": 0, "include": [[1, 1]] * 20_000}, {"image": 0, "include": [[1, 1]], "a": 1},
    {"image": 0, "box": [5, 5, 1, 1]}])
def test_a_bad_click_is_refused_in_a_sentence(page, body):
    with pytest.raises(InputError):
        page[0].post("mask", body)


def painted(mask: np.ndarray) -> str:
    """A mask as the page sends it: opaque where it is painted."""
    alpha = Image.fromarray(np.uint8(255 * mask))
    png = Image.merge("RGBA", [Image.new("L", alpha.size, level) for level in (0, 205, 120)] + [alpha])
    buffer = io.BytesIO()
    png.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_painted_mask_is_saved_as_it_is_and_resized_to_its_image(page):
    page, masks = page
    drawn = np.zeros((64, 64), bool)
    drawn[10:30, 20:50] = True
    answer = page.post("mask", {"image": 0, "painted": painted(drawn)})
    full = drawn.repeat(2, 0).repeat(2, 1)
    assert set(answer["layers"]) == {"mask", "dilated", "grid"} and answer["score"] is None
    assert np.array_equal(decoded(answer["layers"]["mask"])[..., 3] == 255, full)
    page.post("save", {"images": {"0": {"painted": painted(full), "version": ""}}})
    assert np.array_equal(np.asarray(masks[0].mask) > 0, full)
    assert masks[0].clicks == {"include": (), "exclude": ()}


@pytest.mark.parametrize("url", [
    7, {}, "", "x", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:image/png;base64,\u00e4",
    "data:text/html;base64,AAAA", painted(np.ones((8, 1025), bool)), painted(np.ones((64, 64), bool))[:90]])
def test_a_bad_painting_is_refused_in_a_sentence(page, url):
    page, masks = page
    before = dict(masks)
    unknown = {"concept": painted(np.ones((8, 8), bool)), "x": 1}
    for entry in ({"painted": url}, {"concept": url or 1}, unknown):
        with pytest.raises(InputError):
            page.post("save", {"images": {"0": entry}})
    assert masks == before


def test_grabcut_on_the_page_takes_a_box_and_strokes(page):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    page, masks = page
    assert page.state()["grabcut"]
    true = np.asarray(masks[1].mask) > 0
    ys, xs = np.nonzero(true)
    box = [int(xs.min()) - 2, int(ys.min()) - 2, int(xs.max()) + 3, int(ys.max()) + 3]
    inner, outer = np.zeros_like(true), np.ones_like(true)
    inner[int(ys.mean()) - 6:int(ys.mean()) + 6, int(xs.mean()) - 6:int(xs.mean()) + 6] = True
    outer[box[1]:box[3], box[0]:box[2]] = False
    for entry in ({"box": box}, {"box": box, "concept": painted(inner)},
                  {"concept": painted(inner), "background": painted(outer), "box": None}):
        found = decoded(page.post("mask", {"image": 1, **entry})["layers"]["mask"])[..., 3] > 0
        assert (found & true).sum() / (found | true).sum() > 0.7, entry.keys()
    with pytest.raises(InputError, match="left, top, right, bottom"):
        page.post("mask", {"image": 1, "box": [5, 5, 1, 1]})


def test_without_a_model_there_are_no_clicks(page):
    full, _ = page
    page = MaskPage(None, full.images, full.read, full.write, full.zone, 128, notice="Paint.")
    assert not page.state()["clicks"] and page.state()["notice"] == "Paint."
    with pytest.raises(InputError, match="need a Segment Anything model"):
        page.post("mask", {"image": 0, "include": [[1, 1]]})
    assert page.post("mask", {"image": 0, "painted": painted(np.ones((8, 8), bool))})["area"] == 1
