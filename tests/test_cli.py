"""Bad input to the training script gets one line that names it, the right exit code, and touches no file."""

import functools
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, embedding, flags, run_here, run_script
from PIL import Image

import szt_utils.journal
import textual_inversion_szt
from szt_utils.files import read_stats
from szt_utils.safe_zone import SafeZone
from szt_utils.settings import ConceptSettings
from szt_utils.training_images import TrainingImages
from szt_utils.training_run import Run


@pytest.fixture(scope="module")
def finished(tiny_model, concept_folder, tmp_path_factory):
    """A finished run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(flags(tiny_model, concept_folder[0], folder, max_train_steps=2, checkpointing_steps=1))
    return folder


@pytest.fixture
def before(finished, tmp_path):
    """A copy of the finished run as the output folder of one that fails."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def images(concept_folder, tmp_path):
    return shutil.copytree(concept_folder[0], tmp_path / "images")


@pytest.fixture
def masks(concept_folder, tmp_path):
    return shutil.copytree(concept_folder[1], tmp_path / "masks")


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(arguments, output_dir=None) -> str:
    """What main() leaves the interpreter to print before it exits with code 1: one line, no more."""
    whole = output_dir and contents(output_dir)
    assert whole != {}
    with pytest.raises(SystemExit) as caught:
        run_here(arguments)
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and len(message) < 600
    assert output_dir is None or contents(output_dir) == whole
    return message


# --- Images

def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("damage",
                         [truncate, lambda p: p.write_text("not a image"), lambda p: p.write_bytes(b"")])
def test_a_image_that_cannot_be_read(tiny_model, images, before, damage):
    damage(images / "teal-striped-star-02.png")
    message = refused(flags(tiny_model, images, before), before)
    assert "teal-striped-star-02.png" in message and "cannot be read" in message
    assert "replace or remove it" in message


def test_folders_without_images(tiny_model, before, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"'{empty}' holds no image" in refused(flags(tiny_model, empty, before), before)
    (empty / "notes.txt").write_text("x")
    (empty / "sub.png").mkdir()
    assert f"'{empty}' holds no image" in refused(flags(tiny_model, empty, before), before)
    none = tmp_path / "none"
    assert f"'{none}' does not exist" in refused(flags(tiny_model, none, before), before)
    assert not (tmp_path / "fresh").exists() and refused(flags(tiny_model, empty, tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists(), "a run that cannot start makes no folder"


def test_every_kind_of_image_is_handled(tiny_model, tmp_path, capsys):
    """Expected pixels are exact: every image is flat, or has two flat halves, at the training size."""
    side, folder = 64, tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    exif, halves = Image.Exif(), np.zeros((side, side, 3), np.uint8)
    exif[0x0112], halves[:32] = 6, (200, 40, 10)  # the coloured half is above, and belongs to the right
    Image.fromarray(halves).save(folder / "a-exif.png", exif=exif)
    Image.new("P", (side, side), 3).save(folder / "b-palette.png")
    palette = Image.new("P", (side, side), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    palette.save(folder / "b-palette.png")
    Image.new("CMYK", (side, side), (255, 0, 0, 0)).save(folder / "c-cmyk.tif")
    Image.fromarray(np.full((side, side), 40_000, np.uint16)).save(folder / "d-deep.png")
    Image.new("L", (side, side), 77).save(folder / "e-grey.png")
    Image.new("RGBA", (side, side), (10, 20, 30, 0)).save(folder / "f-alpha.png")
    for name, options in (("g-animated.gif", {}), ("h-animated.webp", {"lossless": True})):
        frames = [Image.new("RGB", (side, side), colour) for colour in ((0, 0, 255), (255, 0, 0))]
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], **options)
    for name in (".DS_Store", "notes.txt", ".hidden.png"):
        (folder / name).write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(folder / "sub" / "inside.png")

    turned = np.zeros((side, side, 3), np.uint8)
    turned[:, 32:] = (200, 40, 10)
    expected = [turned, (9, 99, 199), (0, 255, 255), (156,) * 3, (77,) * 3, (255,) * 3, (0, 0, 255),
                (0, 0, 255)]
    arguments = flags(tiny_model, folder, tmp_path / "out", max_train_steps=1)
    settings, (concept,) = textual_inversion_szt.read_settings(
        textual_inversion_szt.parse_args(arguments), arguments)
    prepare = functools.partial(textual_inversion_szt.prepare, SafeZone(), settings.resolution, False)
    found = TrainingImages(concept, SafeZone(), prepare)
    assert len(found) == len(expected) == 8 and found.latent_masks([8, 8]) is None
    for (image, _, _), pixels in zip(found.kept.values(), expected, strict=True):
        assert image.mode == "RGB" and image.size == (side, side)
        assert (np.asarray(image) == pixels).all()

    run_here(arguments)
    assert "8 images" in capsys.readouterr().out
    assert embedding(tmp_path / "out").isfinite().all()


# --- Masks

def test_masks_that_do_not_fit(tiny_model, images, masks, before, tmp_path):
    arguments, name = flags(tiny_model, images, before, loss_mask_dir=masks), "teal-striped-star-01.png"
    original = Image.open(masks / name).copy()

    (masks / name).unlink()
    message = refused(arguments, before)
    assert f"'{images / name}' has no mask in '{masks}'" in message

    Image.new("L", original.size).save(masks / name)
    message = refused(arguments, before)
    assert f"'{masks / name}' is all black" in message

    original.resize((64, 128)).save(masks / name)
    message = refused(arguments, before)
    assert f"'{masks / name}' is 64 x 128 pixels" in message and "128 x 128" in message

    (masks / name).write_text("x")
    assert str(masks / name) in refused(arguments, before)

    original.save(masks / name)
    (images / name).unlink()
    message = refused(arguments, before)
    assert f"'{masks / name}' has no image" in message

    nowhere = flags(tiny_model, images, before, loss_mask_dir=tmp_path / "none")
    assert str(tmp_path / "none") in refused(nowhere, before)


def test_a_mask_below_a_latent_cell_needs_dilation(tiny_model, images, masks, before, tmp_path):
    name = "teal-striped-star-03.png"
    speck = np.zeros((128, 128), np.uint8)
    speck[60:66, 60:66] = 255  # 3 pixels of the 8 of a cell, after resizing
    Image.fromarray(speck).save(masks / name)
    message = refused(flags(tiny_model, images, before, loss_mask_dir=masks), before)
    assert str(images / name) in message and "--mask_dilation" in message
    run_here(flags(tiny_model, images, tmp_path / "fresh", loss_mask_dir=masks, mask_dilation=8,
                   max_train_steps=1))
    assert (tmp_path / "fresh" / "learned_embeds.safetensors").exists()

    outside = np.zeros((64, 128), np.uint8)
    outside[:, :20] = 255  # cut off by the central square
    for folder in (images, masks):
        shutil.rmtree(folder)
        folder.mkdir()
    Image.new("RGB", (128, 64)).save(images / "a.png")
    Image.fromarray(outside).save(masks / "a.png")
    message = refused(flags(tiny_model, images, before, loss_mask_dir=masks, center_crop=True), before)
    assert str(masks / "a.png") in message and "after cropping" in message


def test_each_image_has_its_own_mask_and_a_mirrored_one_its_mirror_image(images, masks):
    for i, path in enumerate(sorted(masks.iterdir())):
        mask = np.zeros((128, 128), np.uint8)
        mask[:64, 32 * i:] = 255
        Image.fromarray(mask).save(path)
    for folder in (images, masks):
        sorted(folder.iterdir())[4].unlink()
    settings = ConceptSettings(str(images), "<star>", "star", loss_mask_dir=str(masks))
    prepare = functools.partial(textual_inversion_szt.prepare, SafeZone(), 64, False)
    found = TrainingImages(settings, SafeZone(), prepare).latent_masks((4, 4))
    assert found.shape == (4, 2, 1, 4, 4)
    for i, (mask, mirrored) in enumerate(found[:, :, 0]):
        expected = torch.zeros(4, 4)
        expected[:2, i:] = 1
        assert torch.equal(mask, expected) and torch.equal(mirrored, expected.flip(-1))


@pytest.mark.parametrize("center_crop, conditioning, crops", [
    (True, "crop", [[0, 16], [68, 0]]), (True, "upstream", [[0, 0]] * 2), (False, "crop", [[0, 0]] * 2)])
@pytest.mark.parametrize("resolution", [64, 32])
def test_the_sizes_that_sdxl_is_told(tmp_path, center_crop, conditioning, crops, resolution):
    """Height, width, and top and left of the crop, which is counted in pixels after the resizing."""
    for name, size in (("a.png", (96, 64)), ("b.png", (64, 200))):
        Image.new("RGB", size).save(tmp_path / name)
    settings = ConceptSettings(str(tmp_path), "<star>", "star", center_crop=center_crop)
    prepare = functools.partial(textual_inversion_szt.prepare, SafeZone(), resolution, center_crop)
    found = TrainingImages(settings, SafeZone(), prepare).sizes(resolution, conditioning).tolist()
    assert found == [[*size, *(edge * resolution // 64 for edge in crop)]
                     for size, crop in zip(([64, 96], [200, 64]), crops, strict=True)]


# --- Options

@pytest.mark.parametrize("changes, flag", [
    (dict(t_min=600, t_max=600), "--t_min"), (dict(t_min=600, t_max=500), "--t_min"),
    (dict(t_min=-1), "--t_min"),
    (dict(t_max=0), "--t_max"), (dict(jpeg_quality=0), "--jpeg_quality"),
    (dict(jpeg_quality=101), "--jpeg_quality"),
    (dict(jpeg_quality="high"), "--jpeg_quality"), (dict(num_vectors=0), "--num_vectors"),
    (dict(mask_dilation=4), "--mask_dilation: needs --loss_mask_dir"),
    (dict(mask_dilation=0), "--mask_dilation: needs --loss_mask_dir"),
    (dict(mask_mode="latent"), "--mask_mode: needs"),
    (dict(mask_normalization="area"), "--mask_normalization: needs --loss_mask_dir"),
    (dict(t_width=50), "--t_width: needs --t_distribution tanh"),
    (dict(offload=True, no_cache_latents=True), "--offload: cannot be combined with --no_cache_latents"),
    (dict(offload=True, quantize="4bit"), "--offload: cannot be combined with --no_cache_latents"),
    (dict(dataset_name="set"), "--dataset_name: cannot be combined with --train_data_dir"),
    (dict(t_power=3), "--t_power: needs --t_distribution power"),
    (dict(t_center=400, t_distribution="power"), "--t_center: needs --t_distribution tanh"),
    (dict(image_column="picture"), "--image_column: needs --dataset_name"),
    (dict(dataset_name="set", train_data_dir=None, caption_column="text"),
     "--caption_column: needs --caption_mode"),
    (dict(dataset_name="set", train_data_dir=None, caption_mode="file"),
     "--caption_mode: file needs --caption_column"),
    (dict(loss_mask_dir="m", mask_dilation=-1), "--mask_dilation"), (dict(mask_mode="all"), "--mask_mode"),
    (dict(t_distribution="normal"), "--t_distribution"), (dict(learning_rate=-1), "--learning_rate"),
    (dict(learning_rate="nan"), "--learning_rate"), (dict(learning_rate=1e38), "--learning_rate"),
    (dict(adam_beta2=1), "--adam_beta2"),
    (dict(repeats=0), "--repeats"),
    (dict(train_batch_size=0), "--train_batch_size"), (dict(save_steps=0), "--save_steps"),
    (dict(num_validation_images=0), "--num_validation_images"), (dict(resolution=0), "--resolution"),
    (dict(initializer_token=None), "--initializer_token"), (dict(t_mim=4), "--t_mim")])
def test_usage_errors_exit_with_2_and_name_the_flag(before, concept_folder, capsys, changes, flag):
    whole = contents(before)
    with pytest.raises(SystemExit) as caught:
        run_here(flags("model", concept_folder[0], before, **changes))
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and "error: " in last and flag in last
    assert contents(before) == whole


@pytest.mark.parametrize("changes, message", [
    (dict(t_min=1000), "t_min is 1000 and t_max is 1000"), (dict(t_max=1001), "t_max is 1001"),
    (dict(szt=True, t_max=400), "t_min is 500 and t_max is 400"),
    (dict(t_distribution="tanh", t_width=0), "width of the tanh"),
    (dict(resolution=4), "--resolution must be at least 8"),
    (dict(clip_skip=2), "--clip_skip must be below 2"), (dict(pooled_token="end"), "are of SDXL"),
    (dict(placeholder_token="star"), "already contains the token 'star'"),
    (dict(placeholder_token="<Star>"), "use '<star>'"), (dict(placeholder_token="my star"), "one word"),
    (dict(initializer_token="striped star"), "'striped star' must be a single token"),
    (dict(initializer_token=""), "'' must be a single token"),
    (dict(resume_from_checkpoint="checkpoint-7"), "there is: checkpoint-1, checkpoint-2"),
    (dict(resume_from_checkpoint="latest", num_vectors=2), "num_vectors was 1 and is now 2"),
    (dict(resume_from_checkpoint="latest", placeholder_token="<other>"), "placeholder_token was '<star>'"),
    (dict(resume_from_checkpoint="latest", train_batch_size=2), "train_batch_size was 4 and is now 2"),
    (dict(report_to="tensorbord"), "--report_to tensorbord cannot be used"),
    (dict(enable_xformers_memory_efficient_attention=True),
     "--enable_xformers_memory_efficient_attention cannot")])
def test_options_that_the_model_or_the_run_refuse(tiny_model, concept_folder, before, changes, message):
    assert message in refused(flags(tiny_model, concept_folder[0], before, **changes), before)


def test_compile_without_a_compiler_is_told(tiny_model, concept_folder, tmp_path):
    done = run_script(SCRIPT, *flags(tiny_model, concept_folder[0], tmp_path / "out", compile=True), expect=1,
                      PATH=str(tmp_path), CXX="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "error: --compile cannot be used here: " in done.stderr and "Traceback" not in done.stderr


def test_models_that_are_missing_or_damaged(tiny_model, concept_folder, before, tmp_path):
    nowhere = tmp_path / "none"
    message = refused(flags(nowhere, concept_folder[0], before), before)
    assert f"The model '{nowhere}', which is no folder here" in message
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    for part, file in (("text_encoder", "model.safetensors"),
                       ("unet", "diffusion_pytorch_model.safetensors")):
        whole = (copy / part / file).read_bytes()
        truncate(copy / part / file)
        assert f"no usable {part}" in refused(flags(copy, concept_folder[0], before), before)
        (copy / part / file).write_bytes(whole)
    shutil.rmtree(copy / "scheduler")
    assert "no usable scheduler" in refused(flags(copy, concept_folder[0], before), before)


def test_a_bare_placeholder_inside_ordinary_words_warns(tiny_model, concept_folder, tmp_path, caplog, capsys):
    for placeholder, warns in (("sks", True), ("<sks>", False), ("zqx", False)):
        caplog.clear()
        run_here(flags(tiny_model, concept_folder[0], tmp_path / placeholder, placeholder_token=placeholder,
                       max_train_steps=1))
        assert ("is part of ordinary words" in caplog.text
                and "'<sks>' would be safe" in caplog.text) == warns


# --- Files

def test_an_output_folder_that_cannot_be_made(tiny_model, concept_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(flags(tiny_model, concept_folder[0], folder))
        assert str(folder) in message and "--output_dir" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("file", ["training_state.pt", "rank_0.pt"])
def test_a_damaged_checkpoint(tiny_model, concept_folder, before, tmp_path, file):
    path = before / "checkpoint-2" / file
    for content in (path.read_bytes()[:-2000], b""):
        path.write_bytes(content)
        message = refused(flags(tiny_model, concept_folder[0], before, resume_from_checkpoint="latest"),
                          before)
        assert str(path.parent) in message and "remove 'checkpoint-2' to use an older one" in message
    # As it says: without it, the run goes on from the older one.
    shutil.rmtree(path.parent)
    arguments = flags(tiny_model, concept_folder[0], before, resume_from_checkpoint="latest",
                      max_train_steps=2)
    run_here(arguments)
    assert [record["step"] for record in read_stats(before / "stats.jsonl")] == [1, 2]


@pytest.mark.parametrize("bad, ends", [({3}, False), ({1, 2, 3, 4}, True)])
def test_steps_that_a_loss_scaler_skips_end_no_training(tiny_model, concept_folder, tmp_path, monkeypatch,
                                                        bad, ends):
    """With fp16 on a GPU; here a scaler stands by, and the optimizer is not asked to step."""
    draw, step, steps = textual_inversion_szt.draw, Run.step, [0]

    def poisoned(concept, model):
        sample, steps[0] = draw(concept, model), steps[0] + 1
        if steps[0] in bad:
            sample.noise = sample.noise * float("nan")
        return sample

    def skipping(run, optimizer, lr_scheduler, rows):
        if steps[0] in bad:
            optimizer.zero_grad()
        else:
            step(run, optimizer, lr_scheduler, rows)

    monkeypatch.setattr(textual_inversion_szt, "draw", poisoned)
    monkeypatch.setattr(Run, "step", skipping)
    journal = szt_utils.journal.Journal.__init__
    monkeypatch.setattr(szt_utils.journal.Journal, "__init__", lambda self, *given: (
        journal(self, *given), setattr(self, "skips_steps", True))[0])
    arguments = flags(tiny_model, concept_folder[0], tmp_path / "out", max_train_steps=4)
    if ends:
        assert "not a number at step 1" in refused(arguments)
    else:
        run_here(arguments)
        assert [record["step"] for record in read_stats(tmp_path / "out" / "stats.jsonl")] == [1, 2, 4]
        assert embedding(tmp_path / "out").isfinite().all()


def test_without_room_for_validation_images_the_training_continues(tiny_model, concept_folder, tmp_path,
                                                                   monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("szt_utils.outputs._save_validation_images", too_large)
    run_here(flags(tiny_model, concept_folder[0], tmp_path / "out", validation_prompt="a <star>",
                   validation_steps=1))
    assert "memory is too small for validation images" in capsys.readouterr().err
    assert embedding(tmp_path / "out").isfinite().all()


def test_a_loss_that_is_not_a_number_keeps_what_was_written(tiny_model, concept_folder, before):
    kept = {name: data for name, data in contents(before).items()
            if name.name in ("learned_embeds.safetensors", "star.safetensors")}
    assert len(kept) == 2
    message = refused(flags(tiny_model, concept_folder[0], before, learning_rate=1e30, save_steps=1,
                            checkpointing_steps=1))
    assert "not a number at step 2" in message and "--learning_rate" in message
    assert {name: (before / name).read_bytes() for name in kept} == kept
    assert embedding(before, "learned_embeds-steps-1.safetensors").isfinite().all()
    assert not (before / "learned_embeds-steps-2.safetensors").exists()
    assert [record["step"] for record in read_stats(before / "stats.jsonl")] == [1]


def test_an_update_that_is_not_finite_is_not_saved(tiny_model, concept_folder, before, monkeypatch):
    whole, step = (before / "learned_embeds.safetensors").read_bytes(), torch.optim.AdamW.step

    def broken(self, *args, **kwargs):  # as by a gradient beyond half precision, after a finite loss
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    message = refused(flags(tiny_model, concept_folder[0], before, max_train_steps=1))
    assert "not finite after step 1" in message
    assert (before / "learned_embeds.safetensors").read_bytes() == whole


def test_a_full_disk_in_a_real_process(tiny_model, concept_folder, before):
    """The kernel refuses to write past 8 kB: options and embeddings fit, a checkpoint's random state not."""
    arguments = flags(tiny_model, concept_folder[0], before, save_steps=1, checkpointing_steps=2,
                      max_train_steps=4)
    whole = contents(before)
    done = subprocess.run([sys.executable, ROOT / SCRIPT, *arguments], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: File too large: ") and "checkpoint-2" in last
    assert "Traceback" not in done.stderr
    after = contents(before)
    for name, data in whole.items():  # the old checkpoints and embeddings are whole
        if name.parts[0].startswith(("checkpoint-", "learned_embeds.")):
            aside = "earlier-1" if name.parts[0].startswith("checkpoint-") else ""
            assert after[Path(aside, name)] == data
    assert embedding(before, "learned_embeds-steps-2.safetensors").isfinite().all()
    assert not [name for name in after if name.name.endswith(".part") and after[name]], "half-written"


def test_one_line_and_the_exit_code_in_a_real_process(tiny_model, images, before):
    truncate(images / "teal-striped-star-02.png")
    whole = contents(before)
    done = run_script(SCRIPT, *flags(tiny_model, images, before), expect=1)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    path = images / "teal-striped-star-02.png"
    assert done.stderr.startswith(f"error: The image '{path}' cannot be read")
    done = run_script(SCRIPT, *flags(tiny_model, images, before, jpeg_quality=0), expect=2)
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "error: argument --jpeg_quality: 0 is not at least 1 and at most 100")
    assert contents(before) == whole
