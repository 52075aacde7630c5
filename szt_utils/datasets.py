"""Data sets of concepts to learn: where each concept's images and masks are, and the words for it.

"pocket" draws its concepts. "dreambooth" is a folder with a sub-folder of images per concept, as published
with DreamBooth (Ruiz et al. 2023). "customconcept101" (Kumari et al. 2023) has such folders and dataset.json,
a list of their class words and prompts. Masks are in `<mask_dir>/<concept>/<stem>.png`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from . import pocket
from .captions import EVALUATION_PROMPTS, read_prompt_templates
from .errors import InputError
from .files import read_json, write_json
from .images import crop_and_resize, name_results, read_image, save_png
from .masks import find_masks, read_mask

__all__ = ["READERS", "DatasetConcept", "read_concepts", "write_images"]


@dataclass(frozen=True)
class DatasetConcept:
    """One concept to learn; in `prompts` a `{}` stands for its token, or its class word in a CLIP score."""

    name: str
    image_dir: Path | None  # None: drawn by the pocket world
    mask_dir: Path | None
    initializer: str
    class_word: str
    prompts: tuple[str, ...]


def read_pocket(dataset_dir: Path | None = None, mask_dir: Path | None = None, initializer: str | None = None,
                prompts: Sequence[str] | None = None) -> list[DatasetConcept]:
    """The novel concepts of the pocket world, whose images and masks `write_images` draws."""
    return [DatasetConcept(name, None, None, initializer or "object", "object",
                           tuple(prompts or pocket.PROMPTS)) for name in pocket.NOVEL_CONCEPTS]


def read_dreambooth(dataset_dir: Path, mask_dir: Path | None = None, initializer: str | None = None,
                    prompts: Sequence[str] | None = None) -> list[DatasetConcept]:
    """A concept per sub-folder; `initializer` is its class word too."""
    if not dataset_dir.is_dir():
        raise InputError(f"The data set '{dataset_dir}' is not a folder.")
    folders = sorted(path for path in dataset_dir.iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    word = initializer or "object"
    return [DatasetConcept(folder.name, folder, mask_dir and mask_dir / folder.name, word, word,
                           tuple(prompts or EVALUATION_PROMPTS)) for folder in folders]


def read_customconcept101(dataset_dir: Path, mask_dir: Path | None = None, initializer: str | None = None,
                          prompts: Sequence[str] | None = None) -> list[DatasetConcept]:
    """The concepts of dataset.json, initialized by the last word of their class, each with its prompts."""
    index, concepts = dataset_dir / "dataset.json", []
    try:
        entries = read_json(index, "list of concepts")
        if not isinstance(entries, list):
            raise InputError("it must hold a list of objects, one per concept")
        texts = [[_text(entry, key) for key in ("instance_data_dir", "class_prompt", "prompt_filename")]
                 for entry in entries]
    except InputError as error:
        raise InputError(f"'{index}' cannot be read as CustomConcept101's list of concepts: "
                         f"{error}") from None
    for folder, class_word, prompt_file in texts:
        own = prompt_file and dataset_dir / prompt_file
        word, name = initializer or class_word.split()[-1], Path(folder).name
        # The list has the paths of its authors' machine, of which only the last name is sure to exist here.
        image_dir = dataset_dir / folder if (dataset_dir / folder).is_dir() else dataset_dir / name
        own_prompts = prompts or (read_prompt_templates(own) if own and own.is_file()
                                  else EVALUATION_PROMPTS)
        concepts.append(DatasetConcept(name, image_dir, mask_dir and mask_dir / name, word, class_word,
                                       tuple(own_prompts)))
    return concepts


def _text(entry: Any, key: str) -> str | None:
    """An entry's text of a name, None for an absent prompt file; InputError for what is no file's name."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if value is None and key == "prompt_filename":
        return None
    if not isinstance(value, str) or not value.strip() or "\0" in value or not Path(value).name.strip("."):
        raise InputError(f"every concept needs a text for '{key}', not {json.dumps(value)[:80]}")
    return value


READERS: dict[str, Callable[..., list[DatasetConcept]]] = {
    "pocket": read_pocket, "dreambooth": read_dreambooth, "customconcept101": read_customconcept101}


def read_concepts(dataset: str, dataset_dir: Path | None = None, mask_dir: Path | None = None, *,
                  names: Sequence[str] | None = None, initializer: str | None = None,
                  prompts: Sequence[str] | None = None) -> dict[str, DatasetConcept]:
    """Concepts of a data set by name: those of `names`, in that order, or all.

    `initializer` and `prompts` replace the data set's own. InputError names a data set that cannot be read
    and a concept that is not in it.
    """
    concepts = READERS[dataset](dataset_dir, mask_dir, initializer, prompts)
    known = {concept.name: concept for concept in concepts}
    if len(known) < len(concepts):
        twice = next(concept.name for concept in concepts if known[concept.name] is not concept)
        raise InputError(f"The data set '{dataset_dir}' has two concepts '{twice}'; rename one.")
    if not known:
        raise InputError(f"The data set '{dataset_dir}' holds no concept.")
    if unknown := [name for name in names or [] if name not in known]:
        raise InputError(f"The data set has no concept '{unknown[0]}'; choose from: {', '.join(known)}.")
    return {name: known[name] for name in names or known}


def write_images(concept: DatasetConcept, image_dir: Path, mask_dir: Path | None, resolution: int,
                 prompts: Sequence[str] = ()) -> None:
    """Write a concept's images, and with `mask_dir` its masks, as square PNGs of `resolution` pixels.

    The concepts of the pocket world are drawn at 128 pixels. InputError names an image without a mask, two
    images that would get one name, and a data set that has changed since: in its images, their names, or the
    `prompts`, which a JSON file beside the folder records.
    """
    if concept.image_dir is None:
        pocket.write_concept(concept.name, image_dir, mask_dir)
        return
    named = name_results(concept.image_dir, recursive=False)
    record, path = {"images": list(named), "prompts": list(prompts)}, Path(f"{image_dir}.json")
    if path.exists() and read_json(path) != record:
        raise InputError(f"The images or prompts of '{concept.image_dir}' have changed since '{path}'; give "
                         "another --output_dir.")
    image_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    masks = find_masks(concept.mask_dir, list(named.values())) if mask_dir else [None] * len(named)
    for (name, path), mask in zip(named.items(), masks, strict=True):
        image = read_image(path)
        _write(crop_and_resize(image, resolution, center_crop=True), image_dir / name)
        if mask is not None:
            _write(crop_and_resize(read_mask(mask, image.size), resolution, True, Image.Resampling.NEAREST),
                   mask_dir / name)


def _write(image: Image.Image, path: Path) -> None:
    """Write a PNG, unless it is there; what was made of another one would not fit it."""
    if not path.exists():
        save_png(image, path)
    elif Image.open(path).tobytes() != image.tobytes():
        raise InputError(f"The data set has changed since '{path}' was made of it; give another "
                         "--output_dir.")
