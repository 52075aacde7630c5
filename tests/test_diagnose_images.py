"""The script: signals to verdict, a calibration for later, resume, one sentence per mistake."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
from conftest import build_tiny_sdxl, run_script
from PIL import Image

from szt_utils import pocket
from szt_utils.diagnosing import _known_signals
from szt_utils.diagnosis import SIGNALS, read_calibration
from szt_utils.files import write_json
from szt_utils.fingerprint import identity
from szt_utils.pixel_signals import SIGNALS as PIXEL_SIGNALS
from szt_utils.pixel_signals import pixel_signals

SCRIPT = "diagnose_images.py"


def here(*arguments) -> None:
    import diagnose_images

    diagnose_images.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of 12 clean images, and one of 6 of which the first three have strong noise."""
    folder, rng = tmp_path_factory.mktemp("diagnosis"), np.random.default_rng(0)
    for i, concept in enumerate(list(pocket.NOVEL_CONCEPTS)[:6]):
        pocket.write_concept(concept, folder / "clean", count=2)
        (path,) = pocket.write_concept(concept, folder / "set" / str(i), count=1, seed=1)
        if i < 3:
            pixels = np.asarray(Image.open(path)).astype(int)
            noise = rng.choice([-40, 40], size=pixels.shape)
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path)
    return folder


def test_a_models_identity_is_of_its_files_alone(tmp_path):
    """Also on Windows, and beside what a download leaves."""
    model = tmp_path / "model"
    for name, content in (("unet/b", "two"), ("a", "one"), (".cache/times", "now"), ("unet/.b", "x")):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(content)
    expected = hashlib.sha256(b"a 3 oneunet/b 3 two").hexdigest()[:8]
    assert identity(str(model)) == f"model@{expected}"



def test_it_calibrates_on_clean_images_and_finds_the_poisoned(folders, tmp_path):
    """Strong noise shows in every signal."""
    model = ["--pretrained_model_name_or_path", pocket.model_path(), "--image_dir", folders / "set"]
    done = run_script(SCRIPT, *model, "--clean_dir", folders / "clean", "--output_dir", tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    report = whole["model"]
    suspects = [image["suspect"] for _, image in sorted(report["images"].items())]
    assert suspects[:3] == [True] * 3 and report["poisoned"] and sum(suspects) == report["suspects"]
    scores = [image["score"] for _, image in sorted(report["images"].items())]
    assert min(scores[:3]) > max(scores[3:])
    lines = done.stdout.splitlines()
    assert len(lines) == 14 and "looks poisoned" in lines[7] and lines[6] == whole["sentence"]
    assert lines[-1] == f"by the model, {report['sentence']}"
    # The calibration alone gives the same, and the same command computes no signal again.
    here(*model, "--calibration", tmp_path / "out" / "calibration.json", "--output_dir", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "diagnosis.json").read_text())
    assert again == whole
    stats = (tmp_path / "again" / "stats.jsonl").read_bytes()
    here(*model, "--calibration", tmp_path / "out" / "calibration.json", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "stats.jsonl").read_bytes() == stats
    # Records that are foreign, or whose signals are no numbers, are measured again.
    lines = stats.decode().splitlines()
    record = json.dumps(json.loads(lines[0]) | {"evenness": "x"}) + '\n{"sha256": {}}\n7\n'
    (tmp_path / "again" / "stats.jsonl").write_text(record)
    here(*model, "--calibration", tmp_path / "out" / "calibration.json", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "stats.jsonl").read_text().splitlines()[3:] == lines
    assert json.loads((tmp_path / "again" / "diagnosis.json").read_text()) == whole


def test_the_pocket_models_calibration_is_bundled(tmp_path):
    pocket.write_concept("blue-dotted-cross", tmp_path / "set", count=2, seed=9)
    here("--pretrained_model_name_or_path", pocket.model_path(), "--image_dir", tmp_path / "set",
         "--output_dir", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "diagnosis.json").read_text())["model"]["images"]) == 2
    with pytest.raises(SystemExit, match="'built in' was made with the resolution 128, not 64; give --clean"):
        here("--pretrained_model_name_or_path", pocket.model_path(), "--image_dir", tmp_path / "set",
             "--output_dir", tmp_path / "small", "--resolution", 64)
    assert not (tmp_path / "small").exists()


def test_a_calibration_belongs_to_its_model(tiny_model, folders, tmp_path):
    write_json(tmp_path / "c.json", {**read_calibration(pocket.calibration_path())})
    message = f"made with the model {identity(pocket.model_path())}, not epsilon@"
    with pytest.raises(SystemExit, match=message):
        here("--pretrained_model_name_or_path", tiny_model, "--image_dir", folders / "set", "--calibration",
             tmp_path / "c.json", "--output_dir", tmp_path / "out")


def test_another_model_than_the_pocket_model_needs_clean_images(tiny_model, concept_folder, tmp_path):
    with pytest.raises(SystemExit) as caught:
        here("--pretrained_model_name_or_path", tiny_model, "--image_dir", concept_folder[0], "--output_dir",
             tmp_path / "out")
    assert "needs --clean_dir" in str(caught.value)
    shutil.copytree(concept_folder[0], tmp_path / "set")
    with pytest.raises(SystemExit) as caught:
        here("--pretrained_model_name_or_path", tiny_model, "--image_dir", tmp_path / "set", "--clean_dir",
             concept_folder[0], "--output_dir", tmp_path / "set" / "out")
    assert "lies in it" in str(caught.value)


def test_an_sdxl_model_diagnoses_too(folders, tmp_path, capsys):
    model = build_tiny_sdxl(tmp_path / "sdxl")
    here("--pretrained_model_name_or_path", model, "--image_dir", folders / "set" / "5", "--clean_dir",
         folders / "clean", "--output_dir", tmp_path / "out")
    (image,) = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["model"]["images"].values()
    assert np.isfinite(list(image["signals"].values())).all() and len(image["signals"]) == 5
    assert capsys.readouterr().out.count("\n") == 4


def test_without_a_model_it_looks_at_the_pixels_at_full_size(tmp_path, capsys):
    """Noise, a flat image and a JPEG file: three verdicts at most, each with a sentence; resumable."""
    (tmp_path / "set" / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0).normal(128, 8, (300, 420, 3)).round().astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "set" / "deep" / "noise.png")
    Image.fromarray(noise).save(tmp_path / "set" / "saved.jpg", quality=75)
    Image.new("RGB", (300, 300), "gray").save(tmp_path / "set" / "flat.png")
    for _ in range(2):
        here("--image_dir", tmp_path / "set", "--output_dir", tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
        assert lines[-1] == report["sentence"] and len(lines) == 4 and "model" not in report
    images = report["images"]
    assert list(images) == ["deep/noise.png", "flat.png", "saved.jpg"]
    assert images["flat.png"]["verdict"] == "cannot tell" and images["flat.png"]["signals"] is None
    assert images["deep/noise.png"]["signals"] == dict(zip(PIXEL_SIGNALS, pixel_signals(noise), strict=True))
    assert images["deep/noise.png"]["verdict"] != "poisoned"
    assert images["saved.jpg"]["verdict"] == "cannot tell"


def test_without_a_model_a_mistake_leaves_no_folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "broken.png").write_text("not an image")
    with pytest.raises(SystemExit, match=r"^error: .*broken.png' cannot be read"):
        here("--image_dir", tmp_path / "set", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_of_signals_that_are_no_finite_numbers_are_not_known():
    good = {"sha256": "a", **dict.fromkeys(SIGNALS, 0.5)}
    bad = [{**good, "sha256": "b", SIGNALS[-1]: value} for value in (math.nan, math.inf, None, "1", 1)]
    assert _known_signals([good, *bad]) == {"a": [0.5] * len(SIGNALS)}
    assert _known_signals([good, {**bad[0], "sha256": "a"}]) == {}  # the last record counts


def test_the_seed_is_the_models_and_signals_that_are_not_finite_are_refused(tiny_model, folders, tmp_path,
                                                                           monkeypatch):
    def measure(model, pixels, seed):
        seeds.append(seed)
        return [0.5] * (len(SIGNALS) - 1) + [math.nan]

    seeds = []
    monkeypatch.setattr("szt_utils.diagnosing.image_signals", measure)
    with pytest.raises(SystemExit, match="The signals of '.*' are not finite; use --mixed_precision bf16"):
        here("--pretrained_model_name_or_path", tiny_model, "--image_dir", folders / "set", "--clean_dir",
             folders / "clean", "--output_dir", tmp_path / "out", "--seed", 5)
    assert seeds == [5]


@pytest.mark.parametrize("arguments, message", [
    (["--clean_dir", "few"], "at least 10 clean images, but there are 5"),
    (["--clean_dir", "none"], "'none' does not exist"),
    (["--calibration", "none.json"], "'none.json' is not a calibration"),
    (["--clean_dir", "enough", "--resolution", 100], "multiple of 8"),
    (["--clean_dir", "enough", "--pretrained_model_name_or_path", "no/such"], "no usable"),
    (["--clean_dir", "broken"], "broken.png' cannot be read"),
])
def test_one_sentence_per_mistake(tiny_model, concept_folder, folders, tmp_path, monkeypatch, arguments,
                                  message):
    monkeypatch.chdir(tmp_path)
    for name, source in (("few/within", concept_folder[0]), ("enough", folders / "clean"),
                         ("broken", folders / "clean")):
        shutil.copytree(source, name)
    (tmp_path / "broken" / "broken.png").write_text("not an image")
    with pytest.raises(SystemExit) as caught:
        here("--pretrained_model_name_or_path", tiny_model, "--image_dir", concept_folder[0],
             "--output_dir", "out", *arguments)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "--image_dir"),
    (["--image_dir", "x", "--clean_dir", "d", "--calibration", "c"], "--calibration: not used"),
    (["--image_dir", "x", "--seed", "-1"], "-1 is not at least 0"),
    (["--image_dir", "x", "--clean_dir", "c"], "--clean_dir: needs --pretrained_model_name_or_path"),
    (["--image_dir", "x", "--calibration", "c"], "--calibration: needs --pretrained_model_name_or_path"),
    (["--image_dir", "x", "--resolution", "64"], "--resolution: needs --pretrained_model_name_or_path"),
    (["--image_dir", "x", "--seed", "0"], "--seed: needs --pretrained_model_name_or_path"),
    (["--image_dir", "x", "--mixed_precision", "bf16"], "--mixed_precision: needs --pretrained_model"),
])
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        here("--output_dir", "o", *arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
