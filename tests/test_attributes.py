"""The reader of attributes on scenes whose attributes are known, and shares against a count by hand."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from szt_utils import pocket
from szt_utils.attributes import OF_CONCEPT, WORDS, attribute_scores, can_read, read_attributes
from szt_utils.metrics import Networks, image_features, score_images
from szt_utils.pocket.scenes import (
    NOVEL_CONCEPTS,
    attributes_of,
    concept_scenes,
    draw_scene,
    training_attributes,
)


def features_of(scenes):
    return image_features([Image.fromarray(scene.image) for scene in scenes], pocket.dino_path(),
                          normalized=False)


@pytest.fixture
def network(tmp_path):
    """A network whose features are the heads' logits, one dimension a word."""
    size = sum(map(len, WORDS.values()))
    save_file({"weight": torch.eye(size), "bias": torch.zeros(size)}, tmp_path / "attributes.safetensors")
    return tmp_path


def features(*rows):
    """Features, for that network, of images that show the words."""
    place = {word: i for i, word in enumerate(word for words in WORDS.values() for word in words)}
    result = torch.zeros(len(rows), len(place))
    for row, words in zip(result, rows, strict=True):
        row[[place[word] for word in words.split()]] = 1
    return result


def test_the_bundled_reader_reads_drawn_scenes():
    scenes = [draw_scene(seed, training_attributes(np.random.default_rng(seed)))
              for seed in range(9_500_000, 9_500_064)]
    read = read_attributes(features_of(scenes), pocket.dino_path())
    for kind in WORDS:
        right = sum(words[kind] == getattr(scene.attributes, kind)
                    for words, scene in zip(read, scenes, strict=True))
        assert right >= 62, kind


def test_features_of_drawn_scenes_are_centered():
    """So images with nothing in common are about 0 similar."""
    scenes = [draw_scene(seed, attributes_of(seed)) for seed in range(9_600_000, 9_600_128)]
    unit = torch.nn.functional.normalize(features_of(scenes), dim=1)
    similarity = unit @ unit.T
    assert abs(similarity.sum() - len(scenes)) / (len(scenes) * (len(scenes) - 1)) < 0.05


def test_centering_moves_all_features_and_leaves_what_the_heads_read(tmp_path, monkeypatch):
    folder = ROOT / "examples" / "train_pocket"
    monkeypatch.syspath_prepend(str(folder))
    center = runpy.run_path(str(folder / "fit_reader.py"))["center"]
    shutil.copytree(pocket.dino_path(), tmp_path / "moved")
    mean = torch.randn(128)
    center(tmp_path / "moved", mean)
    images = [Image.fromarray(draw_scene(seed, attributes_of(seed)).image) for seed in range(3)]
    before, after = (image_features(images, path, normalized=False)
                     for path in (pocket.dino_path(), tmp_path / "moved"))
    assert torch.allclose(after, before - mean, atol=1e-4)
    (old, new) = (load_file(Path(path) / "attributes.safetensors")
                  for path in (pocket.dino_path(), tmp_path / "moved"))
    assert torch.allclose(after @ new["weight"].T + new["bias"], before @ old["weight"].T + old["bias"],
                          atol=1e-3)


@pytest.mark.parametrize("concept", NOVEL_CONCEPTS)
def test_the_concept_is_what_most_clean_images_show(concept):
    color, pattern, shape = NOVEL_CONCEPTS[concept]
    read = read_attributes(features_of(concept_scenes(concept)), pocket.dino_path())
    for kind, word in (("shape", shape), ("color", color), ("pattern", pattern)):
        assert sum(words[kind] == word for words in read) > 2


def test_shares_are_those_of_a_count_by_hand(network):
    clean = features("star teal striped sand", "star teal striped sky", "house teal striped grass")
    made = features("star teal striped night",  # right; the background does not count
                    "star teal plain sand",  # wrong pattern
                    "house red striped sand",  # wrong shape and color
                    "star red striped sand")  # wrong color
    assert attribute_scores(made, clean, network) == {
        "attributes": 0.25, "shape": 0.75, "color": 0.5, "pattern": 0.75}


def test_attributes_see_the_pattern_that_similarity_does_not():
    star, other = ([Image.fromarray(draw_scene(i, scene.attributes).image) for i in range(5)]
                   for scene in (concept_scenes("teal-striped-star", 1)[0],
                                 draw_scene(0, type(concept_scenes("teal-striped-star", 1)[0].attributes)(
                                     "teal", "plain", "star", "sand"))))
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    right = score_images(star, star, [], networks, ["attributes"])
    assert right == dict.fromkeys(("attributes", *OF_CONCEPT), 1.0)
    wrong = score_images(other, star, [], networks, ["dino", "attributes"])
    assert wrong["pattern"] == wrong["attributes"] == 0 and wrong["shape"] == wrong["color"] == 1
    assert wrong["dino"] > 0.5


def test_a_network_without_heads_has_no_attributes(tmp_path):
    assert can_read(pocket.dino_path()) and not can_read(tmp_path) and not can_read("facebook/dinov2-base")
    images = [Image.fromarray(scene.image) for scene in concept_scenes("red-dotted-heart", 2)]
    scores = score_images(images, images, [], Networks(pocket.clip_path(), pocket.clip_path()),
                          ["dino", "attributes"])
    assert set(scores) == {"dino", "real_real"}
