"""--caption_mode: captions of the images' own in the training."""

import shutil

import pytest
import torch
from conftest import TOKEN, embedding, flags, run_here

from szt_utils.caption_files import caption_templates
from szt_utils.captions import OBJECT_TEMPLATES, STYLE_TEMPLATES
from szt_utils.errors import InputError
from szt_utils.images import list_images
from szt_utils.notices import notice
from szt_utils.settings import ConceptSettings


@pytest.fixture
def folder(concept_folder, tmp_path):
    return shutil.copytree(concept_folder[0], tmp_path / "images")


def captions_of(folder, mode, *texts, **more):
    for path, text in zip(list_images(folder), texts, strict=False):
        path.with_suffix(".txt").write_text(text)
    settings = ConceptSettings(str(folder), TOKEN, "star", caption_mode=mode, **more)
    return caption_templates(settings, list_images(folder))


def test_templates_are_upstreams_files_the_images_own_and_both_half_of_each(folder):
    texts = ["a {} at sea", "my Star, in fog", f"a {TOKEN}  and\na star", "star", "{} {}"]
    own = ["a {} at sea", "my {}, in fog", "a {} and a star", "{}", "{} {}"]
    assert captions_of(folder, "template") == [OBJECT_TEMPLATES] * 5
    assert captions_of(folder, "template", learnable_property="style") == [STYLE_TEMPLATES] * 5
    assert captions_of(folder, "file", *texts) == [(text,) for text in own]
    for each, text in zip(captions_of(folder, "both", *texts), own, strict=True):
        assert each == (text,) * len(OBJECT_TEMPLATES) + OBJECT_TEMPLATES  # a random draw is an index


def test_a_missing_caption_and_one_without_a_place_are_named(folder):
    for mode in ("file", "both"):
        with pytest.raises(InputError, match=f"has no caption: write '.*txt', or leave out .*mode {mode}"):
            captions_of(folder, mode, "a {}")
    with pytest.raises(InputError, match="has no place for the placeholder: write {}, or the word 'star'"):
        captions_of(folder, "both", *["a starfish"] * 5)


def test_files_that_repeat_the_templates_train_as_they_do(tiny_model, folder, tmp_path, monkeypatch):
    """With one template, so that no draw can differ."""
    from szt_utils import caption_files

    captions_of(folder, "template", *["a photo of a {}"] * 5)
    (folder / "list_of_captions.csv").write_text("not read")
    monkeypatch.setattr(caption_files, "templates_for", lambda learnable_property: ("a photo of a {}",))
    ends = []
    for mode in ("template", "file", "both"):
        run_here(flags(tiny_model, folder, tmp_path / mode, caption_mode=mode))
        ends.append(embedding(tmp_path / mode))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_own_captions_change_what_is_learned_and_long_ones_are_named(tiny_model, folder, tmp_path, capfd):
    notice.cache_clear()
    captions_of(folder, "file", "a {} " + "and a star " * 60, *["a {}, {curly}"] * 4)
    for mode in ("file", "template"):
        run_here(flags(tiny_model, folder, tmp_path / mode, caption_mode=mode))
    assert not torch.allclose(embedding(tmp_path / "file"), embedding(tmp_path / "template"), atol=1e-4)
    noted = [line for line in capfd.readouterr().err.splitlines() if "cut off" in line]
    assert len(noted) == 1 and f"(1, such as that of '{list_images(folder)[0].name}')" in noted[0]
