"""The poisoning script: budget on the reloaded PNG, masks, independence of order and resume,
records, errors."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
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
    refused("same folder", output_dir=image_dir)
    refused("not of this script", output_dir=folder("foreign", holiday=("b.jpg", "jpg")))
    (tmp_path / "foreign" / "options.json").write_text('{"script": "evaluate.py", "arguments": {}}')
    refused("not of this script", output_dir=tmp_path / "foreign")
    (tmp_path / "foreign" / "options.json").write_text("[not json")
    refused("not of this script", output_dir=tmp_path / "foreign")
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["holiday.jpg", "options.json"]
    refused("is not a folder", output_dir=image_dir / "a.png")
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
    ["--mixed_precision", "fp8"],
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
