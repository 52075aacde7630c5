"""The verdict from pixel signals: fit, thresholds, the verdict on a set, and what the bundled one says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from szt_utils.errors import InputError
from szt_utils.files import write_json
from szt_utils.pixel_score import (
    PARTS,
    explain_pixels,
    fit_score,
    is_coarse_jpeg,
    pixel_calibration_path,
    read_pixel_calibration,
    report_pixels,
    score_pixels,
)
from szt_utils.pixel_signals import SIGNALS, pixel_signals

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"
COUNT = len(SIGNALS)


def made(first: float) -> list[float]:
    """Signals that are 0 but for the first."""
    return [first] + [0.0] * (COUNT - 1)


@pytest.fixture
def simple():
    """A calibration whose scores are the first signal, minus 2 for a poison and minus 1 for a trace."""
    part = {"mean": [0.0] * COUNT, "deviation": [1.0] * COUNT,
            "coefficients": [1.0] + [0.0] * (COUNT + COUNT * (COUNT + 1) // 2)}
    return {"signals": list(SIGNALS), "poison": {**part, "threshold": 2.0},
            "trace": {**part, "threshold": 1.0}}


def test_the_fit_finds_the_odds_of_two_gaussians():
    """Of equal covariance, one deviation apart along one signal: ln odds 2 x of means at -1 and 1."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8000, COUNT))
    poisoned = np.arange(8000) % 4 == 0  # the classes count alike, whatever their sizes
    rows[:, 0] += np.where(poisoned, 1, -1)
    part = fit_score(rows, poisoned, np.ones(8000), ridge=1e-6)
    found = score_pixels(part, np.array([made(x) for x in (-1, 0, 1)]))
    assert found == pytest.approx([-2, 0, 2], abs=0.4)


def test_the_fit_finds_what_only_a_product_separates():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, COUNT))
    poisoned = rows[:, 0] * rows[:, 1] > 0
    part = fit_score(rows, poisoned, np.ones(2000))
    assert ((score_pixels(part, rows) > 0) == poisoned).mean() > 0.95


def test_weights_count_as_copies():
    rng = np.random.default_rng(0)
    rows, poisoned = rng.normal(size=(300, COUNT)), np.arange(300) % 2 == 0
    weights = 1 + np.arange(300) % 3
    again = np.repeat(np.arange(300), weights)
    copied = fit_score(rows[again], poisoned[again], np.ones(len(again)))
    weighted = fit_score(rows, poisoned, weights)
    assert not np.allclose(weighted["mean"], copied["mean"])  # the scale is of the rows
    assert score_pixels(weighted, rows) == pytest.approx(score_pixels(copied, rows), abs=0.1)


def test_an_image_is_poisoned_clean_or_neither(simple):
    for first, verdict, score in ((2.5, "poisoned", 0.5), (1.5, "cannot tell", -0.5), (0.5, "clean", -1.5)):
        found = explain_pixels(simple, made(first))
        assert found["verdict"] == verdict and found["score"] == pytest.approx(score)
        assert found["sentence"].startswith(verdict) and f"score {score:+.1f}" in found["sentence"]
    coarse = explain_pixels(simple, made(0.5), coarse=True)
    assert coarse["verdict"] == "cannot tell" and "JPEG of this quality" in coarse["sentence"]
    assert explain_pixels(simple, made(2.5), coarse=True)["verdict"] == "poisoned"
    nothing = explain_pixels(simple, None)
    assert nothing["verdict"] == "cannot tell" and nothing["score"] is None and "grey" in nothing["sentence"]
    for far, score in ((1e9, 2), (-1e9, -6)):  # no signal counts beyond 4 deviations
        assert explain_pixels(simple, made(far))["score"] == score


def test_a_set_is_poisoned_when_more_images_are_than_chance_explains(simple):
    for poisoned, clean, open_, verdict in ((1, 0, 0, "poisoned"), (1, 9, 0, "clean"), (2, 8, 4, "clean"),
                                            (3, 5, 4, "poisoned"), (0, 3, 3, "cannot tell"),
                                            (3, 0, 20, "poisoned"), (0, 0, 2, "cannot tell"),
                                            (1, 1, 5, "cannot tell"), (10, 90, 0, "poisoned")):
        rows = [made(3)] * poisoned + [made(0)] * clean + [None] * open_
        found = report_pixels(simple, {str(i): row for i, row in enumerate(rows)})
        assert found["verdict"] == verdict, (poisoned, clean, open_)
        assert found["counts"] == {"poisoned": poisoned, "clean": clean, "cannot tell": open_}
        assert found["sentence"].startswith(f"{poisoned} of {len(rows)} ") and verdict in found["sentence"]
    assert found["images"]["0"]["signals"] == dict(zip(SIGNALS, made(3), strict=True))
    json.dumps(found, allow_nan=False)


def test_a_coarse_jpeg_is_one_below_quality_90(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for quality in (50, 75, 88, 90, 95):
        image.save(tmp_path / "image.jpg", quality=quality)
        assert is_coarse_jpeg(tmp_path / "image.jpg") == (quality < 90)
    image.convert("L").save(tmp_path / "gray.jpg", quality=50)
    image.save(tmp_path / "image.png")
    assert is_coarse_jpeg(tmp_path / "gray.jpg") and not is_coarse_jpeg(tmp_path / "image.png")
    image.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[image], quality=50)
    assert Image.open(tmp_path / "phone.jpg").format == "MPO" and is_coarse_jpeg(tmp_path / "phone.jpg")


def test_what_is_no_calibration_is_refused(simple, tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(InputError, match="not a calibration of the pixel signals .*does not exist"):
        read_pixel_calibration(path)
    write_json(path, simple)
    assert read_pixel_calibration(path) == simple
    part = simple["trace"]
    for change in ({"mean": [0.0]}, {"coefficients": [1.0]}, {"deviation": [0.0] * COUNT},
                   {"threshold": "x"}, {"mean": ["x"] * COUNT}, {"mean": None}):
        write_json(path, {**simple, "trace": {**part, **change}})
        with pytest.raises(InputError, match="not a calibration of the pixel signals"):
            read_pixel_calibration(path)
    for change in ([], 3, {**simple, "signals": ["floor"]}, {**simple, "trace": None}):
        write_json(path, change)
        with pytest.raises(InputError, match="not a calibration of the pixel signals"):
            read_pixel_calibration(path)


# --- The bundled calibration

def verdict(image: Image.Image) -> dict:
    return explain_pixels(read_pixel_calibration(), pixel_signals(np.asarray(image.convert("RGB"))))


def changed(image: Image.Image, by: np.ndarray) -> Image.Image:
    return Image.fromarray((np.asarray(image.convert("RGB")) + by).round().clip(0, 255).astype(np.uint8))


def signs_of_smooth_noise(shape: tuple[int, ...], levels: int) -> np.ndarray:
    """Two levels that change every few pixels, channel by channel, as the steps of an attack make them."""
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    channels = [Image.fromarray(noise[..., i]).filter(ImageFilter.GaussianBlur(1)) for i in range(3)]
    smooth = np.stack([np.asarray(channel, float) for channel in channels], -1)
    return np.where(smooth > np.median(smooth), levels, -levels)


@pytest.fixture(scope="module")
def photographs():
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    return [Image.open(folder / name) for name in ("astronaut.png", "chelsea.png", "coffee.png")]


def test_the_bundled_calibration_is_small_and_whole():
    assert Path(pixel_calibration_path()).stat().st_size < 10_000
    calibration = read_pixel_calibration()
    assert all(math.isfinite(calibration[part]["threshold"]) for part in PARTS)


def test_two_levels_raise_the_score_of_a_photograph_and_noise_is_no_poison(photographs):
    for image in photographs:
        clean = verdict(image)
        poisoned = verdict(changed(image, signs_of_smooth_noise((image.height, image.width, 3), 8)))
        assert clean["verdict"] != "poisoned" and poisoned["score"] > clean["score"] + 2
        for level in (4, 8):
            noise = np.random.default_rng(0).normal(0, level, (image.height, image.width, 3))
            assert verdict(changed(image, noise))["verdict"] != "poisoned"


@pytest.mark.skipif(not PAIRS.is_dir(), reason="the pairs of clean and poisoned paintings are not here")
def test_real_poisons_are_found_and_of_their_clean_paintings_one():
    """They took part in the calibration: this guards its result, docs/diagnosis.md has the fair numbers."""
    found = {kind: [verdict(Image.open(path))["verdict"] for path in sorted((PAIRS / kind).glob("*.png"))]
             for kind in ("clean", "aspl", "styleguard")}
    assert found["clean"].count("poisoned") <= 1 and len(found["clean"]) == 6
    assert sum(found[kind].count("poisoned") for kind in ("aspl", "styleguard")) >= 8
