"""The purifying script: what each method writes, records, resume, foreign folders, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

import purify_images
from szt_utils.errors import InputError
from szt_utils.images import crop_and_resize, read_image
from szt_utils.jpeg import jpeg
from szt_utils.locks import lock_folder
from szt_utils.purify import DEFAULTS, PURIFIERS
from szt_utils.purifying import PurifySettings, load_pipelines, load_purifier, purify_batch


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """A wide PNG, a tall JPEG in a sub-folder, a PNG with alpha."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "more").mkdir()
    Image.fromarray(random.integers(0, 256, (48, 70, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 256, (66, 50, 3), dtype=np.uint8)).save(folder / "more" / "b.jpg")
    Image.fromarray(random.integers(0, 256, (40, 40, 4), dtype=np.uint8)).save(folder / "c.png")
    return folder


@pytest.fixture
def run(image_dir):
    return lambda output_dir, *more: purify_images.main(["--image_dir", str(image_dir), "--output_dir",
                                                         str(output_dir), *map(str, more)])


def levels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_jpeg_through_the_real_command_line(image_dir, tmp_path):
    done = run_script("purify_images.py", "--image_dir", image_dir, "--output_dir", tmp_path / "out",
                      "--method", "jpeg")
    assert "3 images" in done.stdout
    for source, name in (("a.png", "a.png"), ("more/b.jpg", "more/b.png"), ("c.png", "c.png")):
        expected = jpeg(read_image(image_dir / source), 25)
        assert np.array_equal(levels(tmp_path / "out" / name), np.asarray(expected))
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert options["settings"] == {"quality": 25} and options["versions"]["pillow"]
    records = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == ["a.png", "c.png", "more/b.png"]
    assert all(record["rms_change"] > 1 for record in records)


def test_resume_does_what_is_missing_or_changed_and_refuses_other_settings(run, image_dir, tmp_path, capsys):
    folder = tmp_path / "out"
    run(folder, "--method", "jpeg", "--jpeg_quality", 50)
    kept, whole = (folder / "a.png").stat().st_mtime_ns, (folder / "c.png").read_bytes()
    (folder / "c.png").unlink()
    run(folder, "--method", "jpeg", "--jpeg_quality", 50)
    assert "3 images" in capsys.readouterr().out
    assert (folder / "a.png").stat().st_mtime_ns == kept and (folder / "c.png").read_bytes() == whole
    with pytest.raises(SystemExit, match="another --jpeg_quality"):
        run(folder, "--method", "jpeg", "--jpeg_quality", 51)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="that this script did not write"):
        run(foreign, "--method", "jpeg")
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    with pytest.raises(SystemExit, match="lies in it"):
        run(image_dir / "out", "--method", "jpeg")


def test_a_purified_image_follows_its_source_unless_it_was_changed_by_hand(run, image_dir, tmp_path, capsys):
    shutil.copytree(image_dir, tmp_path / "in")
    flags = ["--method", "jpeg", "--image_dir", tmp_path / "in"]
    run(tmp_path / "out", *flags)
    first = levels(tmp_path / "out" / "a.png")
    for name in ("a.png", "c.png"):
        Image.open(tmp_path / "in" / name).rotate(180).save(tmp_path / "in" / name)
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "c.png")
    capsys.readouterr()
    run(tmp_path / "out", *flags)
    printed = capsys.readouterr().out
    assert "1 of them to do" in printed
    assert "Results made or changed by hand are kept (1): c.png; delete them" in printed
    assert (levels(tmp_path / "out" / "a.png") != first).any()
    assert Image.open(tmp_path / "out" / "c.png").size == (9, 9)


def test_a_second_command_in_the_folder_is_refused(run, tmp_path):
    with lock_folder(tmp_path / "out"), pytest.raises(SystemExit, match="is in use by another command"):
        run(tmp_path / "out", "--method", "jpeg")


def test_regen_keeps_sizes_and_does_not_depend_on_other_images(run, tiny_model, image_dir, tmp_path):
    flags = ["--method", "regen", "--pretrained_model_name_or_path", tiny_model, "--strength", 0.5,
             "--steps", 4, "--guidance_scale", 2]
    run(tmp_path / "all", *flags)
    assert Image.open(tmp_path / "all" / "a.png").size == (70, 48)
    settings = json.loads((tmp_path / "all" / "options.json").read_text())["settings"]
    assert settings == {"strength": 0.5, "steps": 4, "guidance_scale": 2.0, "prompt": ""}
    (tmp_path / "one").mkdir()
    Image.open(image_dir / "a.png").save(tmp_path / "one" / "z.png")
    run(tmp_path / "alone", "--image_dir", tmp_path / "one", *flags)
    assert np.array_equal(levels(tmp_path / "alone" / "z.png"), levels(tmp_path / "all" / "a.png"))
    run(tmp_path / "seed", "--image_dir", tmp_path / "one", *flags, "--seed", 1)
    assert not np.array_equal(levels(tmp_path / "seed" / "z.png"), levels(tmp_path / "all" / "a.png"))


def test_regen_by_sdxl_is_without_a_watermark_and_without_a_warning(tiny_sdxl, monkeypatch):
    """Its pipeline marks large images where the package invisible-watermark is installed."""
    from diffusers.pipelines import pipeline_utils
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as module

    warnings = []
    monkeypatch.setattr(pipeline_utils.logger, "warning", warnings.append)
    monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(module, "StableDiffusionXLWatermarker", object, raising=False)
    settings = PurifySettings("i", "regen", pretrained_model_name_or_path=str(tiny_sdxl))
    _, (pipeline,) = load_pipelines(settings)
    assert type(pipeline) is module.StableDiffusionXLImg2ImgPipeline and pipeline.watermark is None
    assert not warnings


def test_pdmpure_takes_a_ddpm_pipeline_and_a_resolution(run, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    DDPMPipeline(UNet2DModel(sample_size=16, block_out_channels=(8, 16), norm_num_groups=4,
                             layers_per_block=1,
                             down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2,
                             add_attention=False), DDPMScheduler()).save_pretrained(tmp_path / "model")
    flags = ["--method", "pdmpure", "--pretrained_model_name_or_path", tmp_path / "model"]
    run(tmp_path / "out", *flags, "--resolution", 32, "--batch_size", 3)
    assert Image.open(tmp_path / "out" / "more" / "b.png").size == (32, 32)
    unused = ["--prompt", "a photo", "--guidance_scale", 2, "--upscaler", "x"]
    with pytest.raises(SystemExit, match="no second stage; leave out --guidance_scale, --prompt, --upscaler"):
        run(tmp_path / "text", *flags, *unused)


def test_the_script_and_the_library_agree():
    required = ["--image_dir", "i", "--output_dir", "o", "--method"]
    settings = {name: value for name, value in vars(purify_images.parse_args([*required, "jpeg"])).items()
                if value is not None}
    assert settings.pop("output_dir") == "o"
    assert vars(PurifySettings(**settings)) == vars(PurifySettings("i", "jpeg"))
    assert purify_images.METHODS == tuple(name for name in PURIFIERS if name != "pdmpure_if")
    flags = {"quality": "jpeg_quality"}
    for name in ("strength", "steps", "guidance_scale", "prompt", "quality"):
        users = {method.removesuffix("_if") for method in DEFAULTS if name in DEFAULTS[method]}
        assert users == set(purify_images.USED_BY[flags.get(name, name)])


def test_a_setting_of_zero_is_not_the_default(tiny_model):
    settings = PurifySettings("i", "regen", pretrained_model_name_or_path=str(tiny_model), guidance_scale=0,
                              steps=3, strength=0.5)
    _, chosen = load_purifier(settings)
    assert chosen == {"strength": 0.5, "steps": 3, "guidance_scale": 0, "prompt": ""}


def test_a_resolution_is_that_of_the_central_square(run, image_dir, tmp_path):
    run(tmp_path / "out", "--method", "jpeg", "--resolution", 32)
    for source, name in (("a.png", "a.png"), ("more/b.jpg", "more/b.png")):
        square = crop_and_resize(read_image(image_dir / source), 32, center_crop=True)
        assert np.array_equal(levels(tmp_path / "out" / name), np.asarray(jpeg(square, 25)))


def test_an_image_that_is_not_finite_is_refused(image_dir):
    def one_nan(images, generators):
        images = images.clone()
        images[0, 0, 0, 0] = float("nan")
        return images

    with pytest.raises(InputError, match="turned the image into NaN; try --mixed_precision no"):
        purify_batch(PurifySettings("i", "regen"), one_nan, [("a.png", image_dir / "a.png")])


def test_pdmpure_says_what_it_takes(run, tiny_model, tmp_path):
    with pytest.raises(SystemExit, match="takes a DDPMPipeline or .* is a StableDiffusionPipeline"):
        run(tmp_path / "out", "--method", "pdmpure", "--pretrained_model_name_or_path", tiny_model)


def test_if_needs_an_upscaler_before_it_is_loaded(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "IFSuperResolutionPipeline"}')
    with pytest.raises(SystemExit, match="is IF's second stage, which needs --upscaler"):
        run(tmp_path / "out", "--method", "pdmpure", "--pretrained_model_name_or_path", tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_revision_variant_and_precision_are_those_of_the_pipelines(tmp_path, monkeypatch):
    """The upscaler is another model, which has no revision of that name."""
    def read(cls, path, dtype, *files):
        reads.append((path, dtype, files))
        return torch.nn.Identity()

    reads, model = [], str(tmp_path)
    monkeypatch.setattr("szt_utils.purifying.read_pipeline", read)
    (tmp_path / "model_index.json").write_text('{"_class_name": "IFSuperResolutionPipeline"}')
    load_pipelines(PurifySettings("i", "pdmpure", pretrained_model_name_or_path=model, revision="r",
                                  variant="v", upscaler="other", mixed_precision="bf16"))
    assert reads == [(model, torch.bfloat16, ("r", "v")), ("other", torch.bfloat16, ())]


@pytest.mark.parametrize("flags, message", [
    (["--method", "regen"], "szt_utils.pocket --network diffusion"),
    (["--method", "pdmpure"], "szt_utils.pocket --network pixel"),
    (["--method", "jpeg", "--steps", "5"], "jpeg does not use it"),
    (["--method", "jpeg", "--jpeg_quality", "0"], "0 is not at least 1 and at most 100"),
    (["--method", "regen", "--strength", "1.5"], "1.5 is not above 0 and at most 1"),
    (["--method", "regen", "--strength", "nan"], "'nan' is not a number"),
])
def test_wrong_usage_is_exit_code_2(run, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "out", *flags)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    done = run_script("purify_images.py", "--image_dir", tmp_path / "in", "--output_dir", tmp_path / "out",
                      "--method", "advclean", expect=1)
    assert done.stderr.startswith("error: ") and "broken.png" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "broken.png")
    done = run_script("purify_images.py", "--image_dir", tmp_path / "in", "--output_dir", tmp_path / "out",
                      "--method", "regen", "--pretrained_model_name_or_path", tmp_path / "nowhere", expect=1)
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
