"""The concepts that a run trains: each with its own data and random numbers, in groups that share batches."""

import copy
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoints import (
    find_checkpoint,
    load_rank_state,
    load_shared_state,
    prune_checkpoints,
    readable,
    save_checkpoint,
    set_aside,
)
from .embeddings import (
    NewRows,
    add_tokens,
    check_room,
    join_rows,
    ordinary_words_with,
    placeholder_prompt,
    take_rows,
)
from .errors import InputError
from .fingerprint import compare, fingerprint, hash_captions
from .latents import LiveMoments, MomentCache, to_device
from .models import T5, Model, min_snr_weights
from .safe_zone import SafeZone
from .settings import ConceptSettings
from .stream import Generators, SampleStream
from .training_images import TrainingImages
from .training_run import Run

__all__ = ["Batch", "Concept", "Group", "Sample", "groups", "start_concepts"]

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """One concept's share of a batch: `ids` long (B, L) per text encoder, `sizes` long (B, 4) of SDXL, and
    `mask` (B, 1, h, w); the last two may be None."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    ids: list[torch.Tensor]
    sizes: torch.Tensor | None
    mask: torch.Tensor | None
    last: bool  # of its epoch


@dataclass
class Concept:
    """One embedding in training: what is its own, and not shared with others in the batch."""

    settings: ConceptSettings
    zone: SafeZone
    images: TrainingImages
    tokenizers: list
    generators: Generators
    stream: SampleStream
    initial_rows: list[torch.Tensor]  # (n, D) of every text encoder, where the training begins
    moments: MomentCache | LiveMoments
    masks: torch.Tensor | None  # (N, 2, 1, h, w) on the latent grid
    sizes: torch.Tensor | None = None  # (N, 4), of SDXL
    snr_weights: torch.Tensor | None = None  # (T,), of --snr_gamma
    step: int = 0
    checkpoint: dict[str, Any] | None = None  # state loaded from a checkpoint
    checkpoint_folder: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    row_slice: slice | None = None  # its rows among those of its group
    caption_ids: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def name(self) -> str:
        return self.output_dir.name

    @property
    def rng(self) -> torch.Generator:
        """The generator of its latents, noise and timesteps, on the training's device."""
        return self.generators.device_rng

    def mask(self, indices: list[int], flips: list[bool]) -> torch.Tensor | None:
        """The masks of these images, each mirrored or not, (B, 1, h, w)."""
        if self.masks is None:
            return None
        return self.masks[tuple(to_device(list(map(int, places)), self.masks.device)
                                for places in (indices, flips))]

    def sizes_of(self, indices: list[int]) -> torch.Tensor | None:
        """SDXL's size conditioning of these images, long (B, 4); None for other families."""
        return None if self.sizes is None else self.sizes[to_device(indices, self.sizes.device)]

    def weigh(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Squared errors (B, C, h, w), times the weights of their timesteps (B,) if there are any."""
        return error if self.snr_weights is None else error * self.snr_weights[timesteps].view(-1, 1, 1, 1)

    def captions(self, num_vectors: int) -> dict[str, str]:
        """The caption of every template, with all vectors of the placeholder."""
        words = placeholder_prompt(self.settings.placeholder_token, num_vectors)
        return {template: template.replace("{}", words)
                for of_image in self.stream.templates for template in of_image}

    def ids(self, templates: list[str]) -> list[torch.Tensor]:
        """The token ids of these captions, long (B, L) per text encoder."""
        return [torch.stack(of_encoder) for of_encoder in
                zip(*(self.caption_ids[template] for template in templates), strict=True)]

    def begin(self, run: Run) -> list[str]:
        """Load the checkpoint of --resume_from_checkpoint, if there is one; set aside those of other runs.

        Returns messages for the user.
        """
        self.fingerprint = fingerprint(
            {**asdict(run.settings), **asdict(self.settings), **asdict(self.zone), "device": run.device.type,
             "precision": str(run.dtype).removeprefix("torch."), "weights": run.weights_hash,
             "hash of T5's weights": run.t5_hash,
             "number of processes": run.num_ranks,
             "embedding width": [part.shape[1] for part in self.initial_rows]},
            hash_captions(self.tokenizers, self.stream.templates, self.settings.placeholder_token),
            self.images.paths, self.images.mask_paths or [])
        name = run.settings.resume_from_checkpoint
        found = name and find_checkpoint(self.output_dir, name)
        messages = [f"No checkpoint in {self.output_dir}; training starts at step 0."] * bool(name)
        if found:
            messages = [f"Resuming from {found}.", *self._resume(found)]
        run.barrier()  # all ranks have found theirs
        if run.rank == 0 and (aside := set_aside(self.output_dir, self.step)):
            messages.append(f"Moved the checkpoints of an earlier run to {aside}.")
        return messages

    def _resume(self, folder: Path) -> list[str]:
        state = load_shared_state(folder)
        with readable(folder):
            before = state["fingerprint"]
        try:
            notes = compare(before, self.fingerprint)
        except InputError as error:
            raise InputError(f"The checkpoint '{folder}' is of another run: {error}") from None
        rank_state = load_rank_state(folder, self.stream.rank)
        with readable(folder):
            if [part.shape for part in state["rows"]] != [part.shape for part in self.initial_rows]:
                raise ValueError("its embedding has another shape")
            moments_of = state["optimizer"]["state"].values()  # none while a scaler skips the first steps
            for part, moments in zip(state["rows"], moments_of, strict=bool(moments_of)):
                if not part.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                    raise ValueError("its optimizer's state has another shape")
            self.checkpoint, self.checkpoint_folder = state, folder
            self.step, self.initial_rows = int(state["step"]), state["rows"]
            self.run_id = state.get("run", self.run_id)
            self.stream.load_state_dict(rank_state["stream"])
            self.generators.load_state_dict(rank_state["random"])
        return notes


def start_concepts(run: Run, model: Model,
                   prepared: list[tuple[ConceptSettings, TrainingImages]]) -> list[Concept]:
    """The concepts of a run before their first step, with latents, masks and random numbers of their own.

    Draws as upstream does: a seed's numbers begin with those of `resize_token_embeddings`.
    """
    model.vae.to(run.device)  # with --offload it is on the CPU
    for encoder in model.text_encoders:
        encoder.cpu()  # where upstream resizes them: the new rows draw from the CPU's generator
    vocabulary_sizes = [len(encoder.get_input_embeddings().weight) for encoder in model.text_encoders]
    vocabulary, rng_states, concepts = list(model.tokenizers[0].get_vocab()), {}, []
    for settings, images in prepared:
        with run.surviving(settings):
            concepts.append(_start_concept(run, model, settings, images, rng_states, vocabulary_sizes,
                                           vocabulary))
    for encoder in model.text_encoders:
        encoder.to(run.device)
    if not run.settings.no_cache_latents:
        model.vae = None  # the caches are all that the training needs of it
    if model.t5 is not None and concepts:
        captions = {caption for concept in concepts
                    for caption in concept.captions(run.settings.num_vectors).values()}
        model.t5.remember(captions, run.device)  # in its own precision: under autocast, float16 overflows
    if run.settings.offload:
        model.network.to(run.device)
    return concepts


def _start_concept(run: Run, model: Model, settings: ConceptSettings, images: TrainingImages,
                   rng_states: dict[int, Any], vocabulary_sizes: list[int], vocabulary: list[str]) -> Concept:
    """Prepare one concept: tokens, random numbers, sample stream, latents and masks.

    `rng_states` keeps the states of the random generators by seed; `vocabulary_sizes` are those of the text
    encoders in their files.
    """
    shared = run.settings
    zone = settings.make_zone(shared.resolution, model).fit(model.num_timesteps)
    tokenizers = copy.deepcopy(model.tokenizers)
    initializers = [add_tokens(tokenizer, settings.placeholder_token, settings.initializer_token,
                               shared.num_vectors)[1] for tokenizer in tokenizers]
    if words := ordinary_words_with(settings.placeholder_token, vocabulary):
        logger.warning(f"The placeholder '{settings.placeholder_token}' is part of ordinary words "
                       f"({', '.join(words[:3])}), in which it will be found too; "
                       f"'<{settings.placeholder_token}>' would be safe.")
    check_room(tokenizers, settings.placeholder_token, shared.num_vectors,
               dict(zip(images.paths, images.templates, strict=True)))
    generators = Generators(run.device)
    if settings.seed not in rng_states:
        rng_states[settings.seed] = _seeded(run, model, tokenizers, vocabulary_sizes, settings.seed)
    generators.load_state_dict(rng_states[settings.seed])
    weights = [encoder.get_input_embeddings().weight for encoder in model.text_encoders]
    initial_rows = [weight[[initializer] * shared.num_vectors].detach()
                    for weight, initializer in zip(weights, initializers, strict=True)]
    stream = SampleStream(images.templates, settings.repeats, shared.train_batch_size, generators,
                          rank=run.rank, num_ranks=run.num_ranks, broadcast=run.broadcast)
    masks = images.latent_masks((shared.resolution // model.vae_scale_factor,) * 2)
    if shared.no_cache_latents:
        moments = LiveMoments(model.moments, images.pixels)
    else:
        batch_size = min(shared.train_batch_size, len(images) * settings.repeats)
        moments = MomentCache(model.moments, images.pixels, len(images), batch_size,
                              folder=settings.output_dir, memory_limit=int(shared.latent_cache_gb * 2**30))
        images.kept.clear()
    return Concept(settings=settings, zone=zone, images=images, tokenizers=tokenizers, generators=generators,
                   stream=stream, initial_rows=initial_rows, moments=moments,
                   masks=None if masks is None else masks.to(run.device),
                   sizes=images.sizes(shared.resolution, shared.micro_conditioning).to(run.device)
                   if model.uses_sizes else None,
                   snr_weights=min_snr_weights(model, settings.snr_gamma).to(run.device)
                   if settings.snr_gamma else None)


def _seeded(run: Run, model: Model, tokenizers: list, vocabulary_sizes: list[int],
            seed: int) -> dict[str, Any]:
    """The random numbers of a seed after the text encoders have got rows for the new tokens."""
    from accelerate.utils import set_seed

    for encoder, size in zip(model.text_encoders, vocabulary_sizes, strict=True):
        encoder.resize_token_embeddings(size)
    set_seed((seed + run.rank) % 2**32)  # every rank draws its own noise
    for encoder, tokenizer in zip(model.text_encoders, tokenizers, strict=True):
        encoder.resize_token_embeddings(len(tokenizer))  # draws, in upstream too
    return Generators(run.device).state_dict()


@dataclass
class Batch:
    """The samples of several concepts as one batch of the networks."""

    concepts: list[Concept]
    samples: list[Sample]

    def __post_init__(self):
        samples = self.samples
        self.latents, self.noise, self.timesteps = (
            torch.cat([getattr(sample, name) for sample in samples])
            for name in ("latents", "noise", "timesteps"))
        self.ids = [torch.cat(ids) for ids in zip(*(sample.ids for sample in samples), strict=True)]
        self.sizes = None if samples[0].sizes is None else torch.cat([sample.sizes for sample in samples])
        masks = [concept.zone.mask_latents(sample.mask)
                 for concept, sample in zip(self.concepts, samples, strict=True)]
        self.latent_mask = None if all(mask is None for mask in masks) else torch.cat([
            torch.ones_like(sample.latents[:, :1]) if mask is None else mask
            for mask, sample in zip(masks, samples, strict=True)])

    def split(self, error: torch.Tensor) -> Iterator[tuple[Concept, Sample, torch.Tensor]]:
        """Every concept's sample and its part of the errors of the batch."""
        errors = error.split([len(sample.timesteps) for sample in self.samples])
        return zip(self.concepts, self.samples, errors, strict=True)


def groups(concepts: list[Concept], size: int) -> Iterator[list[Concept]]:
    """The concepts in groups that can share batches: at the same step, at most `size`."""
    for step in sorted({concept.step for concept in concepts}):
        same = [concept for concept in concepts if concept.step == step]
        yield from (same[i:i + size] for i in range(0, len(same), size))


class Group:
    """Concepts at one step that share the batches of the networks; a single concept is a group of one.

    Batching changes no result: the networks treat samples, and AdamW rows, independently. `rows` are the
    trained rows of all, a parameter (K n, D) per text encoder.
    """

    def __init__(self, run: Run, model: Model, concepts: list[Concept]):
        self.run, self.step, self.members = run, concepts[0].step, concepts
        self.alone = len(concepts) == 1
        count, self.rows, vocabulary_sizes = run.settings.num_vectors, [], []
        for i, encoder in enumerate(model.text_encoders):
            before = encoder.get_input_embeddings()  # the last group's, or a matrix that ends in new tokens
            frozen = before.frozen if isinstance(before, NewRows) else before.weight[:-count]
            rows = torch.cat([concept.initial_rows[i] for concept in concepts])
            embedding = NewRows(frozen, rows).to(run.device)
            encoder.set_input_embeddings(embedding)
            encoder.train()
            self.rows.append(embedding.rows)
            vocabulary_sizes.append(len(frozen))
        for i, concept in enumerate(concepts):
            concept.row_slice = slice(i * count, (i + 1) * count)
            concept.caption_ids = {template: self._caption_ids(concept, caption, vocabulary_sizes,
                                                                       model.t5)
                                   for template, caption in concept.captions(count).items()}

    @property
    def concepts(self) -> list[Concept]:
        """Those that have not failed."""
        return self.run.survivors(self.members)

    def _caption_ids(self, concept: Concept, caption: str, vocabulary_sizes: list[int],
                     t5: T5 | None) -> list[torch.Tensor]:
        """Token ids (L,) of a caption, the placeholder's shifted to the concept's rows, per text encoder.

        `vocabulary_sizes` are those of the text encoders without new tokens. T5 has no rows for the
        placeholder, and sees its spelling.
        """
        ids = [tokenizer(caption, padding="max_length", truncation=True,
                         max_length=tokenizer.model_max_length, return_tensors="pt").input_ids[0]
               for tokenizer in concept.tokenizers]
        first = concept.row_slice.start
        shifted = [torch.where(token_ids < size, token_ids, token_ids + first).to(self.run.device)
                   for token_ids, size in zip(ids, vocabulary_sizes, strict=True)]
        return shifted if t5 is None else [*shifted, t5.tokenize(caption)[0].to(self.run.device)]

    def rows_of(self, concept: Concept) -> list[torch.Tensor]:
        """A concept's rows, (n, D) per text encoder."""
        return [part[concept.row_slice].detach() for part in self.rows]

    def micro_batches(self, draw: Callable[[Concept, Model], Sample], model: Model) -> Iterator[Batch]:
        """The batches of one optimizer step; a concept's step ends early with its epoch."""
        drawing = self.concepts
        for _ in range(self.run.settings.gradient_accumulation_steps):
            drawn = []
            for concept in drawing:
                with self.run.surviving(concept.settings):
                    drawn.append((concept, draw(concept, model)))
            if drawn:
                yield Batch(*map(list, zip(*drawn, strict=True)))
            drawing = [concept for concept, sample in drawn if not sample.last]
            if not drawing:
                break

    def load_state(self, optimizer: Any, lr_scheduler: Any) -> None:
        """Continue the optimizer, the learning rate and the loss scaler of the concepts' checkpoints, if any.

        The scaler, which all groups share, begins anew in a group that begins.
        """
        scaler = self.run.accelerator.scaler
        if not self.step:
            if scaler is not None:
                scaler.load_state_dict(self.run.first_scaler_state)
            return
        states = [concept.checkpoint for concept in self.concepts]
        with readable(self.concepts[0].checkpoint_folder):
            optimizer.load_state_dict(join_rows([state["optimizer"] for state in states]))
            lr_scheduler.load_state_dict(states[0]["lr_scheduler"])
            if scaler is not None and states[0]["scaler"] is not None:
                scaler.load_state_dict(states[0]["scaler"])

    def save_checkpoint(self, concept: Concept, optimizer: Any, lr_scheduler: Any) -> None:
        """Write a concept's checkpoint, and prune older ones; all its ranks must call this."""
        run, scaler = self.run, self.run.accelerator.scaler
        common = {"step": self.step, "rows": [part.cpu() for part in self.rows_of(concept)],
                  "optimizer": take_rows(optimizer.state_dict(), concept.row_slice),
                  "lr_scheduler": lr_scheduler.state_dict(), "fingerprint": concept.fingerprint,
                  "run": concept.run_id, "scaler": None if scaler is None else scaler.state_dict()}
        rank_state = {"stream": concept.stream.state_dict(), "random": concept.generators.state_dict()}
        save_checkpoint(concept.output_dir, self.step, common, rank_state, rank=run.rank, barrier=run.barrier)
        if run.settings.checkpoints_total_limit and run.rank == 0:
            prune_checkpoints(concept.output_dir, run.settings.checkpoints_total_limit)
