"""Prompts for Segment Anything: points, a box or words that mark the concept in an image.

A points file is JSON with one entry per image, by file name, in pixels from the upper left corner of the
upright image:

    {"cat-01.jpg": {"include": [[210, 340]], "exclude": [[30, 40]]},
     "cat-02.jpg": {"box": [120, 80, 400, 460]}}

`include` are points (x, y) in the concept, `exclude` points outside it, `box` is left, top, right, bottom.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import nfc, read_json

__all__ = ["MOST_POINTS", "SamPrompt", "prompt_from_json", "prompt_to_json", "read_points_file",
           "relative_prompt"]

MOST_POINTS = 1000


@dataclass(frozen=True)
class SamPrompt:
    """What marks the concept in one image: points (x, y) in it and outside it, a box (left, top, right,
    bottom), both in pixels, or words.

    InputError for more than `MOST_POINTS` points: a model's memory grows with their square.
    """

    include: tuple[tuple[float, float], ...] = ()
    exclude: tuple[tuple[float, float], ...] = ()
    box: tuple[float, float, float, float] | None = None
    text: str | None = None

    def __post_init__(self):
        if (count := len(self.include) + len(self.exclude)) > MOST_POINTS:
            raise InputError(f"{count} points mark the concept, but at most {MOST_POINTS} are taken; "
                             "leave some out")


def prompt_to_json(prompt: SamPrompt) -> dict[str, Any]:
    """The prompt as JSON holds it, in the format of a points file's entry, without empty fields."""
    entry = {"include": [list(point) for point in prompt.include],
             "exclude": [list(point) for point in prompt.exclude],
             "box": list(prompt.box or ()), "text": prompt.text}
    return {name: value for name, value in entry.items() if value}


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    if (not isinstance(value, list | tuple) or len(value) != count
            or any(isinstance(n, bool) or not isinstance(n, int | float) for n in value)):
        raise InputError(f"expected {count} numbers, not {json.dumps(value)[:80]}")
    if any(not abs(n) < 1e9 for n in value):  # also NaN
        raise InputError(f"expected pixels, not {json.dumps(value)[:80]}")
    return tuple(value)


def prompt_from_json(entry: Any, size: tuple[int, int]) -> SamPrompt:
    """The points and the box of an entry, for an image of (width, height) pixels.

    InputError when the entry is malformed, leaves the image or has neither a point in the concept nor a box.
    """
    if not isinstance(entry, dict) or (unknown := sorted(set(entry) - {"include", "exclude", "box"})):
        wrong = f"'{unknown[0]}'" if isinstance(entry, dict) else json.dumps(entry)[:80]
        raise InputError(f"expected 'include', 'exclude' or 'box', not {wrong}")
    points = {}
    for name in ("include", "exclude"):
        listed = entry.get(name, [])
        if not isinstance(listed, list | tuple):
            raise InputError(f"'{name}' must be a list of points [x, y], not {json.dumps(listed)[:80]}")
        points[name] = tuple(_numbers(point, 2) for point in listed)
    box = None if entry.get("box") is None else _numbers(entry["box"], 4)
    if box and not (box[0] < box[2] and box[1] < box[3]):
        raise InputError(f"the box {list(box)} is not left, top, right, bottom")
    for x, y in (*points["include"], *points["exclude"], *((box[:2], box[2:]) if box else ())):
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise InputError(f"({x:g}, {y:g}) lies outside the image's {size[0]} x {size[1]} pixels")
    if not points["include"] and not box:
        raise InputError("a point in 'include' or a box must mark the concept")
    return SamPrompt(points["include"], points["exclude"], box)


def read_points_file(path: str | Path, sizes: Mapping[str, tuple[int, int]]) -> dict[str, SamPrompt]:
    """The prompts of a points file by image name; `sizes` are the images' (width, height) by name.

    InputError names the entry that is missing, unknown or malformed.
    """
    entries = read_json(path, "points file")
    if not isinstance(entries, dict):
        raise InputError(f"The points file '{path}' must hold one object with an entry for every image.")
    same = {nfc(name): name for name in sizes}  # whatever the form of their accents
    entries = {same.get(nfc(name), name): entry for name, entry in entries.items()}
    for name in sizes:
        if name not in entries:
            raise InputError(f"The points file '{path}' has no entry for '{name}'; add one.")
    prompts = {}
    for name, entry in entries.items():
        if name not in sizes:
            raise InputError(f"The points file '{path}' has an entry for '{name}', "
                             "which is not among the images; remove it.")
        try:
            prompts[name] = prompt_from_json(entry, sizes[name])
        except InputError as error:
            raise InputError(f"The points file '{path}', '{name}': {error}.") from None
    return prompts


def relative_prompt(size: tuple[int, int], points: Sequence[Sequence[float]] | None = None,
                    box: Sequence[float] | None = None) -> SamPrompt:
    """Points and a box in shares of the width and height, as a prompt for an image of (width, height)."""
    width, height = size
    corners = box and tuple(share * side for share, side in zip(box, (width, height) * 2, strict=True))
    return SamPrompt(tuple((x * width, y * height) for x, y in points or ()), box=corners)
