"""The diagnosis: signals against their definitions, the score against its closed form."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import build_tiny_sdxl
from scipy.spatial.distance import mahalanobis

from szt_utils.diagnosis import (
    SIGNALS,
    calibrate,
    deviations,
    explain,
    image_signals,
    percentile,
    read_calibration,
    report,
    score,
)
from szt_utils.errors import InputError
from szt_utils.files import write_json
from szt_utils.images import from_pil, read_image, to_pil
from szt_utils.jpeg import jpeg
from szt_utils.models import load_model, residual, tokenize
from szt_utils.statistics import high_frequency_share


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request, tiny_model, tmp_path_factory):
    return load_model(str(tiny_model if request.param == "sd"
                          else build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")))


@pytest.fixture(scope="module")
def image(concept_folder):
    return from_pil(read_image(sorted(concept_folder[0].iterdir())[0]))[:, :, :64, :64].contiguous()


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).multivariate_normal(
        np.arange(5), np.diag([1, 2, 3, 4, 5]) + 0.5, count)


def test_signals_are_what_they_say(model, image):
    found = dict(zip(SIGNALS, image_signals(model, image, draws=2, seed=5), strict=True))
    compressed = from_pil(jpeg(to_pil(image)[0], 25))
    change = (image - compressed).double()
    assert found["pixel_change"] == pytest.approx(change.square().mean().sqrt().log().item())
    centered = change - change.mean()
    assert found["evenness"] == pytest.approx(
        -((centered**4).mean() / centered.square().mean() ** 2).log().item(), abs=1e-6)
    with torch.no_grad():
        before, after = model.encode(image), model.encode(compressed)
        shift = (before - after).square().mean().sqrt()
        gain = (shift / change.square().mean().sqrt()).log().item()
        assert found["latent_gain"] == pytest.approx(gain, abs=1e-4)
        before_share, after_share = (high_frequency_share(latents).item() for latents in (before, after))
        assert found["latent_spectrum"] == pytest.approx(math.log(before_share / after_share), abs=1e-5)
        generator, losses = torch.Generator().manual_seed(5), [0, 0]
        condition = model.condition(tokenize(model, ""))
        for t in (50, 50, 150, 150, 250, 250):
            noise = torch.randn(before.shape, generator=generator)
            for i, latents in enumerate((before, after)):
                error = residual(model, latents, noise, torch.tensor([t]), condition)
                losses[i] += error.square().mean().item()
    assert found["loss_change"] == pytest.approx(np.log(losses[0] / losses[1]), abs=1e-5)


def test_a_plain_image_has_finite_signals(model):
    assert np.isfinite(image_signals(model, torch.full((1, 3, 64, 64), 128 / 255))).all()


def test_the_score_is_mahalanobis_distance():
    clean = rows(400)
    calibration = calibrate(clean)
    covariance = np.cov(clean.T)
    covariance += 0.1 * np.diag(np.diag(covariance))
    for row, found in zip(rows(5) + 2, score(calibration, rows(5) + 2), strict=True):
        assert found == pytest.approx(mahalanobis(row, clean.mean(0), np.linalg.inv(covariance)), rel=1e-6)
    assert np.allclose(deviations(calibration, clean.mean(0)), 0)
    away = deviations(calibration, clean.mean(0) + np.sqrt(np.diag(covariance)))
    assert np.allclose(away, 1)


def test_fresh_clean_images_have_uniform_percentiles_and_poisoned_ones_are_named():
    clean = rows(1400)
    calibration = calibrate(clean[:400])
    shares = percentile(calibration, score(calibration, clean[400:]))
    assert abs(shares.mean() - 0.5) < 0.05 and abs((shares >= 0.95).mean() - 0.05) < 0.03
    poisoned = clean[0].copy()
    poisoned[4] += 40
    found = explain(calibration, poisoned)
    assert found["suspect"] and "loss_change (+" in found["sentence"] and found["percentile"] == 1
    assert not explain(calibration, clean[:400].mean(0))["suspect"]


@pytest.mark.parametrize("distance, suspect", [(37.5, False), (38.5, True)])
def test_an_image_above_95_percent_of_the_clean_ones_is_suspect(distance, suspect):
    """38 of 40 are 95 %."""
    calibration = {"mean": [0.0] * 5, "covariance": np.eye(5).tolist(), "scores": list(range(1, 41))}
    assert explain(calibration, [distance, 0, 0, 0, 0])["suspect"] is suspect


def test_a_set_is_poisoned_when_more_images_are_suspect_than_chance_explains():
    clean = rows(60)
    calibration = calibrate(clean[:40])
    scores = score(calibration, clean)
    usual = [clean[i] for i in scores[:40].argsort()[:30]]  # none of them suspect
    odd = clean[0] + 40
    for count, poisoned in ((0, False), (7, False), (8, True)):  # of 37 and 38; chance .060 and .036
        found = report(calibration, {str(i): row for i, row in enumerate([odd] * count + usual)})
        assert (found["suspects"], found["poisoned"]) == (count, poisoned)
        assert found["sentence"].startswith(f"{count} of {count + 30} images look poisoned")
        assert ("probably poisoned" in found["sentence"]) == poisoned
    assert found["images"]["0"]["signals"] == dict(zip(SIGNALS, odd, strict=True))
    assert not report(calibration, {"alone": usual[0]})["poisoned"]
    # A clean image exceeds the 38th of 40 clean scores with a chance of 3 / 41.
    alone = report(calibration, {"alone": odd})
    assert not alone["poisoned"] and "(of clean ones, about 0.1 would)" in alone["sentence"]
    assert report(calibrate(rows(59)), {"alone": odd})["poisoned"]  # 3 / 60


def test_clean_sets_are_called_poisoned_in_one_of_twenty_cases_at_most():
    """However few images the calibration is made of: all images of a set are compared with the same ones."""
    random, accused = np.random.default_rng(0), 0
    for _ in range(200):
        fresh = random.normal(size=(70, 5))
        found = report(calibrate(fresh[:20]), {str(i): row for i, row in enumerate(fresh[20:])})
        accused += found["poisoned"]
    assert accused <= 20  # more than 20 of 200 have a chance of .0003 at a rate of .05


def test_scores_of_the_calibration_leave_their_own_image_out():
    """Of 12 images, the odd one would hide itself within a covariance that it made."""
    clean = rows(12)
    clean[7] += 30
    calibration = calibrate(clean)
    assert calibration["scores"][-1] > 3 * score(calibration, clean[7])[0]


def test_what_is_no_calibration_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 10 clean images"):
        calibrate(rows(9))
    with pytest.raises(InputError, match="is not a calibration .*does not exist"):
        read_calibration(tmp_path / "none.json")
    whole = calibrate(rows(20))
    write_json(tmp_path / "c.json", whole)
    assert read_calibration(tmp_path / "c.json") == whole
    flat = [[0.0] * 5] * 5
    for change in ([], 3, {"signals": ["other"]}, {"mean": [0]}, {"mean": ["a"] * 5}, {"scores": []},
                   {"scores": [2, 1]}, {"scores": 1}, {"covariance": flat}, {"covariance": [[1.0]]},
                   {"covariance": None}, {"mean": None}):
        write_json(tmp_path / "c.json", {**whole, **change} if isinstance(change, dict) else change)
        with pytest.raises(InputError, match="not a calibration"):
            read_calibration(tmp_path / "c.json")
    for content in ("", json.dumps({**whole, "mean": [math.nan] * 5})):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(InputError, match="not a calibration .*not valid JSON"):
            read_calibration(tmp_path / "c.json")
