#!/usr/bin/env python
"""Textual inversion that learns a concept safely from images that may be poisoned: Safe-Zone Training.

A drop-in replacement for the Diffusers examples `textual_inversion.py` and `textual_inversion_sdxl.py`: same
flags, same defaults, same result with one seed. Safe-Zone Training (Styborski, Lyu et al., "When and Where do
Data Poisons Attack Textual Inversion?", Eq. 7) adds

    --jpeg_quality 25   JPEG-compress the training images            (removes high-frequency poison)
    --t_min 500         train at noisy timesteps only                (WHEN: poisons act at low timesteps)
    --loss_mask_dir M   count the loss only on the concept           (WHERE: poisons teach the background)
    --mask_dilation 16  and a little around it

or all of them at once: `--szt --loss_mask_dir M`. The lines that do it end in `# SZT`.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import szt_utils
from szt_utils.arguments import (
    EntryParser,
    add_data_flags,
    add_diffusers_flags,
    add_family_flags,
    add_memory_flags,
    add_safe_zone_flags,
    check_training_flags,
    number,
    script_parser,
    user_path,
)
from szt_utils.errors import exit_on_input_error

if TYPE_CHECKING:  # libraries that take seconds to import are imported where they are used
    import torch
    from PIL import Image

    from szt_utils.concepts import Concept, Group, Sample
    from szt_utils.models import Model
    from szt_utils.safe_zone import SafeZone
    from szt_utils.settings import ConceptSettings, TrainingSettings
    from szt_utils.training_run import Run

__version__ = "0.2.0"


def parse_args(argv: list[str], entry: str | None = None, unset: Sequence[str] = ()) -> argparse.Namespace:
    """Parse the command line, or that of one entry of --concepts, whose name `entry` begins its errors.

    Flags that are `unset` get their defaults.
    """
    parser = script_parser(__doc__) if entry is None else script_parser(__doc__, EntryParser, prog=entry)
    add_safe_zone_flags(parser)
    add = parser.add_argument_group("Several concepts in one run").add_argument
    add("--concepts", type=user_path,
        help="JSON file: a list of objects, one per concept, of a concept's own flags without their dashes. "
             "What an object leaves out comes from the command line. Results equal those of separate runs")
    add("--concepts_per_batch", type=number(int, 1), default=8,
        help="how many concepts share a batch, each with --train_batch_size images (default: 8)")
    add_data_flags(parser)
    add_memory_flags(parser)
    add_family_flags(parser)
    add_diffusers_flags(parser)
    args = parser.parse_args(argv)
    for name in unset:
        setattr(args, name, parser.get_default(name))
    check_training_flags(parser, args, whole=args.concepts is not None and entry is None)
    return args


def read_settings(args: argparse.Namespace,
                  argv: list[str]) -> "tuple[TrainingSettings, list[ConceptSettings]]":
    """The frozen settings of the run, and those of every concept: one, or the entries of --concepts."""
    from szt_utils.hub_datasets import dataset_folder
    from szt_utils.settings import ConceptSettings, TrainingSettings, read_concepts

    shared = TrainingSettings.from_flags(vars(args))
    if args.dataset_name:
        args.train_data_dir = str(dataset_folder(args.dataset_name, args.dataset_config_name,
                                                 args.image_column or "image", args.caption_column))
    if not args.concepts:
        return shared, [ConceptSettings.from_flags(vars(args))]
    return shared, read_concepts(args.concepts, shared.output_dir, lambda flags, name, unset: vars(
        parse_args([*argv, *flags], name, unset)))


def prepare(zone: "SafeZone", resolution: int, center_crop: bool, path: Path,
            mask_path: Path | None) -> "tuple[Image.Image, torch.Tensor | None, tuple[int, int]]":
    """One training image, Pillow RGB (R, R), its mask (1, 1, R, R) or None, its original (width, height)."""
    from szt_utils.images import crop_and_resize, read_image
    from szt_utils.masks import read_mask

    image = read_image(path)
    size, mask = image.size, None
    if mask_path:
        mask_image = read_mask(mask_path, size)
        mask = zone.prepare_mask(mask_image, resolution, center_crop)                                 # SZT
    image = crop_and_resize(image, resolution, center_crop)
    image = zone.purify(image)                                                                        # SZT
    return image, mask, size


def draw(concept: "Concept", model: "Model") -> "Sample":
    """One concept's share of a batch, in upstream's order of random draws."""
    from szt_utils.concepts import Sample
    from szt_utils.latents import randn_like
    from szt_utils.timesteps import sample_timesteps

    chosen = next(concept.stream)
    latents = model.latents(concept.moments.take(chosen.indices, chosen.flips), concept.rng)
    noise = randn_like(latents, concept.rng)
    distribution = 0, model.num_timesteps
    distribution = concept.zone.timestep_distribution(model.num_timesteps)                            # SZT
    timesteps = sample_timesteps(len(latents), *distribution, device=latents.device, generator=concept.rng)
    return Sample(latents, noise, timesteps, concept.ids(chosen.templates), concept.sizes_of(chosen.indices),
                  concept.mask(chosen.indices, chosen.flips), chosen.last)


def optimize(run: "Run", model: "Model", group: "Group") -> None:
    """Train concepts that share their batches, one or several, to the last step or until a signal comes."""
    from szt_utils.journal import Journal
    from szt_utils.models import residual
    from szt_utils.outputs import save_learned, validate

    settings = run.settings
    optimizer, lr_scheduler = run.make_optimizer(group.rows)
    group.load_state(optimizer, lr_scheduler)
    with Journal(run, group) as journal, run.signals():
        while group.step < settings.max_train_steps and group.concepts:
            for batch in group.micro_batches(draw, model):
                with run.accelerator.autocast():
                    condition = model.condition(batch.ids, batch.sizes)
                errors = residual(model, batch.latents, batch.noise, batch.timesteps, condition,
                                  latent_mask=batch.latent_mask).square()
                losses = []
                for concept, sample, error in batch.split(errors):
                    error = concept.weigh(error, sample.timesteps)
                    loss = error.mean()
                    loss = concept.zone.mean(error, sample.mask)                                      # SZT
                    journal.note(concept, loss, error, sample.mask)
                    losses.append(loss)
                run.accelerator.backward(sum(losses))
            run.step(optimizer, lr_scheduler, group.rows)
            group.step += 1

            stopping = run.stopping()
            saving, checkpointing, validating = (group.step % every == 0 for every in (
                settings.save_steps, settings.checkpointing_steps, settings.validation_steps))
            checkpointing |= group.step == settings.max_train_steps  # a finished run trains no further
            journal.end_step(lr_scheduler.get_last_lr()[0], stopping or saving or checkpointing or validating)
            for concept in group.concepts:
                with run.surviving(concept.settings):
                    if saving and run.rank == 0:
                        save_learned(run, model, group, concept, f"-steps-{group.step}")
                    if validating and concept.settings.validation_prompt is not None:
                        validate(run, model, group, concept)
                    if checkpointing or stopping:  # last: a resumed run does none of this step again
                        group.save_checkpoint(concept, optimizer, lr_scheduler)
            if stopping:
                break


def train(settings: "TrainingSettings", concept_settings: "list[ConceptSettings]") -> None:
    """Train one concept, by all processes together, or several, distributed over them."""
    from szt_utils.concepts import Group, groups, start_concepts
    from szt_utils.outputs import open_folder, resume_concepts, save_all, upload_all
    from szt_utils.training_images import TrainingImages
    from szt_utils.training_run import Run

    with Run(settings, len(concept_settings)) as run:
        prepared = []
        # All images are read first: whatever is wrong with them shows before a model is loaded.
        for concept in run.share(concept_settings):
            with run.surviving(concept):
                concept = replace(concept, seed=run.seed_of(concept))
                zone = concept.make_zone(settings.resolution)
                images = TrainingImages(concept, zone, functools.partial(prepare, zone, settings.resolution,
                                                                         concept.center_crop))
                open_folder(run, concept.output_dir)
                prepared.append((concept, images))
        if not prepared:
            return
        model = run.load_model()
        concepts = resume_concepts(run, model, start_concepts(run, model, prepared))
        for members in groups(concepts, settings.concepts_per_batch):
            group = Group(run, model, members)
            optimize(run, model, group)
            if group.step >= run.settings.max_train_steps:
                save_all(run, model, group)
            if run.stopped:
                break
        else:
            upload_all(run, model, concepts)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with exit_on_input_error():
        if szt_utils.__version__ != __version__:
            print(f"warning: this script is of version {__version__}, but the installed szt_utils of version "
                  f"{szt_utils.__version__}; copy the script of that version.", file=sys.stderr)
        train(*read_settings(args, argv))


if __name__ == "__main__":
    main()
