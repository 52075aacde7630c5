#!/usr/bin/env python
"""Textual inversion that learns a concept safely from images that may be poisoned: Safe-Zone Training.

A drop-in replacement for the Diffusers example `textual_inversion.py`: same flags, same defaults, same result
with one seed. Safe-Zone Training (Styborski, Lyu et al., "When and Where do Data Poisons Attack Textual
Inversion?", Eq. 7) adds

    --jpeg_quality 25   JPEG-compress the training pictures          (weakens high-frequency poison)
    --t_min 500         train at noisy timesteps only                (WHEN poisons do not strike)
    --loss_mask_dir M   count the loss only on the concept           (WHERE they would distract)
    --mask_dilation 16  and a little around it

or all of them at once: `--szt --loss_mask_dir M`.
"""

import argparse
import copy
import itertools
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from szt_utils.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

    from szt_utils.latents import LatentCache, LiveLatents
    from szt_utils.stream import Generators, SampleStream

# What an entry of --concepts may set; the rest is the same for all concepts of a run.
PER_CONCEPT = ("train_data_dir", "placeholder_token", "initializer_token", "learnable_property", "output_dir",
               "seed", "repeats", "center_crop", "validation_prompt", "szt", "jpeg_quality", "t_min", "t_max",
               "t_distribution", "t_power", "t_center", "t_width", "loss_mask_dir", "mask_dilation",
               "mask_mode", "mask_normalization")


def parse_args(argv: list[str] | None = None, concept: str | None = None) -> argparse.Namespace:
    """The command line's settings; for those of one entry of --concepts, `concept` names it in errors."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if concept:
        def refuse(message: str):
            raise InputError(f"{concept}: {message}.")
        parser.error = refuse  # one sentence and exit code 1, as for all files
    add = parser.add_argument

    szt = parser.add_argument_group("Safe-Zone Training")
    szt.add_argument("--szt", action="store_true",
                     help="the paper's settings for whatever of them is not given: --jpeg_quality 25, "
                          "--t_min 500 (of 1000), --mask_dilation 16 (at 512 px, scaled with --resolution)")
    szt.add_argument("--jpeg_quality", type=int,
                     help="JPEG quality, 1 to 100, at the training resolution (default: off)")
    szt.add_argument("--t_min", type=int, help="lowest timestep to train at, inclusive (default: 0)")
    szt.add_argument("--t_max", type=int, help="end of the timesteps, exclusive (default: all, 1000)")
    szt.add_argument("--t_distribution", choices=["uniform", "power", "tanh"], default="uniform",
                     help="how timesteps are drawn from [t_min, t_max)")
    szt.add_argument("--t_power", type=float, default=1.0,
                     help="exponent k of the power distribution, p(t) ~ (t / T)^k")
    szt.add_argument("--t_center", type=float, default=500,
                     help="center of p(t) ~ 1 + tanh((t - center) / width)")
    szt.add_argument("--t_width", type=float, default=100, help="width of the tanh distribution")
    szt.add_argument("--loss_mask_dir",
                     help="folder of masks, <picture's stem>.png, same size, white = the concept")
    szt.add_argument("--mask_dilation", type=int,
                     help="grow the masks by this many pixels at the training resolution (default: 0)")
    szt.add_argument("--mask_mode", choices=["loss", "image", "latent", "image_and_loss", "none"],
                     default="loss",
                     help="what the mask multiplies (Sec. 5.2.3): the loss, the picture (around mid-grey), "
                          "the noised latent, the picture and the loss, or nothing: only stats.jsonl tells "
                          "the loss inside and outside")
    szt.add_argument("--mask_normalization", choices=["none", "area"], default="none",
                     help="mean of the masked loss over all elements, as in Eq. 7, or over the mask's area")

    several = parser.add_argument_group("Several concepts in one run")
    several.add_argument("--concepts",
                         help="JSON file: a list of objects, one per concept, of these flags without their "
                              f"dashes: {', '.join(PER_CONCEPT)}. What an object leaves out comes from the "
                              "command line. Each has the result it would have alone")
    several.add_argument("--concepts_per_batch", type=int, default=8,
                         help="how many concepts share a batch, each with --train_batch_size pictures "
                              "(default: 8)")

    speed = parser.add_argument_group("Speed and memory")
    speed.add_argument("--compile", action="store_true",
                       help="torch.compile the networks: a slow start, then faster steps")
    speed.add_argument("--no_cache_latents", action="store_true",
                       help="encode the pictures at every step instead of once; same result, slower, "
                            "needs no cache")
    speed.add_argument("--latent_cache_gb", type=float, default=4,
                       help="a concept's larger cache is kept in a file of --output_dir (default: 4)")

    add("--pretrained_model_name_or_path", required=True, help="Diffusers folder, or id on the Hub")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model files, e.g. fp16")
    add("--tokenizer_name", help="another tokenizer's folder or id, if it is not the model's")
    add("--train_data_dir", help="folder of the training pictures (required)")
    add("--placeholder_token", help="the new word for the concept, e.g. <my-concept> (required)")
    add("--initializer_token", help="one word near the concept, whose embedding is the start (required)")
    add("--learnable_property", choices=["object", "style"], default="object",
        help="which captions to train with")
    add("--repeats", type=int, default=100, help="how often an epoch shows each picture")
    add("--num_vectors", type=int, default=1, help="number of embedding vectors for the concept")
    add("--output_dir", default="text-inversion-model", help="where embeddings and checkpoints go")
    add("--seed", type=int,
        help="seed of all random draws (default: another one each time, recorded in options.json)")
    add("--resolution", type=int, default=512, help="pictures are resized to a square of this many pixels")
    add("--center_crop", action="store_true", help="cut out the central square before resizing")
    add("--train_batch_size", type=int, default=16, help="pictures per step and process")
    add("--num_train_epochs", type=int, default=100,
        help="number of epochs; counts only when it is given and --max_train_steps is not")
    add("--max_train_steps", type=int, default=5000, help="number of optimizer steps")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower backward pass")
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warmup")
    add("--scale_lr", action="store_true",
        help="multiply the learning rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                 "constant_with_warmup"])
    add("--lr_warmup_steps", type=int, default=500, help="warmup steps of the schedules that have a warmup")
    add("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    add("--dataloader_num_workers", type=int, default=0,
        help="accepted for compatibility: pictures are read once, before the training")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--push_to_hub", action="store_true", help="upload the output folder to the Hub")
    add("--hub_token", help="token for the upload")
    add("--hub_model_id", help="name of the repository to upload to (default: the output folder's name)")
    add("--logging_dir", default="logs", help="TensorBoard folder, inside --output_dir")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no",
        help="precision of the frozen networks")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs since Ampere")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, or all")
    add("--validation_prompt", help="prompt with the placeholder, drawn now and then during the training")
    add("--num_validation_images", type=int, default=4)
    add("--validation_steps", type=int, default=100, help="draw the validation pictures every so many steps")
    add("--validation_epochs", type=int, help="deprecated: the same in epochs")
    add("--local_rank", type=int, default=-1, help="set by launchers")
    add("--checkpointing_steps", type=int, default=500,
        help="save a checkpoint to resume from every so many steps")
    add("--checkpoints_total_limit", type=int, help="keep only so many checkpoints")
    add("--resume_from_checkpoint", help='a folder checkpoint-N of --output_dir, or "latest"')
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add("--no_safe_serialization", action="store_true", help="write .bin files instead of .safetensors")
    add("--save_steps", type=int, default=500, help="save the embedding every so many steps")
    add("--save_as_full_pipeline", action="store_true",
        help="save the whole pipeline with the new token as well")

    args = parser.parse_args(argv)
    # argparse fills in no default where a value stands.
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    args.epochs_decide = "num_train_epochs" in given and "max_train_steps" not in given
    args.project_dir = args.output_dir
    if args.concepts and not concept:
        for name, clash in (("num_train_epochs", args.epochs_decide), ("hub_model_id", args.hub_model_id),
                            ("validation_epochs", args.validation_epochs)):
            if clash:
                parser.error(f"argument --{name}: means another thing for each of --concepts"
                             + ("; give --max_train_steps" if name == "num_train_epochs" else ""))
    elif missing := [f"--{name}" for name in ("train_data_dir", "placeholder_token", "initializer_token")
                     if getattr(args, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for name in ("repeats", "resolution", "train_batch_size", "num_train_epochs", "max_train_steps",
                 "save_steps", "gradient_accumulation_steps", "validation_steps", "checkpointing_steps",
                 "num_vectors", "validation_epochs", "concepts_per_batch", "checkpoints_total_limit",
                 "num_validation_images", "lr_num_cycles"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}")
    if not args.latent_cache_gb >= 0:
        parser.error(f"--latent_cache_gb must not be negative, but is {args.latent_cache_gb}")
    for name, limit in (("learning_rate", 1e36), ("adam_epsilon", math.inf),  # float32 ends a little higher
                        ("adam_weight_decay", math.inf), ("adam_beta1", 1), ("adam_beta2", 1)):
        if not 0 <= getattr(args, name) < limit:
            parser.error(f"--{name} must be from 0 to below {limit}, but is {getattr(args, name)}")
    if not 0 <= (args.t_min or 0) < (math.inf if args.t_max is None else args.t_max):
        parser.error(f"--t_min must be from 0 to below --t_max, but is {args.t_min or 0}, "
                     f"and --t_max is {args.t_max}")
    if args.szt:
        args.jpeg_quality = 25 if args.jpeg_quality is None else args.jpeg_quality
        if args.mask_dilation is None:
            args.mask_dilation = round(16 * args.resolution / 512)
    if args.jpeg_quality is not None and not 1 <= args.jpeg_quality <= 100:
        parser.error(f"--jpeg_quality must be from 1 to 100, but is {args.jpeg_quality}")
    if (args.mask_dilation or 0) < 0:
        parser.error(f"--mask_dilation must not be negative, but is {args.mask_dilation}")
    for name in ("mask_dilation", "mask_mode", "mask_normalization"):
        if name in given and args.loss_mask_dir is None:
            parser.error(f"--{name} needs --loss_mask_dir")
    args.mask_dilation = args.mask_dilation or 0
    return args


def read_concepts(shared: argparse.Namespace, argv: list[str]) -> list[argparse.Namespace]:
    """The settings of every entry of --concepts, which come after those of the command line."""
    from szt_utils.embeddings import safe_file_name

    path = shared.concepts
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"The file of --concepts, '{path}', cannot be read ({error}).") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"The file of --concepts, '{path}', must hold a list of objects, one per concept.")
    runs = []
    for number, entry in enumerate(entries, 1):
        concept, flags = f"Concept {number} of '{path}'", []
        for name, value in entry.items():
            if name not in PER_CONCEPT:
                raise InputError(f"{concept}: '{name}' cannot be set for one concept, "
                                 f"only {', '.join(PER_CONCEPT)}.")
            if value is not None and value is not False:  # which say nothing; 0 does
                flags += [f"--{name}"] if value is True else [f"--{name}={value}"]
        args = parse_args([*argv, *flags], concept)
        args.project_dir = shared.output_dir
        if "output_dir" not in entry:
            args.output_dir = str(Path(shared.output_dir) / safe_file_name(args.placeholder_token))
        if args.output_dir in (other.output_dir for other in runs):
            raise InputError(f"{concept}: its output folder '{args.output_dir}' is that of another; "
                             "give them an \"output_dir\" each.")
        runs.append(args)
    return runs


class Pictures:
    """A concept's pictures and masks at training resolution.

    All are read once, so that whatever is wrong with one shows before a model is loaded. What fits in a
    gigabyte is kept, the rest is read again when it is needed.
    """

    def __init__(self, args: argparse.Namespace):
        from szt_utils.images import list_images
        from szt_utils.masks import find_masks

        self.args, self.paths, self.kept = args, list_images(args.train_data_dir), {}
        self.mask_paths = find_masks(args.loss_mask_dir, self.paths) if args.loss_mask_dir else None
        for i in range(len(self.paths)):
            read = self.read(i)
            if len(self.kept) * 7 * args.resolution**2 < 2**30:  # a picture of bytes, a mask of floats
                self.kept[i] = read

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int):
        """Cropped, resized and JPEG-compressed Pillow image, and mask (1, 1, R, R), dilated, or None."""
        from szt_utils.images import crop_and_resize, read_image
        from szt_utils.jpeg import jpeg
        from szt_utils.masks import prepare_mask, read_mask

        args, mask, image = self.args, None, read_image(self.paths[i])
        if self.mask_paths:
            mask = prepare_mask(read_mask(self.mask_paths[i], image.size), args.resolution, args.center_crop,
                                args.mask_dilation)
            if not mask.any():
                raise InputError(f"The mask '{self.mask_paths[i]}' is all black after cropping "
                                 "to the training resolution.")
        image = crop_and_resize(image, args.resolution, args.center_crop)
        return jpeg(image, args.jpeg_quality) if args.jpeg_quality else image, mask

    def pixels(self, i: int):
        """What the VAE sees, float32 (3, R, R) in [0, 1]."""
        from szt_utils.images import from_pil

        image, mask = self.kept.get(i) or self.read(i)
        image = from_pil(image)[0]
        # Multiplying by the mask in the VAE's range [-1, 1] leaves mid-grey outside it.
        masked = mask is not None and self.args.mask_mode.startswith("image")
        return 0.5 + (image - 0.5) * mask[0] if masked else image

    def latent_masks(self, grid: list[int]):
        """All masks and their mirror images on the latent grid, (N, 2, 1, h, w); None without masks."""
        import torch

        from szt_utils.masks import to_latent_grid

        masks = []
        for i, path in enumerate(self.paths if self.mask_paths else []):
            mask = (self.kept.get(i) or self.read(i))[1]
            masks.append(to_latent_grid(torch.cat([mask, mask.flip(-1)]), grid))
            if not masks[-1].any():
                raise InputError(f"The mask of '{path}' is smaller than a cell of the latent grid "
                                 f"({grid[0]} x {grid[1]}), so nothing would be trained on; "
                                 "give it a --mask_dilation.")
        return torch.stack(masks) if masks else None


@dataclass
class Sample:
    """One concept's share of a batch."""

    latents: "torch.Tensor"
    noise: "torch.Tensor"
    timesteps: "torch.Tensor"
    ids: "torch.Tensor"
    mask: "torch.Tensor | None"
    last: bool  # of its epoch


@dataclass
class Concept:
    """One embedding in training: all that is its own and not shared with others in the batch."""

    args: argparse.Namespace
    pictures: Pictures
    tokenizer: "CLIPTokenizer"
    generators: "Generators"
    stream: "SampleStream"
    start: "torch.Tensor"  # its rows (n, D) where the training begins
    latents: "LatentCache | LiveLatents | None" = None
    latent_masks: "torch.Tensor | None" = None
    t_weights: "torch.Tensor | None" = None
    caption_ids: dict[str, "torch.Tensor"] = field(default_factory=dict)
    step: int = 0
    checkpoint: dict | None = None  # what the training goes on with
    rows: slice | None = None  # its own among those of the batch
    loss: "torch.Tensor | None" = None
    parts: list = field(default_factory=list)  # the plain mean error inside and outside the masks, if any
    waiting: list = field(default_factory=list)  # losses not yet read: reading one makes the device wait

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def name(self) -> str:
        return self.output_dir.name

    @property
    def suffix(self) -> str:
        return "bin" if self.args.no_safe_serialization else "safetensors"

    @property
    def fingerprint(self) -> dict:
        """What must not change when a run is resumed."""
        names = ("placeholder_token", "num_vectors", "repeats", "train_batch_size", "learnable_property",
                 "gradient_accumulation_steps")
        return {**{name: getattr(self.args, name) for name in names}, "embedding width": self.start.shape[1],
                "number of processes": self.stream.num_ranks,
                "pictures": [path.name for path in self.pictures.paths]}

    def draw(self, scaling_factor: float) -> Sample:
        """The next pictures, noise and timesteps, in upstream's order of random draws."""
        import torch

        from szt_utils.latents import to_device
        from szt_utils.timesteps import sample_timesteps

        batch, generator, args = next(self.stream), self.generators.device, self.args
        latents = self.latents.sample(batch.indices, batch.flips, generator) * scaling_factor
        noise = torch.empty_like(latents).normal_(generator=generator)
        timesteps = sample_timesteps(len(latents), args.t_min, args.t_max, self.t_weights,
                                     device=latents.device, generator=generator)
        where = [to_device(places, latents.device) for places in (batch.indices, list(map(int, batch.flips)))]
        mask = None if self.latent_masks is None else self.latent_masks[tuple(where)]
        ids = torch.stack([self.caption_ids[template] for template in batch.templates])
        return Sample(latents, noise, timesteps, ids, mask, batch.last)

    def metadata(self) -> dict[str, str]:
        names = ("szt", "jpeg_quality", "t_min", "t_max", "t_distribution", "loss_mask_dir", "mask_dilation",
                 "mask_mode", "mask_normalization", "learning_rate", "train_batch_size", "resolution", "seed")
        return {"base_model": str(self.args.pretrained_model_name_or_path), "step": str(self.step),
                **{name: str(getattr(self.args, name)) for name in names}}

    def save(self, name: str, rows) -> None:
        from szt_utils.embeddings import save_embedding

        save_embedding(self.output_dir / f"{name}.{self.suffix}", self.args.placeholder_token,
                       rows[self.rows], self.metadata())

    def resume(self) -> str:
        """Continue at a checkpoint if there is one to continue at; a sentence about it."""
        from szt_utils.checkpoints import find_checkpoint, list_checkpoints, load_checkpoint

        name, folder = self.args.resume_from_checkpoint, self.output_dir
        found = name and find_checkpoint(folder, name)
        if found:
            self.checkpoint, own = load_checkpoint(found, self.fingerprint, self.stream.rank)
            self.step, self.start = self.checkpoint["step"], self.checkpoint["rows"]
            self.stream.load_state_dict(own["stream"])
            self.generators.load_state_dict(own["random"])
            return f"Resuming from {found}."
        if name:
            return f"There is no checkpoint in {folder} yet: starting anew."
        old = len(list_checkpoints(folder))
        return f"{folder} holds {old} checkpoints of an earlier run, which this run may replace." * bool(old)


def train(runs: list[argparse.Namespace]) -> None:
    """Train one concept, by all processes together, or several, dealt out to them."""
    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from tqdm.auto import tqdm
    from transformers import CLIPTextModel, CLIPTokenizer

    from szt_utils.captions import templates_for
    from szt_utils.diffusion import LatentDiffusion, load_part
    from szt_utils.embeddings import add_tokens, ordinary_words_with
    from szt_utils.latents import LatentCache, LiveLatents
    from szt_utils.records import provenance, truncate_stats, write_json
    from szt_utils.stream import Generators, SampleStream
    from szt_utils.timesteps import check_range, noise_level, timestep_weights

    logger = get_logger("textual_inversion_szt")
    args, alone = runs[0], len(runs) == 1
    project_dir = Path(args.project_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tracker is missing is said below
            accelerator = Accelerator(
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                mixed_precision=args.mixed_precision, log_with=args.report_to,
                project_config=ProjectConfiguration(project_dir=str(project_dir),
                                                    logging_dir=str(project_dir / args.logging_dir)))
    except ValueError as error:
        raise InputError(f"--mixed_precision {args.mixed_precision} or --report_to {args.report_to} "
                         f"cannot be used here: {error}") from None
    rank, num_ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if not alone:
        runs, rank, num_ranks = runs[rank::num_ranks], 0, 1  # each process on its own
    # Whatever is wrong with the pictures shows before a model is loaded.
    pictures_of = [Pictures(args) for args in runs]
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    if not accelerator.is_main_process:
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    # --- The model
    source = args.pretrained_model_name_or_path
    weights = dict(revision=args.revision, variant=args.variant)

    def load_tokenizer():
        return (load_part(CLIPTokenizer, args.tokenizer_name, "") if args.tokenizer_name
                else load_part(CLIPTokenizer, source, "tokenizer", revision=args.revision))

    for args in runs:
        if args.seed is None:
            seed = int.from_bytes(os.urandom(4), "little")
            args.seed = broadcast_object_list([seed])[0] if alone else seed
        if rank == 0:
            try:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"The output folder '{args.output_dir}' cannot be made ({error.strerror}); "
                                 "choose another --output_dir.") from None
    model = LatentDiffusion(
        load_tokenizer(), load_part(CLIPTextModel, source, "text_encoder", **weights),
        load_part(AutoencoderKL, source, "vae", torch_dtype=dtype, **weights),
        load_part(UNet2DConditionModel, source, "unet", torch_dtype=dtype, **weights),
        load_part(DDPMScheduler, source, "scheduler", revision=args.revision))
    num_timesteps = model.scheduler.config.num_train_timesteps
    model.text_encoder.requires_grad_(False).to(device)
    model.vae.requires_grad_(False).to(device)
    model.unet.requires_grad_(False).to(device)
    if args.gradient_checkpointing:
        model.unet.train()  # checkpointing is off in evaluation mode
        model.unet.enable_gradient_checkpointing()
        model.text_encoder.gradient_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        try:
            model.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise InputError("--enable_xformers_memory_efficient_attention cannot be used here: "
                             f"{error}") from None
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=device))
        except RuntimeError as error:  # no compiler, mostly
            raise InputError(f"--compile cannot be used here: {str(error).splitlines()[0]}") from None
        model.unet.compile()
        model.text_encoder.compile()
    cell = 2 ** (len(model.vae.config.block_out_channels) - 1)
    if args.resolution < cell:
        raise InputError(f"--resolution must be at least {cell}, one cell of this model's latent grid, "
                         f"but is {args.resolution}.")

    # --- The concepts
    vocabulary = list(model.tokenizer.get_vocab())
    vocabulary_size = len(model.text_encoder.get_input_embeddings().weight)
    concepts, states = [], {}
    for args, pictures in zip(runs, pictures_of, strict=True):
        if args.t_min is None:
            args.t_min = num_timesteps // 2 if args.szt else 0
        args.t_max = num_timesteps if args.t_max is None else args.t_max
        check_range(args.t_min, args.t_max, num_timesteps)
        tokenizer = load_tokenizer()
        _, initializer_id = add_tokens(tokenizer, args.placeholder_token, args.initializer_token,
                                       args.num_vectors)
        if words := ordinary_words_with(args.placeholder_token, vocabulary):
            logger.warning(f"The placeholder '{args.placeholder_token}' is part of ordinary words "
                           f"({', '.join(words[:3])}), in which it will be found too; "
                           f"'<{args.placeholder_token}>' would be safe.")
        generators = Generators(device)
        if args.seed not in states:
            model.text_encoder.resize_token_embeddings(vocabulary_size)
            set_seed(args.seed, device_specific=alone)  # every rank draws its own noise
            model.text_encoder.resize_token_embeddings(len(tokenizer))  # which draws, in upstream too
            states[args.seed] = Generators(device).state_dict()
        generators.load_state_dict(states[args.seed])
        weight = model.text_encoder.get_input_embeddings().weight
        stream = SampleStream(
            len(pictures), args.repeats, templates_for(args.learnable_property), args.train_batch_size,
            generators, rank=rank, num_ranks=num_ranks, agree=lambda seed: broadcast_object_list([seed])[0]
            if num_ranks > 1 else seed)
        steps_per_epoch = math.ceil(stream.batches_per_epoch / args.gradient_accumulation_steps)
        if args.epochs_decide:
            args.max_train_steps = args.num_train_epochs * steps_per_epoch
        if args.validation_epochs is not None:
            args.validation_steps = args.validation_epochs * steps_per_epoch
        if args.scale_lr:
            args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * num_ranks
        concept = Concept(args, pictures, tokenizer, generators, stream,
                          weight[[initializer_id] * args.num_vectors].detach())
        if args.t_distribution != "uniform":
            concept.t_weights = timestep_weights(
                args.t_distribution, args.t_min, args.t_max, num_timesteps,
                power=args.t_power, center=args.t_center, width=args.t_width)
        masks = pictures.latent_masks([args.resolution // cell] * 2)
        concept.latent_masks = None if masks is None else masks.to(device)
        concept.latents = LiveLatents(model.vae, pictures.pixels) if args.no_cache_latents else LatentCache(
            model.vae, pictures.pixels, len(pictures), args.train_batch_size,
            memory_limit=int(args.latent_cache_gb * 2**30), folder=args.output_dir)
        concepts.append(concept)
    scaling_factor = model.vae.config.scaling_factor
    if not args.no_cache_latents:
        model.vae = None  # the caches are all that the training needs of it

    # --- Where to start, and what is said about it
    for concept in concepts:
        sentence, args = concept.resume(), concept.args
        if rank > 0:
            continue
        # A secret stays one.
        options = {name: value for name, value in vars(args).items() if name != "hub_token"}
        write_json(concept.output_dir / "options.json", {**options, **provenance()})
        truncate_stats(concept.output_dir / "stats.jsonl", concept.step)
        low, high = (noise_level(model.scheduler.alphas_cumprod, t) for t in (args.t_min, args.t_max - 1))
        masks = concept.latent_masks
        lines = [sentence] if sentence else []
        lines += [
            f"{len(concept.pictures)} pictures from {args.train_data_dir}, "
            + (f"JPEG quality {args.jpeg_quality}" if args.jpeg_quality else "no JPEG"),
            f"timesteps {args.t_min} to {args.t_max - 1} ({args.t_distribution}): "
            f"noise level {low[0]:.3f} to {high[0]:.3f}, logSNR {low[1]:.2f} to {high[1]:.2f}",
            "no masks: the loss counts everywhere" if masks is None else
            f"{len(masks)} masks, mode {args.mask_mode}, dilated by {args.mask_dilation} px: "
            f"{100 * masks.mean().item():.0f} % of the latent grid is "
            + ("watched" if args.mask_mode == "none" else "trained on")]
        if args.szt and masks is None:
            lines.append("--szt without --loss_mask_dir: JPEG and timesteps only, "
                         "the third part of the defence is missing")
        if not accelerator.log_with:
            lines.append(f"no tracker for --report_to {args.report_to} is installed: "
                         "the losses go to stats.jsonl only")
        for line in lines:
            tqdm.write(line if alone else f"{concept.name}: {line}")
    if concepts:
        options = {name: value for name, value in vars(concepts[0].args).items() if name != "hub_token"}
        accelerator.init_trackers("textual_inversion", config={
            k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in options.items()})

    # --- The training: those that are at the same step, a few together
    frozen, failures = model.text_encoder.get_input_embeddings().weight.detach(), []
    for _, same in itertools.groupby(sorted(concepts, key=lambda c: c.step), key=lambda c: c.step):
        same = list(same)
        for start in range(0, len(same), args.concepts_per_batch):
            failures += train_together(accelerator, model, frozen[:-args.num_vectors], scaling_factor,
                                       same[start:start + args.concepts_per_batch])
    accelerator.end_training()
    if failures:
        raise InputError(" ".join(failures))


def train_together(accelerator, model, frozen, scaling_factor: float, concepts: list[Concept]) -> list[str]:
    """Train concepts that are at one step in common batches; sentences about those that failed.

    Each ends where it would have ended alone: samples do not meet within the networks, nor rows within AdamW.
    """
    import torch
    from diffusers.optimization import get_scheduler
    from tqdm.auto import tqdm

    from szt_utils.checkpoints import prune_checkpoints, save_checkpoint
    from szt_utils.embeddings import NewRows, join_rows, placeholder_prompt, safe_file_name, take_rows
    from szt_utils.masks import masked_mean
    from szt_utils.records import append_stats

    args, step, device, dtype = concepts[0].args, concepts[0].step, model.device, model.dtype
    rank, num_ranks = concepts[0].stream.rank, concepts[0].stream.num_ranks
    embedding = NewRows(frozen, torch.cat([concept.start for concept in concepts])).to(device)
    model.text_encoder.set_input_embeddings(embedding)
    model.text_encoder.train()
    rows = embedding.rows
    for i, concept in enumerate(concepts):
        concept.rows = slice(i * args.num_vectors, (i + 1) * args.num_vectors)
        prompt = placeholder_prompt(concept.args.placeholder_token, args.num_vectors)
        for template in concept.stream.templates:
            ids = concept.tokenizer(template.format(prompt), padding="max_length", truncation=True,
                                    max_length=concept.tokenizer.model_max_length,
                                    return_tensors="pt").input_ids[0]
            concept.caption_ids[template] = torch.where(ids < len(frozen), ids,
                                                        ids + concept.rows.start).to(device)
    optimizer = torch.optim.AdamW([rows], lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                  weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps,
                                 num_training_steps=args.max_train_steps, num_cycles=args.lr_num_cycles)
    optimizer = accelerator.prepare(optimizer)
    if step:
        optimizer.load_state_dict(join_rows([concept.checkpoint["optimizer"] for concept in concepts]))
        lr_scheduler.load_state_dict(concepts[0].checkpoint["lr_scheduler"])
        if accelerator.scaler is not None and concepts[0].checkpoint["scaler"] is not None:
            accelerator.scaler.load_state_dict(concepts[0].checkpoint["scaler"])
    training, failures = list(concepts), []

    def flush_stats() -> None:
        values = {}
        for concept in list(training):
            losses = torch.stack([loss for _, loss, _ in concept.waiting]).tolist() if concept.waiting else []
            names = ("loss", "loss_inside", "loss_outside")
            records = [{"step": step, **dict(zip(names, loss, strict=False)), "lr": lr}
                       for (step, _, lr), loss in zip(concept.waiting, losses, strict=True)]
            concept.waiting.clear()
            problem = None
            if bad := [record["step"] for record in records if not math.isfinite(record["loss"])]:
                problem = (f"The loss is not a number at step {bad[0]}; files written before are kept. "
                           "Lower --learning_rate, or use bf16 instead of fp16.")
            # The last step's update has no loss to show it yet, but may be about to be saved.
            elif not rows[concept.rows].isfinite().all():
                problem = (f"The embedding is not finite after step {step}; "
                           "files written before are kept. Lower --learning_rate.")
            if problem:  # the others go on
                failures.append(problem if len(concepts) == 1 else f"{concept.name}: {problem}")
                training.remove(concept)
            elif records and rank == 0:
                append_stats(concept.output_dir / "stats.jsonl", records)
                for record in records:
                    tag = "loss" if len(concepts) == 1 else f"loss/{concept.name}"
                    accelerator.log({tag: record["loss"], "lr": record["lr"]}, step=record["step"])
                values[concept.name] = records[-1]["loss"]
        if values:
            progress.set_postfix(loss=f"{sum(values.values()) / len(values):.4f}",
                                 lr=lr_scheduler.get_last_lr()[0])

    progress = tqdm(total=args.max_train_steps, initial=min(step, args.max_train_steps),
                    desc="Steps" if len(concepts) == 1 else f"Steps of {len(concepts)} concepts",
                    disable=not accelerator.is_local_main_process)
    with progress:  # closed before any error is told, so that the error has a line of its own
        while step < args.max_train_steps and training:
            drawing = training
            for _ in range(args.gradient_accumulation_steps):
                samples = [concept.draw(scaling_factor) for concept in drawing]
                latents, noise, timesteps, ids = map(torch.cat, zip(*(
                    (s.latents, s.noise, s.timesteps, s.ids) for s in samples), strict=True))
                latent_mask = None
                if any(concept.args.mask_mode == "latent" for concept in drawing):
                    latent_mask = torch.cat([
                        sample.mask if concept.args.mask_mode == "latent"
                        else torch.ones_like(sample.latents[:, :1])
                        for concept, sample in zip(drawing, samples, strict=True)])
                with accelerator.autocast():
                    text_states = model.text_encoder(ids)[0].float().to(dtype)

                error = model.loss(latents, noise, timesteps, text_states, latent_mask=latent_mask)
                errors = error.split([len(sample.timesteps) for sample in samples])
                for concept, sample, error in zip(drawing, samples, errors, strict=True):
                    concept.loss = masked_mean(
                        error, sample.mask if concept.args.mask_mode.endswith("loss") else None,
                        concept.args.mask_normalization)
                    concept.parts = [] if sample.mask is None else [
                        masked_mean(error.detach(), mask, "area") for mask in (sample.mask, 1 - sample.mask)]
                accelerator.backward(sum(concept.loss for concept in drawing))
                # A step ends with its concept's epoch.
                drawing = [concept for concept, sample in zip(drawing, samples, strict=True)
                           if not sample.last]
                if not drawing:
                    break
            if num_ranks > 1:
                rows.grad = accelerator.reduce(rows.grad, "mean")
            optimizer.step()
            optimizer.zero_grad()
            if not optimizer.step_was_skipped:
                lr_scheduler.step()

            step += 1
            progress.update(1)
            for concept in training:
                concept.step = step
                concept.waiting.append((step, torch.stack([concept.loss.detach(), *concept.parts]),
                                        lr_scheduler.get_last_lr()[0]))
            saving, keeping, validating = (step % every == 0 for every in (
                args.save_steps, args.checkpointing_steps, args.validation_steps))
            if saving or keeping or step % 10 == 0 or step == args.max_train_steps:
                flush_stats()
            for concept in training:
                if saving and rank == 0:
                    concept.save(f"learned_embeds-steps-{step}", rows)
                if keeping:
                    common = {"step": step, "rows": rows[concept.rows].detach().cpu(),
                              "optimizer": take_rows(optimizer.state_dict(), concept.rows),
                              "lr_scheduler": lr_scheduler.state_dict(), "fingerprint": concept.fingerprint,
                              "scaler": (accelerator.scaler.state_dict()
                                         if accelerator.scaler is not None else None)}
                    own = {"stream": concept.stream.state_dict(), "random": concept.generators.state_dict()}
                    save_checkpoint(concept.output_dir, step, common, own, rank=rank,
                                    barrier=accelerator.wait_for_everyone if num_ranks > 1 else lambda: None)
                    if args.checkpoints_total_limit and rank == 0:
                        prune_checkpoints(concept.output_dir, args.checkpoints_total_limit)
                if validating and concept.args.validation_prompt is not None:
                    validate(accelerator, model, concept, rows)

    for concept in training if rank == 0 else []:
        concept.save("learned_embeds", rows)
        if (name := safe_file_name(concept.args.placeholder_token)) != "learned_embeds":
            # A1111 and ComfyUI take the file's name for the trigger.
            concept.save(name, rows)
        if args.save_as_full_pipeline or args.push_to_hub:
            save_pipeline(model, concept, rows)
        if args.push_to_hub:
            push_to_hub(concept.args)
        print(f"Saved {concept.output_dir / f'learned_embeds.{concept.suffix}'}.")
    if num_ranks > 1:
        accelerator.wait_for_everyone()
    return failures


def validate(accelerator, model, concept: Concept, rows) -> None:
    """Draw the validation pictures, shared among the ranks, onto the disk and into the trackers;
    draws no random number of the training's."""
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from PIL import Image

    from szt_utils.diffusion import evaluating
    from szt_utils.embeddings import ordinary_embedding
    from szt_utils.images import save_png

    args, unet, stream = concept.args, model.unet, concept.stream
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
        tokenizer=concept.tokenizer, text_encoder=model.text_encoder, unet=unet, safety_checker=None,
        torch_dtype=unet.dtype)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(accelerator.device)
    folder = concept.output_dir / "validation"
    with (evaluating(model.text_encoder, unet), torch.no_grad(),
          ordinary_embedding(model.text_encoder, rows[concept.rows]),
          torch.autocast(accelerator.device.type, unet.dtype, enabled=unet.dtype != torch.float32)):
        for i in range(stream.rank, args.num_validation_images, stream.num_ranks):
            generator = torch.Generator(accelerator.device).manual_seed(args.seed + i)
            image = pipeline(args.validation_prompt, num_inference_steps=25, generator=generator,
                             height=args.resolution, width=args.resolution).images[0]
            save_png(image, folder / f"step-{concept.step:05d}-{i}.png")
    if stream.num_ranks > 1:
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        images = [Image.open(path) for path in sorted(folder.glob(f"step-{concept.step:05d}-*.png"))]
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images(f"validation/{concept.name}",
                                          np.stack([np.asarray(i) for i in images]), concept.step,
                                          dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({f"validation/{concept.name}": [
                    wandb.Image(image, caption=f"{i}: {args.validation_prompt}")
                    for i, image in enumerate(images)]}, step=concept.step)


def save_pipeline(model, concept: Concept, rows) -> None:
    """Save the whole pipeline with the new token;
    U-Net and VAE come from their files again, in their own precision."""
    from diffusers import StableDiffusionPipeline

    from szt_utils.embeddings import ordinary_embedding

    args = concept.args
    with ordinary_embedding(model.text_encoder, rows[concept.rows]):
        text_encoder = copy.deepcopy(model.text_encoder)
    StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, safety_checker=None,
        text_encoder=text_encoder.float().cpu(), tokenizer=concept.tokenizer,
    ).save_pretrained(concept.output_dir)


def push_to_hub(args) -> None:
    """Upload the output folder, with a short model card, to the Hub."""
    from huggingface_hub import create_repo, upload_folder

    repo_id = create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True,
                          token=args.hub_token).repo_id
    (Path(args.output_dir) / "README.md").write_text(
        f"---\nbase_model: {args.pretrained_model_name_or_path}\n"
        f"tags: [diffusers, textual_inversion, stable-diffusion]\n---\n# {args.placeholder_token}\n\n"
        f"A textual inversion embedding for {args.pretrained_model_name_or_path}, "
        f"trained with textual_inversion_szt.py. Load it with `pipe.load_textual_inversion(\"{repo_id}\")`; "
        f"the word is `{args.placeholder_token}`.\n")
    upload_folder(repo_id=repo_id, folder_path=args.output_dir, commit_message="Textual inversion embedding",
                  token=args.hub_token, ignore_patterns=["checkpoint-*", ".*", f"{args.logging_dir}/*"])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        train(read_concepts(args, sys.argv[1:] if argv is None else argv) if args.concepts else [args])


if __name__ == "__main__":
    main(sys.argv[1:])
