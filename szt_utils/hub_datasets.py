"""Data sets of the datasets library as a folder of images with captions, which every script can read."""

import os
import shutil
from pathlib import Path
from typing import Any

from .errors import InputError, first_line
from .image_formats import SUFFIXES

__all__ = ["dataset_folder"]


def dataset_folder(name: str, config: str | None = None, image_column: str = "image",
                   caption_column: str | None = None) -> Path:
    """The folder with the images of a data set's "train" split, and their captions as `<stem>.txt`.

    `name` is an id on the Hub or a folder of image files, Parquet, ... on this machine. Images keep their
    encoding. The folder lies in the cache of the datasets library and is written once. InputError when the
    data set cannot be loaded or lacks a column.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, config, split="train")
    except Exception as error:  # the library raises what its many formats lead it to
        raise InputError(f"The data set '{name}' cannot be loaded ({first_line(error)}).") from None
    for column in filter(None, (image_column, caption_column)):
        if column not in data.column_names:
            raise InputError(f"The data set '{name}' has no column '{column}', only: "
                             f"{', '.join(data.column_names)}.")
    if not isinstance(data.features[image_column], datasets.Image):
        raise InputError(f"The column '{image_column}' of the data set '{name}' holds no images.")
    columns = "-".join(filter(None, (image_column, caption_column)))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "szt" / f"{data._fingerprint}-{columns}"
    if not folder.exists():
        encoded = data.cast_column(image_column, datasets.Image(decode=False))
        _write(encoded, image_column, caption_column, folder)
    return folder


def _write(data: Any, image_column: str, caption_column: str | None, folder: Path) -> None:
    """Write the files beside the folder, which gets its name when it is complete."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        for i, row in enumerate(data):
            image, caption = row[image_column], row.get(caption_column)
            if image is None or not isinstance(caption, str | None):
                kind, column = ("image", image_column) if image is None else ("text", caption_column)
                raise InputError(f"Row {i} of the data set holds no {kind} in its column '{column}'.")
            content = image["bytes"] or Path(image["path"]).read_bytes()
            suffix = Path(image["path"] or "").suffix.lower()
            (part / f"{i:06d}{suffix if suffix in SUFFIXES else '.png'}").write_bytes(content)
            if caption is not None:
                (part / f"{i:06d}.txt").write_text(caption, encoding="utf-8")
        if not folder.exists():  # another process may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
