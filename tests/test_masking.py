"""Masks of a folder: one prompt, the paper's dilation, folders of version 0.1, and what is reported."""

import json

import pytest
import torch
from conftest import ROOT

import precompute_masks
from szt_utils.errors import InputError
from szt_utils.masking import (
    WAYS,
    ImageJob,
    MaskingSettings,
    Masks,
    mask_folder,
    read_jobs,
    report,
    sam_prompts_for,
)
from szt_utils.pocket import write_concept
from szt_utils.safe_zone import SafeZone, paper_dilation


def settings(**given) -> MaskingSettings:
    return MaskingSettings(**{"image_dir": "images", "output_dir": "masks", "text": "star"} | given)


@pytest.fixture
def folder(tmp_path):
    write_concept("teal-striped-star", tmp_path / "images", count=2)
    return {"image_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "masks"), "text": None}


def test_exactly_one_way():
    values = {"auto": True, "ui": True, "point": [(0, 0)], "box": [0, 0, 1, 1], "points_file": "p.json",
              "text": ""}
    assert set(values) == set(WAYS)
    for way, value in values.items():
        assert settings(**{"text": None, way: value}).way == way
    for given in ({"text": None}, {"auto": True}):
        with pytest.raises(InputError, match="Exactly one of auto"):
            settings(**given)


def test_the_page_and_the_preview_dilate_as_the_paper_does():
    for resolution in (64, 128, 512, 1000):
        assert settings(resolution=resolution).zone == SafeZone.paper(resolution)
        assert settings(resolution=resolution).zone.mask_dilation == paper_dilation(resolution)
    assert settings(mask_dilation=0).zone.mask_dilation == 0


def test_the_flags_of_the_script_are_the_settings():
    args = precompute_masks.parse_args(["--image_dir", "images", "--output_dir", "masks", "--text", "star"])
    assert MaskingSettings(**vars(args)) == settings()
    assert Masks(settings()).script in {path.name for path in ROOT.glob("*.py")}


def test_the_prompt_of_a_point_and_a_box_follows_the_images_size(folder):
    jobs = read_jobs(folder["image_dir"])
    prompts = sam_prompts_for(settings(**folder | {"point": [(0.5, 0.25)]}), jobs)
    assert [prompt.include for prompt in prompts] == [((64, 32),)] * 2
    assert sam_prompts_for(settings(text="a star"), jobs)[1].text == "a star"


def test_a_folder_of_version_0_1_is_finished(folder, tmp_path, capsys):
    """Its records have another name for the hash of the set of images."""
    auto = settings(**folder, auto=True, grid=4)
    mask_folder(auto)
    stats = tmp_path / "masks" / "stats.jsonl"
    records = [json.loads(line) for line in stats.read_text().splitlines()]
    assert len(records) == 2 and all(set(record["prompt"]) == {"grid", "images"} for record in records)
    stats.write_text(stats.read_text().replace('"images"', '"pictures"'))
    before = stats.read_text()
    capsys.readouterr()
    mask_folder(auto)
    assert "0 of them to do" in capsys.readouterr().out and stats.read_text() == before
    mask_folder(settings(**folder, auto=True, grid=5))
    assert "2 of them to do" in capsys.readouterr().out


def test_masks_of_untypical_area_and_low_confidence_are_reported(folder, capsys):
    masks, (one, two) = Masks(settings(**folder, auto=True)), read_jobs(folder["image_dir"])
    assert isinstance(one, ImageJob) and masks.read(one) is None
    report([one, two], masks)
    assert capsys.readouterr().out == ""  # no mask, no report
    masks.begin()
    masks.save(one, torch.zeros(128, 128, dtype=torch.bool), "ui", {}, 0.5)
    full = torch.ones(128, 128, dtype=torch.bool)
    masks.save(two, full, "auto", {}, 0.5, confidence=0.2)
    report([one, two], masks)
    printed = capsys.readouterr().out
    assert f"{one.path.name}: the mask is all black" in printed
    assert f"{two.path.name}: the mask covers 100.0% of the image" in printed
    assert f"{two.path.name}: the mask has a low confidence (0.20)" in printed
    assert masks.read(one).getextrema() == (0, 0) and masks.read(two).getextrema() == (255, 255)
    assert masks.is_finished(one, "auto", {"grid": 12}) and not masks.is_finished(two, "auto", {"grid": 12})
