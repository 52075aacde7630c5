"""Export a data set for another trainer, in which Safe-Zone Training is done as far as the trainer allows.

    images/<stem>.png   at a size that the trainer does not resize again, after JPEG (Sec. 4.4)
    the mask            grown (Sec. 4.3), at the same size, where the trainer looks for it
    images/<stem>.txt   the caption, or all captions in images/metadata.jsonl
    config files        with the timesteps of the safe zone (Sec. 4.2), and a README.md of the trainer's traps
"""

import hashlib
import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .caption_files import insert_token, read_captions
from .captions import templates_for
from .errors import InputError
from .folder_run import FolderRun
from .image_formats import sort_files
from .images import check_resolution, from_pil, name_results, png_bytes, read_image
from .masks import dilate, find_masks, read_mask
from .notices import notice
from .safe_zone import SafeZone
from .trainers import TRAINERS
from .trainers.buckets import Size, nearest_bucket
from .trainers.family import FAMILIES
from .trainers.trainer import Plan, Trainer

__all__ = ["ExportSettings", "export_folder", "plan_for"]


@dataclass(frozen=True)
class ExportSettings:
    """The settings of export_dataset.py, by its flags' names; its help describes them.

    None is the model's usual resolution, and the paper's value of a part of the safe zone.
    """

    image_dir: str
    trainer: str
    model: str
    placeholder_token: str
    initializer_token: str | None = None
    learnable_property: str = "object"
    loss_mask_dir: str | None = None
    resolution: int | None = None
    jpeg_quality: int | None = None
    t_min: int | None = None
    mask_dilation: int | None = None


@dataclass(frozen=True)
class _Job:
    """An image, its mask's file, and its caption; `stem` names its files in the data set."""

    stem: str
    image: Path
    mask: Path | None
    caption: str

    @property
    def image_name(self) -> str:
        return f"images/{self.stem}.png"


def plan_for(folder: str | Path, model: str, resolution: int | None = None, token: str = "",
             **zone: int | None) -> Plan:
    """The plan of a data set in a folder; `zone` are settings of a SafeZone other than the paper's."""
    family = FAMILIES[model]
    resolution = resolution or family.resolution
    safe_zone = SafeZone.paper(resolution, family, **zone)
    safe_zone.fit(family.num_timesteps)  # raises for a threshold that no timestep reaches
    return Plan(Path(folder).resolve(), family, safe_zone, resolution, token)


def export_folder(settings: ExportSettings, output_dir: str | Path) -> None:
    """Export the images of `settings.image_dir` to `output_dir`; the same command again does what is missing.

    InputError for files and settings that cannot be used, before any is written.
    """
    trainer = TRAINERS[settings.trainer]
    plan = plan_for(output_dir, settings.model, settings.resolution, settings.placeholder_token,
                    jpeg_quality=settings.jpeg_quality, t_min=settings.t_min,
                    mask_dilation=settings.mask_dilation)
    trainer.model(plan)
    check_resolution(plan.resolution)
    jobs = _find_jobs(settings, trainer)
    with FolderRun(output_dir, "export_dataset.py", asdict(settings), settings.image_dir) as run:
        # All are made once before the first is written, and again to be written: they would fill the memory.
        made = {job: _Summary.of(_make(job, trainer, plan)) for job in jobs}
        work = run.missing(jobs, lambda job: made[job].names,
                           lambda job, record: record.get("sha256") == made[job].sha256)
        plan = replace(plan, has_masks=any(job.mask for job in jobs),
                       sizes=sorted({summary.size for summary in made.values()}),
                       captions={f"{job.stem}.png": job.caption for job in jobs})
        texts = trainer.configs(plan) | {"README.md": _readme(plan, trainer)}
        run.begin(version=trainer.version, t_min=plan.zone.t_min, mask_dilation=plan.zone.mask_dilation)
        for job in work:
            run.save([{"file": job.image_name, "source": job.image.name, "sha256": made[job].sha256}],
                     run.without_kept(_make(job, trainer, plan)))
        _save_texts(run, texts)
        _name_leftovers(run, {name for summary in made.values() for name in summary.names})
    print(f"'{output_dir}' is ready for {trainer.title}: see its README.md.")


def _find_jobs(settings: ExportSettings, trainer: Trainer) -> list[_Job]:
    named = name_results(settings.image_dir, recursive=False)
    paths = list(named.values())
    for path in paths:
        if path.name != path.name.encode(errors="ignore").decode():
            raise InputError(f"The name of the image '{path}' is not UTF-8, which trainers cannot read; "
                             "rename it.")
    masks: list[Path | None] = [None] * len(paths)
    if settings.loss_mask_dir and trainer.mask_name:
        masks = [*find_masks(settings.loss_mask_dir, paths)]
    elif settings.loss_mask_dir:
        notice(f"{trainer.title} has no masked loss; the masks are left out.")
    given, templates = read_captions(settings.image_dir, paths), templates_for(settings.learnable_property)
    print(f"{len(given)} of {len(paths)} images have captions; the others get templates.")
    jobs = []
    for i, (name, path) in enumerate(named.items()):
        caption = insert_token(given.get(path, templates[i % len(templates)]), settings.placeholder_token,
                               settings.initializer_token)
        jobs.append(_Job(name.removesuffix(".png"), path, masks[i], caption))
    unnamed = [job.image.name for job in jobs if settings.placeholder_token not in job.caption]
    if unnamed:
        notice(f"{settings.placeholder_token} is missing in {len(unnamed)} of {len(jobs)} captions, such as "
               f"that of '{unnamed[0]}'.")
    return jobs


def _make(job: _Job, trainer: Trainer, plan: Plan) -> dict[str, bytes]:
    """The files of an image by name: itself, its mask, and its caption."""
    image = read_image(job.image)
    size = nearest_bucket(image.size, trainer.buckets(plan.resolution, plan.family.name))
    files = {job.image_name: png_bytes(plan.zone.purify(ImageOps.fit(image, size, Image.Resampling.BICUBIC)))}
    if job.mask:
        mask = from_pil(ImageOps.fit(read_mask(job.mask, image.size), size, Image.Resampling.NEAREST))
        if not mask.any():
            raise InputError(f"The mask '{job.mask}' is all black after cropping to {size[0]} x {size[1]} "
                             "pixels.")
        grown = dilate(mask, plan.zone.mask_dilation)[0, 0].numpy() * 255
        files[trainer.mask_name.format(job.stem)] = png_bytes(Image.fromarray(grown.astype(np.uint8)))
    if trainer.caption_files:
        files[f"images/{job.stem}.txt"] = (job.caption + "\n").encode()
    return files


@dataclass(frozen=True)
class _Summary:
    """The files of an image: their names, the hash of their contents, and the image's size."""

    names: list[str]
    sha256: str
    size: Size

    @classmethod
    def of(cls, files: dict[str, bytes]) -> "_Summary":
        """That of files whose first is the image."""
        with Image.open(io.BytesIO(next(iter(files.values())))) as image:
            size = image.size
        return cls(list(files), hashlib.sha256(b"".join(files.values())).hexdigest(), size)


def _save_texts(run: FolderRun, texts: dict[str, str]) -> None:
    """Write texts that are missing or outdated; those that were changed by hand are kept and named."""
    for name, text in texts.items():
        path, content = run.folder / name, text.encode("utf-8", "surrogateescape")
        if run.find(name)[1]:
            print(f"'{name}' was changed by hand and is kept; delete it to have it written again.")
        elif not path.is_file() or path.read_bytes() != content:
            run.save([{"file": name}], {name: content})


def _name_leftovers(run: FolderRun, names: set[str]) -> None:
    """Name images and masks of images that are no longer there: a trainer would use them, or end."""
    found = [path.relative_to(run.folder).as_posix() for folder in ("images", "masks")
             for path in sort_files(sorted((run.folder / folder).glob("[!.]*")))[0]]
    if left := [name for name in found if name not in names]:
        notice(f"'{run.folder}' holds files of images that are not in --image_dir ({len(left)}), such as "
               f"'{left[0]}'; delete what is not to be trained on.")


def _readme(plan: Plan, trainer: Trainer) -> str:
    zone, family = plan.zone, plan.family
    paper = SafeZone.paper(plan.resolution, family)
    given = "".join(f" --{name} {getattr(zone, name)}" for name in ("jpeg_quality", "t_min")
                    if getattr(zone, name) != getattr(paper, name))
    masks = f"masks grown by {zone.mask_dilation} pixels" if plan.has_masks else "no masks"
    sizes = ", ".join(f"{width} x {height}" for width, height in plan.sizes)
    return "\n".join([
        f"# Images of `{plan.token}` for {trainer.title}", "",
        f"{len(plan.captions)} images of {sizes} pixels, compressed with JPEG quality {zone.jpeg_quality}, "
        f"as PNG; {masks}. The config files train a LoRA of {family.title}, whose safe zone is the "
        f"timesteps {zone.t_min} to {family.num_timesteps - 1}. They were written for {trainer.title} "
        f"{trainer.version}.", "", "## Train", "",
        "Fill in the paths that begin with `/path/to`, if there are any; then:", "",
        "```bash", f"# In the folder of {trainer.title}:", trainer.command(plan), "```", "",
        "Paths in the config files are absolute: instead of moving this folder, export again to another one.",
        "", "## What to mind", "", *(f"* {trap}" for trap in trainer.traps(plan)), "", "## Check", "",
        "```bash", f"python export_dataset.py --trainer {trainer.name} --model {family.name} "
        f"--resolution {plan.resolution}{given} --check {plan.quoted('.')}", "```"]) + "\n"
