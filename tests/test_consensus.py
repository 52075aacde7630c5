"""Consensus: overlaps and centrality in closed form, and the masks that images have in common are chosen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from szt_utils.consensus import Candidates, centrality, choose_masks, pairwise_iou


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
