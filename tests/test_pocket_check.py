"""The pocket world's check: its bounds, the answer of an encoder to attacks and JPEG, and the exit code."""

import io
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.images import from_pil
from szt_utils.pocket.scenes import BACKGROUNDS, Attributes, draw_scene

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "train_pocket"


@pytest.fixture(scope="module")
def check():
    return runpy.run_path(str(FOLDER / "check.py"))


@pytest.fixture(scope="module")
def response(check):
    return sys.modules["jpeg_response"]


@pytest.fixture(scope="module")
def images():
    scenes = [draw_scene(seed, Attributes("red", "striped", "star", background))
              for seed, background in enumerate(("sky", "stone"))]
    return torch.cat([from_pil(Image.fromarray(scene.image)) for scene in scenes])


def test_a_figure_within_its_bounds_is_not_named_and_others_are(check):
    one = check["Check"](None, {"a": (0.2, 0.4), "b": (28, math.inf)})
    assert one.outside({"a": 0.2, "b": 28.0, "unbounded": -5}) == []
    assert one.outside({"a": 0.4, "b": 400.0}) == []
    assert one.outside({"a": 0.41, "b": 27.9}) == ["a is 0.41, not within 0.2 and 0.4",
                                                   "b is 27.9, not within 28 and inf"]
    assert len(one.outside({"a": math.nan, "b": 30})) == 1
    with pytest.raises(KeyError):
        one.outside({"a": 0.3})


def test_the_bounds_are_those_of_encoders_that_were_trained_on_photographs(check):
    bounds = check["CHECKS"]["jpeg"].bounds
    for quality, share in ((75, 0.59), (50, 0.49), (25, 0.42), (10, 0.33)):
        assert bounds[f"left_{quality}"] == pytest.approx((share - 0.08, share + 0.08))
    assert bounds["shift"] == (1.5, 2.5) and bounds["pixels_ea"] == bounds["pixels_adm+"] == (0.3, 0.55)
    assert check["CHECKS"]["vae"].bounds["psnr_db"] == (28, math.inf)
    assert check["CHECKS"]["size"].bounds["megabytes"][1] == 80


def test_the_script_writes_its_figures_and_fails_outside_the_bounds(check, tmp_path, monkeypatch, capsys):
    measured = iter([{"x": 0.5}, {"x": 1.5}])
    monkeypatch.setitem(check["CHECKS"], "size",
                        check["Check"](lambda settings: next(measured), {"x": (0, 1)}))
    arguments = ["--parts", "size", "--output", str(tmp_path / "figures.json")]
    check["main"](arguments)
    with pytest.raises(SystemExit) as failure:
        check["main"](arguments)
    assert str(failure.value) == "Out of bounds:\nsize: x is 1.5, not within 0 and 1"
    assert '"x": 1.5' in (tmp_path / "figures.json").read_text()


def test_the_attack_moves_a_linear_encoder_to_the_corner_of_the_budget(response, images):
    """Away from zero every step has the sign of the weights, so that the shift is known."""
    inside = images * 0.5 + 0.25
    inside = (inside * 255).round() / 255
    kernel = torch.ones(1, 3, 8, 8) / 192
    generators = [torch.Generator().manual_seed(i) for i in range(2)]

    def encode(x):
        return torch.nn.functional.conv2d(x, kernel, stride=8)
    attacked = response.attack(encode, inside, 40, 1, generators)
    change = ((attacked - inside) * 255).round()
    assert change.abs().max() == 16 and (change.abs() == 16).float().mean() > 0.99
    assert response.shift(encode, attacked, inside) == pytest.approx([16 / 255] * 2, rel=0.01)
    # Whole blocks went up or down together: JPEG leaves their mean.
    size = response.shift(encode, attacked, inside)
    assert (response.left(encode, attacked, inside, 75, size) - 1).abs().max() < 0.05


def test_what_jpeg_leaves_in_pixels_is_the_projection_on_the_perturbation(response, images):
    noisy = response.random_signs(images, 16, torch.Generator().manual_seed(0))
    assert ((noisy - images) * 255).round().abs().max() == 16

    def compressed(x):
        buffers = []
        for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
            Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=25)
            buffers.append(np.asarray(Image.open(buffer), np.float64))
        return np.stack(buffers)
    change = 255 * (noisy - images).permute(0, 2, 3, 1).double().numpy()
    kept = compressed(noisy) - compressed(images)
    for weights, view in (((1, 1, 1), {}), ((0.299, 0.587, 0.114), {"view": response.luminance})):
        if not view:
            expected = (kept * change).sum((1, 2, 3)) / (change * change).sum((1, 2, 3))
        else:
            expected = (((kept @ weights) * (change @ weights)).sum((1, 2))
                        / ((change @ weights) ** 2).sum((1, 2)))
        left = response.left_in_pixels(noisy, images, 25, **view)
        assert left.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_grain_of_background_and_object_shelters_noise(response, background):
    scene = draw_scene(3, Attributes("red", "plain", "square", background))
    image = from_pil(Image.fromarray(scene.image))
    noisy = response.random_signs(image, 6, torch.Generator().manual_seed(0))
    assert response.left_in_pixels(noisy, image, 25, view=response.luminance) > 0.12
    steps = np.diff(scene.image.astype(float), axis=1)
    for mask in (scene.mask, ~scene.mask):
        assert 1 < np.median(np.abs(steps[mask[:, 1:] & mask[:, :-1]])) < 8
