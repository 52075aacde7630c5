"""Trainers: the sizes that each keeps, the noise of the families, shares of draws, and TOML."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from szt_utils.errors import InputError
from szt_utils.export import plan_for
from szt_utils.safe_zone import PAPER_LOG_SNR, SafeZone
from szt_utils.trainers import TRAINERS
from szt_utils.trainers.buckets import nearest_bucket
from szt_utils.trainers.config_files import Config, read_config, to_toml, tomllib
from szt_utils.trainers.family import FAMILIES
from szt_utils.trainers.trainer import (
    Source,
    flux_shift,
    read_size,
    share_findings,
    share_in_zone,
    shifted,
)

PAIRS = [(name, model) for name, trainer in TRAINERS.items() for model in trainer.models]


def kohya_bucket(width, height, resolution):
    """The predefined size itself, if there is one; else that of the nearest aspect."""
    sizes = {(resolution // 64 * 64,) * 2}
    for w in range(resolution // 2 // 64 * 64, 2 * resolution + 1, 64):
        h = min(2 * resolution, resolution**2 // w // 64 * 64)
        if h >= resolution // 2 // 64 * 64:
            sizes |= {(w, h), (h, w)}
    return (width, height) if (width, height) in sizes else min(
        sizes, key=lambda size: abs(size[0] / size[1] - width / height))


def onetrainer_bucket(width, height, resolution, step):
    aspects = [(1, each) for each in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)]
    sizes = [(h / math.sqrt(h * w) * resolution, w / math.sqrt(h * w) * resolution)
             for h, w in aspects + [(w, h) for h, w in aspects]]
    sizes = [(round(h / step) * step, round(w / step) * step) for h, w in sizes]
    h, w = sizes[np.argmin([abs(h / w - height / width) for h, w in sizes])]
    return w, h


def ai_toolkit_bucket(width, height, resolution, step=32):
    scale = math.sqrt(min(width * height, resolution**2) / (width * height))
    sides = [[f(side * scale / step) * step for f in (math.floor, math.ceil)] for side in (width, height)]
    fits = [(w, h) for w in sides[0] for h in sides[1] if 0 < w * h <= resolution**2]
    return min(fits, key=lambda size: abs(size[0] * size[1] - min(width * height, resolution**2)))


def simpletuner_bucket(width, height, resolution):
    aspect = round(width / height, 2)
    if aspect == 1:
        return resolution, resolution
    return (round(resolution * math.sqrt(aspect) / 64) * 64, round(resolution / math.sqrt(aspect) / 64) * 64)


def musubi_bucket(width, height, resolution):
    assert width * height <= resolution**2  # bucket_no_upscale
    return width // 16 * 16, height // 16 * 16


@pytest.mark.parametrize("resolution", [128, 512, 576, 768, 1024, 1536])
def test_a_trainer_keeps_the_sizes_that_are_exported_for_it(resolution):
    rules = {"kohya": kohya_bucket, "ai-toolkit": ai_toolkit_bucket, "simpletuner": simpletuner_bucket,
             "musubi": musubi_bucket}
    for name, rule in rules.items():
        sizes = TRAINERS[name].buckets(resolution, "sdxl")
        assert (resolution, resolution) in sizes and len(sizes) >= 3
        assert [rule(*size, resolution) for size in sizes] == sizes, name
    for family, step in (("sd15", 8), ("sdxl", 64)):
        sizes = TRAINERS["onetrainer"].buckets(resolution, family)
        assert [onetrainer_bucket(*size, resolution, step) for size in sizes] == sizes
    assert TRAINERS["diffusers"].buckets(resolution, "flux") == [(resolution, resolution)]


def test_an_image_gets_the_bucket_of_the_nearest_aspect():
    sizes = TRAINERS["kohya"].buckets(512, "sd15")
    assert nearest_bucket((4000, 3000), sizes) == (576, 448)
    assert nearest_bucket((3000, 4000), sizes) == (448, 576)
    assert nearest_bucket((10, 10), sizes) == (512, 512)
    assert nearest_bucket((9000, 10), sizes) == (1024, 256)


@pytest.mark.parametrize("width, nearest", [(1400, 512), (1430, 1024)])
def test_the_nearest_aspect_is_that_of_the_smallest_ratio(width, nearest):
    """Between 1 and 2, the bounds meet at the root of 2."""
    assert nearest_bucket((width, 1000), [(512, 512), (1024, 512)]) == (nearest, 512)
    assert nearest_bucket((1000, width), [(512, 512), (512, 1024)]) == (512, nearest)


def test_sizes_that_a_trainer_keeps_though_they_are_no_buckets():
    for name, kept in (("ai-toolkit", True), ("musubi", True), ("kohya", False)):
        assert TRAINERS[name].keeps((480, 512), 512, "sdxl") == kept
    for name, kept in (("ai-toolkit", False), ("musubi", True)):  # steps of 32 and of 16
        assert TRAINERS[name].keeps((1008, 1024), 1024, "qwen-image") == kept
    assert not TRAINERS["ai-toolkit"].keeps((544, 512), 512, "sdxl")
    assert not TRAINERS["ai-toolkit"].keeps((500, 500), 512, "sdxl")


def test_the_families_have_the_noise_of_their_schedulers():
    """Stable Diffusion's abar is 0.99915 at the first, 0.27633 at the 501st, 0.00466 at the last timestep."""
    signal = FAMILIES["sdxl"].log_snr(torch.tensor([0, 500, 999])).sigmoid()
    assert signal.tolist() == pytest.approx([0.99915, 0.27633, 0.00466], abs=1e-5)
    flow = FAMILIES["flux"].log_snr(torch.tensor([499, 617, 618, 999]))
    assert flow[0] == 0 and flow[1] > PAPER_LOG_SNR >= flow[2] and flow[3] == -math.inf


@pytest.mark.parametrize("name", FAMILIES)
def test_the_safe_zone_of_a_family(name):
    assert SafeZone.paper(512, FAMILIES[name]).t_min == (500 if name in ("sd15", "sd2", "sdxl") else 618)


def test_the_share_of_draws_in_the_zone_is_that_of_a_simulation():
    plan, rng = plan_for("data", "flux"), np.random.default_rng(0)
    normal, uniform = rng.standard_normal(200_000), rng.random(200_000)
    for shift, scale in ((1, None), (3, None), (1, 1), (3.16, 1), (5, 0.5), (0.5, 2)):
        x = uniform if scale is None else 1 / (1 + np.exp(-scale * normal))
        drawn = shift * x / (1 + (shift - 1) * x)
        assert share_in_zone(plan, shift, scale) == pytest.approx((drawn >= 0.618).mean(), abs=0.004)
    assert share_in_zone(plan, 5, 0.5) == pytest.approx(0.988, abs=1e-3)
    assert flux_shift(1024) == pytest.approx(3.158, abs=1e-3)
    assert shifted(shifted(0.618, 3), 1 / 3) == pytest.approx(0.618)


@pytest.mark.parametrize("shift, is_enough", [(30, False), (31, True)])
def test_a_share_of_0_95_in_the_zone_is_enough(shift, is_enough):
    plan = plan_for("data", "flux")
    assert share_in_zone(plan, shift) == pytest.approx(0.95, abs=2e-3)
    assert (list(share_findings(plan, shift, None, "more")) == []) == is_enough


@pytest.mark.parametrize("shift, sigmoid_scale", [(0, None), (-1, None), (1, 0), (1, -1)])
def test_a_shift_and_a_sigmoid_scale_are_above_0(shift, sigmoid_scale):
    with pytest.raises(InputError, match="must be above 0"):
        list(share_findings(plan_for("data", "flux"), shift, sigmoid_scale, "more"))


def test_only_velocities_and_masks_together_need_min_snr():
    for model, gamma in (("sd15", None), ("sd2", 5), ("flux", None)):
        plan = plan_for("data", model)
        assert plan.min_snr_gamma == gamma and replace(plan, has_masks=False).min_snr_gamma is None


def test_simpletuners_timesteps_begin_within_twenty_above_t_min():
    for t_min, first in ((618, 620), (800, 800), (801, 820), (999, 1000)):
        text = TRAINERS["simpletuner"].configs(plan_for("data", "flux", t_min=t_min))["config.json"]
        timesteps = json.loads(text)["flow_custom_timesteps"].split(",")
        assert timesteps == [str(t) for t in range(first, 1001, 20)]


def test_onetrainers_epochs_make_the_steps():
    """An image counts ten times an epoch."""
    for count, epochs in ((1, 100), (4, 25), (5, 20), (300, 1)):
        plan = replace(plan_for("data", "sdxl"), captions={str(i): "" for i in range(count)})
        assert json.loads(TRAINERS["onetrainer"].configs(plan)["config.json"])["epochs"] == epochs


@pytest.mark.parametrize("trainer, documents, expected", [
    ("onetrainer", [{"resolution": "512", "concepts": [{"path": "in"}]}], {}),
    ("onetrainer", [{"resolution": "512"}, [{"path": "in"}]], {}),  # a file of concepts
    ("onetrainer", [{"resolution": "512", "aspect_ratio_bucketing": False, "concepts": [{"path": "in"}]}],
     {"is_fixed": True}),
    ("ai-toolkit", {"folder_path": "in"}, {}), ("ai-toolkit", {"folder_path": "in", "buckets": False},
                                                {"is_fixed": True}),
    ("ai-toolkit", {"folder_path": "in", "alpha_mask": True}, {"has_alpha": True})])
def test_the_images_of_a_config(trainer, documents, expected):
    if trainer == "ai-toolkit":
        documents = [{"config": {"process": [{"datasets": [documents]}]}}]
    (source,) = TRAINERS[trainer].sources(plan_for("data", "sdxl"), Config(documents))
    masks = Path("in") if trainer == "onetrainer" else None
    assert source == Source(Path("in"), masks, (512, 512), **expected)


@pytest.mark.parametrize("trainer, name", [("kohya", "config.toml"), ("onetrainer", "config.json"),
                                           ("ai-toolkit", "config.yaml"), ("simpletuner", "config.json"),
                                           ("diffusers", "train.sh")])
def test_a_folder_with_a_space_is_one_word_of_the_command(trainer, name):
    plan = plan_for("my data", "sdxl")
    assert (Path.cwd() / "my data" / name).as_posix() in shlex.split(TRAINERS[trainer].command(plan))


def test_every_process_of_ai_toolkit_needs_min_snr():
    def has_min_snr(*processes):
        return TRAINERS["ai-toolkit"].has_min_snr(Config([{"config": {"process": list(processes)}}]))
    good, bad = {"train": {"min_snr_gamma": 5}}, {"train": {}}
    assert has_min_snr(good, good) and not has_min_snr(good, bad) and not has_min_snr(bad, good)


@pytest.mark.parametrize("trainer, model", PAIRS)
def test_the_config_files_of_any_t_min_have_nothing_wrong_with_them(tmp_path, trainer, model):
    for t_min in (0, 1, 2, 300, 500, 618, 800, 957, 997, 998, 999):
        plan, paths = plan_for("data", model, t_min=t_min), []
        for name, text in TRAINERS[trainer].configs(plan).items():
            if not name.endswith("metadata.jsonl"):
                paths.append(tmp_path / name)
                paths[-1].write_text(text)
        assert list(TRAINERS[trainer].check(plan, read_config(paths))) == [], t_min


def test_the_shift_puts_a_share_of_0_988_in_the_zone_of_any_t_min():
    assert plan_for("data", "flux").shift == 5
    assert all(plan_for("data", "flux", t_min=t_min).shift == 1 for t_min in (0, 1, 244))  # 0.988 are in it
    x = 1 / (1 + np.exp(-0.5 * np.random.default_rng(0).standard_normal(200_000)))
    for t_min in (300, 618, 700, 900, 999):
        plan = plan_for("data", "flux", t_min=t_min)
        drawn = plan.shift * x / (1 + (plan.shift - 1) * x)
        assert (drawn >= t_min / 1000).mean() == pytest.approx(0.988, abs=0.003)
        for name, key in (("kohya", "discrete_flow_shift"), ("diffusion-pipe", "shift")):
            document = tomllib.loads(TRAINERS[name].configs(plan)["config.toml"])
            assert document.get("model", document)[key] == plan.shift
            (trap,) = (trap for trap in TRAINERS[name].traps(plan) if "sigmoid_scale" in trap)
            assert f"shift {plan.shift:g} and sigmoid_scale 0.5" in trap
            assert f"{share_in_zone(plan, plan.shift, 0.5):.1%} at {t_min} or above" in trap


@pytest.mark.parametrize("model", ["sd15", "flux"])
@pytest.mark.parametrize("t_min", [0, 3, 500, 900, 997, 998, 999])
def test_what_ai_toolkit_draws_of_a_config(model, t_min):
    """Its table goes from timestep 999 down, torch.randint leaves out the end, and ddpm one more at each."""
    (text,) = TRAINERS["ai-toolkit"].configs(plan_for("data", model, t_min=t_min)).values()
    train = yaml.safe_load(text)["config"]["process"][0]["train"]
    low, high = train["min_denoising_steps"], min(train["max_denoising_steps"], 999)
    indices = [low] if low == high else range(low, high) if model == "flux" else range(low + 1, high - 1)
    assert 999 - max(indices) == max(t_min, 1 if model == "flux" else 2)


@pytest.mark.parametrize("trainer, first, last, count", [
    ("kohya", "a.b.BMP", "a.b.webp", 10), ("ai-toolkit", "a.b.jpg", "a.b.webp", 4),
    ("onetrainer", "sub/a.b-masklabel.png", "sub/a.b-masklabel.png", 1),
    ("simpletuner", "sub/a.b.jpg", "sub/a.b.jpg", 1), ("diffusion-pipe", "a.b.AVIF", "a.b.webp", 18)])
def test_where_a_trainer_looks_for_a_mask(trainer, first, last, count):
    names = TRAINERS[trainer].mask_names(Path("sub/a.b.jpg"))
    assert (names[0], names[-1], len(names)) == (first, last, count)


def test_ai_toolkits_sigmoid_reaches_no_zone_near_pure_noise(tmp_path):
    plan = plan_for("data", "flux", t_min=999)
    (text,) = TRAINERS["ai-toolkit"].configs(plan).values()
    (tmp_path / "config.yaml").write_text(text.replace("timestep_type: linear", "timestep_type: sigmoid"))
    (finding,) = TRAINERS["ai-toolkit"].check(plan, read_config([tmp_path / "config.yaml"]))
    assert "set it to 1 with timestep_type linear." in finding
    assert TRAINERS["ai-toolkit"].traps(plan)[-1].endswith("there none is in the zone.")


def test_a_resolution_is_read_in_every_form():
    assert read_size(512) == read_size("512") == read_size([512, 512]) == (512, 512)
    assert read_size("512, 768") == read_size("512x768") == read_size([512, 768]) == (512, 768)
    assert read_size(None) is read_size(1.0) is read_size("0.5") is None
    assert read_size(64) == (64, 64) and read_size(63) is read_size("512,63") is None


def test_toml_is_read_as_it_was_written(tmp_path):
    document = {"path": 'C:\\images "of" ünicode 🟫', "number": 0.0001, "whole": 3, "flag": True,
                "sizes": [[1, 2, 1], [3, 4, 1]], "empty": [], "table": {"a": 1, "inner": {"b": "c"}},
                "datasets": [{"x": 1, "subsets": [{"y": 2}, {"y": 3}]}, {"x": 4}]}
    (tmp_path / "file.toml").write_text(to_toml(document), encoding="utf-8")
    assert tomllib.loads(to_toml(document)) == document
    config = read_config([tmp_path / "file.toml"])
    assert config.documents == [document] and config.settings["a"] == 1
    assert config.tables("datasets", "subsets") == [] and len(config.tables("datasets")) == 2


@pytest.mark.parametrize("suffix, end", [("bat", "^"), ("CMD", "^"), ("ps1", "`")])
def test_the_paths_of_a_command_line_on_windows_keep_their_backslashes(tmp_path, suffix, end):
    path = tmp_path / f"run.{suffix}"
    path.write_text(f"py train.py --train_data_dir C:\\data\\images\\\r\n --output_dir=D:\\out {end}\r\n"
                    '  --vae "C:\\my vae\\" --masked_loss', newline="")
    assert read_config([path]).settings == {
        "script": "train.py", "train_data_dir": "C:\\data\\images\\", "output_dir": "D:\\out",
        "vae": "C:\\my vae\\", "masked_loss": True}
    (tmp_path / "run.sh").write_text("train --a my\\ toy \\\n --b 1")
    assert read_config([tmp_path / "run.sh"]).settings == {"a": "my toy", "b": "1"}


def test_settings_of_any_spelling():
    config = Config([{"--max-steps": "5", "empty": "", "none": None, "section": {"inner-name": "2.5"}}])
    assert config.settings == {"max_steps": "5", "empty": "", "none": None, "section": {"inner-name": "2.5"},
                               "inner_name": "2.5"}
    assert [config.number(name, 7) for name in ("max_steps", "empty", "none", "gone", "inner_name")] == [
        5, 7, 7, 7, 2.5]
    for is_true, values in ((True, (True, "true", "True", "1", 1, "yes")),
                            (False, (False, "false", "0", 0, "no", ""))):
        assert all(Config([{"flag": value}]).flag("flag", not is_true) == is_true for value in values)
    assert Config([]).flag("flag", True) and not Config([]).flag("flag")


def test_the_flags_of_a_command_line(tmp_path):
    (tmp_path / "run.bat").write_text("accelerate launch train.py ^\r\n  --masked-loss "
                                      "--resolution=\"512,512\" --name 'my toy' --low -3 # --not-this\n")
    settings = read_config([tmp_path / "run.bat"]).settings
    assert settings == {"script": "train.py", "masked_loss": True, "resolution": "512,512", "name": "my toy",
                        "low": "-3"}
