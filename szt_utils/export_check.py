"""Say what is wrong with a data set for another trainer and with its config files, a sentence a finding."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .caption_files import METADATA, read_metadata
from .errors import InputError, first_line, some_of
from .export import plan_for
from .files import read_text
from .images import MASK_ENDING, list_images, read_image, read_upright
from .mask_pixels import white_pixels
from .notices import notice
from .trainers import TRAINERS
from .trainers.config_files import Config, read_config
from .trainers.trainer import Plan, Source, Trainer

__all__ = ["check_folder"]

# Levels of root mean square by which JPEG may change an image: photographs change by 3 or more, their
# compressed versions by 1 or less.
_COMPRESSED = 2.0


def check_folder(folder: str | Path, trainer: str, model: str, config: Sequence[str] | None = None,
                 resolution: int | None = None, **zone: int | None) -> list[str]:
    """The findings about a data set; none when nothing is wrong.

    Without `config` files, those that an export writes are read, as far as they are there. InputError for
    files that cannot be read.
    """
    plan, chosen = plan_for(folder, model, resolution, **zone), TRAINERS[trainer]
    chosen.model(plan)
    if not plan.folder.is_dir():
        raise InputError(f"The data set '{folder}' does not exist or is not a folder.")
    names = [name for name in chosen.configs(plan) if Path(name).name != METADATA]
    paths = list(config or [plan.file(name) for name in names if Path(plan.file(name)).is_file()])
    if not paths:
        notice(f"'{folder}' holds no {' and no '.join(names)}; name the config files with --config.")
        return _check_images(plan, chosen, _default_source(plan, chosen), False)
    read = read_config(paths)
    try:
        return list(dict.fromkeys([*_check_sources(plan, chosen, read), *chosen.check(plan, read)]))
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The config files {', '.join(map(str, paths))} do not have the structure of "
                         f"{chosen.title}'s ({first_line(error)}).") from None


def _default_source(plan: Plan, trainer: Trainer) -> Source:
    inside = plan.folder / "images"
    images = inside if inside.is_dir() else plan.folder
    return Source(images, images if trainer.masks_beside_images else plan.folder / "masks")


def _check_sources(plan: Plan, trainer: Trainer, config: Config) -> Iterator[str]:
    sources = trainer.sources(plan, config)
    if not sources:
        notice(f"The config files name no images; those in '{plan.folder}' are checked.")
    for source in sources or [_default_source(plan, trainer)]:
        if not (plan.folder / source.images).is_dir():
            yield f"The folder of images '{source.images}' of the config does not exist; correct its path."
            continue
        if not (plan.folder / source.images).resolve().is_relative_to(plan.folder):
            yield f"The config trains on '{source.images}', which is not in '{plan.folder}'; correct it."
        yield from _check_images(plan, trainer, source, True)
    has_masks = any(source.masks or source.has_alpha for source in sources)
    if plan.family.velocity and has_masks and not trainer.has_min_snr(config):
        yield (f"{plan.family.title} predicts velocity: on a small model, training with masks failed without "
               f"Min-SNR weighting; set {trainer.min_snr}.")


def _check_images(plan: Plan, trainer: Trainer, source: Source, is_configured: bool) -> list[str]:
    folder, square = plan.folder / source.images, (plan.resolution, plan.resolution)
    paths = _list(trainer, source, folder)
    findings, sizes = [], {}
    inside = [path for path in paths if source.masks not in (None, source.images)
              and (plan.folder / source.masks).resolve() in path.resolve().parents]
    if inside:
        findings.append(f"{trainer.title} would train on the masks in '{source.masks}', since it reads "
                        "sub-folders; move them out of the images' folder.")
    suffixes = trainer.image_suffixes
    if unread := [path for path in paths if suffixes and path.suffix.lower() not in suffixes]:
        findings.append(f"{trainer.title} does not read {some_of(unread)}; convert to PNG.")
    paths = [path for path in paths if path not in inside and path not in unread]
    resized, plain = [], []
    for path in paths:
        image = read_image(path)
        sizes[path] = image.size
        kept = (image.size == square if source.is_fixed
                else trainer.keeps(image.size, plan.resolution, plan.family.name))
        if not kept:
            resized.append(path)
        if _change(image, plan.zone.purify(image)) > _COMPRESSED:
            plain.append(path)
    if source.size and source.size != square:
        given = " x ".join(f"{side:g}" for side in dict.fromkeys(source.size))
        findings.append(f"The config trains at a resolution of {given}, not of {plan.resolution}; set it, or "
                        "export again with --resolution.")
    elif resized:
        findings.append(f"{trainer.title} will resize {some_of(resized)}, which undoes JPEG's blocks; export "
                        f"the images at a resolution of {plan.resolution}.")
    if plain:
        findings.append(f"JPEG quality {plan.zone.jpeg_quality} was not applied to {some_of(plain)} at this "
                        "size; export from the original images.")
    return findings + _check_captions(trainer, folder, paths) + _check_masks(plan, trainer, source, sizes,
                                                                             is_configured)


def _list(trainer: Trainer, source: Source, folder: Path, masks: bool = False) -> list[Path]:
    return list_images(folder, trainer.is_recursive or source.is_recursive, masks)


def _change(image: Image.Image, other: Image.Image) -> float:
    """The root mean square of the difference of two RGB images, in levels."""
    difference = np.asarray(image, dtype=np.float32) - np.asarray(other, dtype=np.float32)
    return float(np.sqrt(np.square(difference).mean()))


def _check_captions(trainer: Trainer, folder: Path, paths: Sequence[Path]) -> list[str]:
    if trainer.caption_files:
        without = [path for path in paths if not path.with_suffix(".txt").is_file()
                   or not read_text(path.with_suffix(".txt"), "caption file").strip()]
    else:
        listed = {each.parent / name: text for each in sorted(folder.rglob(METADATA))
                  for name, text in read_metadata(each).items()}
        without = [path for path in paths if not listed.get(path, "").strip()]
    where = "<stem>.txt beside the image" if trainer.caption_files else METADATA
    return [f"No caption was found for {some_of(without)}; expected it in {where}."] if without else []


def _check_masks(plan: Plan, trainer: Trainer, source: Source, sizes: dict[Path, tuple[int, int]],
                 is_configured: bool) -> list[str]:
    if trainer.mask_name is None or source.has_alpha:
        return []
    if source.masks is None or not (plan.folder / source.masks).is_dir():
        absent = ("There are no masks" if not is_configured else "The config names no masks"
                  if source.masks is None else f"The folder of masks '{source.masks}' does not exist")
        return [f"{absent}, so the loss counts on the whole image; make masks with precompute_masks.py and "
                "export them."]
    folder, found, without, read = plan.folder / source.masks, {}, {}, set()
    for path in sizes:
        names = trainer.mask_names(path.relative_to(plan.folder / source.images))
        if existing := [folder / name for name in names if (folder / name).is_file()]:
            found[path] = existing[0]
            read.update(existing)
        else:
            without[path] = Path(max(names, key=lambda name: name.endswith(".png")))
    stems, expected = {mask.stem for mask in without.values()}, next(iter(without.values()), None)
    others = [path for path in _list(trainer, source, folder, masks=True) if path not in read
              and (path.stem.endswith(MASK_ENDING) or not trainer.masks_beside_images)]
    unlike, black, odd = [], [], []
    for path, mask in found.items():
        opened = read_upright(mask)
        if trainer.reads_any_mask:
            opened = Image.fromarray(white_pixels(opened)[0])
        if opened.size != sizes[path]:
            unlike.append(mask)
        if opened.convert("L").getextrema()[1] == 0:
            black.append(mask)
        elif _is_odd(opened):
            odd.append(mask)
    return [sentence.format(some_of(files)) for files, sentence in (
        (list(without), f"No mask was found for {{}}; expected {expected} in '{source.masks}'."),
        ([path for path in others if path.stem in stems],
         f"{trainer.title} does not read {{}} as a mask; expected {expected}."),
        ([path for path in others if path.stem not in stems],
         "No image was found for {} among the masks; remove what belongs to none."),
        (unlike, "The mask has another size than its image: {}; export again."),
        (odd, f"The mask has transparency, labels, colors or dark gray, but {trainer.title} needs white on "
              "black: {}; export again."),
        (black, "Nothing would be trained on with a mask that is all black: {}.")) if files]


def _is_odd(mask: Image.Image) -> bool:
    """Whether a mask has transparency, labels, colors or nothing but dark gray."""
    is_clear = mask.has_transparency_data and mask.convert("RGBA").getchannel("A").getextrema()[0] < 255
    return is_clear or bool(white_pixels(mask)[1]) or mask.convert("L").getextrema()[1] < 128
