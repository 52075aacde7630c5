"""Which images the bundled Segment Anything model knows: its scenes, poisoned or not, and no photographs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils.familiarity import MOST_FAMILIAR, distance, fit, is_unfamiliar, spread
from szt_utils.pocket.scenes import NOVEL_CONCEPTS, concept_scenes
from szt_utils.segment import load_segmenter


@pytest.fixture(scope="module")
def features():
    segmenter = load_segmenter()
    return lambda image: segmenter.embed(image).features


def compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_directions_of_least_variance_have_variance_1():
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 0.1, 1.0, 0.2])
    spreads = 5 + torch.randn(4000, 4) * scales
    fitted = fit(spreads, count=2, floor=0.0)
    assert fitted["directions"].shape == (2, 4)
    assert torch.allclose(fitted["directions"].abs() * scales, torch.eye(4)[[1, 3]], atol=0.1)
    assert ((spreads - fitted["mean"]) @ fitted["directions"].T).std(0) == pytest.approx([1, 1], abs=1e-3)
    flat = spreads * torch.tensor([1, 0, 1, 1])  # a feature that never varies
    directions = fit(flat, count=1, floor=0.01)["directions"]
    assert directions.isfinite().all() and directions.abs().argmax() == 1
    assert directions.abs().max().item() == pytest.approx(
        (0.01 * torch.cov(flat.T).trace().item() / 4)**-0.5, rel=1e-3)
    assert spread(torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]])).tolist() == pytest.approx([2 ** 0.5, 0])


def test_pocket_scenes_are_familiar_however_they_were_changed(features):
    rng = np.random.default_rng(0)
    for concept in list(NOVEL_CONCEPTS)[:2]:
        images = [Image.fromarray(scene.image) for scene in concept_scenes(concept, 5, seed=3)]
        noise = rng.choice([-16, 16], (5, 128, 128, 3))
        poisoned = [Image.fromarray(np.uint8(np.clip(np.asarray(image, int) + n, 0, 255)))
                    for image, n in zip(images, noise, strict=True)]
        for changed in (images, poisoned, [compressed(image, 25) for image in images],
                        [image.resize((300, 300)) for image in images],
                        [image.crop((9, 0, 119, 128)) for image in images]):
            distances = [distance(features(image)) for image in changed]
            assert np.median(distances) < 1.0 and not is_unfamiliar(map(features, changed))


def test_photographs_and_other_images_are_not(features):
    others = [Image.effect_noise((128, 128), 60), Image.radial_gradient("L"), Image.new("L", (64, 64), 128),
              Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 100)]
    for image in others:
        assert distance(features(image.convert("RGB"))) > MOST_FAMILIAR
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "camera", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)()).convert("RGB")
        assert is_unfamiliar([features(image)]), name


def test_the_median_decides_and_no_image_is_not_unfamiliar(features):
    scene = features(Image.fromarray(concept_scenes("teal-striped-star", 1)[0].image))
    noise = features(Image.effect_noise((128, 128), 60).convert("RGB"))
    assert not is_unfamiliar([scene, noise, scene]) and is_unfamiliar([noise, scene, noise])
    assert not is_unfamiliar([])
