"""Prompts for Segment Anything: JSON and shares of the size. (Points files: test_precompute_masks.)"""

import json

import pytest

from szt_utils.errors import InputError
from szt_utils.sam_prompts import SamPrompt, prompt_from_json, prompt_to_json, relative_prompt


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
