"""--dataset_name: data sets of the datasets library, from files on this machine."""

import json

import pytest
import torch
from conftest import embedding, flags, run_here

from szt_utils.errors import InputError
from szt_utils.hub_datasets import dataset_folder
from szt_utils.images import list_images, read_image

datasets = pytest.importorskip("datasets")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def image_folder(concept_folder, tmp_path):
    """An image folder of the datasets library, with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i, path in enumerate(list_images(concept_folder[0])):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file_name": path.name, "text": f"a {{}}, number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_data_set_becomes_a_folder_of_its_files_once(cache, image_folder, tmp_path):
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    data = datasets.load_dataset(str(image_folder), split="train", cache_dir=str(cache))
    data.to_parquet(parquet / "train.parquet")
    for source in (image_folder, parquet):
        folder = dataset_folder(str(source), caption_column="text")
        written = list_images(folder)
        before = [path.stat().st_mtime_ns for path in written]
        originals = list_images(image_folder)
        assert [path.read_bytes() for path in written] == [path.read_bytes() for path in originals]
        assert written[3].with_suffix(".txt").read_text() == "a {}, number 3"
        assert dataset_folder(str(source), caption_column="text") == folder
        assert [path.stat().st_mtime_ns for path in list_images(folder)] == before
        assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_images_with_other_captions_are_another_folder(cache, image_folder):
    alone, captioned = (dataset_folder(str(image_folder), caption_column=column) for column in (None, "text"))
    assert len(list_images(alone)) == len(list_images(captioned)) == 5
    assert not list(alone.glob("*.txt")) and len(list(captioned.glob("*.txt"))) == 5


def test_files_keep_a_suffix_that_is_an_images(cache, image_folder, tmp_path):
    content = list_images(image_folder)[0].read_bytes()
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list([{"image": {"bytes": content, "path": name}} for name in (
        "a.JPG", "a.webp", "a.img", "a")]).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "set" / "train.parquet")
    folder = dataset_folder(str(tmp_path / "set"))
    assert sorted(path.name for path in folder.iterdir()) == ["000000.jpg", "000001.webp", "000002.png",
                                                              "000003.png"]


@pytest.fixture
def write_rows(image_folder, tmp_path):
    """Writes a data set of these captions, the first `images` of which have an image."""
    def write(captions, images):
        image = {"bytes": list_images(image_folder)[0].read_bytes(), "path": None}
        rows = [{"image": image if i < images else None, "text": text} for i, text in enumerate(captions)]
        (tmp_path / "set").mkdir()
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "set" / "train.parquet")
        return str(tmp_path / "set")
    return write


@pytest.mark.parametrize("captions, images, message", [
    (["a {}", "one {}"], 1, "Row 1 of the data set holds no image in its column 'image'"),
    ([["a {}", "one {}"]], 1, "Row 0 of the data set holds no text in its column 'text'")])
def test_a_row_without_an_image_or_with_several_captions_is_named(cache, write_rows, captions, images,
                                                                  message):
    with pytest.raises(InputError, match=message):
        dataset_folder(write_rows(captions, images), caption_column="text")
    assert not list((cache / "szt").iterdir())


def test_an_image_without_a_caption_gets_no_caption_file(cache, write_rows):
    folder = dataset_folder(write_rows(["a {}", None], 2), caption_column="text")
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000000.txt", "000001.png"]


def test_a_training_on_a_data_set_is_that_on_its_files(cache, tiny_model, image_folder, tmp_path):
    options = dict(max_train_steps=2, caption_mode="file")
    run_here(flags(tiny_model, image_folder, tmp_path / "files", **options))
    run_here(flags(tiny_model, None, tmp_path / "set", dataset_name=image_folder, caption_column="text",
                   **options))
    assert torch.equal(embedding(tmp_path / "set"), embedding(tmp_path / "files"))


@pytest.mark.parametrize("options, message", [
    ({"image_column": "picture"}, "has no column 'picture', only: image, text"),
    ({"caption_column": "label"}, "has no column 'label'"),
    ({"image_column": "text"}, "The column 'text' .* holds no images"),
    ({"config": "other"}, "cannot be loaded")])
def test_what_does_not_fit_is_one_sentence(cache, image_folder, options, message):
    with pytest.raises(InputError, match=message):
        dataset_folder(str(image_folder), **options)


def test_a_data_set_that_is_missing_or_holds_no_image_is_one_sentence(cache, tmp_path):
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            dataset_folder(str(name))
        assert "\n" not in str(caught.value)


def test_every_written_file_can_be_read(cache, image_folder):
    folder = dataset_folder(str(image_folder))
    assert {read_image(path).mode for path in list_images(folder)} == {"RGB"}
    assert not list(folder.glob("*.txt"))
