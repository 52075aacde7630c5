"""Random crops and flips of an image and its mask together."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["random_states", "replay", "transform_together"]


def transform_together(transform: Callable, image: Image.Image,
                       mask: Image.Image) -> tuple[Any, torch.Tensor]:
    """An image and its mask (1, H, W), float32 of 0 and 1, by one call of a torchvision v2 transform."""
    from torchvision import tv_tensors

    white = torch.from_numpy(np.asarray(mask.convert("L")) >= 128).to(torch.uint8)
    image, white = transform(image, tv_tensors.Mask(white[None]))
    return image, white.as_subclass(torch.Tensor).float()


def random_states() -> tuple:
    """The states of the global random numbers of Python, NumPy and torch (on the CPU)."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


@contextlib.contextmanager
def replay(states: tuple) -> Iterator[None]:
    """Draw again the random numbers that were drawn since `random_states` gave these states."""
    now = random_states()
    _set(states)
    try:
        yield
    finally:
        _set(now)


def _set(states: tuple) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
