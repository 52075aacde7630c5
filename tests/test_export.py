"""Exported data sets: their trees, pixels, masks, captions and config files, for every trainer."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

import export_dataset
from szt_utils.errors import InputError
from szt_utils.export import ExportSettings, export_folder, plan_for
from szt_utils.export_check import check_folder
from szt_utils.images import from_pil, read_image
from szt_utils.jpeg import jpeg
from szt_utils.masks import dilate
from szt_utils.notices import notice
from szt_utils.safe_zone import SafeZone
from szt_utils.trainers import TRAINERS
from szt_utils.trainers.config_files import tomllib
from szt_utils.trainers.family import FAMILIES

SIZES = {"a": (300, 200), "b": (150, 260), "c d": (140, 140)}
CONFIGS = {"kohya": {"dataset.toml", "config.toml"}, "onetrainer": {"config.json"},
           "ai-toolkit": {"config.yaml"}, "simpletuner": {"config.json", "multidatabackend.json"},
           "diffusion-pipe": {"dataset.toml", "config.toml"}, "musubi": {"dataset.toml", "config.toml"},
           "diffusers": {"images/metadata.jsonl", "train.sh"}}
PAIRS = [(name, model) for name, trainer in TRAINERS.items() for model in trainer.models]
ONE_EACH = [(name, next(iter(trainer.models))) for name, trainer in TRAINERS.items()]


def make_images(folder: Path) -> Path:
    """Noisy images, with a caption for one beside it and one in metadata.jsonl."""
    folder.mkdir()
    for i, (stem, size) in enumerate(SIZES.items()):
        noise = np.random.default_rng(i).integers(100, 140, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{stem}.png")
    (folder / "a.txt").write_text("a red Toy\non grass\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "{} from above"}\n')
    return folder


def make_masks(folder: Path) -> Path:
    folder.mkdir()
    for stem, (width, height) in SIZES.items():
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).rectangle((width // 3, height // 3, width // 2, height // 2), fill=255)
        mask.save(folder / f"{stem}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "in")


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return make_masks(tmp_path_factory.mktemp("masks") / "masks")


@pytest.fixture(autouse=True)
def fresh_notices():
    notice.cache_clear()


@pytest.fixture
def export(images, masks, tmp_path):
    """Export to tmp_path / "out"; returns the folder."""
    def run(trainer: str, model: str, **changes) -> Path:
        settings = {"loss_mask_dir": str(masks), "resolution": 128, "initializer_token": "toy"} | changes
        export_folder(ExportSettings(str(images), trainer, model, "sks toy", **settings), tmp_path / "out")
        return tmp_path / "out"
    return run


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trainer, model", ONE_EACH)
def test_the_tree_of_a_trainer(export, trainer, model):
    folder = export(trainer, model)
    expected = {"README.md", "options.json", "stats.jsonl"} | CONFIGS[trainer]
    expected |= {f"images/{stem}.png" for stem in SIZES}
    if trainer != "diffusers":
        expected |= {f"images/{stem}.txt" for stem in SIZES}
    if trainer == "onetrainer":
        expected |= {f"images/{stem}-masklabel.png" for stem in SIZES}
    elif trainer != "musubi":
        expected |= {f"masks/{stem}.png" for stem in SIZES}
    assert tree(folder) == expected
    readme = (folder / "README.md").read_text()
    assert TRAINERS[trainer].version in readme and "timesteps" in readme


@pytest.mark.parametrize("trainer, model", PAIRS)
def test_an_export_has_nothing_wrong_with_it(export, trainer, model):
    folder = export(trainer, model)
    assert check_folder(folder, trainer, model, resolution=128) == []
    family = FAMILIES[model]
    assert plan_for(folder, model).zone.t_min == (618 if family.flow else 500)


def test_images_are_cut_resized_and_then_compressed_and_masks_grown_with_them(export, images, masks):
    folder = export("kohya", "sdxl")
    zone = SafeZone.paper(128)
    for stem in SIZES:
        exported = read_image(folder / "images" / f"{stem}.png")
        assert exported.size in TRAINERS["kohya"].buckets(128, "sdxl")
        # A second compression changes little: the blocks are those of the exported size.
        assert np.abs(np.asarray(jpeg(exported, 25), int) - np.asarray(exported, int)).mean() < 1
        mask = Image.open(folder / "masks" / f"{stem}.png")
        assert mask.size == exported.size and mask.mode == "L" and set(mask.getdata()) == {0, 255}
    square = Image.open(masks / "c d.png").resize((128, 128), Image.Resampling.NEAREST)
    assert zone.mask_dilation == 4
    grown = dilate(from_pil(square), 4)[0, 0].numpy() * 255
    assert np.array_equal(np.asarray(Image.open(folder / "masks" / "c d.png")), grown)
    expected = zone.purify(read_image(images / "c d.png").resize((128, 128), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(Image.open(folder / "images" / "c d.png")), np.asarray(expected))


def test_captions_come_from_text_files_metadata_and_templates(export):
    folder = export("kohya", "sd15")
    captions = {stem: (folder / "images" / f"{stem}.txt").read_text() for stem in SIZES}
    assert captions == {"a": "a red sks toy on grass\n", "b": "sks toy from above\n",
                        "c d": "a cropped photo of the sks toy\n"}


def test_diffusers_captions_are_metadata(export):
    lines = (export("diffusers", "flux") / "images" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1] == {"file_name": "b.png", "text": "sks toy from above"}


def test_the_numbers_in_the_config_files():
    """The timesteps by signal-to-noise ratio, in each trainer's way of counting."""
    def settings(trainer: str, model: str, name: str) -> dict:
        text = TRAINERS[trainer].configs(plan_for("data", model))[name]
        parse = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load, "sh": str}
        return parse[name.rpartition(".")[2]](text)

    for model, low in (("sd15", 500), ("sd2", 500), ("sdxl", 500), ("sd3", 618)):
        kohya = settings("kohya", model, "config.toml")
        assert (kohya["min_timestep"], kohya["max_timestep"], kohya["masked_loss"]) == (low, 1000, True)
        assert model != "sd2" or kohya["v_parameterization"]
        assert kohya.get("min_snr_gamma") == (5 if model == "sd2" else None)  # masks need it with velocities
    assert settings("ai-toolkit", "sd2", "config.yaml")["config"]["process"][0]["train"]["min_snr_gamma"] == 5
    assert settings("simpletuner", "sd2", "config.json")["snr_gamma"] == 5
    assert "--snr_gamma 5" in settings("diffusers", "sd2", "train.sh")
    onetrainer = settings("onetrainer", "sd2", "config.json")
    assert (onetrainer["loss_weight_fn"], onetrainer["loss_weight_strength"]) == ("MIN_SNR_GAMMA", 5)
    assert onetrainer["samples"] == []  # without it, OneTrainer opens a file that only its window writes
    flux = settings("kohya", "flux", "config.toml")
    assert "min_timestep" not in flux and flux["timestep_sampling"] == "shift"
    assert (flux["discrete_flow_shift"], flux["sigmoid_scale"]) == (5, 0.5)
    for model, low in (("sdxl", 0.5), ("flux", 0.618)):
        onetrainer = settings("onetrainer", model, "config.json")
        assert (onetrainer["min_noising_strength"], onetrainer["unmasked_weight"]) == (low, 0)
        assert (onetrainer["timestep_shift"], onetrainer["dynamic_timestep_shifting"]) == (1, False)
    for model, last, kind in (("sdxl", 501, ("ddpm", None)), ("flux", 382, ("flowmatch", "linear"))):
        train = settings("ai-toolkit", model, "config.yaml")["config"]["process"][0]["train"]
        assert (train["max_denoising_steps"], train["min_denoising_steps"]) == (last, 0)
        assert (train["noise_scheduler"], train.get("timestep_type")) == kind
    simpletuner = settings("simpletuner", "sdxl", "config.json")
    assert simpletuner["timestep_bias_begin"] == 500 and simpletuner["disable_segmented_timestep_sampling"]
    listed = settings("simpletuner", "flux", "config.json")["flow_custom_timesteps"].split(",")
    assert (listed[0], listed[1], listed[-1]) == ("620", "640", "1000")
    model = settings("diffusion-pipe", "flux", "config.toml")["model"]
    assert (model["shift"], model["sigmoid_scale"]) == (5, 0.5)
    musubi = settings("musubi", "qwen-image", "config.toml")
    assert (musubi["timestep_sampling"], musubi["min_timestep"]) == ("uniform", 618)
    command = settings("diffusers", "sd3", "train.sh")
    assert "--t_min 618" in command and "train_dreambooth_lora_sd3_szt.py" in command
    assert "--jpeg_quality" not in command and "--mask_dilation" not in command


def test_values_given_by_hand(export, capsys):
    folder = export("kohya", "sdxl", t_min=600, jpeg_quality=60, mask_dilation=0)
    (command,) = re.findall("^python export_dataset.py (.+)$", (folder / "README.md").read_text(), re.M)
    export_dataset.main(shlex.split(command))  # finds nothing in what was just exported
    assert capsys.readouterr().out.endswith("Nothing is wrong.\n")
    assert tomllib.loads((folder / "config.toml").read_text())["min_timestep"] == 600
    mask = np.asarray(Image.open(folder / "masks" / "c d.png"))
    assert 0 < mask.mean() / 255 < 0.04  # not grown
    assert check_folder(folder, "kohya", "sdxl", resolution=128, t_min=600, jpeg_quality=60) == []


@pytest.mark.parametrize("trainer, model, t_min", [("kohya", "flux", 900), ("diffusion-pipe", "sd3", 300),
                                                   ("ai-toolkit", "sd15", 999)])
def test_the_config_of_a_t_min_given_by_hand_keeps_its_own_zone(export, trainer, model, t_min):
    folder = export(trainer, model, t_min=t_min)
    assert check_folder(folder, trainer, model, resolution=128, t_min=t_min) == []


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_t_min_that_no_timestep_reaches_is_refused(model):
    with pytest.raises(InputError, match="t_min is 1000"):
        plan_for("data", model, t_min=1000)


def test_without_masks_no_config_asks_for_them(export):
    folder = export("kohya", "sdxl", loss_mask_dir=None)
    assert "masked_loss" not in (folder / "config.toml").read_text()
    assert "conditioning_data_dir" not in (folder / "dataset.toml").read_text()
    assert not (folder / "masks").exists()
    findings = check_folder(folder, "kohya", "sdxl", resolution=128)
    assert findings == ["The config names no masks, so the loss counts on the whole image; make masks with "
                        "precompute_masks.py and export them."]


def test_a_trainer_without_masked_loss_says_so(export, capsys):
    export("musubi", "z-image")
    assert "musubi-tuner has no masked loss; the masks are left out" in capsys.readouterr().err


def test_the_same_command_again_does_what_is_missing_and_keeps_what_was_changed(export, images, capsys):
    folder = export("kohya", "sdxl")
    before = {name: (folder / name).stat().st_mtime_ns for name in tree(folder)}
    removed = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "a.png").unlink()
    edited = (folder / "config.toml").read_text().replace("max_train_steps = 1000", "max_train_steps = 7")
    (folder / "config.toml").write_text(edited)
    capsys.readouterr()
    export("kohya", "sdxl")
    printed = capsys.readouterr().out
    assert "1 of them to do" in printed and "'config.toml' was changed by hand" in printed
    assert (folder / "images" / "a.png").read_bytes() == removed
    assert (folder / "config.toml").read_text() == edited
    assert (folder / "images" / "b.png").stat().st_mtime_ns == before["images/b.png"]
    with pytest.raises(InputError, match="another --model"):
        export("kohya", "sd15")


def test_a_caption_that_was_changed_keeps_no_other_file_from_being_made_again(export, tmp_path, capsys):
    own = make_masks(tmp_path / "masks")
    folder = export("kohya", "sdxl", loss_mask_dir=str(own))
    (folder / "images" / "a.txt").write_text("my own caption")
    (folder / "masks" / "a.png").unlink()
    image = (folder / "images" / "a.png").read_bytes()
    Image.new("L", SIZES["a"], 255).save(own / "a.png")
    export("kohya", "sdxl", loss_mask_dir=str(own))
    assert "are kept (1): images/a.txt; delete them" in capsys.readouterr().out
    assert np.asarray(Image.open(folder / "masks" / "a.png")).min() == 255
    assert (folder / "images" / "a.txt").read_text() == "my own caption"
    assert (folder / "images" / "a.png").read_bytes() == image


def test_files_of_an_image_that_is_gone_from_the_folder_are_named(images, masks, tmp_path, capsys):
    source, own = make_images(tmp_path / "in"), make_masks(tmp_path / "masks")
    settings = ExportSettings(str(source), "kohya", "sdxl", "sks", loss_mask_dir=str(own), resolution=128)
    export_folder(settings, tmp_path / "out")
    (source / "b.png").unlink()
    (own / "b.png").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "images" / ".thumbnail.png")  # no trainer reads it
    export_folder(settings, tmp_path / "out")
    assert "that are not in --image_dir (2), such as 'images/b.png'" in capsys.readouterr().err
    (tmp_path / "out" / "images" / "b.png").unlink()
    export_folder(settings, tmp_path / "out")
    assert "that are not in --image_dir (1), such as 'masks/b.png'" in capsys.readouterr().err


def test_nothing_is_written_when_an_input_cannot_be_used(images, masks, tmp_path):
    settings = ExportSettings(str(images), "kohya", "sd15", "sks", loss_mask_dir=str(masks), resolution=128)
    with pytest.raises(InputError, match="does not train Qwen-Image; choose --model from: sd15"):
        export_folder(ExportSettings(str(images), "kohya", "qwen-image", "sks"), tmp_path / "out")
    bad = make_masks(tmp_path / "masks")
    Image.new("L", SIZES["b"]).save(bad / "b.png")
    black = ExportSettings(str(images), "kohya", "sd15", "sks", loss_mask_dir=str(bad), resolution=128)
    with pytest.raises(InputError, match=re.escape("b.png' is all black")):
        export_folder(black, tmp_path / "out")
    corner = Image.new("L", SIZES["a"])
    corner.putpixel((0, 0), 255)
    corner.save(bad / "a.png")
    Image.open(masks / "b.png").save(bad / "b.png")
    black = ExportSettings(str(images), "diffusers", "sd15", "sks", loss_mask_dir=str(bad), resolution=128)
    with pytest.raises(InputError, match="a.png' is all black after cropping"):
        export_folder(black, tmp_path / "out")
    odd = make_images(tmp_path / "odd")
    (odd / "a.png").rename(odd / os.fsdecode(b"a\xff.png"))
    with pytest.raises(InputError, match="is not UTF-8, which trainers cannot read; rename it"):
        export_folder(ExportSettings(str(odd), "diffusers", "sd15", "sks", resolution=128), tmp_path / "out")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds files that this script did not write"):
        export_folder(settings, foreign)
    assert not (tmp_path / "out").exists() and tree(foreign) == {"mine.txt"}


def test_masks_may_lie_beside_their_images(images, masks, tmp_path):
    folder = make_images(tmp_path / "in")
    for stem in SIZES:
        Image.open(masks / f"{stem}.png").save(folder / f"{stem}-masklabel.png")
    settings = ExportSettings(str(folder), "onetrainer", "sd15", "sks", loss_mask_dir=str(folder),
                              resolution=128)
    export_folder(settings, tmp_path / "out")
    assert {f"images/{stem}-masklabel.png" for stem in SIZES} < tree(tmp_path / "out")


def test_a_caption_that_does_not_name_the_concept_is_said(tmp_path, capsys):
    folder = make_images(tmp_path / "in")
    (folder / "c d.txt").write_text("a lamp")
    export_folder(ExportSettings(str(folder), "musubi", "z-image", "sks", resolution=128), tmp_path / "out")
    assert "sks is missing in 2 of 3 captions, such as that of 'a.png'" in capsys.readouterr().err
    assert (tmp_path / "out" / "images" / "c d.txt").read_text() == "a lamp\n"
