"""Random numbers that are drawn again, and transforms of an image with its mask."""

import random

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from szt_utils.joint_transform import random_states, replay, transform_together


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_replay_draws_the_same_again_and_leaves_no_trace():
    states = random_states()
    first = draw()
    with replay(states):
        assert draw() == first
        draw()
    second = draw()
    with replay(states):
        assert (draw(), draw()) == (first, second)
    with replay(states):
        pass
    assert draw() not in (first, second)


def test_replay_restores_after_an_error():
    states = random_states()
    first, now = draw(), random_states()
    try:
        with replay(states):
            draw()
            raise ValueError
    except ValueError:
        pass
    expected = draw()
    with replay(now):
        assert draw() == expected and expected != first


def test_a_mask_is_resized_by_its_nearest_pixels_and_moves_with_its_image():
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[2:6, 3:9] = 255
    mask = Image.fromarray(pixels[..., 0])
    image, white = transform_together(v2.Compose([v2.Resize(40), v2.RandomHorizontalFlip(1.0)]),
                                      Image.fromarray(pixels), mask)
    assert image.size == (40, 40) and type(white) is torch.Tensor
    assert set(white.unique().tolist()) == {0, 1} and white.sum() == 8 * 12
    assert white[0, 4:12, 40 - 18:40 - 6].all()
