"""Poison a folder of images: what poison_images.py does.

An image is attacked as a square of the training resolution, or whole at about that resolution; then the
change is enlarged and added to the original. What is recorded is measured on the 8-bit result.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from .devices import best_device, dtype_of
from .errors import InputError, printable
from .files import read_json
from .folder_run import FolderRun, Record
from .image_rng import image_generator
from .images import from_pil, read_image, to_pil
from .models import Model, check_length, find_family, load_model, load_schedule, tokenize
from .notices import notice
from .pgd import add_within_budget, pgd, project, rms, warn_if_unmoved
from .poison_jobs import AttackInput, ImageJob, find_jobs, read_job, scale
from .poisons import (
    Victim,
    check_chain,
    find_poison,
    image_gradient,
    measure_objective,
    target_pattern,
)
from .safe_zone import SafeZone, paper_dilation
from .schedules import Schedule
from .square_images import check_size, resolution_for

__all__ = ["PoisonSettings", "poison_folder"]

_TARGETS = ("pattern", "grey", "zero")  # any other --target_image is a file


@dataclass(frozen=True)
class PoisonSettings:
    """The settings of poison_images.py, by its flags' names; its help describes them.

    `t_min` None is 0, and the paper's for `adaptive`; `mask_dilation` None is the paper's. `jpeg_quality` is
    one quality, or the lowest and the highest. `preset` is only recorded.
    """

    pretrained_model_name_or_path: str
    image_dir: str
    method: str
    revision: str | None = None
    variant: str | None = None
    mixed_precision: str = "no"
    preset: str | None = None
    eps: int = 16
    norm: str = "linf"
    step_size: float = 1.0
    step_schedule: str = "constant"
    steps: int = 100
    draws: int = 1
    t_min: int | None = None
    t_max: int | None = None
    prompt: str = "a photo"
    target_image: str = "pattern"
    chain_steps: int = 4
    strength: float = 0.8
    guidance_scale: float = 7.5
    mask_dir: str | None = None
    jpeg_quality: list[int] | None = None
    loss_mask_dir: str | None = None
    mask_dilation: int | None = None
    adaptive: str | None = None
    resolution: int = 512
    keep_size: bool = False
    batch_size: int = 1
    one_graph: bool = False
    seed: int = 0

    @property
    def is_adaptive(self) -> bool:
        """Whether the attack is aimed at a defence."""
        return bool(self.adaptive or self.jpeg_quality or self.loss_mask_dir or self.t_min)

    def zone(self, model: Model | Schedule | None = None) -> SafeZone:
        """Where the victim trains; without a model or its schedule, t_min is that of Stable Diffusion."""
        given = {"jpeg_quality": self.jpeg_quality and min(self.jpeg_quality), "t_max": self.t_max,
                 "t_min": self.t_min if "t_min" in find_poison(self.method).uses else 0,
                 "mask_dilation": self.mask_dilation}
        zone = (SafeZone.paper(self.resolution, model) if self.adaptive
                else SafeZone(mask_dilation=paper_dilation(self.resolution)))
        return replace(zone, **{name: value for name, value in given.items() if value is not None})

    def arguments(self) -> dict[str, Any]:
        """What decides the results, as options.json records it."""
        zone, arguments = self.zone(), asdict(self)
        arguments |= {"t_min": zone.t_min, "mask_dilation": zone.mask_dilation}
        if self.adaptive and not self.jpeg_quality:
            arguments["jpeg_quality"] = [zone.jpeg_quality]
        if not self.loss_mask_dir:
            del arguments["mask_dilation"]
        return arguments

    def read(self, job: ImageJob) -> AttackInput:
        """An image and its masks as these settings need them."""
        return read_job(job, self.resolution, self.keep_size, self.zone().mask_dilation,
                        self.multiple if self.keep_size else 8)

    @property
    def multiple(self) -> int:
        """What the sides of a whole image must be multiples of, in pixels; reads the model's config."""
        return 8 * _patch(self.pretrained_model_name_or_path, self.revision)


@functools.lru_cache(maxsize=1)
def _patch(path: str, revision: str | None) -> int:
    return find_family(path, revision).patch


def load_victim(settings: PoisonSettings) -> Victim:
    """The victim of all images, on the GPU if there is one; InputError when a setting does not fit it."""
    torch.backends.cudnn.deterministic = True  # as far as convolutions decide, gradients repeat
    if settings.method == "da":
        check_chain(find_family(settings.pretrained_model_name_or_path, settings.revision),
                    settings.chain_steps, settings.strength)
    model = load_model(settings.pretrained_model_name_or_path, revision=settings.revision,
                       variant=settings.variant, dtype=dtype_of(settings.mixed_precision),
                       device=best_device())
    if settings.method == "da":
        check_chain(model, settings.chain_steps, settings.strength)
        notice_strength(settings)
    zone = settings.zone(model).fit(model.num_timesteps)
    resolution_for(model, settings.resolution)  # raises for one that the model does not take
    check_length(model, settings.prompt)
    condition, empty = (model.condition(tokenize(model, prompt)) for prompt in (settings.prompt, ""))
    several = settings.jpeg_quality is not None and len(settings.jpeg_quality) > 1
    return Victim(model, condition, zone, tuple(sorted(settings.jpeg_quality)) if several else None,
                  draws=settings.draws, one_graph=settings.one_graph, empty=model.unprompted(empty),
                  chain_steps=settings.chain_steps, strength=settings.strength,
                  guidance_scale=settings.guidance_scale)


def notice_strength(settings: PoisonSettings) -> None:
    """Say so when the chain's whole steps make another strength than the one asked for."""
    steps = round(settings.chain_steps / settings.strength)
    strength = settings.chain_steps / steps
    if abs(strength - settings.strength) > 0.005:
        notice(f"da runs the last {settings.chain_steps} of {steps} steps, a strength of {strength:.3g} "
               f"instead of {settings.strength}.")


def aim(victim: Victim, batch: list[AttackInput], settings: PoisonSettings) -> Victim:
    """The victim with the loss masks and the target of a batch."""
    if settings.loss_mask_dir:
        masks = torch.cat([tensors.loss_mask for tensors in batch])
        victim = replace(victim, loss_mask=masks.to(victim.model.device))
    if "target_image" in find_poison(settings.method).uses:
        victim = replace(victim, target=make_target(settings.target_image, *batch[0].attacked.shape[-2:]))
    return victim


def make_target(target: str, height: int, width: int) -> torch.Tensor | None:
    """The target image of --target_image, (1, 3, height, width) in [0, 1]; None is the latent of zeros."""
    if target == "zero":
        return None
    if target == "pattern":
        return target_pattern(height, width)
    if target == "grey":
        return torch.full((1, 3, height, width), 128 / 255)
    return from_pil(read_image(target).resize((width, height)))


def attack_batch(settings: PoisonSettings, victim: Victim, batch: list[AttackInput],
                 on_step: Callable[[torch.Tensor], None]) -> list[torch.Tensor]:
    """Attack images of one size together; each (1, 3, H, W) as it will be saved."""
    poison, device = find_poison(settings.method), victim.model.device
    images = torch.cat([tensors.attacked for tensors in batch]).to(device)
    masks = (torch.cat([tensors.attacked_mask for tensors in batch]).to(device) if settings.mask_dir
             else None)
    generators = [image_generator(image, settings.seed) for image in images]
    attacked = pgd(images, image_gradient(poison, victim, generators), eps=settings.eps,
                   step_size=settings.step_size, steps=settings.steps, ascend=poison.ascend,
                   norm=settings.norm, schedule=settings.step_schedule, mask=masks,
                   generators=generators if poison.random_start else None, on_step=on_step)
    return [add_change(settings, tensors, change)
            for tensors, change in zip(batch, (attacked - images).cpu().split(1), strict=True)]


def add_change(settings: PoisonSettings, tensors: AttackInput, change: torch.Tensor) -> torch.Tensor:
    """The original plus a change (1, 3, h, w), enlarged to its size, within the budget there."""
    if settings.keep_size:
        change = F.interpolate(change, tensors.original.shape[-2:], mode="bicubic", antialias=True)
        change = change if tensors.mask is None else change * tensors.mask
        change = project(change, settings.eps, settings.norm)
    return add_within_budget(tensors.original, change, settings.eps, settings.norm)


def poison_batch(settings: PoisonSettings, victim: Victim, jobs: list[ImageJob],
                 on_step: Callable[[torch.Tensor], None],
                 report: Callable[[str], None]) -> list[tuple[Record, Image.Image]]:
    """Poison images that have one size during the attack: their records and the poisoned images.

    An adaptive attack is compared with the plain one. `report` is given warnings.
    """
    poison, batch = find_poison(settings.method), [settings.read(job) for job in jobs]
    images = [tensors.attacked for tensors in batch]
    check_size(victim.model, *images[0].shape[-2:])
    victim = aim(victim, batch, settings)

    def objective(shown: list[torch.Tensor]) -> torch.Tensor:
        return measure_objective(poison, victim, torch.cat(shown).to(victim.model.device),
                                 [image_generator(image[0], settings.seed, "measure") for image in images])

    def seen(results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of results, the images as a model will see them."""
        return ([scale(to_pil(image)[0], settings.resolution, True, settings.multiple) for image in results]
                if settings.keep_size else results)

    with warnings_to(report):
        results = attack_batch(settings, victim, batch, on_step)
    before, after = objective(images), objective(seen(results))
    plain = None
    if settings.is_adaptive:
        undefended = replace(victim, zone=SafeZone(t_max=victim.zone.t_max), random_jpeg=None,
                             loss_mask=None)
        with warnings_to(report):
            plain = objective(seen(attack_batch(settings, undefended, batch, on_step)))

    poisoned = []
    for i, (job, tensors, result) in enumerate(zip(jobs, batch, results, strict=True)):
        compared = None if plain is None else plain[i].item()
        with warnings_to(lambda message, name=job.path.name: report(f"{name}: {message}")):
            warn_if_failed(settings, before[i].item(), after[i].item(), compared)
        image = to_pil(result)[0]
        change = (from_pil(image) - tensors.original) * 255
        poisoned.append(({
            "file": job.name, "source": job.path.name, "sha256": input_hash(settings, tensors),
            "eps_reached": int(change.abs().max().round()), "rms_reached": round(rms(change).item(), 3),
            "objective_before": before[i].item(), "objective_after": after[i].item(),
            "objective_plain": compared}, image))
    return poisoned


def input_hash(settings: PoisonSettings, tensors: AttackInput) -> str:
    """The hash of what a poison is made of: the image, its masks, and a target that is a file."""
    if "target_image" not in find_poison(settings.method).uses or settings.target_image in _TARGETS:
        return tensors.sha256()
    return tensors.sha256(from_pil(read_image(settings.target_image)))


def warn_if_failed(settings: PoisonSettings, before: float, after: float, plain: float | None) -> None:
    """Warn about an attack that did not move the objective, or moved it less than the plain attack did."""
    ascend = find_poison(settings.method).ascend
    if settings.steps and settings.eps:
        warn_if_unmoved(torch.tensor([before]), torch.tensor([after]), ascend)
    if plain is not None and (after < plain if ascend else after > plain):
        warnings.warn(f"The plain attack would have brought this objective to {plain:.6g}, the adaptive one "
                      f"to {after:.6g}; give it more --steps or --draws.", stacklevel=1)


@contextlib.contextmanager
def warnings_to(report: Callable[[str], None]) -> Iterator[None]:
    """Pass the warnings of the block to `report` when it ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        report(warning.message)


def check_t_min(run: FolderRun, settings: PoisonSettings) -> None:
    """InputError when the adaptive poisons of a folder begin at another timestep.

    `arguments` knows no model, so it records Stable Diffusion's t_min for every adaptive run.
    """
    if settings.adaptive and run.records:
        schedule = load_schedule(settings.pretrained_model_name_or_path, settings.revision)
        if read_json(run.folder / "options.json").get("t_min") not in (None, settings.zone(schedule).t_min):
            raise InputError(f"The folder '{run.folder}' was made with another --t_min; "
                             "give another --output_dir.")


def poison_folder(settings: PoisonSettings, output_dir: str | Path) -> None:
    """Poison the images of `settings.image_dir`, with its sub-folders, into `output_dir`; resumes.

    InputError for files and settings that cannot be used, before any work.
    """
    def read(job: ImageJob) -> tuple[str, tuple[int, ...]]:
        tensors = settings.read(job)
        return input_hash(settings, tensors), tensors.attacked.shape

    with FolderRun(output_dir, "poison_images.py", settings.arguments(), settings.image_dir) as run:
        check_t_min(run, settings)
        jobs = find_jobs(settings.image_dir, settings.mask_dir, settings.loss_mask_dir)
        if settings.target_image not in _TARGETS:
            read_image(settings.target_image)
        batches = run.batches(jobs, lambda job: job.name, read, settings.batch_size)
        if not batches:
            return
        victim = load_victim(settings)
        run.begin(t_min=victim.zone.t_min, t_max=victim.zone.t_max)
        total = sum(map(len, batches)) * settings.steps * (2 if settings.is_adaptive else 1)
        with tqdm(total=total, unit="step", desc=settings.method) as progress:
            def poison(batch: list[ImageJob]) -> list[tuple[Record, Image.Image]]:
                def on_step(values: torch.Tensor) -> None:
                    progress.update(len(values))
                    progress.set_postfix(file=printable(batch[0].name), objective=f"{values.mean():.4f}",
                                         refresh=False)

                return poison_batch(settings, victim, batch, on_step,
                                    lambda message: progress.write(f"warning: {printable(message)}"))

            run.work(batches, poison, lambda job: job.path)
