"""Readers of data sets: their concepts and words, and the images at the training resolution."""

import json

import numpy as np
import pytest
from PIL import Image

from szt_utils import pocket
from szt_utils.captions import EVALUATION_PROMPTS
from szt_utils.datasets import DatasetConcept, read_concepts, write_images
from szt_utils.errors import InputError
from szt_utils.images import list_images


@pytest.fixture
def folder(tmp_path):
    for name in ("toy", "dog", ".cache"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20), "teal").save(tmp_path / name / "00.jpg")
    (tmp_path / "notes.txt").write_text("no folder")
    return tmp_path


def test_the_pocket_world_has_its_novel_concepts_and_backgrounds():
    concepts = read_concepts("pocket")
    assert tuple(concepts) == tuple(pocket.NOVEL_CONCEPTS)
    assert concepts["red-dotted-heart"] == DatasetConcept("red-dotted-heart", None, None, "object", "object",
                                                          pocket.PROMPTS)


def test_a_dreambooth_folder_has_a_concept_per_sub_folder(folder):
    concepts = read_concepts("dreambooth", folder, folder / "masks")
    assert list(concepts) == ["dog", "toy"]
    assert concepts["dog"] == DatasetConcept("dog", folder / "dog", folder / "masks" / "dog", "object",
                                             "object", EVALUATION_PROMPTS)
    given = read_concepts("dreambooth", folder, names=["toy", "dog"], initializer="cat", prompts=["a {}"])
    assert list(given) == ["toy", "dog"]
    assert given["toy"] == DatasetConcept("toy", folder / "toy", None, "cat", "cat", ("a {}",))


def test_customconcept101_has_class_words_and_prompts_of_its_own(folder):
    (folder / "prompts").mkdir()
    (folder / "prompts" / "toy.txt").write_text("a {} on a bench\n{} in the rain\n")
    (folder / "dataset.json").write_text(json.dumps([
        {"instance_data_dir": "./data/benchmark/toy", "class_prompt": "plush toy",
         "prompt_filename": "prompts/toy.txt"},
        {"instance_data_dir": "dog", "class_prompt": "dog", "prompt_filename": "prompts/missing.txt"}]))
    concepts = read_concepts("customconcept101", folder, folder / "masks")
    assert concepts == {
        "toy": DatasetConcept("toy", folder / "toy", folder / "masks" / "toy", "toy", "plush toy",
                              ("a {} on a bench", "{} in the rain")),
        "dog": DatasetConcept("dog", folder / "dog", folder / "masks" / "dog", "dog", "dog",
                              EVALUATION_PROMPTS)}
    given = read_concepts("customconcept101", folder, initializer="bear", prompts=["the {}"])["toy"]
    assert (given.initializer, given.class_word, given.prompts) == ("bear", "plush toy", ("the {}",))


@pytest.mark.parametrize("content,message", [
    ("[", "not valid JSON"), ("{}]", "not valid JSON"), ('["toy"]', "'instance_data_dir'"), ("3", "a list"),
    ('[{"instance_data_dir": "toy"}]', "'class_prompt'"), ('[{"instance_data_dir": ".."}]', "_data_dir'"),
    ('[{"instance_data_dir": "toy", "class_prompt": " "}]',
     "CustomConcept101's list .* needs a text for 'class_prompt'"),
    ('[{"instance_data_dir": "toy", "class_prompt": "a", "prompt_filename": 3}]', "'prompt_filename'"),
    ('[{"instance_data_dir": "a\\u0000", "class_prompt": "a"}]', "'instance_data_dir'"),
    ('[{"instance_data_dir": "a/b", "class_prompt": "a"}, {"instance_data_dir": "c/b", "class_prompt": "a"}]',
     "two concepts 'b'")])
def test_a_damaged_list_of_concepts_is_refused(folder, content, message):
    (folder / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_concepts("customconcept101", folder)


def test_unknown_concepts_and_empty_data_sets_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no concept 'elephant'; choose from: dog, toy"):
        read_concepts("dreambooth", folder, names=["dog", "elephant"])
    with pytest.raises(InputError, match="holds no concept"):
        read_concepts("dreambooth", folder / "toy")
    with pytest.raises(InputError, match="is not a folder"):
        read_concepts("dreambooth", tmp_path / "none")


def test_images_and_masks_are_written_as_squares_of_the_same_names(tmp_path):
    image, mask = (np.zeros((20, 30, 3), np.uint8) for _ in range(2))
    image[:, 5:15], mask[:, 5:15] = 200, 255  # the left half of the central square
    for kind, array in (("images", image), ("masks", mask)):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / "a.png")
    concept = DatasetConcept("c", tmp_path / "images", tmp_path / "masks", "toy", "toy", ("a {}",))
    write_images(concept, tmp_path / "out", tmp_path / "out-masks", 40)
    [path], [mask_path] = list_images(tmp_path / "out"), list_images(tmp_path / "out-masks")
    assert path.name == mask_path.name == "a.png"
    pixels, mask = np.asarray(Image.open(path)), np.asarray(Image.open(mask_path))
    assert pixels.shape == (40, 40, 3) and (pixels[:, :17] == 200).all() and (pixels[:, 23:] == 0).all()
    assert (mask[:, :20] == 255).all() and (mask[:, 20:] == 0).all()
    write_images(concept, tmp_path / "alone", None, 40)
    assert (tmp_path / "alone" / "a.png").read_bytes() == path.read_bytes()
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "b.png")
    with pytest.raises(InputError, match="no mask"):
        write_images(concept, tmp_path / "other", tmp_path / "other-masks", 40)


def test_concepts_whose_names_differ_behind_a_dot_have_records_of_their_own(tmp_path):
    for name in ("dog.v1", "dog.v2"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20), "teal").save(tmp_path / name / f"{name}.png")
    for _ in range(2):
        for name, concept in read_concepts("dreambooth", tmp_path, names=["dog.v1", "dog.v2"]).items():
            write_images(concept, tmp_path / "out" / name, None, 40)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["dog.v1.json", "dog.v2.json"]


@pytest.mark.parametrize("change", ["add", "remove", "prompts"])
def test_a_data_set_that_has_changed_is_refused(tmp_path, change):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 20), "teal").save(tmp_path / "images" / f"{name}.png")
    concept, prompts = DatasetConcept("c", tmp_path / "images", None, "toy", "toy", ("a {}",)), ["a {}"]
    for _ in range(2):
        write_images(concept, tmp_path / "out", None, 40, prompts)
    if change == "add":
        Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "c.png")
    elif change == "remove":
        (tmp_path / "images" / "a.png").unlink()
    else:
        prompts = ["one {}"]
    with pytest.raises(InputError, match="images or prompts of .* have changed since .*; give another"):
        write_images(concept, tmp_path / "out", None, 40, prompts)
    assert len(list_images(tmp_path / "out")) == 2


def test_an_image_that_has_changed_or_would_replace_another_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "images" / "a.png")
    concept = DatasetConcept("c", tmp_path / "images", None, "toy", "toy", ("a {}",))
    for _ in range(2):  # the same image again is no change
        write_images(concept, tmp_path / "out", None, 40)
    written = (tmp_path / "out" / "a.png").read_bytes()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "a.png")
    with pytest.raises(InputError, match="The data set has changed since '.*a.png' was made of it"):
        write_images(concept, tmp_path / "out", None, 40)
    assert (tmp_path / "out" / "a.png").read_bytes() == written
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "images" / "a.jpg")
    with pytest.raises(InputError, match="would both become 'a.png'"):
        write_images(concept, tmp_path / "new", None, 40)
    assert not (tmp_path / "new").exists()


def test_a_pocket_concept_is_drawn_with_its_masks(tmp_path, concept_folder):
    concept = read_concepts("pocket")["teal-striped-star"]
    write_images(concept, tmp_path / "images", tmp_path / "masks", 128)
    for drawn, expected in zip(("images", "masks"), concept_folder, strict=True):
        paths = list_images(tmp_path / drawn)
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in list_images(expected)]
        assert len(paths) == 5
