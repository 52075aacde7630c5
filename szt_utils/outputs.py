"""The files of a training run: options, embeddings, validation images, pipelines, uploads to the Hub."""

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .concepts import Concept, Group
from .embeddings import ordinary_embedding, safe_file_name, save_embedding
from .errors import InputError
from .files import truncate_stats, write_json
from .folder_run import provenance
from .images import read_image, save_png
from .models import Model, evaluating
from .training_run import Run

__all__ = ["describe_start", "make_folder", "save_all", "save_rows", "validate"]


def make_folder(path: str | Path) -> None:
    """Make an output folder; InputError when that is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The output folder '{path}' cannot be made ({error.strerror}); "
                         "choose another --output_dir.") from None


def describe_start(run: Run, model: Model, concept: Concept, resumed: str) -> None:
    """Write a concept's options.json, drop the statistics of steps that come again, and print what it trains
    on; `resumed` is the message of `Concept.resume`."""
    from tqdm.auto import tqdm

    settings, zone = concept.settings, concept.zone
    write_json(concept.output_dir / "options.json", {**run.settings.options(settings, zone), **provenance()})
    truncate_stats(concept.output_dir / "stats.jsonl", concept.step)
    first, *rest = zone.describe(model, concept.masks)
    lines = [resumed] if resumed else []
    lines += [f"{len(concept.images)} images from {settings.train_data_dir}, {first}", *rest]
    if settings.szt and concept.masks is None:
        lines.append("--szt without --loss_mask_dir: JPEG and timesteps only, "
                     "the third part of the defence is missing")
    for line in lines + run.describe_trackers():
        tqdm.write(line if run.together else f"{concept.name}: {line}")


def save_rows(run: Run, group: Group, concept: Concept, name: str) -> None:
    """Write a concept's rows as `<name>.safetensors`, or `.bin`; the metadata says how they were trained."""
    settings, shared = concept.settings, run.settings
    metadata = {"base_model": shared.pretrained_model_name_or_path, "step": group.step, "szt": settings.szt,
                "loss_mask_dir": settings.loss_mask_dir, **asdict(concept.zone), "seed": settings.seed,
                "learning_rate": shared.learning_rate, "train_batch_size": shared.train_batch_size,
                "resolution": shared.resolution}
    (rows,) = group.rows_of(concept)
    save_embedding(concept.output_dir / f"{name}.{shared.suffix}", settings.placeholder_token, rows,
                   {option: str(value) for option, value in metadata.items()})


def save_all(run: Run, model: Model, group: Group) -> None:
    """Write the results of a group's concepts, and upload them if asked to."""
    settings = run.settings
    for concept in group.concepts if run.rank == 0 else []:
        save_rows(run, group, concept, "learned_embeds")
        if (name := safe_file_name(concept.settings.placeholder_token)) != "learned_embeds":
            save_rows(run, group, concept, name)  # A1111 and ComfyUI take the file's name for the word
        if settings.save_as_full_pipeline or settings.push_to_hub:
            _save_pipeline(model, group, concept)
        if settings.push_to_hub:
            _push_to_hub(run, concept)
        print(f"Saved {concept.output_dir / f'learned_embeds.{settings.suffix}'}.")
    run.barrier()


def validate(run: Run, model: Model, group: Group, concept: Concept) -> None:
    """Generate the validation images, shared among the ranks, onto the disk and into the trackers.

    Draws no random number of the training's.
    """
    from diffusers import DPMSolverMultistepScheduler

    settings, stream = run.settings, concept.stream
    pipeline = model.pipeline(tokenizers=concept.tokenizers)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(run.device)
    folder = concept.output_dir / "validation"
    (encoder,), (rows,) = model.text_encoders, group.rows_of(concept)
    with (evaluating(encoder, model.network), torch.no_grad(), ordinary_embedding(encoder, rows),
          run.evaluation()):
        for i in range(stream.rank, settings.num_validation_images, stream.num_ranks):
            generator = torch.Generator(run.device).manual_seed(concept.settings.seed + i)
            image = pipeline(concept.settings.validation_prompt, num_inference_steps=25, generator=generator,
                             height=settings.resolution, width=settings.resolution).images[0]
            save_png(image, folder / f"step-{group.step:05d}-{i}.png")
    run.barrier()
    if run.accelerator.is_main_process:
        _track(run, concept, [read_image(path) for path in
                              sorted(folder.glob(f"step-{group.step:05d}-*.png"))], group.step)


def _track(run: Run, concept: Concept, images: list[Image.Image], step: int) -> None:
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(f"validation/{concept.name}", np.stack([np.asarray(i) for i in images]),
                                      step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            prompt = concept.settings.validation_prompt
            tracker.log({f"validation/{concept.name}": [wandb.Image(image, caption=f"{i}: {prompt}")
                                                        for i, image in enumerate(images)]}, step=step)


def _save_pipeline(model: Model, group: Group, concept: Concept) -> None:
    """Save the whole pipeline with the new token; U-Net and VAE in the precision of their files."""
    (encoder,), (rows,) = model.text_encoders, group.rows_of(concept)
    with ordinary_embedding(encoder, rows):
        encoder = copy.deepcopy(encoder)
    model.pipeline(tokenizers=concept.tokenizers, text_encoders=[encoder.float().cpu()],
                   from_files=True).save_pretrained(concept.output_dir)


def _push_to_hub(run: Run, concept: Concept) -> None:
    """Upload the output folder, with a short model card, to the Hub."""
    from huggingface_hub import create_repo, upload_folder

    settings, token, folder = run.settings, concept.settings.placeholder_token, concept.output_dir
    base = settings.pretrained_model_name_or_path
    repo_id = create_repo(settings.hub_model_id or folder.name, exist_ok=True,
                          token=settings.hub_token).repo_id
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\ntags: [diffusers, textual_inversion, stable-diffusion]\n---\n# {token}\n\n"
        f"A textual inversion embedding for {base}, trained with textual_inversion_szt.py. Load it with "
        f"`pipe.load_textual_inversion(\"{repo_id}\")`; the word is `{token}`.\n")
    upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Textual inversion embedding",
                  token=settings.hub_token,
                  ignore_patterns=["checkpoint-*", ".*", f"{settings.logging_dir}/*"])
