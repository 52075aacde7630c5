"""The sizes at which trainers train: an image of such a size is not resized again.

Each function lists the sizes (width, height) that its trainer keeps at a resolution, in pixels, a multiple
of 64.
"""

import math
from collections.abc import Sequence

__all__ = ["Size", "area_buckets", "aspect_buckets", "nearest_bucket", "rounded_buckets", "square"]

Size = tuple[int, int]
_STEP = 64
_ASPECTS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)  # those of OneTrainer


def square(resolution: int, family: str) -> list[Size]:
    """The one square size of trainers without buckets."""
    return [(resolution, resolution)]


def area_buckets(resolution: int, family: str) -> list[Size]:
    """For each width in steps of 64 the largest height within the area: kohya's buckets.

    The trainers that never enlarge an image keep these sizes too.
    """
    smallest, largest = resolution // 2 // _STEP * _STEP, 2 * resolution
    sizes = {(resolution, resolution)}
    for width in range(smallest, largest + 1, _STEP):
        height = min(largest, resolution**2 // width // _STEP * _STEP)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def rounded_buckets(resolution: int, family: str) -> list[Size]:
    """The sizes among `area_buckets` to which their own aspect, of two decimals, leads back: SimpleTuner."""
    def kept(size: Size) -> bool:
        root = math.sqrt(round(size[0] / size[1], 2))
        return size == tuple(round(side / _STEP) * _STEP for side in (resolution * root, resolution / root))
    return [size for size in area_buckets(resolution, family) if kept(size)]


def aspect_buckets(resolution: int, family: str) -> list[Size]:
    """Nine aspects at one area, rounded to 8 pixels for Stable Diffusion 1 and 2, else to 64: OneTrainer."""
    step = 8 if family in ("sd15", "sd2") else _STEP
    sizes = set()
    for aspect in _ASPECTS:
        short, long = (round(side / math.sqrt(aspect) * resolution / step) * step for side in (1, aspect))
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the aspect nearest to an image's (width, height), the larger of two equal ones."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda it: (abs(math.log(it[0] / it[1]) - aspect), -it[0] * it[1]))
