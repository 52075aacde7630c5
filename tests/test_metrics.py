"""Similarity against closed forms, and the pocket image encoder's features
on scenes whose identity is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils import pocket
from szt_utils.errors import InputError
from szt_utils.metrics import image_features, pairwise_similarity, similarity
from szt_utils.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    caption,
    concept_scenes,
    draw_scene,
    training_attributes,
)


def test_similarities_of_known_vectors():
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2])
    unit = torch.stack([angles.cos(), angles.sin()], dim=1)
    cosines = [math.cos(math.pi / 3), 0, math.cos(math.pi / 6)]  # of the three pairs
    assert pairwise_similarity(unit) == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert similarity(unit[:1], unit) == pytest.approx((1 + cosines[0] + cosines[1]) / 3, abs=1e-6)
    with pytest.raises(InputError, match="at least two"):
        pairwise_similarity(unit[:1])


def test_an_unknown_encoder_is_named():
    with pytest.raises(InputError, match="nowhere/at-all"):
        image_features([Image.new("RGB", (8, 8))], "nowhere/at-all")


def test_features_tell_concepts_apart_and_do_not_depend_on_the_batch():
    sets = [[Image.fromarray(scene.image) for scene in concept_scenes(name, 6, seed=5)]
            for name in ("teal-striped-star", "red-dotted-heart", "black-dotted-arrow")]
    features = [image_features(images, pocket.dino_path()) for images in sets]
    assert all(torch.allclose(f.norm(dim=1), torch.ones(6), atol=1e-5) for f in features)
    assert torch.allclose(image_features(sets[0], pocket.dino_path(), batch_size=1), features[0], atol=1e-4)
    among = [pairwise_similarity(f) for f in features]
    between = [similarity(features[i], features[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(among) > max(between) + 0.2, (among, between)


@torch.no_grad()
def test_the_pocket_clip_prefers_the_true_caption_to_one_with_another_word():
    from transformers import AutoProcessor, CLIPModel, CLIPTokenizer

    rng = np.random.default_rng(3)
    scenes = [draw_scene(int(rng.integers(2**31)), training_attributes(rng)) for _ in range(24)]
    clip = CLIPModel.from_pretrained(pocket.clip_path()).eval()
    tokenizer, processor = (kind.from_pretrained(pocket.clip_path())
                            for kind in (CLIPTokenizer, AutoProcessor))
    pixel_values = processor(images=[scene.image for scene in scenes], return_tensors="pt").pixel_values
    right = {}
    for field, words in (("shape", SHAPES), ("colour", COLOURS), ("pattern", PATTERNS),
                         ("background", BACKGROUNDS)):
        wrong = [replace(scene.attributes, **{field: str(rng.choice(
            [word for word in words if word != getattr(scene.attributes, field)]))}) for scene in scenes]
        captions = [caption(attributes) for attributes in [scene.attributes for scene in scenes] + wrong]
        ids = tokenizer(captions, padding=True, return_tensors="pt")
        scores = clip(**ids, pixel_values=pixel_values).logits_per_image
        right[field] = (scores[:, :24].diagonal() > scores[:, 24:].diagonal()).float().mean().item()
    assert min(right.values()) >= 0.9, right
