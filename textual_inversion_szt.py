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
import contextlib
import math
import os
import sys
from pathlib import Path

from szt_utils.errors import InputError, exit_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
    szt.add_argument("--mask_mode", choices=["loss", "image", "latent", "image_and_loss"], default="loss",
                     help="what the mask multiplies (Sec. 5.2.3): the loss, the picture (around mid-grey), "
                          "the noised latent, or the picture and the loss")
    szt.add_argument("--mask_normalization", choices=["none", "area"], default="none",
                     help="mean of the masked loss over all elements, as in Eq. 7, or over the mask's area")
    szt.add_argument("--no_cache_latents", action="store_true",
                     help="encode the pictures at every step instead of once; same result, slower, "
                          "needs no cache")

    add("--pretrained_model_name_or_path", required=True, help="Diffusers folder, or id on the Hub")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model files, e.g. fp16")
    add("--tokenizer_name", help="another tokenizer's folder or id, if it is not the model's")
    add("--train_data_dir", required=True, help="folder of the training pictures")
    add("--placeholder_token", required=True, help="the new word for the concept, e.g. <my-concept>")
    add("--initializer_token", required=True, help="one word near the concept, whose embedding is the start")
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
    for name in ("repeats", "resolution", "train_batch_size", "num_train_epochs", "max_train_steps",
                 "save_steps", "gradient_accumulation_steps", "validation_steps", "checkpointing_steps",
                 "num_vectors", "validation_epochs", "checkpoints_total_limit", "num_validation_images",
                 "lr_num_cycles"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(args, name)}")
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


def read_training_data(args, paths: list[Path]):
    """The pictures as Pillow images at training resolution, JPEG applied, and their dilated masks or None."""
    from szt_utils.images import crop_and_resize, read_image
    from szt_utils.jpeg import jpeg
    from szt_utils.masks import find_masks, prepare_mask, read_mask

    mask_paths = find_masks(args.loss_mask_dir, paths) if args.loss_mask_dir else []
    pictures, masks = [], []
    for i, path in enumerate(paths):
        image = read_image(path)
        if mask_paths:
            mask = read_mask(mask_paths[i], image.size)
            masks.append(prepare_mask(mask, args.resolution, args.center_crop, args.mask_dilation))
            if not masks[-1].any():
                raise InputError(f"The mask '{mask_paths[i]}' is all black after cropping "
                                 "to the training resolution.")
        image = crop_and_resize(image, args.resolution, args.center_crop)
        pictures.append(jpeg(image, args.jpeg_quality) if args.jpeg_quality else image)
    return pictures, masks or None


def train(args: argparse.Namespace) -> None:
    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from tqdm.auto import tqdm
    from transformers import CLIPTextModel, CLIPTokenizer

    from szt_utils.captions import templates_for
    from szt_utils.checkpoints import (
        find_checkpoint,
        list_checkpoints,
        load_checkpoint,
        prune_checkpoints,
        random_state,
        save_checkpoint,
        set_random_state,
    )
    from szt_utils.diffusion import denoising_loss, load_part
    from szt_utils.embeddings import (
        add_placeholder,
        ordinary_words_with,
        placeholder_prompt,
        safe_file_name,
        save_embedding,
        train_rows,
    )
    from szt_utils.images import from_pil, list_images
    from szt_utils.latents import LatentCache, LiveLatents
    from szt_utils.masks import masked_mean, to_latent_grid
    from szt_utils.records import append_stats, provenance, truncate_stats, write_json
    from szt_utils.stream import SampleStream
    from szt_utils.timesteps import check_range, noise_level, sample_timesteps, timestep_weights

    logger = get_logger("textual_inversion_szt")
    output_dir = Path(args.output_dir)
    paths = list_images(args.train_data_dir)
    # Whatever is wrong with the pictures shows before a model is loaded.
    pictures, masks = read_training_data(args, paths)

    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision, log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir,
                                                logging_dir=str(output_dir / args.logging_dir)))
    except ValueError as error:
        raise InputError(f"--mixed_precision {args.mixed_precision} or --report_to {args.report_to} "
                         f"cannot be used here: {error}") from None
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    rank, device = accelerator.process_index, accelerator.device
    if not accelerator.is_main_process:
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            tqdm.write(text)

    def agree(value):  # on what rank 0 says
        return broadcast_object_list([value])[0]

    if args.seed is None:
        args.seed = agree(int.from_bytes(os.urandom(4), "little"))
    set_seed(args.seed, device_specific=True)  # every rank draws its own noise
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"The output folder '{output_dir}' cannot be made ({error.strerror}); "
                             "choose another --output_dir.") from None

    # --- The model, with rows for the new tokens
    source = args.pretrained_model_name_or_path
    weights = dict(revision=args.revision, variant=args.variant)
    tokenizer = (load_part(CLIPTokenizer, args.tokenizer_name, "") if args.tokenizer_name
                 else load_part(CLIPTokenizer, source, "tokenizer", revision=args.revision))
    scheduler = load_part(DDPMScheduler, source, "scheduler", revision=args.revision)
    num_timesteps = scheduler.config.num_train_timesteps
    if args.t_min is None:
        args.t_min = num_timesteps // 2 if args.szt else 0
    args.t_max = num_timesteps if args.t_max is None else args.t_max
    check_range(args.t_min, args.t_max, num_timesteps)
    t_weights = None if args.t_distribution == "uniform" else timestep_weights(
        args.t_distribution, args.t_min, args.t_max, num_timesteps,
        power=args.t_power, center=args.t_center, width=args.t_width)
    text_encoder = load_part(CLIPTextModel, source, "text_encoder", **weights)
    vae = load_part(AutoencoderKL, source, "vae", torch_dtype=dtype, **weights)
    unet = load_part(UNet2DConditionModel, source, "unet", torch_dtype=dtype, **weights)

    vocabulary = list(tokenizer.get_vocab())
    add_placeholder(tokenizer, text_encoder, args.placeholder_token, args.initializer_token, args.num_vectors)
    if words := ordinary_words_with(args.placeholder_token, vocabulary):
        logger.warning(f"The placeholder '{args.placeholder_token}' is part of ordinary words "
                       f"({', '.join(words[:3])}), in which it will be found too; "
                       f"'<{args.placeholder_token}>' would be safe.")
    rows = train_rows(text_encoder, args.num_vectors).rows
    vae.requires_grad_(False)
    unet.requires_grad_(False)
    if args.gradient_checkpointing:
        unet.train()  # checkpointing is off in evaluation mode
        unet.enable_gradient_checkpointing()
        text_encoder.gradient_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise InputError("--enable_xformers_memory_efficient_attention cannot be used here: "
                             f"{error}") from None
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # --- Optimizer, schedule, order of samples
    if args.scale_lr:
        args.learning_rate *= (args.gradient_accumulation_steps * args.train_batch_size
                               * accelerator.num_processes)
    optimizer = torch.optim.AdamW([rows], lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                  weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    templates = templates_for(args.learnable_property)
    stream = SampleStream(len(pictures), args.repeats, templates, args.train_batch_size, rank=rank,
                          num_ranks=accelerator.num_processes, agree=agree)
    steps_per_epoch = math.ceil(stream.batches_per_epoch / args.gradient_accumulation_steps)
    if args.epochs_decide:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    if args.validation_epochs is not None:
        args.validation_steps = args.validation_epochs * steps_per_epoch
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps,
                                 num_training_steps=args.max_train_steps, num_cycles=args.lr_num_cycles)
    text_encoder, optimizer = accelerator.prepare(text_encoder, optimizer)
    unet.to(device)
    vae.to(device)

    # --- Latents and masks
    def picture(i: int) -> torch.Tensor:
        image = from_pil(pictures[i])[0]
        # Multiplying by the mask in the VAE's range [-1, 1] leaves mid-grey outside it.
        return 0.5 + (image - 0.5) * masks[i][0] if masks and args.mask_mode.startswith("image") else image

    scaling_factor = vae.config.scaling_factor
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution < cell:
        raise InputError(f"--resolution must be at least {cell}, one cell of this model's latent grid, "
                         f"but is {args.resolution}.")
    grid = [args.resolution // cell] * 2
    latents_of = (LiveLatents(vae, picture) if args.no_cache_latents
                  else LatentCache(vae, picture, len(pictures), args.train_batch_size))
    del vae  # a cache is all the training needs of it
    latent_masks = None
    if masks:
        latent_masks = torch.stack([to_latent_grid(torch.cat([m, m.flip(-1)]), grid)
                                    for m in masks]).to(device)
        for path, mask in zip(paths, latent_masks, strict=True):
            if not mask.any():
                raise InputError(f"The mask of '{path}' is smaller than a cell of the latent grid "
                                 f"({grid[0]} x {grid[1]}), so nothing would be trained on; "
                                 "give it a --mask_dilation.")

    # --- Where to start: anew, or at a checkpoint
    fingerprint = {"placeholder_token": args.placeholder_token, "num_vectors": args.num_vectors,
                   "embedding width": rows.shape[1], "number of processes": accelerator.num_processes,
                   "pictures": [path.name for path in paths], "repeats": args.repeats,
                   "train_batch_size": args.train_batch_size, "learnable_property": args.learnable_property,
                   "gradient_accumulation_steps": args.gradient_accumulation_steps}
    stats_path, global_step = output_dir / "stats.jsonl", 0
    checkpoint = args.resume_from_checkpoint and find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint:
        common, own = load_checkpoint(checkpoint, fingerprint, rank)
        global_step = common["step"]
        with torch.no_grad():
            rows.copy_(common["rows"])
        optimizer.load_state_dict(common["optimizer"])
        lr_scheduler.load_state_dict(common["lr_scheduler"])
        if accelerator.scaler is not None and common["scaler"] is not None:
            accelerator.scaler.load_state_dict(common["scaler"])
        stream.load_state_dict(own["stream"])
        set_random_state(own["random"])
        tell(f"Resuming from {checkpoint}.")
    elif args.resume_from_checkpoint:
        tell(f"There is no checkpoint in {output_dir} yet: starting anew.")
    elif accelerator.is_main_process and (old := list_checkpoints(output_dir)):
        logger.warning(f"{output_dir} holds {len(old)} checkpoints of an earlier run, "
                       "which this run may replace.")

    def metadata() -> dict[str, str]:
        names = ("szt", "jpeg_quality", "t_min", "t_max", "t_distribution", "loss_mask_dir", "mask_dilation",
                 "mask_mode", "mask_normalization", "learning_rate", "train_batch_size", "resolution", "seed")
        return {"base_model": str(source), "step": str(global_step),
                **{name: str(getattr(args, name)) for name in names}}

    suffix = "bin" if args.no_safe_serialization else "safetensors"

    def save(name: str) -> None:
        save_embedding(output_dir / f"{name}.{suffix}", args.placeholder_token, rows, metadata())

    # Losses not yet read: reading one makes the device wait.
    waiting: list[tuple[int, torch.Tensor, float]] = []

    def flush_stats() -> None:
        records = [{"step": step, "loss": loss.item(), "lr": lr} for step, loss, lr in waiting]
        waiting.clear()
        if bad := [r["step"] for r in records if not math.isfinite(r["loss"])]:
            raise InputError(f"The loss is not a number at step {bad[0]}; files written before are kept. "
                             "Lower --learning_rate, or use bf16 instead of fp16.")
        # The last step's update has no loss to show it yet, but may be about to be saved.
        if not rows.isfinite().all():
            raise InputError(f"The embedding is not finite after step {global_step}; "
                             "files written before are kept. Lower --learning_rate.")
        if records and accelerator.is_main_process:
            append_stats(stats_path, records)
            progress.set_postfix(loss=f"{records[-1]['loss']:.4f}", lr=records[-1]["lr"])
        for record in records:
            accelerator.log({"loss": record["loss"], "lr": record["lr"]}, step=record["step"])

    if accelerator.is_main_process:
        truncate_stats(stats_path, global_step)
        # A secret stays one.
        options = {name: value for name, value in vars(args).items() if name != "hub_token"}
        write_json(output_dir / "options.json", {**options, **provenance()})
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in options.items()}
        accelerator.init_trackers("textual_inversion", config=config)
        low, high = (noise_level(scheduler.alphas_cumprod, args.t_min),
                     noise_level(scheduler.alphas_cumprod, args.t_max - 1))
        tqdm.write(f"{len(pictures)} pictures from {args.train_data_dir}"
                   + (f", JPEG quality {args.jpeg_quality}" if args.jpeg_quality else ", no JPEG"))
        tqdm.write(f"timesteps {args.t_min} to {args.t_max - 1} ({args.t_distribution}): "
                   f"noise level {low[0]:.3f} to {high[0]:.3f}, logSNR {low[1]:.2f} to {high[1]:.2f}")
        tqdm.write("no masks: the loss counts everywhere" if latent_masks is None else
                   f"{len(masks)} masks, mode {args.mask_mode}, dilated by {args.mask_dilation} px: "
                   f"{100 * latent_masks.mean().item():.0f} % of the latent grid is trained on")
        if args.szt and latent_masks is None:
            tqdm.write("--szt without --loss_mask_dir: JPEG and timesteps only, "
                       "the third part of the defence is missing")

    # --- The training
    progress = tqdm(total=args.max_train_steps, initial=min(global_step, args.max_train_steps), desc="Steps",
                    disable=not accelerator.is_local_main_process)
    prompt = placeholder_prompt(args.placeholder_token, args.num_vectors)
    caption_ids = {template: tokenizer(template.format(prompt), padding="max_length", truncation=True,
                                       max_length=tokenizer.model_max_length,
                                       return_tensors="pt").input_ids[0].to(device)
                   for template in templates}
    micro_step = 0
    text_encoder.train()
    with progress:  # closed before any error is told, so that the error has a line of its own
        while global_step < args.max_train_steps:
            batch = next(stream)
            micro_step += 1
            accelerator.sync_gradients = batch.last or micro_step % args.gradient_accumulation_steps == 0
            with (contextlib.nullcontext() if accelerator.sync_gradients
                  else accelerator.no_sync(text_encoder)):
                latents = latents_of.sample(batch.indices, batch.flips) * scaling_factor
                noise = torch.randn_like(latents)
                timesteps = sample_timesteps(len(latents), args.t_min, args.t_max, t_weights, device=device)
                mask = (None if latent_masks is None
                        else latent_masks[batch.indices, [int(f) for f in batch.flips]])
                ids = torch.stack([caption_ids[template] for template in batch.templates])
                text_states = text_encoder(ids)[0].to(dtype)

                error = denoising_loss(unet, scheduler, latents, noise, timesteps, text_states,
                                       latent_mask=mask if args.mask_mode == "latent" else None)
                loss = masked_mean(error, mask if args.mask_mode.endswith("loss") else None,
                                   args.mask_normalization)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            micro_step = 0
            if not optimizer.step_was_skipped:
                lr_scheduler.step()
            global_step += 1
            progress.update(1)
            waiting.append((global_step, loss.detach(), lr_scheduler.get_last_lr()[0]))
            saving, keeping, validating = (global_step % every == 0 for every in (
                args.save_steps, args.checkpointing_steps, args.validation_steps))
            if saving or keeping or len(waiting) == 10 or global_step == args.max_train_steps:
                flush_stats()
            if saving and accelerator.is_main_process:
                save(f"learned_embeds-steps-{global_step}")
            if keeping:
                common = {"step": global_step, "rows": rows.detach().cpu(),
                          "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict(),
                          "fingerprint": fingerprint,
                          "scaler": (accelerator.scaler.state_dict()
                                     if accelerator.scaler is not None else None)}
                save_checkpoint(output_dir, global_step, common,
                                {"stream": stream.state_dict(), "random": random_state()},
                                rank=rank, barrier=accelerator.wait_for_everyone)
                if args.checkpoints_total_limit and accelerator.is_main_process:
                    prune_checkpoints(output_dir, args.checkpoints_total_limit)
            if validating and args.validation_prompt is not None:
                validate(args, accelerator, tokenizer, text_encoder, unet, global_step)

    # --- What remains
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save("learned_embeds")
        if safe_file_name(args.placeholder_token) != "learned_embeds":
            # A1111 and ComfyUI take the file's name for the trigger.
            save(safe_file_name(args.placeholder_token))
        if args.save_as_full_pipeline or args.push_to_hub:
            save_pipeline(args, accelerator.unwrap_model(text_encoder, keep_fp32_wrapper=False), tokenizer)
        if args.push_to_hub:
            push_to_hub(args)
        print(f"Saved {output_dir / f'learned_embeds.{suffix}'}.")
    accelerator.end_training()


def validate(args, accelerator, tokenizer, text_encoder, unet, step: int) -> None:
    """Draw the validation pictures, shared among the ranks, onto the disk and into the trackers;
    draws no global random number."""
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from PIL import Image

    from szt_utils.diffusion import evaluating
    from szt_utils.images import save_png

    pipeline = StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, tokenizer=tokenizer,
        text_encoder=accelerator.unwrap_model(text_encoder), unet=unet, safety_checker=None,
        torch_dtype=unet.dtype)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(accelerator.device)
    folder = Path(args.output_dir) / "validation"
    with evaluating(pipeline.text_encoder, unet), torch.no_grad(), torch.autocast(
            accelerator.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
        for i in range(accelerator.process_index, args.num_validation_images, accelerator.num_processes):
            generator = torch.Generator(accelerator.device).manual_seed(args.seed + i)
            image = pipeline(args.validation_prompt, num_inference_steps=25, generator=generator,
                             height=args.resolution, width=args.resolution).images[0]
            save_png(image, folder / f"step-{step:05d}-{i}.png")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        images = [Image.open(path) for path in sorted(folder.glob(f"step-{step:05d}-*.png"))]
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", np.stack([np.asarray(i) for i in images]), step,
                                          dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"validation": [wandb.Image(image, caption=f"{i}: {args.validation_prompt}")
                                            for i, image in enumerate(images)]}, step=step)


def save_pipeline(args, text_encoder, tokenizer) -> None:
    """Save the whole pipeline with the new token;
    U-Net and VAE come from their files again, in their own precision."""
    from diffusers import StableDiffusionPipeline

    from szt_utils.embeddings import write_rows_back

    write_rows_back(text_encoder)
    StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, safety_checker=None,
        text_encoder=text_encoder.float().cpu(), tokenizer=tokenizer).save_pretrained(args.output_dir)


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
        train(args)


if __name__ == "__main__":
    main(sys.argv[1:])
