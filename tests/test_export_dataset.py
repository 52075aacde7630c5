"""The exporting script: its command lines, exit codes, and that it and the library agree."""

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

import export_dataset
from szt_utils.export import ExportSettings
from szt_utils.trainers import TRAINERS
from szt_utils.trainers.family import FAMILIES

FLAGS = ["--trainer", "musubi", "--model", "z-image", "--resolution", "128"]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(90, 140, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def test_export_through_the_real_command_line(images, tmp_path):
    done = run_script("export_dataset.py", *FLAGS, "--image_dir", images, "--output_dir", tmp_path / "out",
                      "--placeholder_token", " my  toy ")
    assert "is ready for musubi-tuner" in done.stdout
    assert (tmp_path / "out" / "images" / "a.txt").read_text() == "a photo of a my toy\n"


@pytest.fixture
def exported(images, tmp_path):
    export_dataset.main([*FLAGS, "--image_dir", str(images), "--output_dir", str(tmp_path / "out"),
                         "--placeholder_token", "toy"])
    return tmp_path / "out"


def test_check_prints_a_line_a_finding_and_exits_with_1(exported, capsys):
    capsys.readouterr()
    export_dataset.main([*FLAGS, "--check", str(exported)])
    assert capsys.readouterr().out == "Nothing is wrong.\n"
    text = (exported / "config.toml").read_text()
    (exported / "config.toml").write_text(text.replace("min_timestep = 618", "min_timestep = 0"))
    (exported / "images" / "a.txt").unlink()
    (exported / "images" / "a.png").rename(exported / "images" / "\x1b[2J.png")
    with pytest.raises(SystemExit) as caught:
        export_dataset.main([*FLAGS, "--check", str(exported)])
    lines = caught.value.code.splitlines()
    assert len(lines) == 2 and "No caption was found for \\x1b[2J.png" in lines[0]
    assert "min_timestep is 0" in lines[1] and capsys.readouterr().out == ""


def test_the_script_and_the_library_agree():
    assert export_dataset.TRAINERS == tuple(TRAINERS) and export_dataset.MODELS == tuple(FAMILIES)
    assert set().union(*(trainer.models for trainer in TRAINERS.values())) == set(FAMILIES)
    given = vars(export_dataset.parse_args(["--trainer", "kohya", "--model", "sd15", "--image_dir", "i",
                                            "--output_dir", "o", "--placeholder_token", "t"]))
    given = {name: value for name, value in given.items() if value is not None}
    assert given.pop("output_dir") == "o"
    assert ExportSettings(**given) == ExportSettings("i", "kohya", "sd15", "t")


REQUIRED = ["--trainer", "kohya", "--model", "sd15"]
EXPORT = [*REQUIRED, "--image_dir", "i", "--output_dir", "o", "--placeholder_token", "t"]


@pytest.mark.parametrize("flags, message", [
    (REQUIRED, "required: --image_dir, --output_dir, --placeholder_token"),
    (["--trainer", "fluxgym", "--model", "sd15"], "invalid choice: 'fluxgym'"),
    ([*EXPORT, "--config", "x.toml"], "--config: an export does not use it, only --check"),
    ([*REQUIRED, "--check", "d", "--image_dir", "i"], "--image_dir: --check does not use it"),
    ([*REQUIRED, "--check", "d", "--mask_dilation", "3"], "--mask_dilation: --check does not use it"),
    ([*EXPORT, "--mask_dilation", "3"], "--mask_dilation: needs --loss_mask_dir"),
    ([*EXPORT, "--resolution", "500"], "500 is not a multiple of 64"),
    ([*EXPORT, "--t_min", "1000"], "1000 is not at least 0 and at most 999"),
    ([*EXPORT, "--placeholder_token", " "], "--placeholder_token: it is empty"),
])
def test_wrong_usage_is_exit_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        export_dataset.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_bad_input_is_one_sentence(images, tmp_path):
    (images / "b.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as error:
        export_dataset.main(["--trainer", "kohya", "--model", "sd15", "--image_dir", str(images),
                             "--output_dir", str(tmp_path / "out"), "--placeholder_token", "t"])
    assert error.value.code.startswith("error: ") and "b.jpg" in error.value.code
    assert not (tmp_path / "out").exists()
