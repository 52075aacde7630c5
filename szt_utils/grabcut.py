"""Masks with GrabCut (Rother, Kolmogorov and Blake 2004), by OpenCV: no model, for any image.

Colors inside and outside a box, or under strokes, become two mixtures of Gaussians; a graph cut divides the
image between them along its edges, and both are repeated.
"""

import functools
import importlib

import numpy as np
import torch
from PIL import Image

from .errors import InputError, first_line
from .sam_prompts import SamPrompt

__all__ = ["BACKGROUND", "CONCEPT", "check_available", "grabcut", "is_available", "seeds_of"]

LONGEST_SIDE = 384  # pixels that are cut; a mask is resized to its image
BACKGROUND, CONCEPT, PROBABLY_BACKGROUND, PROBABLY_CONCEPT = range(4)  # as OpenCV numbers its seeds
_ITERATIONS = 5
_POINT_RADIUS = 0.05  # share of the shorter side
_SMALLEST_PART = 0.02  # of the mask: smaller parts and holes are noise


@functools.cache
def _why_not() -> str:
    """Why OpenCV cannot be imported, "" if it can: opencv-python needs libraries of a display."""
    try:
        importlib.import_module("cv2")
    except Exception as error:  # a damaged package raises almost anything
        return first_line(error)
    return ""


def is_available() -> bool:
    """Whether OpenCV is installed and works."""
    return not _why_not()


def check_available() -> None:
    """InputError without OpenCV."""
    if not is_available():
        raise InputError(f"--grabcut needs OpenCV ({_why_not()}): pip install opencv-python-headless.")


def seeds_of(prompt: SamPrompt, size: tuple[int, int]) -> np.ndarray:
    """What is known of an image of (width, height) pixels from points and a box: uint8 (height, width).

    Outside the box is background; the ellipse in it is the first guess of the concept. Points are discs.
    """
    width, height = size
    seeds = np.full((height, width), PROBABLY_BACKGROUND, np.uint8)
    y, x = np.ogrid[0.5:height, 0.5:width]
    if prompt.box:
        left, top, right, bottom = prompt.box
        across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        seeds[(abs(across) > 1) | (abs(down) > 1)] = BACKGROUND
        seeds[across**2 + down**2 <= 1] = PROBABLY_CONCEPT
    for points, value in ((prompt.include, CONCEPT), (prompt.exclude, BACKGROUND)):
        for px, py in points:
            seeds[np.hypot(x - px, y - py) <= max(1, _POINT_RADIUS * min(size))] = value
    return seeds


def grabcut(image: Image.Image, seeds: np.ndarray) -> torch.Tensor:
    """The mask of an RGB image, bool (H, W), from its seeds, uint8 (h, w) of any size with its aspect.

    Seeds are `BACKGROUND`, `CONCEPT`, `PROBABLY_BACKGROUND` and `PROBABLY_CONCEPT`. Where some are certainly
    the concept, parts of the mask without any of them are left out. InputError when nothing may be the
    concept or nothing the background.
    """
    import cv2

    scale = min(1, LONGEST_SIDE / max(image.size))
    small = tuple(max(1, round(side * scale)) for side in image.size)
    seeds = np.array(Image.fromarray(seeds).resize(small, Image.Resampling.NEAREST))
    if not np.isin(seeds, (CONCEPT, PROBABLY_CONCEPT)).any():
        raise InputError("nothing marks the concept; give a point, a box or a stroke")
    if not np.isin(seeds, (BACKGROUND, PROBABLY_BACKGROUND)).any():
        raise InputError("the whole image is marked; GrabCut learns the background from the rest")
    pixels = np.ascontiguousarray(np.asarray(image.resize(small, Image.Resampling.LANCZOS))[..., ::-1])
    cv2.setRNGSeed(0)  # of the first mixtures: the same seeds give the same mask
    cut, background, concept = seeds.copy(), np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, cut, None, background, concept, _ITERATIONS, cv2.GC_INIT_WITH_MASK)
    mask = _largest_parts(np.isin(cut, (CONCEPT, PROBABLY_CONCEPT)), seeds == CONCEPT)
    soft = Image.fromarray(np.uint8(255 * mask)).resize(image.size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(soft) >= 128)


def _largest_parts(mask: np.ndarray, certain: np.ndarray) -> np.ndarray:
    """A mask, bool (h, w), without parts and holes below `_SMALLEST_PART` of its area, and without parts that
    have nothing of what is `certain`, if anything is."""
    import cv2

    limit = _SMALLEST_PART * mask.sum()
    for value in (True, False):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(np.uint8(mask == value), connectivity=4)
        wrong = stats[:, cv2.CC_STAT_AREA] < limit
        if value and certain.any():
            wrong[np.setdiff1d(labels, labels[certain])] = True
        wrong[0] = False  # what has the other value
        mask = np.where(wrong[labels], not value, mask)
    return mask
