"""Calibration of the pixel signals: copies, what is left out, thresholds, intervals, and its command."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from szt_utils.pixel_score import read_pixel_calibration
from szt_utils.pixel_signals import SIGNALS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("calibrate_pixels")
    sys.modules.pop("calibrate_pixels", None)


def records(rng, source: str, kind: str, copy: str, mean: float, count: int) -> list[dict]:
    return [{"source": source, "kind": kind, "file": f"{i}.png", "copy": copy,
             "signals": (rng.normal(size=len(SIGNALS)) + mean).tolist()} for i in range(count)]


@pytest.fixture
def table(script):
    """Two sources of clean images and two of poisons, three deviations apart in every signal."""
    rng = np.random.default_rng(0)
    rows = []
    for copy in ("original", "noise 4"):
        rows += records(rng, "a", "clean-photograph", copy, 0, 40) + records(rng, "b", "clean-painting", copy,
                                                                             0, 40)
    for copy in ("original", "JPEG 95", "JPEG 75"):
        rows += records(rng, "a", "mist", copy, 3, 10) + records(rng, "c", "aspl", copy, 3, 10)
    return script.Table(rows)


def test_the_interval_is_wilsons(script):
    """By hand for 8 of 10, and at the ends, where the share itself has no spread."""
    found = script.wilson(8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none = script.wilson(0, 10)
    assert none["low"] == 0 and none["high"] == pytest.approx(0.2775, abs=1e-4)
    assert script.wilson(10, 10)["high"] == 1


def test_neither_a_source_nor_its_poisons_teach_their_own_scores(script, table, monkeypatch):
    taught = []

    def record(part, rows):
        taught.append({(str(s), str(k)) for s, k in zip(table.source[rows], table.kind[rows], strict=True)})
        return {"mean": [0.0] * 9, "deviation": [1.0] * 9, "coefficients": [0.0] * 55}
    monkeypatch.setattr(table, "fit", record)
    assert not np.isnan(table.left_out("poison")).any()
    assert taught[0] == {("b", "clean-painting"), ("c", "aspl")}
    assert taught[1] == {("a", "clean-photograph"), ("a", "mist"), ("c", "aspl")}
    assert taught[2] == {("a", "clean-photograph"), ("b", "clean-painting"), ("a", "mist")}


def test_the_trace_score_learns_from_all_copies_of_poisons(table):
    poison, trace = table.learns("poison"), table.learns("trace")
    assert set(table.copy[poison & table.poisoned]) == {"original"}
    assert set(table.copy[trace & table.poisoned]) == {"original", "JPEG 95", "JPEG 75"}
    assert poison[~table.poisoned].all() and trace[~table.poisoned].all()


def test_at_most_five_percent_of_every_kind_and_treatment_are_accused(script, table):
    scores = {part: table.left_out(part) for part in ("poison", "trace")}
    limit = script.thresholds(table, scores)
    for kind in ("clean-photograph", "clean-painting"):
        for treatment in ("original", "noise"):
            rows = (table.kind == kind) & (table.treatment == treatment)
            assert rows.sum() == 40 and (scores["poison"][rows] > limit["poison"]).mean() <= 0.05
    for copy in ("original", "JPEG 95"):
        rows = table.poisoned & (table.copy == copy)
        assert (scores["trace"][rows] < limit["trace"]).mean() <= 0.1
    found = script.summarize(table, scores, limit)
    assert found["area"]["originals"] > 0.99 and found["kinds"]["mist"]["original"]["poisoned"]["found"] >= 9
    counted = found["kinds"]["clean-photograph"]
    assert set(counted) == {"original", "noise"} and counted["noise"]["poisoned"]["of"] == 40


def test_copies_are_the_same_every_time_and_of_the_size_they_say(script):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    sizes = {name: make(image).size for name, make in script.COPIES.items()}
    assert sizes["upscaled 1.5"] == (90, 60) and sizes["halved"] == (30, 20) and sizes["JPEG 75"] == (60, 40)
    assert {name.split()[0] for name in sizes} == set(script.TREATMENTS)
    assert (np.asarray(script.noisy(image, 4)) == np.asarray(script.noisy(image, 4))).all()


def test_from_images_to_a_calibration_that_can_be_read(script, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    for source in ("one", "two"):
        for kind, levels in (("clean-photograph", 0), (f"poison-{source}", 8)):
            (tmp_path / "images" / source / kind).mkdir(parents=True)
            for i in range(3):
                content = rng.normal(128, 3, (112, 112, 1)) + rng.normal(0, 1, (112, 112, 3))
                pixels = content + levels * rng.choice([-1, 1], content.shape)
                Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(
                    tmp_path / "images" / source / kind / f"{i}.png")
    small = {name: script.COPIES[name] for name in ("original", "JPEG 95", "JPEG 90", "noise 4")}
    monkeypatch.setattr(script, "COPIES", small)
    arguments = ["--image_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")]
    script.main(arguments)
    read_pixel_calibration(tmp_path / "out" / "pixel_calibration.json")
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["kinds"]["poison-one"]["original"]["poisoned"]["of"] == 3
    assert len(json.loads((tmp_path / "out" / "signals.json").read_text())["images"]) == 4 * 3 * len(small)
    printed = capsys.readouterr().out
    script.main(arguments)  # again from the signals alone
    assert capsys.readouterr().out == printed and "poison-two" in printed


def test_too_few_sources_are_one_sentence(script, tmp_path):
    arguments = ["--image_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit, match=r"^error: The folder '.*' holds no <source>/<kind> folders\.$"):
        script.main(arguments)
    (tmp_path / "images" / "one" / "clean").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(100, 150, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "one" / "clean" / "a.png")
    with pytest.raises(SystemExit, match=r"^error: '.*' has fewer than two sources of clean images: none"):
        script.main(arguments)
