"""Masks of a folder: one prompt, the paper's dilation, folders of version 0.1, and what is reported."""

import json
import weakref

import pytest
import torch
from conftest import ROOT
from PIL import Image

import precompute_masks
from szt_utils.consensus import Choice
from szt_utils.errors import InputError
from szt_utils.images import read_image
from szt_utils.mask_page import SavedMask
from szt_utils.mask_preview import mask_sheet
from szt_utils.masking import (
    WAYS,
    MaskingSettings,
    MaskJob,
    Masks,
    area_warning,
    is_foreign,
    mask_folder,
    masked,
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
    given = {name: value for name, value in vars(args).items() if value is not None}
    assert MaskingSettings(**given) == settings()
    assert Masks(settings()).script in {path.name for path in ROOT.glob("*.py")}


def test_an_image_without_a_mask_stops_no_other(folder, monkeypatch, capsys):
    def refuse_one(segmenter, embedded, prompt):
        done.append(embedded)
        if len(done) == 1:
            raise InputError("Nothing was found.")
        return torch.ones(128, 128, dtype=torch.bool), 0.75
    done = []
    monkeypatch.setattr("szt_utils.masking.segment", refuse_one)
    made = settings(**folder | {"point": [(0.5, 0.5)]})
    with pytest.raises(InputError, match=r"^'.*\.png': Nothing was found\.$"):
        mask_folder(made)
    images = len(read_jobs(folder["image_dir"]))
    assert len(done) == images == 2 and len(list(ROOT.joinpath(made.output_dir).glob("*.png"))) == images - 1
    assert "masks" in capsys.readouterr().out  # the report comes nevertheless
    (record,) = map(json.loads, (ROOT / made.output_dir / "stats.jsonl").read_text().splitlines())
    assert (record["score"], record["area"]) == (0.75, 1)


def test_an_image_that_the_model_cannot_take_stops_no_other(folder, tmp_path):
    """The choice of --auto needs all of them."""
    thin = tmp_path / "images" / "thin.png"
    Image.new("RGB", (8000, 20)).save(thin)
    message = f"^'{thin}': 8000 x 20 pixels are too long and narrow for the model; crop the image$"
    with pytest.raises(InputError, match=message):
        mask_folder(settings(**folder, auto=True, grid=4))
    assert not (tmp_path / "masks").exists()
    with pytest.raises(InputError, match=message):
        mask_folder(settings(**folder | {"point": [(0.5, 0.5)], "preview": True}))
    assert len(list((tmp_path / "masks").glob("*.png"))) == 2
    Image.new("L", (8000, 20), 255).save(tmp_path / "masks" / "thin.png")
    mask_folder(settings(**folder | {"point": [(0.5, 0.5)], "preview": True}))
    assert (tmp_path / "masks" / "preview" / "sheet.png").is_file()


@pytest.mark.parametrize("way", [{"auto": True, "grid": 2}, {"point": [(0.5, 0.5)]}, {"ui": True}])
def test_few_images_of_a_folder_are_in_memory(folder, monkeypatch, way):
    write_concept("teal-striped-star", folder["image_dir"], count=9)
    alive, most = 0, 0

    def read(path):
        nonlocal alive, most
        image = read_image(path)
        alive += 1
        most = max(most, alive)
        weakref.finalize(image, end)
        return image

    def end():
        nonlocal alive
        alive -= 1

    def visit(get, post, *_):
        for i in range(9):
            assert get(f"image/{i}") and get(f"thumbnail/{i}")
            post("save", {"images": {i: {"include": [[64, 64]]}}})

    monkeypatch.setattr("szt_utils.masking.read_image", read)
    monkeypatch.setattr("szt_utils.masking.serve_locally", visit)
    mask_folder(settings(**folder, **way, preview=True))
    assert 0 < most <= (6 if "ui" in way else 2)


def test_an_image_that_changes_during_a_run_is_not_masked(folder):
    job, _ = read_jobs(folder["image_dir"])
    assert job.read().size == job.size == (128, 128)
    Image.new("RGB", (128, 128)).save(job.path)
    with pytest.raises(InputError, match=f"'{job.path}' has changed since the start"):
        job.read()


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


def test_the_score_of_an_automatic_mask_is_that_of_the_chosen_one(folder, tmp_path, monkeypatch):
    def choose(candidates):
        chosen.extend(each.merit.min().item() for each in candidates)
        assert all(each.merit.max() - each.merit.min() > 0.01 for each in candidates)
        return [Choice(int(each.merit.argmin()), 0.5) for each in candidates]

    chosen = []
    monkeypatch.setattr("szt_utils.masking.choose_masks", choose)
    mask_folder(settings(**folder, auto=True, grid=4))
    records = map(json.loads, (tmp_path / "masks" / "stats.jsonl").read_text().splitlines())
    assert [record["score"] for record in records] == pytest.approx(chosen, abs=1e-4)


@pytest.mark.parametrize("center_crop", [False, True])
def test_the_preview_and_the_page_are_given_the_settings(tmp_path, monkeypatch, center_crop):
    """The images are foreign to the bundled model, which the page says; masks of one's own are shown."""
    (tmp_path / "images").mkdir()
    image = Image.effect_noise((96, 64), 60).convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, (40, 10, 60, 40))
    image.save(tmp_path / "images" / "a.png")
    given = settings(image_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "masks"), text=None,
                     ui=True, port=4711, resolution=64, mask_dilation=3, center_crop=center_crop,
                     preview=True)
    with Masks(given) as masks:
        masks.begin()
    mask.save(tmp_path / "masks" / "a.png")
    served = []
    monkeypatch.setattr("szt_utils.masking.serve_locally", lambda get, post, port, ready: served.append(
        (port, json.loads(get("state")[1]))))
    mask_folder(given)
    ((port, state),) = served
    assert port == 4711 and "paint the masks, or give --sam_model" in state["notice"]
    assert (state["resolution"], state["dilation"], state["center_crop"]) == (64, 3, center_crop)
    expected = mask_sheet([("a.png", image, mask)], given.zone, 64, center_crop)
    assert Image.open(tmp_path / "masks" / "preview" / "sheet.png").tobytes() == expected.tobytes()


def test_masks_of_untypical_area_and_low_confidence_are_reported(folder, capsys):
    one, two = read_jobs(folder["image_dir"])
    full = torch.ones(128, 128, dtype=torch.bool)
    with Masks(settings(**folder, auto=True)) as masks:
        assert isinstance(one, MaskJob) and masks.read(one) == SavedMask()
        report([one, two], masks)
        assert capsys.readouterr().out == ""  # no mask, no report
        masks.begin()
        masks.save_image(*masked(one, ~full, "ui", {}, 0.5))
        masks.save_image(*masked(two, full, "auto", {}, 0.5, confidence=0.2))
        report([one, two], masks)
        printed = capsys.readouterr().out
        assert f"{one.path.name}: the mask is all black" in printed
        assert f"{two.path.name}: the mask covers 100.0% of the image" in printed
        assert f"{two.path.name}: the mask has a low confidence (0.20)" in printed
        assert "the concept covers 50.0% of an image, from 0.0% to 100.0%." in printed
        assert masks.read(one).mask.getextrema() == (0, 0)
        assert masks.read(two).mask.getextrema() == (255, 255)
        assert masks.outdated([one, two], "auto", lambda job: [{"grid": 12}]) == [two]
        assert masks.outdated([one, two], "auto", lambda job: [{}]) == []


def test_a_mask_of_one_pixel_is_small_and_not_black(folder):
    speck = torch.zeros(512, 512, dtype=torch.bool)
    speck[0, 0] = True
    record, _ = masked(read_jobs(folder["image_dir"])[0], speck, "ui", {}, 0.5)
    assert record["area"] == pytest.approx(1 / 512**2, rel=1e-3)
    assert "covers 0.0% of the image" in area_warning(record)


@pytest.mark.parametrize("area, is_typical", [(0.0199, False), (0.02, True), (0.8, True), (0.801, False)])
def test_the_areas_of_masks_that_are_warned_about(area, is_typical):
    expected = None if is_typical else f"a.png: the mask covers {area:.1%} of the image"
    assert area_warning({"area": area, "source": "a.png"}) == expected


def test_a_mask_of_a_box_has_no_clicks(folder):
    """The page would show a mask of its points alone."""
    job, _ = read_jobs(folder["image_dir"])
    prompt = {"include": [[64, 64]], "box": [1, 1, 90, 90]}
    with Masks(settings(**folder, ui=True)) as masks:
        masks.begin()
        masks.save_image(*masked(job, torch.ones(128, 128, dtype=torch.bool), "points_file", prompt, 0.5))
        assert masks.read(job).mask is not None and masks.read(job).clicks == {}


@pytest.mark.parametrize("given, is_asked", [({}, True), ({"sam_checkpoint": "sam.pth"}, False),
                                             ({"sam_model": "org/sam"}, False)])
def test_only_the_bundled_model_can_know_images_too_little(monkeypatch, given, is_asked):
    monkeypatch.setattr("szt_utils.masking.is_unfamiliar", lambda features: True)
    assert is_foreign(settings(**given), object(), []) == is_asked


def test_a_mask_that_was_changed_by_hand_is_kept_by_every_way(folder, tmp_path, capsys):
    """And so is one that somebody has put there; both are read and reported as they are now."""
    mask_folder(settings(**folder, auto=True, grid=4))
    one, two = read_jobs(folder["image_dir"])
    drawn = Image.new("L", (128, 128))
    drawn.paste(255, (0, 0, 64, 64))
    drawn.save(tmp_path / "masks" / one.name)
    edited = (tmp_path / "masks" / one.name).read_bytes()
    write_concept("teal-striped-star", tmp_path / "images", count=3)
    third = read_jobs(folder["image_dir"])[2]
    drawn.save(tmp_path / "masks" / third.name)
    for way in ({"auto": True, "grid": 5}, {"point": [(0.5, 0.5)]}, {"box": (0.1, 0.1, 0.9, 0.9)}):
        Image.effect_noise((128, 128), 9).convert("RGB").save(one.path)  # its image has changed as well
        capsys.readouterr()
        mask_folder(settings(**folder, **way))
        printed = capsys.readouterr().out
        assert "3 images" in printed and "1 of them to do" in printed
        assert f"Results made or changed by hand are kept (2): {one.name}, {third.name};" in printed
        assert "3 masks in" in printed
        assert printed.count("the image has changed since its mask was made") == 1
        assert f"warning: {one.path.name}: the image has changed" in printed
        for job in (one, third):
            assert (tmp_path / "masks" / job.name).read_bytes() == edited
    with Masks(settings(**folder, ui=True)) as masks:
        saved = masks.read(one)
        assert saved.mask.tobytes() == drawn.tobytes()
        one = read_jobs(folder["image_dir"])[0]
        for job, of_another in ((one, True), (third, False)):
            assert "changed by hand" in masks.read(job).note
            assert ("another version of the image" in masks.read(job).note) == of_another
        assert len({masks.read(job).version for job in (one, two)} | {""}) == 3
        (tmp_path / "masks" / one.name).write_bytes(b"no image")
        assert masks.read(one).mask is None and "cannot be read" in masks.read(one).note
        report([one, two, third], masks)
    printed = capsys.readouterr().out
    assert "warning: The image" in printed and "cannot be read" in printed and "2 masks in" in printed


def test_a_clicked_mask_whose_image_has_changed_is_said_to_be_made_again(folder, tmp_path, capsys):
    one, two = read_jobs(folder["image_dir"])
    clicks = {"include": [[64, 64]], "exclude": [[1, 2]]}
    with Masks(settings(**folder, ui=True)) as masks:
        masks.begin()
        for job in (one, two):
            masks.save_image(*masked(job, torch.ones(128, 128, dtype=torch.bool), "ui", clicks, 0.5))
        assert masks.read(one).clicks == clicks and masks.read(one).note == ""
        Image.new("RGB", (100, 128)).save(one.path)
        one, two = read_jobs(folder["image_dir"])
        assert masks.read(one).mask is None and "another version of the image" in masks.read(one).note
        assert masks.outdated([one, two], "auto", lambda job: [{}]) == [one]
    assert f"Clicked masks whose images have changed are made again (1): {one.path.name}." in (
        capsys.readouterr().out)


@pytest.mark.parametrize("record", [
    {}, {"way": 7}, {"prompt": [1]}, {"area": "large", "confidence": [], "score": None}, {"sha256": {}},
    {"prompt": {"include": "x"}}, {"prompt": {"include": [[1, 1]], "box": 3}}, {"area": None}])
def test_foreign_records_are_no_obstacle(folder, tmp_path, record):
    auto = settings(**folder, auto=True, grid=4)
    with Masks(auto) as masks:
        masks.begin()
        for job in read_jobs(folder["image_dir"]):
            Image.new("L", (128, 128), 255).save(tmp_path / "masks" / job.name)
            masks.append([{"file": job.name, **record}])
            masks.read(job)
        report(read_jobs(folder["image_dir"]), masks)
    mask_folder(auto)
