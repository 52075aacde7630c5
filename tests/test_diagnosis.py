"""The diagnosis: signals against their definitions, the score against its closed form."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from szt_utils.diagnosis import (
    SIGNALS,
    calibrate,
    deviations,
    explain,
    percentile,
    read_calibration,
    score,
    signals,
)
from szt_utils.diffusion import LatentDiffusion
from szt_utils.errors import InputError
from szt_utils.images import from_pil, read_image, to_pil
from szt_utils.jpeg import jpeg


@pytest.fixture(scope="module")
def model(tiny_model):
    return LatentDiffusion.load(str(tiny_model))


@pytest.fixture(scope="module")
def image(concept_folder):
    return from_pil(read_image(sorted(concept_folder[0].iterdir())[0]))[:, :, :64, :64].contiguous()


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).multivariate_normal(
        np.arange(5), np.diag([1, 2, 3, 4, 5]) + 0.5, count)


def test_signals_are_what_they_say(model, image):
    found = dict(zip(SIGNALS, signals(model, image, draws=1), strict=True))
    compressed = from_pil(jpeg(to_pil(image)[0], 25))
    change = (image - compressed).double()
    assert found["pixel_change"] == pytest.approx(change.square().mean().sqrt().log().item())
    centred = change - change.mean()
    assert found["evenness"] == pytest.approx(
        -((centred**4).mean() / centred.square().mean() ** 2).log().item(), abs=1e-6)
    with torch.no_grad():
        before, after = model.encode(image), model.encode(compressed)
        shift = (before - after).square().mean().sqrt()
        gain = (shift / change.square().mean().sqrt()).log().item()
        assert found["latent_gain"] == pytest.approx(gain, abs=1e-4)
        generator, losses = torch.Generator().manual_seed(0), [0, 0]
        for t in (50, 150, 250):
            noise = torch.randn(before.shape, generator=generator)
            for i, latents in enumerate((before, after)):
                losses[i] += model.loss(latents, noise, torch.tensor([t]), model.embed_text("")).mean().item()
    assert found["loss_change"] == pytest.approx(np.log(losses[0] / losses[1]), abs=1e-5)


def test_a_plain_picture_has_finite_signals(model):
    assert np.isfinite(signals(model, torch.full((1, 3, 64, 64), 128 / 255))).all()


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


def test_fresh_clean_pictures_have_uniform_percentiles_and_poisoned_ones_are_named():
    clean = rows(1400)
    calibration = calibrate(clean[:400])
    shares = percentile(calibration, score(calibration, clean[400:]))
    assert abs(shares.mean() - 0.5) < 0.05 and abs((shares >= 0.95).mean() - 0.05) < 0.03
    poisoned = clean[0].copy()
    poisoned[4] += 40
    told = explain(calibration, poisoned)
    assert told["suspect"] and "loss_change (+" in told["sentence"] and told["percentile"] == 1
    assert not explain(calibration, clean[:400].mean(0))["suspect"]


def test_scores_of_the_calibration_leave_their_own_picture_out():
    """Of 12 pictures, the odd one would hide itself within a covariance that it made."""
    clean = rows(12)
    clean[7] += 30
    calibration = calibrate(clean)
    assert calibration["scores"][-1] > 3 * score(calibration, clean[7])[0]


def test_what_is_no_calibration_is_told(tmp_path):
    with pytest.raises(InputError, match="at least 10 clean pictures"):
        calibrate(rows(9))
    for content in ("", "[]", '{"signals": ["other"], "scores": [1], "mean": [0]}'):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(InputError, match="not a calibration"):
            read_calibration(tmp_path / "c.json")
    with pytest.raises(InputError, match="not a calibration"):
        read_calibration(tmp_path / "none.json")
