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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
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


def test_clicks_in_a_browser_become_masks(page, concept_folder):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser_path:
        pytest.skip("no Chromium on this machine")
    url, folder, _ = page
    points, errors = clicks(concept_folder[1]), []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        tab.wait_for_selector("body[data-ready=yes]")
        for i, name in enumerate(sorted(points)):
            canvas = tab.locator(".canvas").nth(i)
            scale = canvas.bounding_box()["width"] / 128
            x, y = points[name]["include"][0]
            canvas.click(position={"x": x * scale, "y": y * scale})
        tab.locator(".canvas").nth(0).click(position={"x": 10, "y": 10}, button="right")
        assert tab.locator(".dot.include").count() == 5 and tab.locator(".dot.exclude").count() == 1
        tab.locator(".dot.exclude").click()
        assert tab.locator(".dot.exclude").count() == 0
        tab.click("#save")
        tab.locator("#message", has_text="Saved 5 masks").wait_for()
        assert tab.locator(".layer.mask").count() == 5
        assert min(overlaps(folder, concept_folder[1])) > 0.85

        # A second tab saves over what the first one shows; the first one is told, and starts from there.
        second = browser.new_page()
        second.goto(url)
        second.wait_for_selector("body[data-ready=yes]")
        for page_of, x in ((second, 20), (tab, 40)):
            page_of.locator(".canvas").nth(0).click(position={"x": x, "y": x})
            page_of.locator("figure.changed").wait_for()
        second.click("#save")
        second.locator("#message", has_text="Saved 1 mask").wait_for()
        names = sorted(points)
        (folder / names[1]).write_bytes(b"not a mask")
        tab.click("#save")
        tab.locator("#message", has_text=f"{names[0]} changed in another tab").wait_for()
        assert tab.locator("figure.changed").count() == 0
        assert tab.locator(".canvas").nth(0).locator(".dot").count() == 2
        assert "cannot be read" in tab.locator("figure em").nth(1).inner_text()
        browser.close()
    assert not errors


def test_masks_made_by_clicking_are_kept(run, page, concept_folder, capsys):
    url, folder, end = page
    name = sorted(path.name for path in concept_folder[0].glob("*.png"))[0]
    send(f"{url}/save", {"images": {"0": {"include": [[2, 2]]}}})  # not what --auto would choose
    clicked = (folder / name).read_bytes()
    end()
    run("--auto", "--grid", 6)
    assert (folder / name).read_bytes() == clicked and "4 of them to do" in capsys.readouterr().out
