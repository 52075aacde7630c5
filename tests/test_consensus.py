"""Consensus: overlaps and centrality in closed form, and the masks that images have in common are chosen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from szt_utils.consensus import Candidates, candidate_masks, centrality, choose_masks, pairwise_iou
from szt_utils.segment import EmbeddedImage


def boxes(*corners, side: int = 9) -> torch.Tensor:
    """Bool (M, side, side), true from (top, left) to (bottom, right)."""
    masks = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_pairwise_iou_is_that_of_every_pair():
    random = np.random.default_rng(0)
    a, b = random.random((3, 7, 5)) < 0.5, random.random((4, 7, 5)) < 0.5
    expected = [[(x & y).sum() / (x | y).sum() for y in b] for x in a]
    assert np.allclose(pairwise_iou(torch.from_numpy(a), torch.from_numpy(b)), expected)
    assert pairwise_iou(boxes((0, 0, 0, 0)), boxes((0, 0, 0, 0))).item() == 0


def test_centrality_is_highest_in_the_center_and_negative_along_the_edge():
    center, corner, whole = centrality(boxes((4, 4, 5, 5), (0, 0, 1, 1), (0, 0, 9, 9))).tolist()
    assert center == 1
    assert corner == pytest.approx(-1 / 32)  # one of 32 pixels of the edge
    assert whole == pytest.approx(sum(8 * r * (1 - r / 4) for r in range(1, 5)) / 81 + 1 / 81 - 1)


class Squares:
    """A segmenter whose first two masks of a click are squares around it, and whose third is empty.

    Both squares are equal; the model is sure of the `stable` one, and its score of the other is higher.
    """

    def __init__(self, stable: int = 0):
        self.stable, self.clicks = stable, []

    def decode(self, embedded, points, labels, boxes, multimask):
        assert labels.tolist() == [[1]] * len(points) and boxes is None and multimask
        self.clicks += points[:, 0].tolist()
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        cells = points[:, 0, :, None, None] / 4  # the model's input has 64 pixels
        near = 3 - torch.maximum((x - cells[:, 0]).abs(), (y - cells[:, 1]).abs())
        logits = torch.stack([near, near / 10, -torch.ones_like(near)], 1)
        scores = torch.tensor([0.5, 0.6, 1.0]).repeat(len(points), 1)
        order = [0, 1, 2] if self.stable == 0 else [1, 0, 2]
        return logits[:, order], scores[:, order]


@pytest.fixture
def embedded():
    """An image of 128 x 128 pixels in a model's input of 64, with random features."""
    features = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    return EmbeddedImage(Image.new("RGB", (128, 128)), (128, 128), (64, 64), 64, None, features)


def test_clicks_are_the_centers_of_a_grids_cells(embedded):
    segmenter = Squares()
    candidate_masks(segmenter, embedded, grid=4, batch_size=3)
    assert segmenter.clicks == [[x, y] for y in (8, 24, 40, 56) for x in (8, 24, 40, 56)]


def test_no_more_candidates_than_asked_for_and_the_best_of_them(embedded):
    every, few = (candidate_masks(Squares(), embedded, grid=4, most=most) for most in (40, 3))
    assert len(every.masks) == 16 and torch.equal(few.masks, every.masks[:3])
    assert (every.merit.diff() <= 0).all()


def test_the_features_of_a_mask_are_its_mean_less_that_of_the_image(embedded):
    found = candidate_masks(Squares(), embedded, grid=3)
    assert len(found.masks) == 9
    for mask, features in zip(found.masks, found.features, strict=True):
        expected = embedded.features[:, mask].mean(1) - embedded.features.mean((1, 2))
        assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("stable", [0, 1])
def test_of_two_equal_masks_the_stable_one_is_kept(embedded, stable):
    """The other one's score is higher, and its logits are a tenth."""
    found = candidate_masks(Squares(stable), embedded, grid=1)
    assert len(found.logits) == 1 and found.logits.max() > 2


def image(features: list[list[float]], merit: list[float]) -> Candidates:
    masks = boxes(*((3 * i, 0, 3 * i + 3, 9) for i in range(len(merit))))
    return Candidates(masks.float(), masks, torch.tensor(features), torch.tensor(merit))


def test_what_the_images_have_in_common_is_chosen_over_the_best_alone():
    common, own = [1.0, 0.0, 0.0, 0.0], F.one_hot(torch.arange(1, 4), 4).float().tolist()
    images = [image([common, own[i]], [1.0, 1.2]) for i in range(3)]
    choices = choose_masks(images)
    assert [choice.index for choice in choices] == [0, 0, 0]
    assert [choice.confidence for choice in choices] == pytest.approx([0.8] * 3)  # 1 + 1 against 1.2
    images[1] = image([own[1], common], [1.2, 1.0])
    assert [choice.index for choice in choose_masks(images)] == [0, 1, 0]


def climb(images: list[Candidates]) -> list[int]:
    """The best choice by coordinate ascent, from one seed after another."""
    features, weight = [F.normalize(image.features, dim=1) for image in images], 1 / max(1, len(images) - 1)

    def values(i, chosen):
        others = [f[c] for j, (f, c) in enumerate(zip(features, chosen, strict=True)) if j != i]
        return images[i].merit + weight * sum((features[i] @ other for other in others), torch.zeros(()))

    ends = []
    for i, seeds in enumerate(features):
        for seed, direction in enumerate(seeds):
            chosen = [int((image.merit + f @ direction).argmax())
                      for image, f in zip(images, features, strict=True)]
            chosen[i] = seed
            for _ in range(10):
                for j in range(len(images)):
                    chosen[j] = int(values(j, chosen).argmax())
            ends.append((sum(values(j, chosen)[c].item() for j, c in enumerate(chosen)), chosen))
    return max(ends, key=lambda end: end[0])[1]


def test_the_choice_is_that_of_climbing_from_every_seed_alone():
    random = torch.Generator().manual_seed(0)
    for counts in ((5,), (3, 4), (6, 1, 7), (4, 9, 5, 8, 2, 6, 7, 3)):
        for _ in range(5):
            images = [Candidates(torch.zeros(n, 1, 1), torch.rand(n, 9, 9, generator=random) > 0.5,
                                 torch.randn(n, 4, generator=random), 0.3 * torch.rand(n, generator=random))
                      for n in counts]
            assert [choice.index for choice in choose_masks(images)] == climb(images)


def test_one_image_and_one_candidate():
    choice, = choose_masks([image([[1.0, 0.0], [0.0, 1.0]], [0.2, 0.5])])
    assert choice.index == 1 and choice.confidence == pytest.approx(0.3)
    choice, = choose_masks([image([[1.0, 0.0]], [0.2])])
    assert (choice.index, choice.confidence) == (0, 1.0)
