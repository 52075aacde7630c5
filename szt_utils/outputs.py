"""The files of a training run: options, embeddings, validation images, pipelines, uploads to the Hub."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .concepts import Concept, Group
from .embedding_files import safe_file_name, save_rows
from .embeddings import ordinary_embeddings
from .errors import InputError, first_line
from .files import truncate_stats, write_bytes, write_json
from .folder_run import provenance
from .generation import spell_out, use_dpm_solver
from .images import read_image, save_png
from .locks import lock_folder, sweep_leftovers
from .models import Model, evaluating
from .notices import notice
from .settings import public_name
from .training_run import Run

__all__ = ["open_folder", "resume_concepts", "save_all", "save_learned", "upload_all", "validate"]


def open_folder(run: Run, path: str) -> None:
    """Make an output folder, lock it while the run lasts, and remove what a killed one left in it.

    InputError when that is impossible, or when another command holds it.
    """
    if run.rank == 0:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"The output folder '{path}' cannot be made ({error.strerror}); "
                             "give another --output_dir.") from None
        run.resources.enter_context(lock_folder(path))
        sweep_leftovers(path)
    run.barrier()


def resume_concepts(run: Run, model: Model, concepts: list[Concept]) -> list[Concept]:
    """Load the concepts' checkpoints, write their options.json, and print what they train on.

    Returns the concepts that have not failed.
    """
    if not concepts:
        return []
    # Concepts that share a run count no epochs (`check_training_flags`): the first one's stand for all.
    run.settings = run.settings.resolved(concepts[0].stream.batches_per_epoch, run.num_ranks)
    for concept in concepts:
        with run.surviving(concept.settings):
            messages = concept.begin(run)
            if run.rank == 0:
                _describe_start(run, model, concept, messages)
    concepts = run.survivors(concepts)
    if concepts:
        run.start_trackers(run.settings.options(concepts[0].settings, concepts[0].zone))
    return concepts


def _describe_start(run: Run, model: Model, concept: Concept, messages: list[str]) -> None:
    """Write a concept's options.json, drop the statistics of steps that come again, and print what it trains
    on, after the messages of `Concept.begin`."""
    from tqdm.auto import tqdm

    settings, zone = concept.settings, concept.zone
    write_json(concept.output_dir / "options.json", {"run": concept.run_id,
                                                     **run.settings.options(settings, zone), **provenance()})
    truncate_stats(concept.output_dir / "stats.jsonl", concept.step)
    first, *rest = zone.describe(model, concept.masks)
    count = f"{len(concept.images)} image{'s' if len(concept.images) > 1 else ''}"
    lines = [*messages, f"{count} from {settings.train_data_dir}, {first}", *rest]
    if settings.szt and concept.masks is None:
        lines.append("--szt without --loss_mask_dir uses JPEG and timesteps only")
    if (concept.masks is not None and zone.mask_mode.endswith("loss") and concept.snr_weights is None
            and model.scheduler.config.get("prediction_type") != "epsilon"):
        lines.append("the model predicts velocities: add --snr_gamma 5; without it, masks lowered the "
                     "quality on small models")
    if model.t5 is not None:
        lines.append("T5 has no embedding for the placeholder; it reads its spelling")
    if model.pooled_token is not None:
        lines.append(f"pooled token: {run.settings.pooled_token}, as "
                     + ("Diffusers does; ComfyUI, A1111 and kohya pool the end of the text (--pooled_token "
                        "end)" if run.settings.pooled_token == "upstream" else
                        "ComfyUI, A1111 and kohya do; Diffusers pools the placeholder"))
    if run.settings.use_8bit_adam:
        lines.append("--use_8bit_adam is ignored: it would save nothing for a few rows")
    for line in lines:
        tqdm.write(line if run.one_concept else f"{concept.name}: {line}")


def save_learned(run: Run, model: Model, group: Group, concept: Concept, tail: str = "") -> None:
    """Write a concept's rows as `learned_embeds<tail>`, of a second text encoder `learned_embeds_2<tail>`.

    The metadata of a .safetensors file says how they were trained. An earlier run's files of these names with
    the other suffix, and of a second text encoder, are removed: they would be loaded with these, or first.
    """
    written = set()
    for i, rows in enumerate(group.rows_of(concept)):
        path = concept.output_dir / f"learned_embeds{f'_{i + 1}' if i else ''}{tail}.{run.settings.suffix}"
        save_rows(path, {concept.settings.placeholder_token: rows}, _metadata(run, model, group, concept))
        written.add(path)
    for name, suffix in itertools.product(("learned_embeds", "learned_embeds_2"), ("safetensors", "bin")):
        if (path := concept.output_dir / f"{name}{tail}.{suffix}") not in written:
            path.unlink(missing_ok=True)


def _save_named(run: Run, model: Model, group: Group, concept: Concept) -> None:
    """Write a file named after the token: A1111 and ComfyUI take the file's name for the word."""
    name, rows = safe_file_name(concept.settings.placeholder_token), group.rows_of(concept)
    keys = model.embedding_keys if len(rows) > 1 else (concept.settings.placeholder_token,)
    if name != "learned_embeds":
        save_rows(concept.output_dir / f"{name}.{run.settings.suffix}", dict(zip(keys, rows, strict=True)),
                  _metadata(run, model, group, concept))


def _metadata(run: Run, model: Model, group: Group, concept: Concept) -> dict[str, str]:
    settings, shared = concept.settings, run.settings
    metadata = {"base_model": public_name(shared.pretrained_model_name_or_path), "step": group.step,
                "szt": settings.szt, "loss_mask_dir": public_name(settings.loss_mask_dir),
                **asdict(concept.zone), "seed": settings.seed,
                "learning_rate": shared.learning_rate, "train_batch_size": shared.train_batch_size,
                "resolution": shared.resolution, "clip_skip": shared.clip_skip,
                "num_vectors": shared.num_vectors, "snr_gamma": settings.snr_gamma}
    if model.pooled_token is not None:
        metadata["pooled_token"] = shared.pooled_token
    return {option: str(value) for option, value in metadata.items()}


def save_all(run: Run, model: Model, group: Group) -> None:
    """Write the results of a group's concepts."""
    settings = run.settings
    for concept in group.concepts if run.rank == 0 else []:
        with run.surviving(concept.settings):
            save_learned(run, model, group, concept)
            _save_named(run, model, group, concept)
            print(f"Saved {concept.output_dir / f'learned_embeds.{settings.suffix}'}.")
            if settings.save_as_full_pipeline or settings.push_to_hub:
                _save_pipeline(model, group, concept)
    run.barrier()


def upload_all(run: Run, model: Model, concepts: list[Concept]) -> None:
    """Upload the output folders to the Hub if asked to, when everything is saved."""
    for concept in run.survivors(concepts) if run.settings.push_to_hub and run.rank == 0 else []:
        with run.surviving(concept.settings):
            _push_to_hub(run, model, concept)


def validate(run: Run, model: Model, group: Group, concept: Concept) -> None:
    """Generate the validation images, shared among the ranks, onto the disk and into the trackers.

    Draws no random number of the training's. When the GPU's memory is too small, the images are left out.
    """
    folder = concept.output_dir / "validation"
    paths = [folder / f"step-{group.step:05d}-{i}.png" for i in range(run.settings.num_validation_images)]
    try:
        _save_validation_images(run, model, group, concept, paths)
    except torch.OutOfMemoryError:
        notice("The GPU's memory is too small for validation images, which are left out; training continues.")
    run.barrier()
    if run.accelerator.is_main_process:
        _track(run, concept, [read_image(path) for path in paths if path.exists()], group.step)


def _save_validation_images(run: Run, model: Model, group: Group, concept: Concept,
                            paths: list[Path]) -> None:
    settings, stream = run.settings, concept.stream
    pipeline = model.pipeline(tokenizers=concept.tokenizers)
    use_dpm_solver(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    prompt = spell_out(pipeline, concept.settings.validation_prompt)
    # The training lets go of the VAE and of T5, which the pipeline has read again.
    pipeline.vae.to(run.device)
    if getattr(pipeline, "text_encoder_3", None) is not None:
        t5 = pipeline.text_encoder_3.to(run.device)
        t5.forward = torch.autocast(run.device.type, enabled=False)(t5.forward)  # it overflows in float16
    cell = max(8, model.vae_scale_factor)  # pipelines take multiples of 8 only
    side = max(cell, settings.resolution // cell * cell)
    with (evaluating(*model.text_encoders, model.network), torch.no_grad(), run.evaluation(),
          _decoding_in_float32(pipeline.vae),
          ordinary_embeddings(model.text_encoders, group.rows_of(concept))):
        for i in range(stream.rank, len(paths), stream.num_ranks):
            generator = torch.Generator(run.device).manual_seed(concept.settings.seed + i)
            image = pipeline(prompt, num_inference_steps=25, generator=generator,
                             height=side, width=side, clip_skip=settings.clip_skip or None).images[0]
            save_png(image, paths[i])


@contextlib.contextmanager
def _decoding_in_float32(vae: Any) -> Iterator[None]:
    """For a while, a VAE decodes in float32, also under autocast: that of SDXL overflows in float16."""
    dtype, decode = vae.dtype, vae.decode

    @torch.autocast(vae.device.type, enabled=False)
    def in_float32(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        return decode(latents.float(), *args, **options)

    torch.nn.Module.float(vae).decode = in_float32
    try:
        yield
    finally:
        del vae.decode
        torch.nn.Module.to(vae, dtype)  # that of Diffusers warns


def _track(run: Run, concept: Concept, images: list[Image.Image], step: int) -> None:
    for tracker in run.accelerator.trackers if images else []:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(f"validation/{concept.name}", np.stack([np.asarray(i) for i in images]),
                                      step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            prompt = concept.settings.validation_prompt
            tracker.log({f"validation/{concept.name}": [wandb.Image(image, caption=f"{i}: {prompt}")
                                                        for i, image in enumerate(images)], "step": step})


def _save_pipeline(model: Model, group: Group, concept: Concept) -> None:
    """Save the whole pipeline with the new token, in the precision of its safetensors files, but for text
    encoders in float32.

    It is written beside and moved when complete, the index last.
    """
    part = concept.output_dir / ".pipeline.part"
    try:
        pipeline = model.pipeline(tokenizers=concept.tokenizers, from_files=True)
        encoders = [getattr(pipeline, f"text_encoder{f'_{i + 1}' if i else ''}")
                    for i in range(len(model.text_encoders))]
        parts = zip(encoders, concept.tokenizers, group.rows_of(concept), strict=True)
        for encoder, tokenizer, rows in parts:
            encoder.float().resize_token_embeddings(len(tokenizer), mean_resizing=False)
            encoder.get_input_embeddings().weight.data[-len(rows):] = rows.cpu()
        pipeline.save_pretrained(part)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "model_index.json"):
            final = concept.output_dir / path.name
            if path.is_dir():
                shutil.rmtree(final, ignore_errors=True)
            path.replace(final)
    except Exception as error:  # a full disk is another exception in every library
        raise InputError(f"The pipeline cannot be saved in '{concept.output_dir}' "
                         f"({first_line(error)}); the embedding is saved there.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _push_to_hub(run: Run, model: Model, concept: Concept) -> None:
    """Upload the output folder, with a short model card, to the Hub."""
    from huggingface_hub import create_repo, upload_folder

    settings, folder = run.settings, concept.output_dir
    try:
        repo_id = create_repo(settings.hub_model_id or folder.name, exist_ok=True,
                              token=settings.hub_token).repo_id
        write_bytes(folder / "README.md", _model_card(model, concept, repo_id).encode())
        upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Textual inversion embedding",
                      token=settings.hub_token, ignore_patterns=["checkpoint-*", "earlier-*", ".*",
                                                                 f"{settings.logging_dir}/*"])
    except Exception as error:  # no network, no account, no room: an exception of their own each
        raise InputError(f"The upload to the Hub failed ({first_line(error)}); everything is saved in "
                         f"'{folder}', and `hf upload` can send it.") from None


def _model_card(model: Model, concept: Concept, repo_id: str) -> str:
    """A model card with the lines that load the embedding into a pipeline."""
    base, token = public_name(model.path), concept.settings.placeholder_token
    if len(model.text_encoders) == 1:
        load = f'pipe.load_textual_inversion("{repo_id}")'
    else:
        load = ("from huggingface_hub import snapshot_download\n"
                "from szt_utils.embeddings import load_into\n\n"
                f'load_into(pipe, snapshot_download("{repo_id}"))')
    return (f"---\nbase_model: {base}\ntags: [diffusers, textual_inversion, stable-diffusion]\n---\n"
            f"# {token}\n\nA textual inversion embedding for {base}, trained with textual_inversion_szt.py. "
            f"The word is `{token}`.\n\n```python\n{load}\n```\n")
