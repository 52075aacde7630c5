"""Scores against closed forms, and the pocket networks on scenes whose identity is known."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from szt_utils import metrics, pocket
from szt_utils.errors import InputError
from szt_utils.metrics import (
    SCORES,
    Networks,
    clip_scores,
    frechet_distance,
    image_features,
    inception_features,
    kernel_distance,
    pairwise_similarity,
    score_images,
    similarity,
)
from szt_utils.pocket.scenes import (
    BACKGROUNDS,
    COLORS,
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
    for field, words in (("shape", SHAPES), ("color", COLORS), ("pattern", PATTERNS),
                         ("background", BACKGROUNDS)):
        wrong = [replace(scene.attributes, **{field: str(rng.choice(
            [word for word in words if word != getattr(scene.attributes, field)]))}) for scene in scenes]
        captions = [caption(attributes) for attributes in [scene.attributes for scene in scenes] + wrong]
        ids = tokenizer(captions, padding=True, return_tensors="pt")
        scores = clip(**ids, pixel_values=pixel_values).logits_per_image
        right[field] = (scores[:, :24].diagonal() > scores[:, 24:].diagonal()).float().mean().item()
    assert min(right.values()) >= 0.9, right


def two_sets(n: int = 60, m: int = 40, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator)
    return (torch.randn(n, size, generator=generator) @ mix,
            torch.randn(m, size, generator=generator) * 0.5 + 1)


def test_frechet_distance_of_known_gaussians():
    """In one dimension: the difference of means squared plus that of standard deviations."""
    a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[10.0], [11.0], [12.0]])
    assert frechet_distance(a, b) == pytest.approx(9**2 + (2 - 1) ** 2, abs=1e-9)
    sets = two_sets()
    assert frechet_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(*sets) == pytest.approx(frechet_distance(*reversed(sets)), abs=1e-9)
    with pytest.raises(InputError, match="two images"):
        frechet_distance(a[:1], b)


def test_frechet_distance_is_that_of_the_matrix_root():
    """Heusel et al.'s formula by scipy, where the covariances have full rank;
    with fewer images than features too."""
    from scipy.linalg import sqrtm

    for a, b in (two_sets(), [f.double() for f in two_sets(5, 30)]):
        x, y = a.double().numpy(), b.double().numpy()
        first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = sqrtm(first @ second).real
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_by_its_definition():
    a, b = two_sets(5, 4, 3)
    kernel = [[[(float(u @ v) / 3 + 1) ** 3 for v in y] for u in x] for x, y in ((a, a), (b, b), (a, b))]
    among = [sum(k[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
             for k, n in ((kernel[0], 5), (kernel[1], 4))]
    between = sum(map(sum, kernel[2])) / 20
    assert kernel_distance(a, b) == pytest.approx(sum(among) - 2 * between, rel=1e-5)


def test_distances_are_torch_fidelitys_and_torchmetrics():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = two_sets(200, 200)
    ours = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b),
                                        verbose=False)
    assert frechet_distance(a, b) == pytest.approx(ours["frechet_inception_distance"], rel=1e-4)
    theirs = kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")
    x, y = a.double(), b.double()
    value = torchmetrics._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(a, b) == pytest.approx(value.item(), rel=1e-4)


def test_inception_needs_its_library_and_its_file(tmp_path):
    with pytest.raises(InputError, match="torch-fidelity|do not exist"):
        inception_features([Image.new("RGB", (32, 32))], tmp_path / "nowhere.pth")


def test_scores_know_a_copy_from_another_concept_and_warn_of_few_images():
    star, more, heart = ([Image.fromarray(scene.image) for scene in concept_scenes(name, 6, seed=seed)]
                         for name, seed in (("teal-striped-star", 5), ("teal-striped-star", 6),
                                            ("red-dotted-heart", 5)))
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    texts = ["a photo of a teal striped star"] * 6
    with pytest.warns(UserWarning, match="6 generated and 6 real"):
        same, other = (score_images(images, star, texts, networks) for images in (more, heart))
    assert set(same) == {*SCORES, "real_real"}
    assert same["real_real"] == other["real_real"]
    for name, sign in (("dino", 1), ("clip", 1), ("fid", -1), ("kid", -1), ("fd_dino", -1)):
        assert sign * (same[name] - other[name]) > 0, (name, same, other)
    with pytest.raises(InputError, match="beauty"):
        score_images(more, star, texts, networks, ["beauty"])
    with pytest.raises(InputError, match="no CLIPModel"):
        clip_scores(star, texts, pocket.dino_path())


@pytest.fixture
def two_concepts():
    """Six images of a star and five of a heart."""
    return tuple([Image.fromarray(scene.image) for scene in concept_scenes(name, count)]
                 for name, count in (("teal-striped-star", 6), ("red-dotted-heart", 5)))


@pytest.mark.filterwarnings("ignore:FID and FD-DINOv2 rest")
@pytest.mark.parametrize("name, network, distance", [
    ("fd_dino", "dino", frechet_distance), ("fid", "clip", frechet_distance),
    ("kid", "clip", kernel_distance)])
def test_distances_are_of_the_features_before_they_are_normalized(two_concepts, name, network, distance):
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    features = [image_features(images, getattr(networks, network), normalized=False)
                for images in two_concepts]
    found = score_images(*two_concepts, [], networks, [name])
    assert found == {name: pytest.approx(distance(*features), rel=1e-6)}


@pytest.mark.filterwarnings("ignore:FID and FD-DINOv2 rest")
def test_fid_and_kid_are_of_inceptions_features_where_it_is_given(two_concepts, monkeypatch):
    sets = dict(zip((6, 5), two_sets(6, 5), strict=True))
    monkeypatch.setattr(metrics, "inception_features", lambda images, weights, device: (
        sets[len(images)] * (2 if weights == "weights.pth" else 1)))
    networks = Networks(pocket.dino_path(), pocket.clip_path(), "weights.pth")
    found = score_images(*two_concepts, [], networks, ["fid", "kid"])
    a, b = (2 * features for features in sets.values())
    assert found == pytest.approx({"fid": frechet_distance(a, b), "kid": kernel_distance(a, b)})


@pytest.mark.filterwarnings("error:FID and FD-DINOv2 rest")
def test_the_smaller_set_decides_whether_images_are_few(two_concepts, monkeypatch):
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    monkeypatch.setattr(metrics, "FEW_IMAGES", 6)
    for generated, real in (two_concepts, two_concepts[::-1]):
        with pytest.warns(UserWarning, match=f"{len(generated)} generated and {len(real)} real"):
            score_images(generated, real, [], networks, ["fd_dino"])
    score_images(two_concepts[0], two_concepts[0], [], networks, ["fd_dino"])


@torch.no_grad()
def test_clip_scores_are_the_models_own_logits_without_their_scale():
    from transformers import AutoProcessor, CLIPModel, CLIPTokenizer

    images = [Image.fromarray(scene.image) for scene in concept_scenes("teal-striped-star", 3)]
    texts = ["a photo of a star", "a photo of a teal striped star on sand", "a photo of a star"]
    clip = CLIPModel.from_pretrained(pocket.clip_path()).eval()
    inputs = AutoProcessor.from_pretrained(pocket.clip_path())(images=images, return_tensors="pt")
    ids = CLIPTokenizer.from_pretrained(pocket.clip_path())(texts, padding=True, return_tensors="pt")
    logits = clip(**ids, pixel_values=inputs.pixel_values).logits_per_image.diagonal()
    expected = (100 * logits / clip.logit_scale.exp()).clamp(min=0)
    assert torch.allclose(clip_scores(images, texts, pocket.clip_path()), expected, atol=1e-2)


def test_a_clip_score_is_at_least_0(monkeypatch):
    images = [Image.fromarray(scene.image) for scene in concept_scenes("teal-striped-star", 2)]
    texts = ["a photo of a teal striped star"] * 2
    assert clip_scores(images, texts, pocket.clip_path()).min() > 0
    monkeypatch.setattr(metrics, "image_features", lambda *given, **more: -image_features(*given, **more))
    assert clip_scores(images, texts, pocket.clip_path()).tolist() == [0, 0]


def test_what_is_not_finite_is_named(monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, pixel_values):
            features = pixel_values.flatten(1)[:, :4].clone()
            features[1, 2] = float("nan")
            return SimpleNamespace(pooler_output=features)

    processor = metrics._load(pocket.dino_path(), "cpu")[0]
    monkeypatch.setattr(metrics, "_load", lambda *_: (processor, Broken()))
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    with pytest.raises(InputError, match="features of clean image 2 of 3 by 'net' are not finite"):
        score_images(images, images, [""] * 3, Networks("net", "net"), ["dino"])


def test_a_network_of_another_kind_is_named(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    shutil.copytree(pocket.dino_path(), tmp_path / "net", ignore=shutil.ignore_patterns("*.safetensors"))
    SiglipModel(SiglipConfig(text_config=dict(small, vocab_size=9, projection_size=8), vision_config=dict(
        small, image_size=16, patch_size=8))).save_pretrained(tmp_path / "net")
    with pytest.raises(InputError, match="is neither a Dinov2Model nor a CLIPModel"):
        image_features([Image.new("RGB", (8, 8))], tmp_path / "net")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_network_with_code_of_its_own_is_refused_without_a_question(tmp_path, file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(pocket.dino_path(), tmp_path / "net")
    (tmp_path / "net" / "evil.py").write_text("raise SystemExit('was run')")
    config = json.loads((tmp_path / "net" / file).read_text())
    config |= {"auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoImageProcessor")}}
    config |= {"model_type": "evil"} if file == "config.json" else {"image_processor_type": "Evil"}
    (tmp_path / "net" / file).write_text(json.dumps(config))
    with pytest.raises(InputError, match="The image encoder '.*net' cannot be loaded: "):
        image_features([Image.new("RGB", (8, 8))], tmp_path / "net")
