"""Masks of the concept in a folder of images: what precompute_masks.py runs.

A record of stats.jsonl says how a mask was made: "way", one of `WAYS`; "prompt", as in a points file, or the
grid and the set of images of "auto", and whether it was GrabCut; "area", the mask's share of the image;
"score", the model's own, if one made it; for "auto" the "confidence" (`consensus.Choice`); and for a prompt
per image the "seconds".
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .consensus import LARGEST_AREA, SMALLEST_AREA, candidate_masks, choose_masks
from .devices import best_device
from .errors import InputError, printable
from .familiarity import is_unfamiliar
from .folder_run import FolderRun, Record
from .grabcut import check_available, grabcut, seeds_of
from .images import hash_pixels, name_results, read_image, read_upright, save_png
from .local_server import serve_locally
from .mask_page import MaskPage, PageImage, SavedMask
from .mask_preview import mask_area, mask_sheet
from .masks import read_mask
from .safe_zone import SafeZone
from .sam_prompts import SamPrompt, prompt_from_json, prompt_to_json, read_points_file, relative_prompt
from .segment import EmbeddedImage, Segmenter, load_segmenter, resize_to_image, segment

__all__ = ["WAYS", "MaskJob", "Masks", "MaskingSettings", "mask_folder", "sam_prompts_for"]

WAYS = ("auto", "point", "box", "points_file", "text", "ui")
_LOW_CONFIDENCE = 0.3
_UNFAMILIAR = ("The images look unlike the drawn pocket-world scenes that the bundled model knows, and its "
               "masks would be wrong; ")
_OTHER_MODELS = "give --sam_model facebook/sam-vit-base or --sam_checkpoint sam_vit_b_01ec64.pth"


@dataclass(frozen=True)
class MaskingSettings:
    """The settings of a run; exactly one of `WAYS` marks the concept, else InputError.

    Points (x, y) and the box (left, top, right, bottom) are shares of the width and height; a `points_file`
    (`sam_prompts`) is in pixels. `grabcut` works without a model, and neither for auto nor for text. `grid`
    belongs to auto, `port` to ui. The preview and the page show what a training with this resolution, mask
    dilation (by default the paper's) and crop makes of the masks.
    """

    image_dir: str
    output_dir: str
    sam_checkpoint: str | None = None
    sam_model: str | None = None
    grabcut: bool = False
    auto: bool = False
    point: Sequence[Sequence[float]] | None = None
    box: Sequence[float] | None = None
    points_file: str | None = None
    text: str | None = None
    ui: bool = False
    grid: int = 12
    preview: bool = False
    port: int = 0
    resolution: int = 512
    mask_dilation: int | None = None
    center_crop: bool = False

    def __post_init__(self):
        if len(self._ways()) != 1:
            raise InputError(f"Exactly one of {', '.join(WAYS)} must mark the concept.")
        if self.grabcut and self.way in ("auto", "text"):
            raise InputError(f"GrabCut takes no {self.way}; give a box, a point, a points_file or ui.")

    def _ways(self) -> list[str]:
        return [way for way in WAYS if getattr(self, way) not in (None, False)]

    @property
    def way(self) -> str:
        """The one of `WAYS` that is set."""
        return self._ways()[0]

    @property
    def zone(self) -> SafeZone:
        """The zone whose mask dilation the preview and the page show."""
        return SafeZone.paper(self.resolution, mask_dilation=self.mask_dilation)


@dataclass(frozen=True)
class MaskJob:
    """An image's path, the name of its mask, its upright (width, height), and the SHA-256 of its size and
    pixels."""

    path: Path
    name: str
    size: tuple[int, int]
    sha256: str

    def read(self) -> Image.Image:
        """The upright RGB image; InputError when it is not the one that the run began with."""
        image = read_image(self.path)
        if hash_pixels(image) != self.sha256:
            raise InputError(f"The image '{self.path}' has changed since the start; give the command again.")
        return image


class Masks(FolderRun):
    """The output folder: masks and their records. A mask without a record is somebody's own, and is kept."""

    keeps_unrecorded = True

    def __init__(self, settings: MaskingSettings):
        arguments = {name: getattr(settings, name) for name in ("image_dir", "sam_checkpoint", "sam_model")}
        super().__init__(settings.output_dir, "precompute_masks.py", arguments, settings.image_dir)

    def outdated(self, jobs: list[MaskJob], way: str,
                 prompts: Callable[[MaskJob], list[Any]]) -> list[MaskJob]:
        """The images without a mask that was made of them by clicking, or in this way from one of these
        prompts; masks that were changed by hand are kept. Prints what will be done."""
        def is_current(job: MaskJob, record: Record) -> bool:
            return record.get("sha256") == job.sha256 and (record.get("way") == "ui" or (
                record.get("way") == way and record.get("prompt") in prompts(job)))

        work = self.missing(jobs, lambda job: [job.name], is_current)
        if clicked := [job.path.name for job in work if (self.find(job.name)[0] or {}).get("way") == "ui"]:
            print(f"Clicked masks whose images have changed are made again ({len(clicked)}): "
                  f"{printable(', '.join(clicked))}.")
        return work

    def read(self, job: MaskJob) -> SavedMask:
        """The image's mask as it is in the folder; one that cannot be used is named in its note."""
        record, by_hand = self.find(job.name)
        if record is None and not by_hand:
            return SavedMask()
        path = self.folder / job.name
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        try:
            mask = read_mask(path, job.size) if by_hand else read_upright(path).convert("L")
        except InputError as error:
            return SavedMask(note=str(error), version=version)
        notes = {"The mask was made or changed by hand; saving replaces it.": by_hand,
                 "The mask was made for another version of the image.": self.is_of_another(job, record)}
        return SavedMask(mask if mask.size == job.size else None, _clicks(record or {}, job.size),
                         " ".join(note for note, holds in notes.items() if holds), version)

    def is_of_another(self, job: MaskJob, record: Record | None) -> bool:
        """Whether the image has changed since its mask was made, before any change of the mask by hand.

        `record` is that of `find`.
        """
        record = record or self.latest.get(job.name)
        return record is not None and record.get("sha256") != job.sha256


def masked(job: MaskJob, mask: torch.Tensor, way: str, prompt: dict[str, Any],
           score: float | None = None, **more: Any) -> tuple[Record, Image.Image]:
    """The record of a mask, bool (H, W), and the mask as it is saved."""
    if score is not None:
        more["score"] = round(score, 4)
    record = {"file": job.name, "source": job.path.name, "sha256": job.sha256, "way": way,
              "prompt": prompt, "area": float(f"{mask.float().mean().item():.4g}"), **more}
    return record, Image.fromarray(mask.numpy()).convert("L")


def _clicks(record: Record, size: tuple[int, int]) -> dict[str, Any]:
    """The points that a mask was made from, as JSON; none if it was made in another way."""
    try:
        prompt = prompt_from_json(record.get("prompt"), size)
    except InputError:
        return {}
    return {} if prompt.box else prompt_to_json(prompt)


def mask_folder(settings: MaskingSettings) -> None:
    """Make the masks of a folder of images that are missing or outdated; print a summary and what to check.

    Masks that were made by clicking or changed by hand are kept. InputError before any work for images,
    prompts and folders that cannot be used, and at the end for images that the model cannot mask.
    """
    with Masks(settings) as masks:
        jobs = read_jobs(settings.image_dir)
        make = {"auto": mask_by_consensus, "ui": mask_by_hand}.get(settings.way, mask_by_prompt)
        try:
            make(settings, jobs, masks)
        finally:
            report(jobs, masks)
            if settings.preview:
                write_preview(settings, jobs, masks)


def read_jobs(image_dir: str | Path) -> list[MaskJob]:
    """The images of a folder; InputError when two would have the same mask."""
    jobs = []
    for name, path in name_results(image_dir, recursive=False).items():
        image = read_image(path)  # read again when it is needed: a folder of photographs fills a memory
        jobs.append(MaskJob(path, name, image.size, hash_pixels(image)))
    return jobs


def sam_prompts_for(settings: MaskingSettings, jobs: list[MaskJob]) -> list[SamPrompt]:
    """The prompt of every image, for the ways point, box, points_file and text."""
    if settings.points_file is not None:
        prompts = read_points_file(settings.points_file, {job.path.name: job.size for job in jobs})
        return [prompts[job.path.name] for job in jobs]
    if settings.text is not None:
        return [SamPrompt(text=settings.text)] * len(jobs)
    return [relative_prompt(job.size, settings.point, settings.box) for job in jobs]


def mask_by_prompt(settings: MaskingSettings, jobs: list[MaskJob], masks: Masks) -> None:
    """Mask every image by its own prompt; InputError at the end for those that cannot be masked."""
    prompts = {job.name: prompt for job, prompt in zip(jobs, sam_prompts_for(settings, jobs), strict=True)}

    def recorded(job: MaskJob) -> dict[str, Any]:
        return prompt_to_json(prompts[job.name]) | ({"grabcut": True} if settings.grabcut else {})

    work = masks.outdated(jobs, settings.way, lambda job: [recorded(job)])
    if not work:
        return
    segmenter = _load_segmenter(settings)
    if settings.text is not None and not segmenter.takes_text:
        raise InputError(f"The model '{segmenter.name}' takes no --text; give --point, --box, --points_file, "
                         "--auto or --ui, or a SAM 3 model.")
    if is_foreign(settings, segmenter, jobs):
        print(f"warning: {_UNFAMILIAR}{_OTHER_MODELS}, or --grabcut.")
    masks.begin()

    def mask(batch: list[MaskJob]) -> list[tuple[Record, Image.Image]]:
        [job] = batch
        found, score = _mask_of(segmenter, job, prompts[job.name])
        return [masked(job, found, settings.way, recorded(job), score)]

    masks.work([[job] for job in work], mask, lambda job: job.path, settings.way)


def _embed(segmenter: Segmenter, job: MaskJob) -> EmbeddedImage:
    """The embedded image of a job, whose file an InputError of the model names."""
    image = job.read()
    try:
        return segmenter.embed(image)
    except InputError as error:
        raise InputError(f"'{job.path}': {error}") from None


def _mask_of(segmenter: Segmenter | None, job: MaskJob,
             prompt: SamPrompt) -> tuple[torch.Tensor, float | None]:
    """The mask of a prompt and the model's score of it; by GrabCut without a model."""
    image = job.read()
    if segmenter is None:
        return grabcut(image, seeds_of(prompt, job.size)), None
    return segment(segmenter, segmenter.embed(image), prompt)


def is_foreign(settings: MaskingSettings, segmenter: Segmenter | None,
               jobs: Sequence[MaskJob]) -> bool:
    """Whether the images are unlike all that the bundled model, if it is used, was trained on."""
    def features() -> Iterator[torch.Tensor]:
        for job in jobs:
            with contextlib.suppress(InputError):  # which comes again when its mask is made
                yield _embed(segmenter, job).features

    return (segmenter is not None and settings.sam_checkpoint is None and settings.sam_model is None
            and is_unfamiliar(features()))


def mask_by_consensus(settings: MaskingSettings, jobs: list[MaskJob], masks: Masks) -> None:
    """Mask what the images have in common; the choice in one image depends on all others."""
    image_set = hashlib.sha256("".join(job.sha256 for job in jobs).encode()).hexdigest()
    prompt = {"grid": settings.grid, "images": image_set}
    prompt_of_0_1 = {"grid": settings.grid, "pictures": image_set}  # in folders made by version 0.1
    missing = {job.name for job in masks.outdated(jobs, "auto", lambda job: [prompt, prompt_of_0_1])}
    if not missing:
        return
    segmenter = _load_segmenter(settings)
    if is_foreign(settings, segmenter, jobs):
        raise InputError(f"{_UNFAMILIAR}{_OTHER_MODELS}, or use --grabcut with --box, or --ui.")
    embedded, candidates = [], []
    for job in tqdm(jobs, unit="image"):
        full = _embed(segmenter, job)
        candidates.append(candidate_masks(segmenter, full, settings.grid))
        embedded.append(dataclasses.replace(full, image=None, embedding=None, features=None))
    masks.begin()
    for i, (job, choice) in enumerate(zip(jobs, choose_masks(candidates), strict=True)):
        if job.name in missing:
            logits = resize_to_image(candidates[i].logits[choice.index][None, None], embedded[i])
            masks.save_image(*masked(job, logits[0, 0] > 0, "auto", prompt,
                                     candidates[i].merit[choice.index].item(),
                                     confidence=round(choice.confidence, 3)))


def mask_by_hand(settings: MaskingSettings, jobs: list[MaskJob], masks: Masks) -> None:
    """Serve the mask page until Ctrl-C."""
    def save(index: int, mask: torch.Tensor, prompt: SamPrompt, score: float | None) -> str | None:
        record, image = masked(jobs[index], mask, "ui", prompt_to_json(prompt), score)
        masks.save_image(record, image)
        return area_warning(record)

    segmenter, notice = _load_segmenter(settings), ""
    if is_foreign(settings, segmenter, jobs):
        notice = f"{_UNFAMILIAR}paint the masks, or {_OTHER_MODELS}."
        print(f"warning: {notice}")
    masks.begin()
    images = [PageImage(job.path.name, job.size, job.read) for job in jobs]
    page = MaskPage(segmenter, images, lambda index: masks.read(jobs[index]), save, settings.zone,
                    settings.resolution, settings.center_crop, notice)
    serve_locally(page.get, page.post, settings.port,
                  lambda url: print(f"Open {url} in a browser on this computer; Ctrl-C ends.", flush=True))


def _load_segmenter(settings: MaskingSettings) -> Segmenter | None:
    """The model; None for GrabCut, which needs none."""
    if settings.grabcut:
        return check_available()
    return load_segmenter(settings.sam_checkpoint, settings.sam_model, best_device())


def area_warning(record: dict[str, Any]) -> str | None:
    """A warning for a mask of an untypical area; None for others."""
    if not record["area"]:
        return f"{record['source']}: the mask is all black, which training refuses"
    if not SMALLEST_AREA <= record["area"] <= LARGEST_AREA:
        return f"{record['source']}: the mask covers {record['area']:.1%} of the image"
    return None


def report(jobs: list[MaskJob], masks: Masks) -> None:
    """Print how many masks there are, their areas and confidences, and which to check."""
    records = []
    for job in jobs:
        record, by_hand = masks.find(job.name)
        numbers = {name: value for name, value in (record or {}).items() if isinstance(value, int | float)}
        if by_hand or record and "area" not in numbers:
            saved, numbers = masks.read(job), {}
            if saved.mask is None:
                print(f"warning: {printable(saved.note)}")
            else:
                numbers["area"] = mask_area(saved.mask)
        if numbers:
            records.append({**numbers, "source": printable(job.path.name),
                            "is_of_another": masks.is_of_another(job, record)})
    if not records:
        return
    areas = [record["area"] for record in records]
    print(f"{len(records)} masks in '{printable(masks.folder)}'; the concept covers "
          f"{sum(areas) / len(areas):.1%} of an image, from {min(areas):.1%} to {max(areas):.1%}.")
    if confidences := [f"{record['source']} {record['confidence']:.2f}"
                       for record in records if "confidence" in record]:
        print(f"confidence: {', '.join(confidences)}")
    for record in records:
        if record["is_of_another"]:
            print(f"warning: {record['source']}: the image has changed since its mask was made; check it.")
        if warning := area_warning(record):
            print(f"warning: {warning}; check it.")
        if record.get("confidence", 1) < _LOW_CONFIDENCE:
            print(f"warning: {record['source']}: the mask has a low confidence ({record['confidence']:.2f}); "
                  "check it, and correct it with --ui.")


def write_preview(settings: MaskingSettings, jobs: list[MaskJob], masks: Masks) -> None:
    """Write the contact sheet of all masks, preview/sheet.png in the output folder."""
    found = ((job.path.name, job.read(), mask) for job in jobs if (mask := masks.read(job).mask) is not None)
    if sheet := mask_sheet(found, settings.zone, settings.resolution, settings.center_crop):
        path = masks.folder / "preview" / "sheet.png"
        save_png(sheet, path)
        print(f"The contact sheet is '{printable(path)}'.")
