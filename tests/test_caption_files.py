"""Captions of images: where they are found, which wins, and where the concept's token goes."""

import json
import unicodedata

import pytest

from szt_utils.caption_files import caption_templates, insert_token, read_captions
from szt_utils.errors import InputError
from szt_utils.settings import ConceptSettings


def test_a_text_file_wins_over_metadata_and_an_empty_caption_is_none(tmp_path):
    images = [tmp_path / name for name in ("a.jpg", "b.png", "c.png", "d.png")]
    (tmp_path / "a.txt").write_text("\ufefftwo\r\n lines ", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "no"}\n \n'
                                             '{"file_name": "b.png", "text": "listed\u2028too", "m": 1}\n',
                                             encoding="utf-8")
    assert read_captions(tmp_path, images) == {images[0]: "two lines", images[1]: "listed too"}
    assert read_captions(str(tmp_path), []) == {}


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_whatever_the_form_of_their_accents_and_the_case_of_txt(tmp_path, form, other):
    images = [tmp_path / unicodedata.normalize(form, f"{name}.png") for name in ("café", "thé", "b.1", "c")]
    texts = {"café.txt": "beside", "b.1.TXT": "upper", "c.TXT": "no", "c.txt": "lower"}
    for name, text in texts.items():
        (tmp_path / unicodedata.normalize(other, name)).write_text(text)
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(
        {"file_name": unicodedata.normalize(other, "thé.png"), "text": "listed"}))
    assert list(read_captions(tmp_path, images).values()) == ["beside", "listed", "upper", "lower"]


def test_an_image_in_a_sub_folder_has_its_caption_beside_it_or_by_its_path(tmp_path):
    images = [tmp_path / name for name in ("sub/a.png", "sub/b.png", "b.png")]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("beside")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/b.png", "text": "listed"}')
    assert read_captions(tmp_path, images) == {images[0]: "beside", images[1]: "listed"}


@pytest.mark.parametrize("line", ["[1]", '{"file_name": "a.png"}', '{"file_name": "a.png", "text": 3}', "{"])
def test_a_line_that_is_no_caption_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(InputError, match="Line 2 of .*metadata.jsonl"):
        read_captions(tmp_path, [])


@pytest.mark.parametrize("caption, expected", [
    ("<star> on a table", "{} on a table"), ("<star> <star>_1 on a table", "{} on a table"),
    ("<star> <star>_1 <star>_2, a <star>", "{}, a {}"), ("a toy <star>", "a toy {}")])
def test_all_tokens_of_a_placeholder_are_one_place(tmp_path, caption, expected):
    image = tmp_path / "a.png"
    image.with_suffix(".txt").write_text(caption)
    settings = ConceptSettings(str(tmp_path), "<star>", "toy", caption_mode="file")
    assert caption_templates(settings, [image]) == [(expected,)]


@pytest.mark.parametrize("caption, expected", [
    ("a {} and a {}", "a <x> and a <x>"), ("a Dog and a dog", "a <x> and a dog"), ("a dogma", "a dogma"),
    ("a {} dog", "a <x> dog"), ("a <x> dog", "a <x> dog"), ("a lamp", "a lamp"),
])
def test_the_token_replaces_braces_or_else_the_first_class_word(caption, expected):
    assert insert_token(caption, "<x>", "dog") == expected
    assert insert_token("a dog", "<x>") == "a dog"
    assert insert_token("a c++ toy", r"\1", "toy") == r"a c++ \1"
