"""--check: every trap of every trainer is found in its config files, and what is wrong with the images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFilter

from szt_utils.errors import InputError
from szt_utils.export import ExportSettings, export_folder, plan_for
from szt_utils.export_check import check_folder
from szt_utils.safe_zone import SafeZone
from szt_utils.trainers import TRAINERS
from szt_utils.trainers.config_files import to_toml, tomllib


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(trainer, model): the folder of an export of two images and masks, made once."""
    folder, made = tmp_path_factory.mktemp("exported"), {}
    for name in ("in", "masks"):
        (folder / name).mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(90, 140, (140, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i}.png")
        mask = Image.new("L", (140, 140))
        ImageDraw.Draw(mask).ellipse((40, 40, 90, 90), fill=255)
        mask.save(folder / "masks" / f"{i}.png")

    def get(trainer: str, model: str) -> Path:
        if (trainer, model) not in made:
            made[trainer, model] = folder / f"{trainer}-{model}"
            export_folder(ExportSettings(
                str(folder / "in"), trainer, model, "sks toy", loss_mask_dir=str(folder / "masks"),
                resolution=128), made[trainer, model])
        return made[trainer, model]
    return get


def load(path: Path):
    parse = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load}
    return parse[path.suffix](path.read_text())


def dump(path: Path, content) -> None:
    form = {".toml": to_toml, ".json": json.dumps, ".yaml": yaml.safe_dump}
    path.write_text(form[path.suffix](content))


def put(*path, **values):
    """An edit of a config: set values in the table at a path; None removes one."""
    def edit(content):
        for step in path:
            content = content[step]
        for name, value in values.items():
            content.pop(name, None) if value is None else content.update({name: value})
    return edit


@pytest.fixture
def check_edited(exported, tmp_path):
    """check_edited(trainer, model, **edits): the findings when its config files, by stem, are edited."""
    def check(trainer: str, model: str, **edits) -> list[str]:
        folder, config = exported(trainer, model), []
        for path in map(folder.joinpath, TRAINERS[trainer].configs(plan_for("data", model))):
            content = load(path)
            edits.pop(path.stem, lambda content: None)(content)
            config.append(tmp_path / path.name)
            dump(config[-1], content)
        assert not edits
        return check_folder(folder, trainer, model, config, resolution=128)
    return check


def assert_found(findings: list[str], messages) -> None:
    """Each finding holds its message, of one or several, and is one line that ends in a full stop."""
    messages = (messages,) if isinstance(messages, str) else messages
    assert len(findings) == len(messages), findings
    for finding, message in zip(findings, messages, strict=True):
        assert message in finding and finding.endswith(".") and "\n" not in finding, finding


DATA = ("datasets", 0, "subsets", 0)
NO_MASKS = "The config names no masks"
TRAIN, IMAGES = ("config", "process", 0, "train"), ("config", "process", 0, "datasets", 0)
TRAPS = [
    # kohya sd-scripts
    ("kohya", "flux", "config.toml", put(min_timestep=618), "min_timestep is ignored for FLUX.1"),
    ("kohya", "flux", "config.toml", put(timestep_sampling=None, discrete_flow_shift=None), "Only 65%"),
    ("kohya", "flux", "config.toml", put(timestep_sampling="sigmoid", sigmoid_scale=1.0), "Only 32%"),
    ("kohya", "flux", "config.toml", put(timestep_sampling="flux_shift", sigmoid_scale=1.0), "Only 49%"),
    ("kohya", "sdxl", "config.toml", put(min_timestep=None), "min_timestep is 0, so training reaches"),
    ("kohya", "sdxl", "config.toml", put(min_timestep=0, max_timestep=500), "is the wrong way round"),
    ("kohya", "sd3", "config.toml", put(min_timestep=500), "set it to 618"),
    ("kohya", "sdxl", "config.toml", put(masked_loss=None), "masked_loss is not set"),
    ("kohya", "sdxl", "config.toml", put(conditioning_data_dir="masks"), "is ignored on the command line"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, conditioning_data_dir=None), NO_MASKS),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, conditioning_data_dir="gone"), "'gone' does not exist"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, image_dir="nowhere"), "'nowhere' of the config does not"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, caption_extension=None), "caption_extension is .caption"),
    ("kohya", "sdxl", "dataset.toml", put("datasets", 0, resolution=512), "trains at a resolution of 512"),
    ("kohya", "sdxl", "dataset.toml", lambda content: content["datasets"][0]["subsets"].append(
        {"image_dir": "prior", "is_reg": True, "caption_extension": ".txt"}),
     "A subset with is_reg stands in one"),
    ("kohya", "sd2", "config.toml", put(min_snr_gamma=None), "set min_snr_gamma to 5."),
    # OneTrainer
    ("onetrainer", "sd2", "config.json", put(loss_weight_fn=None), "set loss_weight_fn to MIN_SNR_"),
    ("onetrainer", "sdxl", "config.json", put(unmasked_weight=None), "it is 0.1 unless it is set"),
    ("onetrainer", "sdxl", "config.json", put(unmasked_weight=0.5), "unmasked_weight is 0.5"),
    ("onetrainer", "sdxl", "config.json", put(masked_training=False), "masked_training is off"),
    ("onetrainer", "sdxl", "config.json", put(min_noising_strength=None), "min_noising_strength is 0, so"),
    ("onetrainer", "sdxl", "config.json", put(min_noising_strength=0, max_noising_strength=0.5),
     "set min_noising_strength to 0.5 and max_noising_strength to 1."),
    ("onetrainer", "flux", "config.json", put(timestep_shift=0.5), "from 0.618 to 0.447, below 0.618"),
    ("onetrainer", "flux", "config.json", put(dynamic_timestep_shifting=True), "moves the range"),
    ("onetrainer", "sdxl", "config.json", put("concepts", 0, image={}), "enable_crop_jitter is on"),
    ("onetrainer", "sdxl", "config.json", put(resolution="128x192"), "resolution of 128 x 192, not of 128"),
    ("onetrainer", "sdxl", "config.json", put(resolution="128, 768"), "trains at a resolution of 768"),
    ("onetrainer", "sdxl", "config.json", put("concepts", 0, "image", enable_resolution_override=True,
                                              resolution_override="512"), "trains at a resolution of 512"),
    # ai-toolkit
    ("ai-toolkit", "sd2", "config.yaml", put(*TRAIN, min_snr_gamma=None), "set min_snr_gamma to 5."),
    ("ai-toolkit", "sdxl", "config.yaml", put(*TRAIN, min_denoising_steps=500, max_denoising_steps=999),
     "min_denoising_steps 500 is the wrong way round"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*TRAIN, max_denoising_steps=None), "set it to 501."),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, max_denoising_steps=383), "set it to 382"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, timestep_type=None), "315 with timestep_type sigmoid"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, timestep_type="shift"), "timestep_type shift moves"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, noise_scheduler="ddpm"), "noise_scheduler is ddpm"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, mask_path=None), NO_MASKS),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, mask_min_value=0.1), "mask_min_value is 0.1"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, invert_mask=True), "invert_mask trains on the"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, buckets=False), "buckets is false"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, resolution=[128, 768]), "resolution of 768"),
    # SimpleTuner
    ("simpletuner", "sd2", "config.json", put(snr_gamma=None), "set snr_gamma to 5."),
    ("simpletuner", "sdxl", "config.json", put(disable_segmented_timestep_sampling=None, train_batch_size=4),
     "spread over all timesteps"),
    ("simpletuner", "sdxl", "config.json", put(disable_segmented_timestep_sampling=None,
                                               train_batch_size=None), "spread over all timesteps"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_strategy=None), "is not range"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_begin=0), "timestep_bias_begin is 0"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_multiplier=999), "drawn too often"),
    ("simpletuner", "sdxl", "config.json", put(flow_custom_timesteps="620,1000"), "is ignored for Stable"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps=None), "is not set"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps="[0.5, 0.8]"), "begins at 500"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps="1.0; 0.5"), "begins at 500"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps=[400, 1000]), "begins at 400"),
    ("simpletuner", "flux", "config.json", put(timestep_bias_strategy="range"), "is ignored for FLUX.1"),
    ("simpletuner", "sdxl", "multidatabackend.json", put(0, conditioning_data=None),
     (NO_MASKS, "is not used as masks")),
    ("simpletuner", "sdxl", "multidatabackend.json", put(1, conditioning_type="controlnet"),
     (NO_MASKS, "is not used as masks")),
    ("simpletuner", "sdxl", "multidatabackend.json", put(1, crop_style="random"), "crop_style differs"),
    # diffusion-pipe
    ("diffusion-pipe", "flux", "config.toml", put("model", min_t=0.618), "min_t is ignored for FLUX.1"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None, sigmoid_scale=None), "Only 32%"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None, timestep_sample_method="uniform"),
     "Only 38%"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None), "Only 17%"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None, flux_shift=True), "Only 49%"),
    ("diffusion-pipe", "flux", "dataset.toml", put("directory", 0, mask_path=None), "names no masks"),
    ("diffusion-pipe", "flux", "dataset.toml", put(size_buckets=None), "size_buckets is not set"),
    # musubi-tuner
    ("musubi", "z-image", "config.toml", put(timestep_sampling=None), "is the wrong way round: with"),
    ("musubi", "z-image", "config.toml", put(timestep_sampling=None, min_timestep=None), "reaches timestep"),
    ("musubi", "z-image", "config.toml", put(min_timestep=None), "min_timestep is 0, so training reaches"),
    ("musubi", "z-image", "dataset.toml", put("general", bucket_no_upscale=None), "resized again"),
]


@pytest.mark.parametrize("trainer, model, name, edit, messages", TRAPS)
def test_a_trap_is_found(check_edited, trainer, model, name, edit, messages):
    assert_found(check_edited(trainer, model, **{Path(name).stem: edit}), messages)


def add(*path, **entry):
    """An edit of a config: one more entry of the list at a path."""
    def edit(content):
        for step in path:
            content = content[step]
        content.append(entry)
    return edit


@pytest.mark.parametrize("trainer, name, edit", [
    ("onetrainer", "config.json", add("concepts", path="nowhere", enabled=False)),
    ("simpletuner", "multidatabackend.json", add(id="more", instance_data_dir="nowhere", disabled=True)),
    ("kohya", "dataset.toml", add("datasets", resolution=128, subsets=[
        {"image_dir": "prior", "is_reg": True, "caption_extension": ".txt"}])),
    ("ai-toolkit", "config.yaml", add(*IMAGES[:-1], folder_path="prior", is_reg=True)),
    ("kohya", "dataset.toml", put(*DATA, conditioning_data_dir=None, alpha_mask=True)),
    ("simpletuner", "multidatabackend.json", put(0, conditioning_data=["masks"])),
    ("onetrainer", "config.json", put(min_noising_strength=0.8, timestep_shift=0.9)),
    ("onetrainer", "config.json", put(timestep_distribution="SIGMOID", timestep_shift=0.5))],
    ids=["a concept that is off", "a data set that is off", "a block of regularization images",
         "a data set of regularization images", "masks in alpha channels", "a list of data sets of masks",
         "a shift that leaves a range in the zone", "a distribution that is not shifted"])
def test_what_looks_like_a_trap_and_is_none(check_edited, trainer, name, edit):
    assert check_edited(trainer, "sdxl", **{Path(name).stem: edit}) == []


def test_velocities_without_masks_need_no_min_snr(check_edited):
    assert_found(check_edited("kohya", "sd2", config=put(min_snr_gamma=None),
                              dataset=put(*DATA, conditioning_data_dir=None)), NO_MASKS)


@pytest.mark.parametrize("buckets", [True, False])
def test_kohya_resizes_what_is_not_square_without_buckets(exported, tmp_path, buckets):
    folder = shutil.copytree(exported("kohya", "sdxl"), tmp_path / "copy")
    stretch(folder / "images" / "0.png", folder / "masks" / "0.png")
    content = load(folder / "dataset.toml")
    put("datasets", 0, enable_bucket=buckets)(content)
    put(*DATA, image_dir=str(folder / "images"), conditioning_data_dir=str(folder / "masks"))(content)
    dump(folder / "dataset.toml", content)
    findings = check_folder(folder, "kohya", "sdxl", resolution=128)
    assert_found(findings, () if buckets else "will resize 0.png")


def test_musubis_sigma_with_the_range_that_is_right_there(exported, tmp_path):
    """Index 0 of its table is pure noise, so that max_timestep 382 is t >= 618, unless a shift moves it."""
    folder = exported("musubi", "z-image")
    content = load(folder / "config.toml")
    put(timestep_sampling="sigma", min_timestep=0, max_timestep=382)(content)
    config = [tmp_path / "config.toml", folder / "dataset.toml"]
    dump(config[0], content)
    assert check_folder(folder, "musubi", "z-image", config, resolution=128) == []
    for shift, ok in ((3.0, True), (0.5, False)):
        dump(config[0], content | {"discrete_flow_shift": shift})
        assert (check_folder(folder, "musubi", "z-image", config, resolution=128) == []) == ok


def check_with(folder: Path, model: str, line: str, target: Path) -> list[str]:
    """The findings about a command line of Diffusers with one more line."""
    command = (folder / "train.sh").read_text()
    (target / "run.sh").write_text(command.rstrip() + f" \\\n  {line}\n")
    return check_folder(folder, "diffusers", model, [target / "run.sh"], resolution=128)


@pytest.mark.parametrize("line, messages", [
    ("--cache_latents", "gives an image the caption of another one"),
    ("--mask_dilation 16", "--mask_dilation is done in the data set already"),
    ("--jpeg_quality 25", "--jpeg_quality is done in the data set already"),
    ("--t_min 300", "--t_min is 300, so training reaches timesteps below 618"),
    ("--t_max=600", "the range is the wrong way round"),
    ("--szt", "--szt compresses and grows masks once more"),
    ("--loss_mask_dir ''", (NO_MASKS, "--loss_mask_dir is not set")),
    ("--instance_data_dir images", "holds 'metadata.jsonl', which the script would open as an image"),
    ("--instance_data_dir .", ("would train on the masks in",
                               "holds 'README.md', which the script would open as an image")),
])
def test_a_trap_in_a_command_line_is_found(exported, tmp_path, line, messages):
    folder = exported("diffusers", "flux")
    assert check_folder(folder, "diffusers", "flux", [folder / "train.sh"], resolution=128) == []
    assert_found(check_with(folder, "flux", line, tmp_path), messages)


@pytest.mark.parametrize("model, messages", [("sdxl", ()), ("sd3", "the caption of another one"),
                                             ("qwen-image", ())])
def test_cached_latents_keep_their_captions_in_some_scripts(exported, tmp_path, model, messages):
    assert_found(check_with(exported("diffusers", model), model, "--cache_latents", tmp_path), messages)


def test_a_command_line_without_a_resolution_is_one_all_the_same(exported, tmp_path):
    folder = exported("diffusers", "sdxl")
    (tmp_path / "run.sh").write_text(f"python train.py --train_data_dir {folder / 'images'} --t_min 300 "
                                     f"--loss_mask_dir {folder / 'masks'}\n")
    assert_found(check_folder(folder, "diffusers", "sdxl", [tmp_path / "run.sh"], resolution=128),
                 "--t_min is 300, so training reaches timesteps below 500")


def test_ai_toolkits_weighted_timesteps_are_at_the_same_places(check_edited):
    assert check_edited("ai-toolkit", "flux", config=put(*TRAIN, timestep_type="weighted")) == []


def test_a_command_line_of_kohya(exported, tmp_path):
    """The masks' folder on the command line is ignored: none are used, and nothing says so."""
    folder = exported("kohya", "sdxl")
    (tmp_path / "train.sh").write_text(
        f"accelerate launch sdxl_train_network.py --train_data_dir={folder} --resolution=128,128 \\\n"
        "  --masked_loss --conditioning_data_dir masks --min_timestep 500 --caption_extension .txt\n")
    findings = check_folder(folder, "kohya", "sdxl", [tmp_path / "train.sh"], resolution=128)
    assert len(findings) == 1 and "--conditioning_data_dir is ignored on the command line" in findings[0]


def stretch(image: Path, mask: Path) -> None:
    """Make an exported image and its mask a wide bucket of 192 x 64 pixels."""
    SafeZone.paper(128).purify(Image.open(image).resize((192, 64))).save(image)
    Image.open(mask).resize((192, 64)).save(mask)


def without_configs(folder: Path, target: Path) -> Path:
    """A copy of an export, whose config files are not read: their paths are those of the original."""
    shutil.copytree(folder, target)
    for path in target.glob("*.*"):
        path.unlink()
    return target


@pytest.fixture
def copied(exported, tmp_path):
    return without_configs(exported("kohya", "sdxl"), tmp_path / "copy")


def test_captions_are_looked_for_where_the_trainer_reads_them(exported, tmp_path):
    for trainer, model, other in (("diffusers", "flux", "{}.txt"), ("kohya", "sdxl", "metadata.jsonl")):
        folder = without_configs(exported(trainer, model), tmp_path / trainer)
        images = sorted((folder / "images").glob("*.png"))
        for path in (*(folder / "images").glob("*.txt"), *(folder / "images").glob("*.jsonl")):
            path.unlink()
        for image in images:
            with open(folder / "images" / other.format(image.stem), "a") as captions:
                captions.write("a sks toy\n" if trainer == "diffusers" else
                               json.dumps({"file_name": image.name, "text": "a sks toy"}) + "\n")
        findings = check_folder(folder, trainer, model, resolution=128)
        assert_found(findings, "No caption was found for 0.png, 1.png")


def remove(name):
    return lambda folder: (folder / name).unlink()


def draw(name, size, mode="L"):
    """A black image or mask."""
    return lambda folder: Image.new(mode, (size, size)).save(folder / name)


def add_noise(folder):
    """As little as JPEG changes a smooth photograph: three levels, root mean square."""
    pixels = np.random.default_rng(9).integers(110, 121, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "0.png")


@pytest.mark.parametrize("damage, messages", [
    (remove("masks/0.png"), "No mask was found for 0.png; expected 0.png in"),
    (draw("masks/0.png", 64), ("another size than its image: 0.png", "all black: 0.png")),
    (draw("masks/1.png", 128), "all black: 1.png"),
    (draw("masks/x.png", 128), "No image was found for x.png among the masks"),
    (lambda folder: shutil.rmtree(folder / "masks"), "There are no masks, so the loss counts on the whole"),
    (remove("images/1.txt"), "No caption was found for 1.png; expected it in <stem>.txt"),
    (lambda folder: (folder / "images" / "1.txt").write_text(" \n"), "No caption was found for 1.png"),
    (add_noise, "JPEG quality 25 was not applied to 0.png"),
    (draw("images/1.png", 100, "RGB"), ("kohya sd-scripts will resize 1.png",
                                        "another size than its image: 1.png")),
])
def test_what_is_wrong_with_the_images(copied, damage, messages):
    assert check_folder(copied, "kohya", "sdxl", resolution=128) == []
    damage(copied)
    assert_found(check_folder(copied, "kohya", "sdxl", resolution=128), messages)


@pytest.mark.parametrize("trainer, names, expected, is_read", [
    ("kohya", "masks/{}.webp", "0.png", True), ("kohya", "masks/{}.PNG", "0.png", True),
    ("kohya", "masks/{}.tif", "0.png", False), ("ai-toolkit", "masks/{}.bmp", "0.png", False),
    ("ai-toolkit", "masks/{}.PNG", "0.png", False), ("simpletuner", "masks/{}.webp", "0.png", False),
    ("onetrainer", "images/{}-masklabel.webp", "0-masklabel.png", False),
    ("diffusion-pipe", "masks/{}.gif", "0.png", True), ("diffusers", "masks/{}.tif", "0.png", True)])
def test_a_mask_of_a_suffix_that_the_trainer_does_not_read_is_none(exported, tmp_path, trainer, names,
                                                                  expected, is_read):
    folder = without_configs(exported(trainer, "sdxl"), tmp_path / "copy")
    for i in range(2):
        png = folder / TRAINERS[trainer].mask_name.format(i)
        mask = Image.open(png)
        png.unlink()
        mask.save(folder / names.format(i), lossless=True)
    findings = check_folder(folder, trainer, "sdxl", resolution=128)
    names = ", ".join(Path(names.format(i)).name for i in range(2))
    assert findings == [] if is_read else [finding.partition(" in '")[0] for finding in findings] == [
        f"No mask was found for 0.png, 1.png; expected {expected}",
        f"{TRAINERS[trainer].title} does not read {names} as a mask; expected {expected}."]


@pytest.mark.parametrize("trainer, suffix, is_read", [
    ("kohya", "bmp", True), ("kohya", "tif", False), ("ai-toolkit", "bmp", False), ("musubi", "gif", False),
    ("musubi", "avif", True), ("onetrainer", "gif", False), ("simpletuner", "gif", True)])
def test_an_image_of_a_suffix_that_the_trainer_does_not_read_is_named(exported, tmp_path, trainer, suffix,
                                                                     is_read):
    model = next(iter(TRAINERS[trainer].models))
    folder = without_configs(exported(trainer, model), tmp_path / "copy")
    Image.new("RGB", (128, 128)).save(folder / "images" / f"x.{suffix}")
    absent = ["caption", "mask"] if TRAINERS[trainer].mask_name else ["caption"]
    assert_found(check_folder(folder, trainer, model, resolution=128),
                 [f"No {what} was found for x.{suffix}" for what in absent] if is_read else
                 f"{TRAINERS[trainer].title} does not read x.{suffix}; convert to PNG.")


def labels(mask):
    return mask.point(lambda level: level // 255)


def cut_out(mask):
    clear = Image.new("RGBA", mask.size, "white")
    clear.putalpha(mask)
    return clear


def colors(mask):
    red = Image.merge("RGB", [mask, *[Image.new("L", mask.size)] * 2])
    red.paste((0, 200, 0), (60, 60, 70, 70))
    return red


@pytest.mark.parametrize("change, is_odd", [
    (labels, True), (cut_out, True), (colors, True),
    (lambda mask: mask.filter(ImageFilter.BoxBlur(5)).point(lambda level: level // 3), True),
    (lambda mask: mask.filter(ImageFilter.BoxBlur(5)), False), (lambda mask: mask.convert("RGBA"), False),
    (lambda mask: mask.convert("P"), False), (lambda mask: mask.convert("1"), False)])
@pytest.mark.parametrize("trainer", ["kohya", "onetrainer", "diffusers"])
def test_a_mask_that_means_something_else_to_a_trainer_is_found(exported, tmp_path, trainer, change, is_odd):
    """Trainers weight the loss by levels and drop transparency, which the patched script does not."""
    folder = without_configs(exported(trainer, "sdxl"), tmp_path / "copy")
    path = folder / TRAINERS[trainer].mask_name.format(1)
    change(Image.open(path)).save(path)
    findings = check_folder(folder, trainer, "sdxl", resolution=128)
    message = f"{TRAINERS[trainer].title} needs white on black: {path.name};"
    odd = [each for each in findings if message in each]
    assert len(odd) == (is_odd and trainer != "diffusers")
    assert findings == odd or (trainer == "diffusers" and "all black" in findings[0])  # the gray is too dark


@pytest.mark.parametrize("trainer", ["kohya", "onetrainer", "ai-toolkit", "simpletuner", "diffusion-pipe",
                                     "diffusers"])
def test_sub_folders_are_read_as_by_the_trainer(exported, tmp_path, trainer):
    """An image in a sub-folder has its mask by its name, by its path, or beside it; its caption beside it."""
    folder = without_configs(exported(trainer, "sdxl"), tmp_path / "copy")
    for name in ("images", "masks") if trainer == "simpletuner" else ("images",):
        (folder / name / "sub").mkdir()
        for path in (folder / name).glob("1*"):
            path.rename(folder / name / "sub" / path.name)
    if trainer == "diffusers":
        lines = (folder / "images" / "metadata.jsonl").read_text().splitlines(keepends=True)
        (folder / "images" / "metadata.jsonl").write_text(lines[0])
        (folder / "images" / "sub" / "metadata.jsonl").write_text(lines[1])
    is_recursive = trainer in ("ai-toolkit", "simpletuner", "diffusers")
    others = ["No image was found for 1.png among the masks; remove what belongs to none."]
    before = [] if is_recursive or trainer == "onetrainer" else others
    assert check_folder(folder, trainer, "sdxl", resolution=128) == before
    Image.new("RGB", (128, 128)).save(folder / "images" / "sub" / "x.png")
    assert_found(check_folder(folder, trainer, "sdxl", resolution=128), before if not is_recursive else [
        "No caption was found for x.png", "No mask was found for x.png"])


def test_onetrainer_reads_sub_folders_where_its_config_says_so(exported, tmp_path):
    folder = shutil.copytree(exported("onetrainer", "sdxl"), tmp_path / "copy")
    (folder / "images" / "sub").mkdir()
    shutil.copy(folder / "images" / "0.png", folder / "images" / "sub" / "x.png")
    for is_read in (False, True):
        content = load(folder / "config.json")
        put("concepts", 0, include_subdirectories=is_read, path=str(folder / "images"))(content)
        dump(folder / "config.json", content)
        findings = check_folder(folder, "onetrainer", "sdxl", resolution=128)
        assert [finding.partition(" in ")[0] for finding in findings] == is_read * [
            "No caption was found for x.png; expected it",
            "No mask was found for x.png; expected sub/x-masklabel.png"]


def test_masks_in_a_sub_folder_of_the_images_would_be_trained_on(exported, tmp_path):
    folder = without_configs(exported("ai-toolkit", "sdxl"), tmp_path / "copy")
    for path in (folder / "images").iterdir():
        path.rename(folder / path.name)
    (folder / "images").rmdir()
    (finding,) = check_folder(folder, "ai-toolkit", "sdxl", resolution=128)
    assert finding.startswith("ai-toolkit would train on the masks in")


@pytest.mark.parametrize("size", ["128", "128x128"])
def test_onetrainers_resolution_may_be_a_size(exported, tmp_path, size):
    """"128x128" is one size for all images, "128" the area of its buckets."""
    folder = shutil.copytree(exported("onetrainer", "sdxl"), tmp_path / "copy")
    content, image, mask = (load(folder / "config.json"), folder / "images" / "0.png",
                            folder / "images" / "0-masklabel.png")
    put("concepts", 0, path=str(folder / "images"))(content)
    dump(folder / "config.json", content | {"resolution": size})
    assert check_folder(folder, "onetrainer", "sdxl", resolution=128) == []
    stretch(image, mask)
    findings = check_folder(folder, "onetrainer", "sdxl", resolution=128)
    assert_found(findings, "will resize 0.png" if size == "128x128" else ())


def test_a_set_that_was_moved_is_found(exported, tmp_path):
    folder = shutil.copytree(exported("onetrainer", "sdxl"), tmp_path / "moved")
    findings = check_folder(folder, "onetrainer", "sdxl", resolution=128)
    assert len(findings) == 1 and "which is not in" in findings[0]


def test_a_missing_mask_of_onetrainer_is_found_beside_the_image(exported, tmp_path):
    folder = without_configs(exported("onetrainer", "sdxl"), tmp_path / "copy")
    (folder / "images" / "0-masklabel.png").unlink()
    (finding,) = check_folder(folder, "onetrainer", "sdxl", resolution=128)
    assert "No mask was found for 0.png; expected 0-masklabel.png" in finding


def test_many_files_are_counted(exported, tmp_path):
    folder = without_configs(exported("musubi", "z-image"), tmp_path / "copy")
    for i in range(5):
        (folder / "images" / f"{i}.txt").unlink(missing_ok=True)
        shutil.copy(folder / "images" / "0.png", folder / "images" / f"{i}.png") if i else None
    (finding,) = check_folder(folder, "musubi", "z-image", resolution=128)
    assert "for 0.png, 1.png, 2.png and 2 more;" in finding


@pytest.mark.parametrize("name, text, message", [
    ("config.toml", "min_timestep = ", "config.toml' cannot be parsed"),
    ("config.toml", "min_timestep = 'high'", "'min_timestep' in the config is 'high', which is not a number"),
    ("config.toml", "[[datasets]]\nsubsets = 3", "do not have the structure of kohya sd-scripts"),
    ("config.toml", "datasets = [1]", "'datasets' in the config must be a list of tables"),
    ("config.yaml", "a: [", "config.yaml' cannot be parsed"),
    ("config.json", "{", "is not valid JSON"),
    ("train.sh", "echo 'hello", "cannot be parsed"),
    ("train.sh", "echo hello", "it holds no flag"),
])
def test_config_files_that_cannot_be_used(exported, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        check_folder(exported("kohya", "sdxl"), "kohya", "sdxl", [tmp_path / name], resolution=128)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_or_config_that_is_not_there(exported, tmp_path):
    with pytest.raises(InputError, match="The data set '.*nowhere' does not exist"):
        check_folder(tmp_path / "nowhere", "kohya", "sdxl")
    with pytest.raises(InputError, match="The config '.*no.toml' does not exist"):
        check_folder(exported("kohya", "sdxl"), "kohya", "sdxl", [tmp_path / "no.toml"])
