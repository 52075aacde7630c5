"""--check: every trap of every trainer is found in its config files, and what is wrong with the images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from szt_utils.errors import InputError
from szt_utils.export import ExportSettings, export_folder, plan_for
from szt_utils.export_check import check_folder
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
            export_folder(made[trainer, model], ExportSettings(
                str(folder / "in"), trainer, model, "sks toy", loss_mask_dir=str(folder / "masks"),
                resolution=128))
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


DATA = ("datasets", 0, "subsets", 0)
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
    ("kohya", "sdxl", "dataset.toml", put(*DATA, conditioning_data_dir=None), "The config names no masks"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, conditioning_data_dir="gone"), "'gone' does not exist"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, image_dir="nowhere"), "'nowhere' of the config does not"),
    ("kohya", "sdxl", "dataset.toml", put(*DATA, caption_extension=None), "caption_extension is .caption"),
    ("kohya", "sdxl", "dataset.toml", put("datasets", 0, resolution=512), "trains at a resolution of 512"),
    ("kohya", "sdxl", "dataset.toml", lambda content: content["datasets"][0]["subsets"].append(
        {"image_dir": "prior", "is_reg": True}), "A subset with is_reg stands in one"),
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
    # ai-toolkit
    ("ai-toolkit", "sd2", "config.yaml", put(*TRAIN, min_snr_gamma=None), "set min_snr_gamma to 5."),
    ("ai-toolkit", "sdxl", "config.yaml", put(*TRAIN, min_denoising_steps=500, max_denoising_steps=999),
     "min_denoising_steps 500 is the wrong way round"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*TRAIN, max_denoising_steps=None), "set it to 501."),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, max_denoising_steps=383), "set it to 382"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, timestep_type=None), "315 with timestep_type sigmoid"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, timestep_type="shift"), "timestep_type shift moves"),
    ("ai-toolkit", "flux", "config.yaml", put(*TRAIN, noise_scheduler="ddpm"), "noise_scheduler is ddpm"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, mask_path=None), "The config names no masks"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, mask_min_value=0.1), "mask_min_value is 0.1"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, invert_mask=True), "invert_mask trains on the"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, buckets=False), "buckets is false"),
    ("ai-toolkit", "sdxl", "config.yaml", put(*IMAGES, resolution=[128, 768]), "resolution of 768"),
    # SimpleTuner
    ("simpletuner", "sd2", "config.json", put(snr_gamma=None), "set snr_gamma to 5."),
    ("simpletuner", "sdxl", "config.json", put(disable_segmented_timestep_sampling=None, train_batch_size=4),
     "spread over all timesteps"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_strategy=None), "is not range"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_begin=0), "timestep_bias_begin is 0"),
    ("simpletuner", "sdxl", "config.json", put(timestep_bias_multiplier=2), "drawn too often"),
    ("simpletuner", "sdxl", "config.json", put(flow_custom_timesteps="620,1000"), "is ignored for Stable"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps=None), "is not set"),
    ("simpletuner", "flux", "config.json", put(flow_custom_timesteps="[0.5, 0.8]"), "begins at 500"),
    ("simpletuner", "flux", "config.json", put(timestep_bias_strategy="range"), "is ignored for FLUX.1"),
    ("simpletuner", "sdxl", "multidatabackend.json", put(0, conditioning_data=None), "is not used as masks"),
    ("simpletuner", "sdxl", "multidatabackend.json", put(1, conditioning_type="controlnet"), "not used as"),
    ("simpletuner", "sdxl", "multidatabackend.json", put(1, crop_style="random"), "crop_style differs"),
    # diffusion-pipe
    ("diffusion-pipe", "flux", "config.toml", put("model", min_t=0.618), "min_t is ignored for FLUX.1"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None, sigmoid_scale=None), "Only 32%"),
    ("diffusion-pipe", "flux", "config.toml", put("model", shift=None, timestep_sample_method="uniform"),
     "Only 38%"),
    ("diffusion-pipe", "flux", "dataset.toml", put("directory", 0, mask_path=None), "names no masks"),
    ("diffusion-pipe", "flux", "dataset.toml", put(size_buckets=None), "size_buckets is not set"),
    # musubi-tuner
    ("musubi", "z-image", "config.toml", put(timestep_sampling=None), "is the wrong way round: with"),
    ("musubi", "z-image", "config.toml", put(timestep_sampling=None, min_timestep=None), "reaches timestep"),
    ("musubi", "z-image", "config.toml", put(min_timestep=None), "min_timestep is 0, so training reaches"),
    ("musubi", "z-image", "dataset.toml", put("general", bucket_no_upscale=None), "resized again"),
]


@pytest.mark.parametrize("trainer, model, name, edit, message", TRAPS)
def test_a_trap_is_found(exported, tmp_path, trainer, model, name, edit, message):
    folder, config = exported(trainer, model), []
    for path in map(folder.joinpath, TRAINERS[trainer].configs(plan_for("data", model))):
        config.append(tmp_path / path.name)
        content = load(path)
        if path.name == name:
            edit(content)
        dump(config[-1], content)
    findings = check_folder(folder, trainer, model, config, resolution=128)
    assert any(message in finding for finding in findings), findings
    assert all(finding.endswith(".") and "\n" not in finding for finding in findings)


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


@pytest.mark.parametrize("line, message", [
    ("--cache_latents", "gives an image the caption of another one"),
    ("--mask_dilation 16", "--mask_dilation is done in the data set already"),
    ("--jpeg_quality 25", "--jpeg_quality is done in the data set already"),
    ("--t_min 300", "--t_min is 300, so training reaches timesteps below 618"),
    ("--t_max=600", "the range is the wrong way round"),
    ("--szt", "--szt compresses and grows masks once more"),
    ("--loss_mask_dir ''", "--loss_mask_dir is not set"),
    ("--instance_data_dir images", "holds 'metadata.jsonl', which the script would open as an image"),
])
def test_a_trap_in_a_command_line_is_found(exported, tmp_path, line, message):
    folder = exported("diffusers", "flux")
    command = (folder / "train.sh").read_text()
    assert check_folder(folder, "diffusers", "flux", [folder / "train.sh"], resolution=128) == []
    (tmp_path / "run.sh").write_text(command.rstrip() + f" \\\n  {line}\n")
    findings = check_folder(folder, "diffusers", "flux", [tmp_path / "run.sh"], resolution=128)
    assert any(message in finding for finding in findings), findings


def test_a_command_line_of_kohya(exported, tmp_path):
    """The masks' folder on the command line is ignored: none are used, and nothing says so."""
    folder = exported("kohya", "sdxl")
    (tmp_path / "train.sh").write_text(
        f"accelerate launch sdxl_train_network.py --train_data_dir={folder} --resolution=128,128 \\\n"
        "  --masked_loss --conditioning_data_dir masks --min_timestep 500 --caption_extension .txt\n")
    findings = check_folder(folder, "kohya", "sdxl", [tmp_path / "train.sh"], resolution=128)
    assert len(findings) == 1 and "--conditioning_data_dir is ignored on the command line" in findings[0]


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of an export, whose config files are not read: their paths are those of the original."""
    folder = shutil.copytree(exported("kohya", "sdxl"), tmp_path / "copy")
    for path in folder.glob("*.toml"):
        path.unlink()
    return folder


def test_captions_are_looked_for_where_the_trainer_reads_them(exported, tmp_path):
    for trainer, model, other in (("diffusers", "flux", "{}.txt"), ("kohya", "sdxl", "metadata.jsonl")):
        folder = shutil.copytree(exported(trainer, model), tmp_path / trainer)
        images = sorted((folder / "images").glob("*.png"))
        for path in (*(folder / "images").glob("*.txt"), *(folder / "images").glob("*.jsonl"),
                     *folder.glob("*.toml"), *folder.glob("*.sh")):  # whose paths are those of the original
            path.unlink()
        for image in images:
            with open(folder / "images" / other.format(image.stem), "a") as captions:
                captions.write("a sks toy\n" if trainer == "diffusers" else
                               json.dumps({"file_name": image.name, "text": "a sks toy"}) + "\n")
        findings = check_folder(folder, trainer, model, resolution=128)
        assert any("No caption was found for 0.png, 1.png" in finding for finding in findings), trainer


def remove(name):
    return lambda folder: (folder / name).unlink()


def draw(name, size, mode="L"):
    """A black image or mask."""
    return lambda folder: Image.new(mode, (size, size)).save(folder / name)


def add_noise(folder):
    pixels = np.random.default_rng(9).integers(90, 140, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "0.png")


@pytest.mark.parametrize("damage, message", [
    (remove("masks/0.png"), "No mask was found for 0.png; expected 0.png in"),
    (draw("masks/0.png", 64), "another size than its image: 0.png"),
    (draw("masks/1.png", 128), "all black: 1.png"),
    (draw("masks/x.png", 128), "No image was found for x.png among the masks"),
    (lambda folder: shutil.rmtree(folder / "masks"), "There are no masks, so the loss counts on the whole"),
    (remove("images/1.txt"), "No caption was found for 1.png; expected it in <stem>.txt"),
    (lambda folder: (folder / "images" / "1.txt").write_text(" \n"), "No caption was found for 1.png"),
    (add_noise, "JPEG quality 25 was not applied to 0.png"),
    (draw("images/1.png", 100, "RGB"), "kohya sd-scripts will resize 1.png"),
])
def test_what_is_wrong_with_the_images(copied, damage, message):
    assert check_folder(copied, "kohya", "sdxl", resolution=128) == []
    damage(copied)
    findings = check_folder(copied, "kohya", "sdxl", resolution=128)
    assert any(message in finding for finding in findings), findings


def test_a_set_that_was_moved_is_found(exported, tmp_path):
    folder = shutil.copytree(exported("onetrainer", "sdxl"), tmp_path / "moved")
    findings = check_folder(folder, "onetrainer", "sdxl", resolution=128)
    assert len(findings) == 1 and "which is not in" in findings[0]


def test_a_missing_mask_of_onetrainer_is_found_beside_the_image(exported, tmp_path):
    folder = shutil.copytree(exported("onetrainer", "sdxl"), tmp_path / "copy")
    (folder / "config.json").unlink()
    (folder / "images" / "0-masklabel.png").unlink()
    (finding,) = check_folder(folder, "onetrainer", "sdxl", resolution=128)
    assert "No mask was found for 0.png; expected 0-masklabel.png" in finding


def test_many_files_are_counted(exported, tmp_path):
    folder = shutil.copytree(exported("musubi", "z-image"), tmp_path / "copy")
    for i in range(5):
        (folder / "images" / f"{i}.txt").unlink(missing_ok=True)
        shutil.copy(folder / "images" / "0.png", folder / "images" / f"{i}.png") if i else None
    (folder / "config.toml").unlink(), (folder / "dataset.toml").unlink()
    (finding,) = check_folder(folder, "musubi", "z-image", resolution=128)
    assert "for 0.png, 1.png, 2.png and 2 more;" in finding


@pytest.mark.parametrize("name, text, message", [
    ("config.toml", "min_timestep = ", "config.toml' cannot be parsed"),
    ("config.toml", "min_timestep = 'high'", "'min_timestep' in the config is 'high', which is not a number"),
    ("config.toml", "[[datasets]]\nsubsets = 3", "have another form than those of kohya sd-scripts"),
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
