"""The poisoning script: budget on the reloaded PNG, masks, independence of order and resume,
records, errors."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

EPS, STEPS, SIDE = 3, 5, 64
NAMES = ["a.png", "b.png", "c.png"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("poison_images", ROOT / "poison_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """A wide PNG, a tall JPEG and a PNG with alpha."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
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
def run(script, options):
    return lambda output_dir, *more: script.main([*map(str, options), "--output_dir", str(output_dir),
                                                  *map(str, more)])


def levels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def source(path) -> np.ndarray:
    from szt_utils.images import crop_and_resize, read_image

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
    assert "3 pictures" in capsys.readouterr().out
    after = snapshot(folder)
    assert [after[name][0] for name in NAMES] == [whole[name][0] for name in NAMES]
    assert after["a.png"] == kept["a.png"] and after["c.png"] != kept["c.png"]
    assert "b.png" in after["stats.jsonl"][0].decode().splitlines()[2]

    run(folder)
    assert "0 of them to do" in capsys.readouterr().out and snapshot(folder) == after


def test_a_changed_picture_is_done_again(run, image_dir, tmp_path, capsys):
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
    refused("holds no picture", "--image_dir", folder("empty"))
    twins = folder("twins", a=("a.png", "png"))
    shutil.copy(image_dir / "b.jpg", twins / "a.jpg")
    refused("would both become 'a.png'", "--image_dir", twins)
    broken = folder("broken", a=("a.png", "png"), z=("b.jpg", "jpg"))
    (broken / "z.jpg").write_bytes((broken / "z.jpg").read_bytes()[:500])
    refused(r"z\.jpg' cannot be read", "--image_dir", broken)
    refused("is --image_dir or lies in it", output_dir=image_dir)
    refused("is --image_dir or lies in it", output_dir=image_dir / "poisoned")
    refused("not of this script", output_dir=folder("foreign", holiday=("b.jpg", "jpg")))
    (tmp_path / "foreign" / "options.json").write_text('{"script": "evaluate.py", "arguments": {}}')
    refused("not of this script", output_dir=tmp_path / "foreign")
    (tmp_path / "foreign" / "options.json").write_text("[not json")
    refused("not of this script", output_dir=tmp_path / "foreign")
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["holiday.jpg", "options.json"]
    refused("is not a folder", output_dir=twins / "a.png")
    refused("has no mask", "--mask_dir", folder("masks", a=("a.png", "png")))
    edge, mask = folder("edge"), Image.new("L", (300, 100))
    mask.save(edge / "a.png")
    mask.paste(255, (0, 0, 50, 100))
    mask.save(folder("edge-masks") / "a.png")
    refused("black within the central square", "--image_dir", edge, "--mask_dir", tmp_path / "edge-masks")
    refused("0 <= t_min < t_max <= 1000", "--t_min", 500, "--t_max", 500)
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
def test_usage_errors(script, flags, capsys):
    required = ["--pretrained_model_name_or_path", "m", "--image_dir", "i", "--output_dir", "o",
                "--method", "adm+"]
    script.parse_args(required)
    with pytest.raises(SystemExit) as failure:
        script.parse_args([*required, *flags])
    assert failure.value.code == 2 and flags[0] in capsys.readouterr().err


def test_defaults_are_the_papers(script, capsys):
    required = ["--image_dir", "i", "--output_dir", "o", "--method", "adm+"]
    args = script.parse_args([*required, "--pretrained_model_name_or_path", "m"])
    assert ((args.eps, args.step_size, args.steps, args.draws, args.prompt, args.t_min)
            == (16, 1, 100, 1, "a photo", 0))
    assert (args.norm, args.step_schedule, args.target_image) == ("linf", "constant", "pattern")
    with pytest.raises(SystemExit) as failure:
        script.parse_args(required)
    assert failure.value.code == 2 and "--pretrained_model_name_or_path" in capsys.readouterr().err


def test_methods_are_the_registry_and_help_imports_no_torch(script):
    from szt_utils.objectives import POISONS

    assert script.METHODS == tuple(POISONS)
    code = """import sys, poison_images
try: poison_images.parse_args(["--help"])
except SystemExit: assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_presets_are_defaults_that_flags_override(script, capsys):
    required = ["--pretrained_model_name_or_path", "m", "--image_dir", "i", "--output_dir", "o"]
    for preset, methods in script.PRESETS.items():
        for method, settings in methods.items():
            args = vars(script.parse_args([*required, "--method", method, "--preset", preset]))
            assert {name: args[name] for name in script.DEFAULTS} == {**script.DEFAULTS, **settings}
    args = script.parse_args([*required, "--method", "ea", "--preset", "photoguard", "--steps", "7"])
    assert (args.eps, args.steps, args.step_schedule) == (15, 7, "linear")
    with pytest.raises(SystemExit):
        script.parse_args([*required, "--method", "da", "--preset", "diff-protect"])
    assert "diff-protect has no da, only adm+" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse_args([*required, "--method", "da", "--target_image", "zero"])
    assert "zero is a latent" in capsys.readouterr().err


def test_adaptive_szt_is_its_three_parts(script):
    required = ["--pretrained_model_name_or_path", "m", "--image_dir", "i", "--output_dir", "o",
                "--adaptive", "szt", "--loss_mask_dir", "l"]
    args = script.parse_args([*required, "--method", "adm+"])
    assert (args.jpeg_quality, args.t_min, args.mask_dilation) == ([25], 500, 16)
    assert script.parse_args([*required, "--method", "ea"]).t_min == 0  # it uses no timestep
    assert script.parse_args([*required, "--method", "adm+", "--t_min", "300", "--jpeg_quality", "15", "95"]
                             ).jpeg_quality == [15, 95]


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
    assert "3 pictures" in (told := capsys.readouterr().out) and "1 of them to do" in told


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
    from szt_utils.images import read_image

    for path in folder.iterdir():
        width, height = read_image(path).size
        mask = np.zeros((height, width), np.uint8)
        mask[height // 3:, : width // 2] = 255
        Image.fromarray(mask).save(masks / f"{path.stem}.png")
    return folder, masks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_keep_size_keeps_size_budget_and_mask_of_photographs(run, photographs, tmp_path, norm):
    from szt_utils.images import read_image

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
    from szt_utils.images import read_image

    run(tmp_path / "out", "--image_dir", photographs[0], "--keep_size", "--steps", 0)
    for path in photographs[0].iterdir():
        assert np.array_equal(levels(tmp_path / "out" / f"{path.stem}.png"), np.asarray(read_image(path)))


def test_batches_take_pictures_of_one_size_together(run, photographs, tmp_path, monkeypatch):
    import szt_utils.pgd as pgd_module

    sizes, original = [], pgd_module.pgd
    monkeypatch.setattr(pgd_module, "pgd",
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


def test_a_weaker_adaptive_attack_is_named(script, run, image_dir, tmp_path, monkeypatch, capsys):
    attack_batch = script.attack_batch

    def lazy(args, attack, batch, on_step):
        return [tensors.original for tensors in batch] if attack.jpeg_qualities else attack_batch(
            args, attack, batch, on_step)

    monkeypatch.setattr(script, "attack_batch", lazy)
    monkeypatch.setattr(script, "find_pictures", lambda args, find=script.find_pictures: find(args)[:1])
    run(tmp_path / "out", "--method", "ea", "--jpeg_quality", 90, "--eps", 16, "--step_size", 4)
    told = capsys.readouterr().out
    assert "a.png: The objective did not fall" in told
    assert "a.png: The plain attack would have brought" in told
