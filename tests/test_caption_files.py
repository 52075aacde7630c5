"""Captions of images: where they are found, which wins, and where the concept's token goes."""

import pytest

from szt_utils.caption_files import insert_token, read_captions
from szt_utils.errors import InputError


def test_a_text_file_wins_over_metadata_and_an_empty_caption_is_none(tmp_path):
    images = [tmp_path / name for name in ("a.jpg", "b.png", "c.png", "d.png")]
    (tmp_path / "a.txt").write_text("\ufefftwo\r\n lines ", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "no"}\n\n'
                                             '{"file_name": "b.png", "text": "listed", "more": 1}\n')
    assert read_captions(tmp_path, images) == {images[0]: "two lines", images[1]: "listed"}
    assert read_captions(str(tmp_path), []) == {}


@pytest.mark.parametrize("line", ["[1]", '{"file_name": "a.png"}', '{"file_name": "a.png", "text": 3}', "{"])
def test_a_line_that_is_no_caption_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(InputError, match="Line 2 of .*metadata.jsonl"):
        read_captions(tmp_path, [])


@pytest.mark.parametrize("caption, expected", [
    ("a {} and a {}", "a <x> and a <x>"), ("a Dog and a dog", "a <x> and a dog"), ("a dogma", "a dogma"),
    ("a {} dog", "a <x> dog"), ("a <x> dog", "a <x> dog"), ("a lamp", "a lamp"),
])
def test_the_token_replaces_braces_or_else_the_first_class_word(caption, expected):
    assert insert_token(caption, "<x>", "dog") == expected
    assert insert_token("a dog", "<x>") == "a dog"
    assert insert_token("a c++ toy", r"\1", "toy") == r"a c++ \1"
