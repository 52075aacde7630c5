"""Captions of images: `<stem>.txt` beside the image, else the folder's metadata.jsonl, else a template."""

import re
from collections.abc import Sequence
from pathlib import Path

from .captions import templates_for
from .errors import InputError
from .files import nfc, parse_json, read_text
from .settings import ConceptSettings

__all__ = ["METADATA", "caption_templates", "insert_token", "read_captions", "read_metadata"]

METADATA = "metadata.jsonl"  # as in image folders of the datasets library: file_name and text


def read_captions(image_dir: str | Path, images: Sequence[Path]) -> dict[Path, str]:
    """The captions that images have, each as one line; an empty caption counts as none.

    Names match whatever the Unicode form of their accents and the case of the suffix. InputError for a file
    that cannot be read, and for a line of metadata.jsonl that is no JSON object with the text entries
    file_name and text.
    """
    listed = {nfc(name): text for name, text in read_metadata(Path(image_dir) / METADATA).items()}
    texts = {nfc(str(path.with_suffix(""))): path for folder in {image.parent for image in images}
             for path in sorted(folder.glob("*")) if path.suffix.lower() == ".txt" and path.is_file()}
    captions = {}
    for image in images:
        beside = texts.get(nfc(str(image.with_suffix(""))))
        text = (read_text(beside, "caption file") if beside
                else listed.get(nfc(image.relative_to(image_dir).as_posix()), ""))
        if line := " ".join(text.split()):
            captions[image] = line
    return captions


def read_metadata(path: Path) -> dict[str, str]:
    """The texts of a metadata.jsonl by file name, none without the file; InputError names a bad line."""
    listed = {}
    text = read_text(path, "caption file") if path.is_file() else ""
    for i, line in enumerate(text.split("\n"), 1):  # JSON may hold other line breaks of Unicode as they are
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise InputError(f"Line {i} of '{path}' is not valid JSON ({error}).") from None
        pair = [entry.get(name) for name in ("file_name", "text")] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) for value in pair):
            raise InputError(f"Line {i} of '{path}' needs the texts \"file_name\" and \"text\".")
        listed[pair[0]] = pair[1]
    return listed


def insert_token(caption: str, token: str, class_word: str | None = None) -> str:
    """A caption with the concept's token in the place of each `{}`, or else of the class word.

    Without both it stays as it is, and so does one that has the token.
    """
    if "{}" in caption:
        return caption.replace("{}", token)
    if class_word and token not in caption:
        return re.sub(rf"\b{re.escape(class_word)}\b", lambda match: token, caption, count=1, flags=re.I)
    return caption


def caption_templates(settings: ConceptSettings, images: Sequence[Path]) -> list[tuple[str, ...]]:
    """The caption templates of every image, with a {} for the placeholder, by `settings.caption_mode`.

    "template" takes upstream's, "file" each image's own caption, "both" its own for half of the draws. In a
    caption without {} or placeholder, the initializer token's place is the placeholder's. InputError when an
    image has no caption, or a caption no such place.
    """
    templates = templates_for(settings.learnable_property)
    if settings.caption_mode == "template":
        return [templates] * len(images)
    captions, every = read_captions(settings.train_data_dir, images), []
    token = re.escape(settings.placeholder_token)
    spelled_out = re.compile(rf"{token}(?: {token}_\d+)*")  # with the tokens of further vectors
    for image in images:
        if image not in captions:
            raise InputError(f"The image '{image}' has no caption: write '{image.stem}.txt', or leave out "
                             f"--caption_mode {settings.caption_mode}.")
        own = insert_token(spelled_out.sub("{}", captions[image]), "{}", settings.initializer_token)
        if "{}" not in own:
            raise InputError(f"The caption of '{image}' has no place for the placeholder: write {{}}, or the "
                             f"word '{settings.initializer_token}', into it.")
        every.append((own,) if settings.caption_mode == "file" else (own,) * len(templates) + templates)
    return every
