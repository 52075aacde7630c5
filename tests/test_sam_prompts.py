"""Prompts for Segment Anything: JSON and shares of the size. (Points files: test_precompute_masks.)"""

import json
import math
import unicodedata

import pytest

from szt_utils.errors import InputError
from szt_utils.sam_prompts import (
    MOST_POINTS,
    SamPrompt,
    prompt_from_json,
    prompt_to_json,
    read_points_file,
    relative_prompt,
)


@pytest.mark.parametrize("prompt", [
    SamPrompt(((1, 2.5),), ((3, 4), (0, 0))), SamPrompt(box=(1, 2, 3, 4.5)),
    SamPrompt(((9, 9),), (), (1, 2, 3, 4))])
def test_a_prompt_is_the_same_after_json(prompt):
    entry = prompt_to_json(prompt)
    assert json.loads(json.dumps(entry)) == entry and all(entry.values())
    assert prompt_from_json(entry, (10, 10)) == prompt


def test_text_and_an_empty_prompt_as_json():
    assert prompt_to_json(SamPrompt(text="toy dog")) == {"text": "toy dog"}
    assert prompt_to_json(SamPrompt()) == {}
    with pytest.raises(InputError, match="must mark the concept"):
        prompt_from_json({}, (10, 10))


def test_shares_become_pixels_of_each_image():
    assert relative_prompt((200, 100), points=[(0.5, 0.5), (0, 1)]) == SamPrompt(((100, 50), (0, 100)))
    assert relative_prompt((200, 100), box=[0.25, 0.5, 1, 1]) == SamPrompt(box=(50, 50, 200, 100))


def test_points_have_a_limit():
    """A model's memory grows with their square."""
    points = [[1, 1]] * (MOST_POINTS + 1)
    for make in (lambda: prompt_from_json({"include": points}, (9, 9)),
                 lambda: relative_prompt((9, 9), points),
                 lambda: prompt_from_json({"include": points[:1], "exclude": points[1:]}, (9, 9))):
        with pytest.raises(InputError, match="1001 points mark the concept, but at most 1000"):
            make()
    assert len(prompt_from_json({"include": points[1:]}, (9, 9)).include) == MOST_POINTS


@pytest.mark.parametrize("number", [math.nan, math.inf, 10**400, -10**12, 1e300, True, None, "1", [1]])
def test_numbers_that_are_no_pixels_are_refused(number):
    for entry in ({"include": [[number, 1]]}, {"box": [0, 0, number, 9]}):
        with pytest.raises(InputError):
            prompt_from_json(entry, (10, 10))


@pytest.mark.parametrize("entry, message", [
    ({"include": [[20, 10], [0, 0]]}, None), ({"include": [[20.5, 5]]}, r"\(20.5, 5\) lies outside"),
    ({"include": [[5, 10.5]]}, "20 x 10 pixels"), ({"include": [[15, -1]]}, "outside"),
    ({"include": [[1, 1]], "exclude": [[15, 15]]}, r"\(15, 15\) lies outside"),
    ({"box": [0, 0, 20, 10]}, None), ({"box": [0, 0, 21, 9]}, r"\(21, 9\) lies outside"),
    ({"box": [-1, 0, 9, 9]}, r"\(-1, 0\) lies outside"),
    ({"box": [5, 1, 5, 9]}, "is not left, top, right, bottom"),
    ({"box": [1, 5, 9, 5]}, "is not left, top, right, bottom")])
def test_a_prompt_lies_in_its_image_and_a_box_has_an_area(entry, message):
    if message is None:
        assert prompt_to_json(prompt_from_json(entry, (20, 10))) == entry
        return
    with pytest.raises(InputError, match=message):
        prompt_from_json(entry, (20, 10))


def test_a_points_file_of_any_editor(tmp_path):
    """With a byte order mark, and names in the other Unicode form."""
    image, entry = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFD", "NFC"))
    path = tmp_path / "points.json"
    path.write_text(f'\ufeff{{"{entry}": {{"include": [[1, 2]]}}}}', encoding="utf-8")
    assert read_points_file(path, {image: (9, 9)}) == {image: SamPrompt(((1, 2),))}
    for content in ("[" * 100_000, '{"a": 1, "a": 2}', "[]", "x", "\0"):
        path.write_text(content)
        with pytest.raises(InputError, match="points.json"):
            read_points_file(path, {image: (9, 9)})
