"""The poisoning script: budget on the reloaded PNG, masks, independence of order and resume,
records, errors."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, white_masks
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

import poison_images
from szt_utils import poisoning
from szt_utils.image_rng import image_generator
from szt_utils.images import crop_and_resize, read_image
from szt_utils.masks import read_mask
from szt_utils.models import load_model
from szt_utils.poison_jobs import ImageJob
from szt_utils.poisoning import PoisonSettings, load_victim, make_target, poison_batch, warn_if_failed
from szt_utils.poisons import POISONS, measure_objective
from szt_utils.safe_zone import SafeZone

EPS, STEPS, SIDE = 3, 5, 64
NAMES = ["a.png", "b.png", "c.png"]


REQUIRED = ["--pretrained_model_name_or_path", "m", "--image_dir", "i", "--output_dir", "o"]


def settings_of(*flags) -> PoisonSettings:
    """The settings of a command line, as main() makes them."""
    args = poison_images.parse_args([*REQUIRED, *map(str, flags)])
    return PoisonSettings(**poison_images.given_settings(args))


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """A wide PNG, a tall JPEG and a PNG with alpha."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (SIDE, 90, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 256, (100, 70, 3), dtype=np.uint8)).save(folder / "b.jpg")
    Image.fromarray(random.integers(0, 256, (80, 80, 4), dtype=np.uint8)).save(folder / "c.png")
    return folder


@pytest.fixture(scope="module")
def options(tiny_model, image_dir):
    """Command line without --output_dir; later flags win."""
    return ["--pretrained_model_name_or_path", tiny_model, "--image_dir", image_dir, "--method", "adm+",
            "--eps", EPS, "--steps", STEPS, "--resolution", SIDE]


@pytest.fixture(scope="module")
def poisoned(options, tmp_path_factory):
    """The real command in a subprocess: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "poisoned"
    return folder, run_script("poison_images.py", *options, "--output_dir", folder, OMP_NUM_THREADS="1")


@pytest.fixture
def run(options):
    return lambda output_dir, *more: poison_images.main([*map(str, options), "--output_dir", str(output_dir),
                                                         *map(str, more)])


def levels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def source(path) -> np.ndarray:
    return np.asarray(crop_and_resize(read_image(path), SIDE, center_crop=True)).astype(int)


def snapshot(folder) -> dict:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_budget_holds_and_is_reached_on_the_reloaded_png(poisoned, image_dir):
    folder, _ = poisoned
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "options.json", "stats.jsonl"]
    for name, original in zip(NAMES, ["a.png", "b.jpg", "c.png"], strict=True):
        assert Image.open(folder / name).size == (SIDE, SIDE) and Image.open(folder / name).mode == "RGB"
        change = np.abs(levels(folder / name) - source(image_dir / original))
        assert change.max() == EPS and change.mean() > 0.5


def test_records_tell_what_ran_and_what_came_out(poisoned, options):
    folder, done = poisoned
    written = json.loads((folder / "options.json").read_text())
    assert (written["arguments"]["eps"] == EPS and written["arguments"]["method"] == "adm+"
            and written["t_max"] == 1000)
    assert written["versions"]["torch"]
    records = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == NAMES
    for record in records:
        assert record["eps_reached"] == EPS and record["seconds"] > 0
        assert record["objective_before"] != record["objective_after"]
        failed = record["objective_after"] <= record["objective_before"]
        assert failed == (f"warning: {record['source']}: The objective did not rise" in done.stdout)
    assert f"{3 * STEPS}/{3 * STEPS}" in done.stderr and "objective=" in done.stderr  # the progress bar


def test_order_company_and_repetition_change_no_byte(poisoned, run, image_dir, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(image_dir / "c.png", tmp_path / "in" / "1.png")
    shutil.copy(image_dir / "a.png", tmp_path / "in" / "2.png")
    run(tmp_path / "out", "--image_dir", tmp_path / "in")
    assert (tmp_path / "out" / "1.png").read_bytes() == (poisoned[0] / "c.png").read_bytes()
    assert (tmp_path / "out" / "2.png").read_bytes() == (poisoned[0] / "a.png").read_bytes()


def test_resume_does_only_what_is_missing_and_gives_the_same_bytes(poisoned, run, tmp_path, capsys):
    whole, folder = snapshot(poisoned[0]), tmp_path / "copy"
    shutil.copytree(poisoned[0], folder)
    (folder / "b.png").unlink()
    lines = (folder / "stats.jsonl").read_text().splitlines(keepends=True)
    # Killed after c.png was saved, before it was recorded.
    (folder / "stats.jsonl").write_text("".join(lines[:2]))
    kept = snapshot(folder)
    run(folder)
    assert "3 images" in capsys.readouterr().out
    after = snapshot(folder)
    assert [after[name][0] for name in NAMES] == [whole[name][0] for name in NAMES]
    assert after["a.png"] == kept["a.png"] and after["c.png"] != kept["c.png"]
    assert "b.png" in after["stats.jsonl"][0].decode().splitlines()[2]

    run(folder)
    assert "0 of them to do" in capsys.readouterr().out and snapshot(folder) == after


def test_a_changed_image_is_done_again(run, image_dir, tmp_path, capsys):
    source_dir, folder = tmp_path / "in", tmp_path / "out"
    shutil.copytree(image_dir, source_dir)
    more = ["--image_dir", source_dir, "--steps", 0]
    run(folder, *more)
    for name, original in zip(NAMES, ["a.png", "b.jpg", "c.png"], strict=True):
        # 0 steps are the identity.
        assert np.array_equal(levels(folder / name), source(source_dir / original))
    Image.open(source_dir / "a.png").rotate(180).save(source_dir / "a.png")
    run(folder, *more)
    assert "1 of them to do" in capsys.readouterr().out
    assert np.array_equal(levels(folder / "a.png"), source(source_dir / "a.png"))


def test_bfloat16_and_masks(run, image_dir, tmp_path):
    (tmp_path / "masks").mkdir()
    for name in ("a.png", "b.jpg", "c.png"):
        mask = np.zeros(Image.open(image_dir / name).size[::-1], np.uint8)
        mask[20:50, 20:60] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name[0]}.png")
    run(tmp_path / "out", "--mask_dir", tmp_path / "masks", "--mixed_precision", "bf16", "--draws", 2)
    for name, original in zip(NAMES, ["a.png", "b.jpg", "c.png"], strict=True):
        change = np.abs(levels(tmp_path / "out" / name) - source(image_dir / original)).max(2)
        inside = Image.open(tmp_path / "masks" / name)
        left, top = ((inside.size[i] - min(inside.size)) // 2 for i in (0, 1))
        inside = inside.crop((left, top, left + min(inside.size),
                              top + min(inside.size))).resize((SIDE, SIDE), 0)
        inside = np.asarray(inside) > 0
        assert not change[~inside].any() and (~inside).any()
        assert change.max() == EPS and (change[inside] > 0).mean() > 0.5


def test_other_options_in_the_same_folder_are_refused(poisoned, run):
    before = snapshot(poisoned[0])
    with pytest.raises(SystemExit, match="made with another --eps, --seed; give another --output_dir"):
        run(poisoned[0], "--eps", 4, "--seed", 1)
    assert snapshot(poisoned[0]) == before


def test_bad_data_is_one_sentence_before_any_work(run, image_dir, tmp_path):
    def refused(message, *more, output_dir=tmp_path / "never"):
        with pytest.raises(SystemExit, match=message) as failure:
            run(output_dir, *more)
        assert str(failure.value).startswith("error: ") and "\n" not in str(failure.value)
        assert not (tmp_path / "never").exists()

    def folder(name, **files):
        (tmp_path / name).mkdir()
        for stem, (original, suffix) in files.items():
            shutil.copy(image_dir / original, tmp_path / name / f"{stem}.{suffix}")
        return tmp_path / name

    refused("does not exist", "--image_dir", tmp_path / "nowhere")
    refused("holds no image", "--image_dir", folder("empty"))
    twins = folder("twins", a=("a.png", "png"))
    shutil.copy(image_dir / "b.jpg", twins / "a.jpg")
    refused("would both become 'a.png'", "--image_dir", twins)
    broken = folder("broken", a=("a.png", "png"), z=("b.jpg", "jpg"))
    (broken / "z.jpg").write_bytes((broken / "z.jpg").read_bytes()[:500])
    refused(r"z\.jpg' cannot be read", "--image_dir", broken)
    refused("is --image_dir or lies in it", output_dir=image_dir)
    refused("is --image_dir or lies in it", output_dir=image_dir / "poisoned")
    refused("that this script did not write", output_dir=folder("foreign", holiday=("b.jpg", "jpg")))
    (tmp_path / "foreign" / "options.json").write_text('{"script": "evaluate.py", "arguments": {}}')
    refused("that this script did not write", output_dir=tmp_path / "foreign")
    (tmp_path / "foreign" / "options.json").write_text("[not json")
    refused("that this script did not write", output_dir=tmp_path / "foreign")
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["holiday.jpg", "options.json"]
    refused("is not a folder", output_dir=twins / "a.png")
    refused("has no mask", "--mask_dir", folder("masks", a=("a.png", "png")))
    edge, mask = folder("edge"), Image.new("L", (300, 100))
    mask.save(edge / "a.png")
    mask.paste(255, (0, 0, 50, 100))
    mask.save(folder("edge-masks") / "a.png")
    refused("black within the central square", "--image_dir", edge, "--mask_dir", tmp_path / "edge-masks")
    refused("0 <= t_min < t_max, but t_min is 500", "--t_min", 500, "--t_max", 500)
    refused("0 <= t_min < t_max <= 1000", "--t_max", 1001)
    refused("multiple of 8", "--resolution", 60)
    refused("no usable", "--pretrained_model_name_or_path", tmp_path / "no-model")


def test_exit_codes_of_the_command_itself(options, tmp_path):
    options = [*options, "--output_dir", tmp_path / "out"]
    done = run_script("poison_images.py", *options, "--image_dir", tmp_path / "nowhere", expect=1)
    assert done.stderr.startswith("error: The image folder") and done.stderr.count("\n") == 1
    done = run_script("poison_images.py", *options, "--eps", "8/255", expect=2)
    assert "argument --eps: '8/255' is not a whole number of 1/255 levels" in done.stderr


@pytest.mark.parametrize("flags", [
    ["--eps", "16.5"], ["--eps", "-1"], ["--eps", "256"], ["--step_size", "0"], ["--step_size", "nan"],
    ["--step_size", "x"], ["--steps", "-1"], ["--draws", "0"], ["--t_min", "-1"], ["--method", "adm"],
    ["--mixed_precision", "fp8"], ["--norm", "l1"], ["--jpeg_quality", "0"],
    ["--jpeg_quality", "1", "2", "3"], ["--target_image", "grey"], ["--strength", "1.1"],
    ["--chain_steps", "2"], ["--preset", "photoguard"],
    ["--adaptive", "szt"], ["--batch_size", "0"],
])
def test_usage_errors(flags, capsys):
    required = [*REQUIRED, "--method", "adm+"]
    poison_images.parse_args(required)
    with pytest.raises(SystemExit) as failure:
        poison_images.parse_args([*required, *flags])
    assert failure.value.code == 2 and flags[0] in capsys.readouterr().err


def test_defaults_are_the_papers(capsys):
    settings = settings_of("--method", "adm+")
    assert ((settings.eps, settings.step_size, settings.steps, settings.draws, settings.prompt,
             settings.zone().t_min) == (16, 1, 100, 1, "a photo", 0))
    assert (settings.norm, settings.step_schedule, settings.target_image) == ("linf", "constant", "pattern")
    with pytest.raises(SystemExit) as failure:
        poison_images.parse_args(["--image_dir", "i", "--output_dir", "o", "--method", "adm+"])
    assert failure.value.code == 2 and "--pretrained_model_name_or_path" in capsys.readouterr().err


def test_the_script_and_the_library_agree_and_help_imports_no_torch():
    assert poison_images.METHODS == tuple(POISONS)
    used_by = {name: tuple(method for method in POISONS if name in POISONS[method].uses)
               for poison in POISONS.values() for name in poison.uses}
    assert poison_images.USED_BY == used_by
    flags = vars(poison_images.parse_args([*REQUIRED, "--method", "ea"]))
    assert flags.keys() - {"output_dir"} == vars(settings_of("--method", "ea")).keys()
    code = """import sys, poison_images
try: poison_images.parse_args(["--help"])
except SystemExit: assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        poison_images.parse_args(["--help"])
    told, settings = " ".join(capsys.readouterr().out.split()), settings_of("--method", "da")
    named = ("eps", "norm", "step_size", "step_schedule", "steps", "draws", "prompt", "target_image",
             "chain_steps", "strength", "guidance_scale", "resolution", "batch_size", "seed",
             "mixed_precision")
    for name in named:
        default = getattr(settings, name)
        shown = f"{default:g}" if isinstance(default, float) else default
        assert re.search(rf" --{name} [^(]*?(\(ea: [^)]*\)[^(]*)?\({shown}\)", told), name


def test_presets_are_defaults_that_flags_override(capsys):
    for preset, methods in poison_images.PRESETS.items():
        for method, given in methods.items():
            settings = vars(settings_of("--method", method, "--preset", preset))
            plain = vars(settings_of("--method", method))
            assert settings == {**plain, "preset": preset, **given}
    settings = settings_of("--method", "ea", "--preset", "photoguard", "--steps", "7")
    assert (settings.eps, settings.steps, settings.step_schedule) == (15, 7, "linear")
    with pytest.raises(SystemExit):
        settings_of("--method", "da", "--preset", "diff-protect")
    assert "diff-protect has no da, only adm+" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settings_of("--method", "da", "--target_image", "zero")
    assert "zero is a latent" in capsys.readouterr().err


def test_adaptive_szt_is_its_three_parts():
    adaptive = ["--adaptive", "szt", "--loss_mask_dir", "l"]
    zone = settings_of("--method", "adm+", *adaptive).zone()
    assert (zone.jpeg_quality, zone.t_min, zone.mask_dilation) == (25, 500, 16)
    assert settings_of("--method", "ea", *adaptive).zone().t_min == 0  # it uses no timestep
    given = settings_of("--method", "adm+", *adaptive, "--t_min", "300", "--jpeg_quality", "15", "95")
    assert given.jpeg_quality == [15, 95] and given.zone().t_min == 300
    assert settings_of("--method", "adm+").zone() == SafeZone(mask_dilation=16)


@pytest.mark.parametrize("flags, is_adaptive", [
    ([], False), (["--t_min", 0], False), (["--t_min", 1], True), (["--t_max", 500], False),
    (["--mask_dir", "m"], False), (["--loss_mask_dir", "l"], True), (["--jpeg_quality", 50], True)])
def test_an_attack_that_knows_a_part_of_a_defence_is_adaptive(flags, is_adaptive):
    assert settings_of("--method", "adm+", *flags).is_adaptive == is_adaptive


def test_a_target_has_the_shape_of_its_image(tmp_path):
    half = Image.new("RGB", (40, 20), "red")
    half.paste("blue", (0, 10, 40, 20))
    half.save(tmp_path / "half.png")
    target = make_target(str(tmp_path / "half.png"), 64, 32)
    assert target.shape == (1, 3, 64, 32) and target[0, 0, :24].min() > 0.9 > 0.1 > target[0, 0, 40:].max()
    assert make_target("pattern", 64, 32).shape == (1, 3, 64, 32)
    assert make_target("grey", 64, 32).unique().tolist() == pytest.approx([128 / 255])
    assert make_target("zero", 64, 32) is None


@pytest.mark.parametrize("flags, is_warned", [([], True), (["--eps", 0], False), (["--steps", 0], False)])
def test_an_attack_that_may_change_nothing_does_not_fail(flags, is_warned, recwarn):
    warn_if_failed(settings_of("--method", "adm+", *flags), 0.5, 0.5, None)
    assert ["did not rise" in str(warning.message) for warning in recwarn] == [True] * is_warned


def test_the_objective_is_measured_on_draws_that_the_attack_does_not_see(tiny_model, image_dir):
    settings = settings_of("--pretrained_model_name_or_path", tiny_model, "--method", "adm+", "--steps", 0,
                           "--resolution", SIDE, "--seed", 3)
    victim, job = load_victim(settings), ImageJob("a.png", image_dir / "a.png")
    ((record, _),) = poison_batch(settings, victim, [job], lambda values: None, print)
    image, seen = settings.read(job).attacked, []
    for more in (["measure"], []):
        generator = image_generator(image[0], 3, *more)
        seen.append(measure_objective(POISONS["adm+"], victim, image, [generator]).item())
    assert record["objective_before"] == record["objective_after"] == seen[0] != seen[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A wide image and a mask that reaches its edge, as a job."""
    folder = tmp_path_factory.mktemp("wide")
    Image.new("RGB", (900, 600), "teal").save(folder / "a.png")
    mask = np.zeros((600, 900), np.uint8)
    mask[200:330, 300:430] = mask[590:, 700:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return ImageJob("a.png", folder / "a.png", None, folder / "mask.png")


@pytest.mark.parametrize("resolution, dilation", [(128, 4), (512, 16)])
def test_an_adaptive_attack_knows_the_zone_of_the_training(tiny_model, wide, resolution, dilation):
    flags = ["--method", "adm+", "--loss_mask_dir", "l", "--resolution", resolution]
    settings, zone = settings_of(*flags, "--adaptive", "szt"), SafeZone.paper(resolution)
    assert settings.zone() == settings.zone(load_model(str(tiny_model))) == zone
    assert zone.mask_dilation == dilation
    trained_on = zone.prepare_mask(read_mask(wide.loss_mask_path, (900, 600)), resolution, center_crop=True)
    loss_mask = settings.read(wide).loss_mask
    assert torch.equal(loss_mask, trained_on) and 0 < loss_mask.mean() < 1
    assert torch.equal(settings_of(*flags).read(wide).loss_mask, trained_on)  # masks alone
    literal = settings_of(*flags, "--adaptive", "szt", "--mask_dilation", dilation + 3)
    assert literal.zone().mask_dilation == dilation + 3
    assert literal.read(wide).loss_mask.sum() > loss_mask.sum()


def test_adaptive_szt_begins_at_the_papers_signal_to_noise_ratio(tiny_model, tmp_path):
    """A model whose schedule is another one: half the timesteps."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    DDPMScheduler.from_config(scheduler.config, trained_betas=None, num_train_timesteps=500,
                              beta_start=0.0017, beta_end=0.024).save_pretrained(folder / "scheduler")
    flags = ["--method", "adm+", "--adaptive", "szt", "--loss_mask_dir", "l", "--resolution", SIDE]
    settings = settings_of(*flags, "--pretrained_model_name_or_path", folder)
    zone = load_victim(settings).zone
    assert zone == SafeZone.paper(SIDE, load_model(str(folder))).fit(500)
    assert 240 < zone.t_min < 260 and zone.t_max == 500 and settings.zone().t_min == 500


@pytest.fixture(params=["sd3", "terminal"])
def another_schedule(request, tiny_sd3, tiny_velocity_model, tmp_path):
    """A model whose t_min of the paper is not 500, and that t_min: of flow, and of zero terminal SNR."""
    if request.param == "sd3":
        return tiny_sd3, 618
    folder = shutil.copytree(tiny_velocity_model, tmp_path / "terminal")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True,
                              timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return folder, 475


def test_adaptive_szt_and_its_number_for_stable_diffusion_are_two_runs(run, image_dir, tmp_path, capsys,
                                                                       another_schedule):
    """For another model, t_min 500 is another attack than the paper's, whatever the arguments say."""
    white_masks(image_dir, tmp_path / "masks")
    model, t_min = another_schedule
    adaptive = ["--pretrained_model_name_or_path", model, "--adaptive", "szt", "--loss_mask_dir",
                tmp_path / "masks", "--steps", 1]
    runs = {"paper": [], "given": ["--t_min", 500]}
    for name, more in runs.items():
        run(tmp_path / name, *adaptive, *more)
    written = {name: json.loads((tmp_path / name / "options.json").read_text()) for name in runs}
    assert {name: options["t_min"] for name, options in written.items()} == {"paper": t_min, "given": 500}
    # As version 0.2 wrote them.
    assert [options["arguments"]["t_min"] for options in written.values()] == [500, 500]
    capsys.readouterr()
    for name, other in (("paper", "given"), ("given", "paper")):
        with pytest.raises(SystemExit, match=f"{name}' was made with another --t_min; give another"):
            run(tmp_path / name, *adaptive, *runs[other])
        run(tmp_path / name, *adaptive, *runs[name])
        assert "3 images" in (told := capsys.readouterr().out) and "0 of them to do" in told


@pytest.mark.parametrize("another_schedule", ["terminal"], indirect=True)
def test_a_chain_of_da_that_cannot_reach_the_image_is_refused(run, tmp_path, another_schedule):
    folder, _ = another_schedule
    flags = ["--pretrained_model_name_or_path", folder, "--method", "da"]
    for strength, message in ((1, "4 steps at strength 1 begins at pure noise, where Stable Diffusion"),
                              (0.001, "needs a schedule of 4000 steps, which must be fewer than the mod")):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "out", *flags, "--strength", strength)
    assert not (tmp_path / "out").exists()
    load_victim(settings_of(*flags, "--resolution", SIDE))
    DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="leading").save_pretrained(
        folder / "scheduler")
    load_victim(settings_of(*flags, "--resolution", SIDE, "--strength", 1))  # this begins at t = 751


def test_a_chain_that_begins_almost_without_noise_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="A chain of 1 step at strength 1 begins almost without noise"):
        run(tmp_path / "out", "--method", "da", "--chain_steps", 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", ["adm+", "adm-", "sds+", "sds-", "ea", "da"])
def test_every_method_keeps_its_budget_and_repeats_itself(run, tmp_path, image_dir, method, norm):
    state = torch.get_rng_state()
    more = ["--method", method, "--norm", norm, "--steps", 3]
    more += ["--chain_steps", 2] if method == "da" else []
    run(tmp_path / "first", *more)
    run(tmp_path / "second", *more)
    assert torch.equal(torch.get_rng_state(), state)
    for name, original in zip(NAMES, ["a.png", "b.jpg", "c.png"], strict=True):
        change = levels(tmp_path / "first" / name) - source(image_dir / original)
        reached = np.abs(change).max() if norm == "linf" else np.sqrt((change**2).mean())
        assert 0.4 * EPS < reached <= EPS
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_targets_change_the_encoder_attack(run, tmp_path, image_dir):
    for target in ("pattern", "grey", "zero", image_dir / "b.jpg"):
        run(tmp_path / str(target).replace("/", "-"), "--method", "ea", "--target_image", target)
    assert len({(folder / "a.png").read_bytes() for folder in tmp_path.iterdir()}) == 4


def test_a_poison_follows_its_target_unless_changed_by_hand(run, tmp_path, image_dir, capsys):
    shutil.copy(image_dir / "a.png", tmp_path / "target.png")
    flags = ["--method", "ea", "--target_image", tmp_path / "target.png"]
    run(tmp_path / "out", *flags)
    before = snapshot(tmp_path / "out")
    run(tmp_path / "out", *flags)
    assert snapshot(tmp_path / "out") == before
    Image.new("RGB", (64, 64)).save(tmp_path / "target.png")
    (tmp_path / "out" / "c.png").write_bytes(b"mine")
    capsys.readouterr()
    run(tmp_path / "out", *flags)
    assert "by hand are kept (1): c.png; delete them" in capsys.readouterr().out
    assert (tmp_path / "out" / "c.png").read_bytes() == b"mine"
    assert all((tmp_path / "out" / name).read_bytes() != before[name][0] for name in ("a.png", "b.png"))


def test_sub_folders_keep_their_structure(run, image_dir, tmp_path, capsys):
    tree, masks = tmp_path / "tree", tmp_path / "masks"
    for inner, name in (("", "a.png"), ("cat", "a.png"), ("cat/old", "c.png")):
        for folder in (tree, masks):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        shutil.copy(image_dir / name, tree / inner / name)
        Image.new("L", Image.open(image_dir / name).size, 255).save(masks / inner / name)
    run(tmp_path / "out", "--image_dir", tree, "--mask_dir", masks)
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert made == ["a.png", "cat/a.png", "cat/old/c.png"]
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "out" / "cat" / "a.png").read_bytes()
    capsys.readouterr()
    (tmp_path / "out" / "cat" / "a.png").unlink()
    run(tmp_path / "out", "--image_dir", tree, "--mask_dir", masks)
    assert "3 images" in (told := capsys.readouterr().out) and "1 of them to do" in told


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs of odd sizes: colour, grey, a palette, 16 bits, and one that lies on its side."""
    from skimage import data

    folder, masks = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("stencils")
    coffee, cat = Image.fromarray(data.coffee()), Image.fromarray(data.chelsea())
    coffee.resize((203, 135)).save(folder / "colour.jpg", quality=92)
    Image.fromarray(data.camera()).resize((151, 149)).save(folder / "grey.png")
    cat.resize((170, 113)).quantize(64).save(folder / "palette.png")
    Image.fromarray(np.asarray(Image.fromarray(data.coins()).resize((127, 101)), np.uint16) * 257).save(
        folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.rotate(90, expand=True).resize((99, 160)).save(folder / "lying.jpg", exif=exif, quality=92)
    for path in folder.iterdir():
        width, height = read_image(path).size
        mask = np.zeros((height, width), np.uint8)
        mask[height // 3:, : width // 2] = 255
        Image.fromarray(mask).save(masks / f"{path.stem}.png")
    return folder, masks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_keep_size_keeps_size_budget_and_mask_of_photographs(run, photographs, tmp_path, norm):
    folder, masks = photographs
    run(tmp_path / "out", "--image_dir", folder, "--mask_dir", masks, "--keep_size", "--norm", norm,
        "--eps", 6, "--step_size", 2, "--method", "sds+")
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    for path in folder.iterdir():
        original = read_image(path)
        result = Image.open(tmp_path / "out" / f"{path.stem}.png")
        assert result.size == original.size and result.mode == "RGB"
        change = np.asarray(result).astype(int) - np.asarray(original).astype(int)
        inside = np.asarray(Image.open(masks / f"{path.stem}.png")) > 0
        assert not change[~inside].any() and change[inside].any()
        reached = np.abs(change).max() if norm == "linf" else np.sqrt((change**2).mean())
        assert 2 < reached <= 6


def test_zero_steps_leave_photographs_as_they_are(run, photographs, tmp_path):
    run(tmp_path / "out", "--image_dir", photographs[0], "--keep_size", "--steps", 0)
    for path in photographs[0].iterdir():
        assert np.array_equal(levels(tmp_path / "out" / f"{path.stem}.png"), np.asarray(read_image(path)))


def test_batches_take_images_of_one_size_together(run, photographs, tmp_path, monkeypatch):
    sizes, original = [], poisoning.pgd
    monkeypatch.setattr(poisoning, "pgd",
                        lambda images, *args, **kwargs: sizes.append(tuple(images.shape)) or original(
                            images, *args, **kwargs))
    run(tmp_path / "square", "--image_dir", photographs[0], "--batch_size", 3, "--steps", 1)
    assert sizes == [(3, 3, SIDE, SIDE), (2, 3, SIDE, SIDE)]
    sizes.clear()
    run(tmp_path / "whole", "--image_dir", photographs[0], "--batch_size", 3, "--steps", 1, "--keep_size")
    assert sum(size[0] for size in sizes) == 5 and all(min(size[2:]) == SIDE for size in sizes)
    records = [json.loads(line) for line in (tmp_path / "square" / "stats.jsonl").read_text().splitlines()]
    assert len({record["file"] for record in records}) == 5


def test_an_adaptive_attack_is_compared_with_the_plain_one(run, image_dir, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("L", Image.open(image_dir / name).size, 255).save(tmp_path / "masks" / f"{name[0]}.png")
    adaptive = ["--adaptive", "szt", "--loss_mask_dir", tmp_path / "masks"]
    run(tmp_path / "out", *adaptive, "--draws", 2)
    told = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    for record in records:
        worse = record["objective_plain"] > record["objective_after"]
        assert worse == (f"warning: {record['source']}: The plain attack would have brought" in told)
    run(tmp_path / "plain", "--steps", 2)
    records = [json.loads(line) for line in (tmp_path / "plain" / "stats.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["objective_plain"] is None for record in records)


def test_the_plain_attack_of_the_comparison_keeps_the_end_of_the_timesteps_alone(run, image_dir, tmp_path,
                                                                                 monkeypatch):
    victims, attack_batch = [], poisoning.attack_batch
    monkeypatch.setattr(poisoning, "attack_batch", lambda settings, victim, *rest: victims.append(
        victim) or attack_batch(settings, victim, *rest))
    white_masks(image_dir, tmp_path / "masks")
    run(tmp_path / "out", "--jpeg_quality", 95, 25, "--t_max", 300, "--steps", 1, "--loss_mask_dir",
        tmp_path / "masks")
    assert {(victim.zone.jpeg_quality, victim.zone.t_max, victim.random_jpeg, victim.loss_mask is not None)
            for victim in victims} == {(25, 300, (25, 95), True), (None, 300, None, False)}


def test_a_strength_that_the_chain_cannot_have_is_named(tiny_model, capsys):
    for steps, strength, said in ((4, 0.8, ""),
                                  (4, 0.7, "da runs the last 4 of 6 steps, a strength of 0.667 instead of")):
        load_victim(settings_of("--pretrained_model_name_or_path", tiny_model, "--method", "da",
                                "--resolution", SIDE, "--chain_steps", steps, "--strength", strength))
        err = capsys.readouterr().err
        assert said in err if said else "strength" not in err


def test_a_prompt_that_would_be_cut_off_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="more than the .* tokens that the model takes; shorten it"):
        run(tmp_path / "out", "--prompt", "a photo " * 99)


def test_a_weaker_adaptive_attack_is_named(run, tmp_path, monkeypatch, capsys):
    attack_batch, find_jobs = poisoning.attack_batch, poisoning.find_jobs

    def lazy(settings, victim, batch, on_step):
        return [tensors.original for tensors in batch] if victim.zone.jpeg_quality else attack_batch(
            settings, victim, batch, on_step)

    monkeypatch.setattr(poisoning, "attack_batch", lazy)
    monkeypatch.setattr(poisoning, "find_jobs", lambda *folders: find_jobs(*folders)[:1])
    run(tmp_path / "out", "--method", "ea", "--jpeg_quality", 90, "--eps", 16, "--step_size", 4)
    told = capsys.readouterr().out
    assert "a.png: The objective did not fall" in told
    assert "a.png: The plain attack would have brought" in told


def test_a_folder_of_version_0_1_is_continued(run, image_dir, tmp_path, capsys):
    """Its options.json names a mask dilation without masks, and the numbers of --adaptive szt."""
    masks = white_masks(image_dir, tmp_path / "masks")
    adaptive = ["--adaptive", "szt", "--loss_mask_dir", masks, "--steps", 1]
    for name, more, old in (("plain", [], {"mask_dilation": 16}),
                            ("szt", adaptive, {"mask_dilation": 2, "t_min": 500, "jpeg_quality": [25]})):
        run(tmp_path / name, *more)
        options = json.loads((tmp_path / name / "options.json").read_text())
        options["arguments"] |= old
        (tmp_path / name / "options.json").write_text(json.dumps(options))
        capsys.readouterr()
        run(tmp_path / name, *more)
        assert "3 images" in (told := capsys.readouterr().out) and "0 of them to do" in told
    with pytest.raises(SystemExit, match="made with another --t_min, --mask_dilation"):
        run(tmp_path / "szt", *adaptive, "--t_min", 400, "--mask_dilation", 16)


@pytest.mark.parametrize("method", ["adm+", "sds+", "ea", "da"])
def test_sdxl_is_poisoned_as_well(run, image_dir, tiny_sdxl, tmp_path, method):
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--method", method]
    run(tmp_path / "out", *flags, *(["--chain_steps", 2, "--steps", 3] if method == "da" else []))
    records = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    for name, original in zip(NAMES, ["a.png", "b.jpg", "c.png"], strict=True):
        change = np.abs(levels(tmp_path / "out" / name) - source(image_dir / original))
        assert change.max() == EPS and change.mean() > 0.5
    moved = [record["objective_after"] - record["objective_before"] for record in records]
    assert len(moved) == 3 and all(moved)
    # Of random weights, only the encoder promises anything at draws that the attack did not see.
    assert method != "ea" or max(moved) < 0


def test_an_adaptive_attack_on_sdxl(run, image_dir, tiny_sdxl, tmp_path):
    masks = white_masks(image_dir, tmp_path / "masks")
    run(tmp_path / "out", "--pretrained_model_name_or_path", tiny_sdxl, "--adaptive", "szt",
        "--loss_mask_dir", masks, "--steps", 2)
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (options["t_min"], options["t_max"]) == (500, 1000)
    assert options["arguments"]["mask_dilation"] == 2 and options["arguments"]["jpeg_quality"] == [25]


def test_the_documented_poison_of_ones_own_runs(image_dir, tiny_model, tmp_path, monkeypatch):
    code = (ROOT / "docs" / "poisons.md").read_text().split("```python\n")[1].split("```")[0]
    small = code.replace('adaptive="szt"', 'adaptive="szt", steps=8, resolution=64')
    shutil.copytree(image_dir, tmp_path / "images")
    white_masks(image_dir, tmp_path / "masks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("szt_utils.poisons.POISONS", {**POISONS})  # the snippet registers one
    exec(small, {"model": str(tiny_model)})
    records = [json.loads(line) for line in open("poisoned/stats.jsonl")]
    assert len(records) == 3 and all(each["objective_after"] < each["objective_before"] for each in records)
