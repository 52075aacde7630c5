"""The masking script: every way to mark the concept, resume, the page, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import precompute_masks
from szt_utils.images import list_images
from szt_utils.masks import find_masks, read_mask


@pytest.fixture
def run(concept_folder, tmp_path):
    return lambda *flags: precompute_masks.main(["--image_dir", str(concept_folder[0]), "--output_dir",
                                                 str(tmp_path / "masks"), *map(str, flags)])


def is_inside(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L")) > 127


def overlaps(masks, true) -> list[float]:
    paths = sorted(Path(true).glob("*.png"))
    assert paths
    pairs = [(is_inside(Path(masks) / path.name), is_inside(path)) for path in paths]
    return [(a & b).sum() / (a | b).sum() for a, b in pairs]


def clicks(true_dir) -> dict:
    """A point inside every true mask."""
    points = {}
    for path in sorted(Path(true_dir).glob("*.png")):
        ys, xs = np.nonzero(is_inside(path))
        points[path.name] = {"include": [[float(np.median(xs)), float(np.median(ys))]]}
    return points


def test_auto_finds_the_concept_writes_a_sheet_and_resumes(run, concept_folder, tmp_path, capsys):
    run("--auto", "--grid", 8, "--preview", "--resolution", 128)
    assert min(overlaps(tmp_path / "masks", concept_folder[1])) > 0.85
    assert "confidence:" in capsys.readouterr().out
    assert Image.open(tmp_path / "masks" / "preview" / "sheet.png").size[0] > 500
    images = list_images(concept_folder[0])  # training takes them as they are
    for image, mask in zip(images, find_masks(tmp_path / "masks", images), strict=True):
        assert set(np.unique(read_mask(mask, Image.open(image).size))) == {0, 255}
        assert Image.open(mask).mode == "L"
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "masks").glob("*.png"))}
    run("--auto", "--grid", 8)
    assert "0 of them to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_points_file_masks_and_only_changed_entries_are_masked_again(run, concept_folder, tmp_path, capsys):
    points = clicks(concept_folder[1])
    file = tmp_path / "points.json"
    file.write_text(json.dumps(points))
    run("--points_file", file)
    assert min(overlaps(tmp_path / "masks", concept_folder[1])) > 0.85
    points[min(points)]["exclude"] = [[1, 1]]
    file.write_text(json.dumps(points))
    capsys.readouterr()
    run("--points_file", file)
    assert "1 of them to do" in capsys.readouterr().out


def test_a_rotated_image_has_a_mask_of_its_upright_size(concept_folder, tmp_path):
    source = sorted(concept_folder[0].glob("*.png"))[0]
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(source).crop((0, 0, 128, 100)).save(tmp_path / "in" / "rotated.jpg", exif=exif)
    precompute_masks.main(["--image_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"),
                           "--point", "0.5", "0.5"])
    assert Image.open(tmp_path / "out" / "rotated.png").size == (100, 128)


@pytest.mark.parametrize("content, message", [
    ("no json", "not valid JSON"), ("[]", "one object"), ("{}", "has no entry"),
    ('{"NAME": {"include": [[1, 2, 3]]}}', "expected 2 numbers"),
    ('{"NAME": {"include": [[1, 999]]}}', "outside the image"),
    ('{"NAME": {"exclude": [[1, 9]]}}', "'include' or a box"), ('{"NAME": {"dot": 1}}', "'dot'"),
    ('{"NAME": {"box": [9, 9, 1, 1]}}', "left, top, right, bottom"),
    ('{"NAME": {"include": [[1, 9]]}, "other.png": {}}', "not among the images")])
def test_a_bad_points_file_is_reported_in_one_sentence(concept_folder, tmp_path, content, message):
    source = sorted(concept_folder[0].glob("*.png"))[0]
    (tmp_path / "in").mkdir()
    shutil.copy(source, tmp_path / "in")
    (tmp_path / "points.json").write_text(content.replace("NAME", source.name))
    with pytest.raises(SystemExit) as stop:
        precompute_masks.main(["--image_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"),
                               "--points_file", str(tmp_path / "points.json")])
    printed = str(stop.value)
    assert message in printed and printed.startswith("error: ") and "\n" not in printed
    assert not (tmp_path / "out").exists()


@pytest.fixture
def photographs(tmp_path):
    """Images that the bundled model does not know."""
    for i in range(2):
        name = tmp_path / "photographs" / f"{i}.png"
        name.parent.mkdir(exist_ok=True)
        Image.effect_mandelbrot((96, 80), (-2, -1.5 + i, 1, 1.5), 100).convert("RGB").save(name)
    return ["--image_dir", str(name.parent), "--output_dir", str(tmp_path / "out")]


def test_the_bundled_model_refuses_photographs_with_auto_and_warns_with_a_box(photographs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="unlike the drawn.*--sam_model facebook/sam-vit-base or --sam_ch"):
        precompute_masks.main([*photographs, "--auto"])
    assert not (tmp_path / "out").exists()
    precompute_masks.main([*photographs, "--box", "0.2", "0.2", "0.8", "0.8"])
    assert "warning: The images look unlike" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_grabcut_needs_a_box_or_points_and_opencv(photographs, tmp_path, capsys, monkeypatch):
    for flags in (["--auto"], ["--text", "dog"], ["--box", "0", "0", "1", "1", "--sam_model", "x"]):
        with pytest.raises(SystemExit) as stop:
            precompute_masks.main([*photographs, "--grabcut", *flags])
        assert stop.value.code == 2
    assert "--grabcut" in capsys.readouterr().err
    monkeypatch.setattr("szt_utils.grabcut.is_available", lambda: False)
    with pytest.raises(SystemExit, match="pip install"):
        precompute_masks.main([*photographs, "--grabcut", "--box", "0.2", "0.2", "0.8", "0.8"])
    assert not (tmp_path / "out").exists()


def test_grabcut_masks_by_a_box_and_does_not_mix_with_masks_of_a_model(photographs, tmp_path, capsys):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    box = ["--box", "0.1", "0.1", "0.9", "0.9"]
    for flags, to_do in ((["--grabcut"], 2), (["--grabcut"], 0), ([], 2), (["--grabcut"], 2)):
        capsys.readouterr()
        precompute_masks.main([*photographs, *box, *flags])
        printed = capsys.readouterr().out
        assert f"{to_do} of them to do" in printed and ("unlike" in printed) == (flags == [])
    record = json.loads((tmp_path / "out" / "stats.jsonl").read_text().splitlines()[-1])
    assert record["prompt"]["grabcut"] is True and "score" not in record


@pytest.mark.parametrize("flags, needed", [
    (["--grid", 2], "--auto"), (["--port", 0], "--ui"), (["--resolution", 64], "--preview or --ui"),
    (["--mask_dilation", 0], "--preview or --ui"), (["--center_crop"], "--preview or --ui")])
def test_no_flag_is_without_effect(run, capsys, flags, needed):
    with pytest.raises(SystemExit) as stop:
        run("--point", 0.5, 0.5, *flags)
    assert stop.value.code == 2 and f"argument {flags[0]}: needs {needed}" in capsys.readouterr().err


def test_text_foreign_folders_and_wrong_usage_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="takes no --text"):
        run("--text", "star")
    for flags in ([], ["--auto", "--point", 0.5, 0.5], ["--point", 2, 0], ["--box", 0.5, 0, 0.4, 1]):
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        assert stop.value.code == 2
    capsys.readouterr()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit, match="that this script did not write"):
        run("--auto")
    twins = tmp_path / "twins"
    twins.mkdir()
    for name in ("twin.png", "twin.bmp"):
        Image.new("RGB", (8, 8)).save(twins / name)
    with pytest.raises(SystemExit, match="would both become 'twin.png'"):
        precompute_masks.main(["--image_dir", str(twins), "--output_dir", str(tmp_path / "out"), "--auto"])


@pytest.fixture
def page(concept_folder, tmp_path):
    """The page as a user starts it: its address, its output folder and its end."""
    command = [sys.executable, str(ROOT / "precompute_masks.py"), "--image_dir", str(concept_folder[0]),
               "--output_dir", str(tmp_path / "masks"), "--ui", "--resolution", "128"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": path},
                               # Tests in a shell's background inherit a SIGINT that is ignored.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def end() -> None:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == ""  # no traceback
        assert process.returncode == 0  # Ctrl-C is how it ends

    yield process.stdout.readline().split()[1].rstrip("/"), tmp_path / "masks", end
    if process.poll() is None:
        end()


def send(url: str, body=None, **headers) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    return json.loads(urllib.request.urlopen(request).read())


def test_the_page_answers_saves_and_is_open_to_this_computer_only(page, concept_folder, run):
    url, folder, _ = page
    assert url.startswith("http://127.0.0.1:")
    state = send(f"{url}/state")
    assert state["dilation"] == 4 and len(state["images"]) == 5
    points = clicks(concept_folder[1])
    entries = {str(i): points[image["name"]] for i, image in enumerate(state["images"])}
    answer = send(f"{url}/mask", {"image": 0, **entries["0"]})
    assert set(answer["layers"]) == {"mask", "dilated", "grid"} and 0.05 < answer["area"] < 0.5
    assert not list(folder.glob("*.png"))  # only /save saves
    assert len(send(f"{url}/save", {"images": entries})["saved"]) == 5
    assert min(overlaps(folder, concept_folder[1])) > 0.85
    for path, body, headers, code in (
            ("/mask", {"image": 9}, {}, 400), ("/nothing", {}, {}, 404),
            ("/mask", {"image": 0, "include": [[999, 0]]}, {}, 400),
            ("/save", {}, {"Content-Type": "text/plain"}, 403), ("/save", {}, {"Host": "evil.example"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            send(url + path, body, **headers)
        assert refused.value.code == code, path
    with pytest.raises(SystemExit, match="is in use by another command"):
        run("--auto")


@pytest.fixture
def tab(page):
    """The page in a headless Chromium; no script error may happen on it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser_path:
        pytest.skip("no Chromium on this machine")
    errors = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        open_tab(tab, page[0])
        yield tab
        browser.close()
    assert not errors


def open_tab(tab, url: str) -> None:
    tab.goto(url)
    tab.wait_for_selector("body[data-ready=yes]")


def position(tab, x: float, y: float) -> dict:
    """A point of the shown image, of 128 pixels, as Playwright takes it."""
    box = tab.locator("#photo").bounding_box()
    return {"x": x * box["width"] / 128, "y": y * box["height"] / 128}


def click(tab, x: float, y: float, **options) -> None:
    tab.locator(".canvas").click(position=position(tab, x, y), **options)


def drag(tab, *points, button: str = "left") -> None:
    """Draw a line through points of the shown image."""
    corner = tab.locator("#photo").bounding_box()
    for i, point in enumerate(points):
        at = position(tab, *point)
        tab.mouse.move(corner["x"] + at["x"], corner["y"] + at["y"], steps=5)
        if i == 0:
            tab.mouse.down(button=button)
    tab.mouse.up(button=button)


def test_clicks_in_a_browser_become_masks(page, tab, concept_folder):
    url, folder, _ = page
    points = clicks(concept_folder[1])
    for i, name in enumerate(sorted(points)):
        tab.locator("nav button").nth(i).click()
        click(tab, *points[name]["include"][0])
        assert tab.locator(".dot.include").count() == 1
    click(tab, 4, 4, button="right")
    assert tab.locator(".dot.exclude").count() == 1
    tab.locator(".dot.exclude").click()
    assert tab.locator(".dot.exclude").count() == 0 and tab.locator(".dot.include").count() == 1
    tab.locator("#areas", has_text="trains on").wait_for()
    assert tab.locator("#progress").inner_text() == "0 of 5 done"
    tab.click("#save")
    tab.locator("#message", has_text="Saved 5 masks").wait_for()
    assert tab.locator("#progress").inner_text() == "5 of 5 done"
    assert tab.locator(".layer").count() == 3 and tab.locator("nav .done").count() == 5
    assert min(overlaps(folder, concept_folder[1])) > 0.85

    # A second tab saves over what the first one shows; the first one is told, and starts from there.
    second = tab.context.browser.new_page()
    open_tab(second, url)
    for page_of, x in ((second, 20), (tab, 40)):
        page_of.locator("nav button").nth(0).click()
        click(page_of, x, x)
        page_of.locator("nav .changed").wait_for()
    second.click("#save")
    second.locator("#message", has_text="Saved 1 mask").wait_for()
    names = sorted(points)
    (folder / names[1]).write_bytes(b"not a mask")
    tab.click("#save")
    tab.locator("#message", has_text=f"{names[0]} changed in another tab").wait_for()
    assert tab.locator("nav .changed").count() == 0 and tab.locator(".dot").count() == 2
    tab.locator("nav button").nth(1).click()
    assert "cannot be read" in tab.locator("#note").inner_text()


def test_a_person_paints_five_masks_with_brush_eraser_undo_and_keys(page, tab, concept_folder):
    _, folder, _ = page
    names = sorted(path.name for path in concept_folder[0].glob("*.png"))
    tab.keyboard.press("b")
    tab.locator("#size").fill("188")  # thousandths of the image: 24 pixels
    for i, name in enumerate(names):
        assert tab.locator("#name").inner_text() == name
        drag(tab, (30, 40), (90, 40))
        drag(tab, (30, 60), (90, 60))
        tab.keyboard.press("e")
        drag(tab, (64, 20), (64, 100))  # a cut from top to bottom
        if i == 1:  # without the cut
            tab.keyboard.press("Control+z")
        if i == 2:  # undone and done again
            tab.keyboard.press("z")
            tab.keyboard.press("y")
        tab.keyboard.press("b")
        drag(tab, (10, 120), (10, 120))
        drag(tab, (10, 120), (14, 120), button="right")  # the other button erases
        tab.keyboard.press("Enter")
        tab.locator("#progress", has_text=f"{i + 1} of 5 done").wait_for()
        mask = is_inside(folder / name)
        assert mask.shape == (128, 128) and mask[40, 30:50].all() and mask[40, 80:90].all()
        assert not mask[10].any() and not mask[90:].any()
        assert mask[50, 64] == (i == 1)
    records = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [(record["way"], record["prompt"]) for record in records] == [("ui", {})] * 5
    assert not any("score" in record for record in records)
    # Zoomed, a stroke still lands under the mouse; a saved mask is where the next stroke begins.
    tab.locator("nav button").nth(0).click()
    tab.keyboard.press("+")
    tab.mouse.wheel(0, -200)
    drag(tab, (64, 70), (64, 70))
    tab.keyboard.press("s")
    tab.locator("#message", has_text="Saved 1 mask").wait_for()
    mask = is_inside(folder / names[0])
    assert mask[70, 64] and mask[40, 30] and not mask[40, 64]
    tab.keyboard.press("n")
    assert tab.locator("#name").inner_text() == names[1]
    tab.keyboard.press("p")
    tab.click("#clear")
    assert tab.locator("#save").is_disabled()  # an empty mask is not saved


def test_a_stroke_before_the_saved_mask_has_come_is_added_to_it(page, tab, concept_folder):
    url, folder, _ = page
    points = clicks(concept_folder[1])
    name = sorted(points)[3]
    send(f"{url}/save", {"images": {str(i): points[each] for i, each in enumerate(sorted(points))}})
    before, slow, held = is_inside(folder / name), [True], []
    tab.route("**/mask", lambda route: held.append(route) if slow else route.continue_())
    tab.goto(url)
    tab.locator("nav button").nth(3).click()
    tab.keyboard.press("b")
    drag(tab, (4, 4), (20, 4))
    tab.keyboard.press("s")
    tab.wait_for_timeout(500)
    slow.clear()
    for route in held:
        route.continue_()
    tab.locator("#message", has_text="Saved 1 mask").wait_for()
    after = is_inside(folder / name)
    assert before.any() and after[before].all() and after[4, 4:20].all() and not after[120:].any()


def test_a_box_in_a_browser_becomes_a_mask_by_grabcut(page, tab, concept_folder):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    _, folder, _ = page
    true = sorted(concept_folder[1].glob("*.png"))[0]
    ys, xs = np.nonzero(is_inside(true))
    tab.keyboard.press("x")
    drag(tab, (xs.min() - 3, ys.min() - 3), (xs.max() + 3, ys.max() + 3))
    tab.locator("nav .changed").wait_for()
    assert tab.locator("#frame").is_visible()
    tab.keyboard.press("b")
    drag(tab, *zip(xs[len(xs) // 3::len(xs) // 3], ys[len(ys) // 3::len(ys) // 3], strict=True))
    tab.keyboard.press("g")  # the box still counts
    tab.locator("#message", has_text="GrabCut ...").wait_for()
    tab.locator("#message:empty").wait_for(state="attached")
    tab.keyboard.press("s")
    tab.locator("#message", has_text="Saved 1 mask").wait_for()
    found = is_inside(folder / true.name)
    assert (found & is_inside(true)).sum() / (found | is_inside(true)).sum() > 0.7


def test_masks_made_by_clicking_are_kept(run, page, concept_folder, capsys):
    url, folder, end = page
    name = sorted(path.name for path in concept_folder[0].glob("*.png"))[0]
    send(f"{url}/save", {"images": {"0": {"include": [[2, 2]]}}})  # not what --auto would choose
    clicked = (folder / name).read_bytes()
    end()
    run("--auto", "--grid", 6)
    assert (folder / name).read_bytes() == clicked and "4 of them to do" in capsys.readouterr().out
