"""The mask page's answers, without a server. (With one, and in a browser: test_precompute_masks.)"""

import base64
import dataclasses
import io
import json
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.images import crop_and_resize
from szt_utils.local_server import Conflict
from szt_utils.mask_page import LARGEST_SIDE, MaskPage, PageImage, SavedMask
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

    images = [PageImage(f"{i}.png", (128, 128), partial(Image.fromarray, scene.image))
              for i, scene in enumerate(scenes)]
    return MaskPage(load_segmenter(), images, masks.get, save, SafeZone(mask_dilation=4), 128), masks


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))


# What the page's own functions need: layers that are texts, one image, and a server. A request waits in
# `requests`; calling it does what the server does, and gives the function that lets the answer arrive.
PAGE = """
const surface = () => ({text: "", canvas: {width: 1, height: 1, toDataURL() { return this.of.text; }},
                        clearRect() { this.text = ""; }, drawImage(layer) { this.text += layer; }});
const wrapped = () => { const made = surface(); made.canvas.of = made; return made; };
const stroke = (context, step) => { context.text += " - stroke"; };
const show = () => {}, load = async url => url, saveButton = {}, messages = [], requests = [];
const showMessage = text => messages.push(text), pause = time => new Promise(end => setTimeout(end, time));
const disk = {include: [], exclude: [], masked: true, note: "", version: 1, mask: "disk"}, saves = [];
let images = [], current = null, drag = null, centerCrop, saving = Promise.resolve();
const late = value => pause(30).then(() => value), getState = () => late({images: [{...disk}]});
const post = (path, body) => new Promise((resolve, reject) => requests.push(() => {
  const {version, ...entry} = path === "save" ? body.images[0] : body;
  const mask = entry.painted ?? (entry.include ? `clicks ${JSON.stringify(entry.include)}`
                                 : entry.box ? "cut" : disk.mask);
  if (entry.include?.flat().includes(-1)) return () => reject(new Error("refused"));
  if (path === "mask") return () => resolve({layers: {mask}});
  if (version !== disk.version) return () => reject(Object.assign(new Error("behind"), {status: 409}));
  Object.assign(disk, {mask, version: version + 1});
  saves.push(entry.painted ?? entry);
  return () => resolve({versions: [version + 1], warnings: []});
}));
async function answerAll() {
  for (let quiet = 0; quiet < 3; quiet++)
    for (await pause(100); requests.length; await pause(0), quiet = 0) requests.shift()()();
}
const shown = () => { const s = wrapped(); replay(image, s); return s.text; };
const paint = () => add(image, {kind: "brush", points: [[0, 0]]});
const click = x => add(image, {kind: "clicks", include: [[x, x]], exclude: []});
let image;
function start(more) {
  image = current = begin({index: 0, name: "a.png"}, Object.assign(disk, more));
  images = [image];
}
"""


def in_page(folder, script: str):
    """What a script that uses the page's own functions returns."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    page = (ROOT / "szt_utils" / "mask_page.html").read_text()
    functions = "".join(page[page.index(first):page.index(last)] for first, last in (
        ("// What the steps amount to.", "// ---- What is shown."), ("function placeOn(", "function place()"),
        ("async function cut(", "const resize =")))
    (folder / "run.mjs").write_text(PAGE + functions.replace("surface(", "wrapped(") + (
        f"console.log(JSON.stringify(await (async () => {{ {script} }})()));"))
    done = subprocess.run(["node", folder / "run.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("include, first", [([], "disk"), ([[1, 1]], "clicks [[1,1]]")])
def test_undo_after_save_goes_back_to_the_first_mask(include, first, tmp_path):
    """What is shown, and what would be saved, is the mask before the stroke."""
    before, saved, after, changed, savable, entry = in_page(tmp_path, f"""
        start({{include: {json.dumps(include)}}});
        refresh(image);
        await answerAll();
        const before = shown();
        paint();
        save();
        await answerAll();
        undo();
        await answerAll();
        return [before, saves[0], shown(), isChanged(image), isSavable(image), entryOf(image)];""")
    assert (before, saved, after) == ("disk", "disk - stroke", first) and changed and savable
    assert entry == ({"include": include, "exclude": []} if include else {"painted": "disk"})


@pytest.mark.parametrize("script", [
    "paint(); save();", "paint(); await pause(300); save();", "paint(); refreshAll(); save();",
    "paint(); refresh(image); await answerAll(); save();",
    # The answer with an old mask arrives after the page knows that there is another one.
    *(f"disk.mask = 'old'; refresh(image); const arrive = requests.shift()(); "
      f"Object.assign(disk, {{mask: 'disk', version: 2}}); update(); await pause(60); {end}"
      for end in ("arrive(); paint(); save();", "paint(); save(); await pause(9); arrive();"))])
def test_a_stroke_never_replaces_the_mask_that_is_not_loaded_yet(script, tmp_path):
    """Whoever asks first, and whenever it comes: at the start, and after another program has changed it."""
    saved, shown, message = in_page(tmp_path, f"""
        start();
        {script}
        await answerAll();
        return [saves, shown(), messages.at(-1)];""")
    assert saved == ["disk - stroke"] and shown == "disk - stroke" and message == "Saved 1 mask."


def test_a_stroke_waits_for_the_clicks_below_it_and_stays_when_they_are_refused(tmp_path):
    assert in_page(tmp_path, """
        start({masked: false});
        click(1); paint(); save();
        await answerAll();
        click(-1); paint();
        await answerAll();
        const {length} = image.steps;
        save();
        await answerAll();
        return [saves, length, shown(), isChanged(image)];""") == [
        ["clicks [[1,1]] - stroke", "clicks [[1,1]] - stroke - stroke"], 3,
        "clicks [[1,1]] - stroke - stroke", False]


def test_a_save_is_not_taken_for_that_of_another_tab(tmp_path):
    """Neither by a second save, nor when the window gets the focus before a save or its answer."""
    assert in_page(tmp_path, """
        start();
        paint();
        save(); save();
        await answerAll();
        paint();
        save();
        await pause(10);
        const arrive = requests.shift()();
        update();
        await pause(60);
        arrive();
        await answerAll();
        update();
        paint();
        await pause(10);
        save();
        await pause(10);
        requests.shift()()();
        await answerAll();
        const refused = messages.filter(text => /another|Not/.test(text));
        return [saves, image.steps.length, isChanged(image), refused];
        """) == [[f"disk{n * ' - stroke'}" for n in (1, 2, 3)], 3, False, []]


def test_what_another_tab_has_saved_is_shown_in_place_of_what_was_done_here(tmp_path):
    saved, steps, shown, message = in_page(tmp_path, """
        start();
        paint();
        Object.assign(disk, {mask: "theirs", version: 2});
        save();
        await answerAll();
        return [saves, image.steps.length, shown(), messages.at(-1)];""")
    assert (saved, steps, shown) == ([], 0, "theirs") and "a.png changed in another tab" in message


def test_the_outline_of_older_strokes_is_not_put_over_a_newer_one(tmp_path):
    assert in_page(tmp_path, """
        start({masked: false});
        cut([0, 0, 9, 9]);
        paint();
        await answerAll();
        const late = shown();
        cut([0, 0, 9, 9]);
        await answerAll();
        return [late, messages.filter(text => /meanwhile/.test(text)).length, shown()];""") == [
        " - stroke", 1, "cut"]


@pytest.mark.parametrize("crop, shares", [(False, (0, 0, 100, 100)), (True, (24.5, 0, 50.5, 100))])
def test_what_training_makes_of_a_mask_is_drawn_where_its_crop_is(crop, shares, tmp_path):
    image = Image.new("L", (200, 101))
    image.paste(255, (49, 0, 150, 101))
    assert crop_and_resize(image, 101, center_crop=True).getextrema() == (255, 255)  # (49, 0) to (150, 101)
    assert in_page(tmp_path, f"""
        const layer = {{style: {{}}}};
        centerCrop = {json.dumps(crop)};
        current = {{width: 200, height: 101}};
        placeLayer(layer);
        const {{left, top, width, height}} = layer.style;
        return [left, top, width, height];""") == [f"{share:g}%" for share in shares]


def test_an_image_is_read_when_it_is_needed_and_few_are_kept(page):
    reads = []
    images = [PageImage(f"{i}.png", (400, 300), lambda i=i: reads.append(i) or Image.new("RGB", (400, 300)))
              for i in range(9)]
    page = MaskPage(None, images, lambda index: SavedMask(), page[0].write, page[0].zone, 128)
    page.state()
    page.post("mask", {"image": 3, "painted": painted(np.ones((3, 4), bool))})
    assert reads == []
    thumbnails = [Image.open(io.BytesIO(page.get(f"thumbnail/{i}")[1])) for i in (0, 8)]
    assert [image.size for image in thumbnails] == [(256, 192)] * 2
    for _ in range(2):
        assert Image.open(io.BytesIO(page.get("image/8")[1])).size == (400, 300)
        page.get("thumbnail/0")
    assert reads == [0, 8]
    for i in range(9):
        page.get(f"image/{i}")
    assert len(reads) > 9 - 2 and page.open.cache_info().currsize == page.open.cache_info().maxsize < 9


def test_without_a_model_old_clicks_are_not_offered(page):
    """They would be all that is left when the user undoes, and could not be saved."""
    page, masks = page
    page.segmenter = None
    state = page.state()["images"][1]
    assert state["masked"] and masks[1].clicks and state["include"] == state["exclude"] == []


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
    for name, side in (("dilated", 128), ("grid", 16)):
        layer = decoded(answer["layers"][name])
        assert layer.shape == (side, side, 4) and len(np.unique(layer.reshape(-1, 4), axis=0)) == 2
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
    assert page.post("mask", {"image": 0, "painted": painted(np.ones((8, LARGEST_SIDE), bool))})["area"] == 1


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
    # A pixel in both strokes is background.
    both = {"concept": painted(inner | outer), "background": painted(outer)}
    found = decoded(page.post("mask", {"image": 1, **both})["layers"]["mask"])[..., 3] > 0
    assert found[inner].mean() > 0.9 and not found[outer].any()
    with pytest.raises(InputError, match="left, top, right, bottom"):
        page.post("mask", {"image": 1, "box": [5, 5, 1, 1]})


def test_an_image_is_embedded_at_its_first_click_alone(page, monkeypatch):
    page, embed, embedded = page[0], page[0].segmenter.embed, []
    monkeypatch.setattr(page.segmenter, "embed", lambda image: embedded.append(1) or embed(image))
    for x in (60, 64, 68):
        page.post("mask", {"image": 0, "include": [[x, 64]]})
    assert embedded == [1]


def test_without_a_model_there_are_no_clicks(page):
    full, _ = page
    page = MaskPage(None, full.images, full.read, full.write, full.zone, 128, notice="Paint.")
    assert not page.state()["clicks"] and page.state()["notice"] == "Paint."
    with pytest.raises(InputError, match="need a Segment Anything model"):
        page.post("mask", {"image": 0, "include": [[1, 1]]})
    assert page.post("mask", {"image": 0, "painted": painted(np.ones((8, 8), bool))})["area"] == 1
