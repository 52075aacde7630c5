"""Purify a folder of images: what purify_images.py does."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .devices import best_device, dtype_of
from .errors import InputError
from .folder_run import FolderRun, Record, sha256_of
from .image_rng import image_generator
from .images import crop_and_resize, from_pil, name_results, read_image, to_pil
from .models.parts import load_index, read_pipeline
from .purify import DEFAULTS, PURIFIERS, check_strength

__all__ = ["PurifySettings", "purify_folder"]

# Images (B, 3, H, W) in [0, 1] and a CPU generator per image -> the purified images.
Purifier = Callable[[torch.Tensor, list[torch.Generator]], torch.Tensor]
# Folders of IF's second stage may name any of its pipelines.
_SECOND_STAGES = ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline",
                  "IFInpaintingSuperResolutionPipeline")
Job = tuple[str, Path]  # the result's name and the image


@dataclass(frozen=True)
class PurifySettings:
    """The settings of purify_images.py, by its flags' names; its help describes them.

    None is the default of the method (`szt_utils.purify.DEFAULTS`); without `resolution` images keep their
    size.
    """

    image_dir: str
    method: str
    jpeg_quality: int | None = None
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    upscaler: str | None = None
    strength: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    prompt: str | None = None
    resolution: int | None = None
    batch_size: int = 1
    seed: int = 0
    mixed_precision: str = "no"


def load_purifier(settings: PurifySettings) -> tuple[Purifier, dict[str, Any]]:
    """The purifier and all its settings; InputError when they do not fit its model."""
    method, pipelines = settings.method, []
    given = {**asdict(settings), "quality": settings.jpeg_quality}
    if method not in ("advclean", "jpeg"):
        method, pipelines = load_pipelines(settings)
    unused = [name for name in ("guidance_scale", "prompt", "upscaler")
              if method == "pdmpure" and given[name] is not None]
    if unused:
        raise InputError(f"The model '{settings.pretrained_model_name_or_path}' has no text and no second "
                         f"stage; leave out --{', --'.join(unused)}.")
    chosen = {name: default if given.get(name) is None else given[name]
              for name, default in DEFAULTS[method].items()}
    function = PURIFIERS[method]
    if not pipelines:
        return lambda images, generators: function(images, **chosen), chosen
    check_strength(chosen["strength"], chosen["steps"])
    return (lambda images, generators: function(images, *pipelines, generators=generators, **chosen)), chosen


def load_pipelines(settings: PurifySettings) -> tuple[str, list]:
    """The purifier's name in PURIFIERS and its Diffusers pipelines."""
    import diffusers

    path, files = settings.pretrained_model_name_or_path, (settings.revision, settings.variant)
    if settings.method == "regen":
        return "regen", [load_on_device(diffusers.AutoPipelineForImage2Image, path, settings, *files)]
    kind = load_index(path, settings.revision).get("_class_name", "")
    if kind == "DDPMPipeline":
        return "pdmpure", [load_on_device(diffusers.DDPMPipeline, path, settings, *files)]
    if kind not in _SECOND_STAGES:
        raise InputError(f"pdmpure takes a DDPMPipeline or DeepFloyd IF's second stage, but '{path}' is a "
                         f"{kind or 'folder without a model_index.json'}.")
    if not settings.upscaler:
        raise InputError(f"The model '{path}' is IF's second stage, which needs --upscaler, such as "
                         "stabilityai/stable-diffusion-x4-upscaler.")
    return "pdmpure_if", [
        load_on_device(diffusers.IFImg2ImgSuperResolutionPipeline, path, settings, *files),
        load_on_device(diffusers.StableDiffusionUpscalePipeline, settings.upscaler, settings)]


def load_on_device(cls: type, path: str, settings: PurifySettings, *files: str | None) -> Any:
    """`read_pipeline` in the settings' precision, on the GPU if there is one."""
    return read_pipeline(cls, path, dtype_of(settings.mixed_precision), *files).to(best_device())


def read_tensor(path: Path, resolution: int | None) -> torch.Tensor:
    """An image as it is purified, float32 (1, 3, H, W) in [0, 1]."""
    image = read_image(path)
    return from_pil(crop_and_resize(image, resolution, center_crop=True) if resolution else image)


def purify_batch(settings: PurifySettings, purifier: Purifier,
                 jobs: list[Job]) -> list[tuple[Record, Image.Image]]:
    """Purify images of one size together: their records and the purified images."""
    images = [read_tensor(path, settings.resolution) for _, path in jobs]
    try:
        results = purifier(torch.cat(images), [image_generator(image[0], settings.seed) for image in images])
    except ValueError as error:  # of diffusers, for steps that it cannot take
        raise InputError(str(error)) from None
    if not torch.isfinite(results).all():
        raise InputError("The model turned the image into NaN; try --mixed_precision no.")
    purified = []
    for (name, path), image, result, saved in zip(jobs, images, results, to_pil(results), strict=True):
        change = (result - image[0]).square().mean().sqrt().item() * 255
        purified.append(({"file": name, "source": path.name, "sha256": sha256_of(image),
                          "rms_change": round(change, 3)}, saved))
    return purified


def purify_folder(settings: PurifySettings, output_dir: str | Path) -> None:
    """Purify the images of `settings.image_dir`, with its sub-folders, into `output_dir`; resumes.

    InputError for files and settings that cannot be used, before any work; for an image that the purifier
    refuses, when the others are done.
    """
    def read(job: Job) -> tuple[str, tuple[int, ...]]:
        image = read_tensor(job[1], settings.resolution)
        return sha256_of(image), image.shape

    with FolderRun(output_dir, "purify_images.py", asdict(settings), settings.image_dir) as run:
        batches = run.batches(list(name_results(settings.image_dir).items()), lambda job: job[0], read,
                              settings.batch_size)
        if not batches:
            return
        purifier, chosen = load_purifier(settings)
        run.begin(settings=chosen)
        run.work(batches, lambda jobs: purify_batch(settings, purifier, jobs), lambda job: job[1],
                 settings.method)
