"""OneTrainer: one JSON file, masks `<stem>-masklabel.png` beside their images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .buckets import aspect_buckets
from .config_files import Config
from .trainer import (
    LEARNING_RATE,
    MAX_TRAIN_STEPS,
    RANK,
    Plan,
    Source,
    Trainer,
    range_findings,
    read_size,
    shifted,
)

__all__ = ["ONETRAINER"]

# Distributions that are shifted after they are scaled to the range, so that a shift moves its ends.
_SHIFTED = ("UNIFORM", "LOGIT_NORMAL", "HEAVY_TAIL", "BETA")


def _configs(plan: Plan) -> dict[str, str]:
    concept = {"__version": 2, "name": plan.token, "path": plan.images, "balancing": 10.0,
               "image": {"enable_crop_jitter": False, "enable_random_flip": False},
               "text": {"prompt_source": "sample"}}
    frozen = {"train": False, "weight_dtype": "BFLOAT_16"}
    settings: dict[str, Any] = {
        "__version": 11, "training_method": "LORA", "model_type": ONETRAINER.model(plan),
        "base_model_name": plan.family.repository,
        "output_model_destination": f"{plan.output}/szt.safetensors",
        "workspace_dir": f"{plan.output}/workspace", "cache_dir": f"{plan.output}/cache",
        "resolution": str(plan.resolution), "aspect_ratio_bucketing": True, "concepts": [concept],
        "samples": [],  # else it looks for a file that only its window writes
        "batch_size": 1, "learning_rate": LEARNING_RATE, "lora_rank": RANK, "lora_alpha": float(RANK),
        "epochs": max(1, MAX_TRAIN_STEPS // (10 * max(1, len(plan.captions)))), "train_dtype": "BFLOAT_16",
        "transformer" if plan.family.flow else "unet": {"train": True, "weight_dtype": "BFLOAT_16"},
        "text_encoder": frozen, "text_encoder_2": frozen, "text_encoder_3": frozen,
        "vae": {"weight_dtype": "FLOAT_32"},
        "masked_training": plan.has_masks, "unmasked_weight": 0.0, "unmasked_probability": 0.0,
        "timestep_distribution": "UNIFORM",
        "min_noising_strength": plan.zone.t_min / plan.family.num_timesteps,
        "max_noising_strength": 1.0, "timestep_shift": 1.0, "dynamic_timestep_shifting": False}
    if plan.min_snr_gamma:
        settings |= {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": plan.min_snr_gamma}
    return {"config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}


def _command(plan: Plan) -> str:
    return f"python scripts/train.py --config-path {plan.quoted('config.json')}"


def _traps(plan: Plan) -> list[str]:
    return ["`unmasked_weight` is 0.1 by default, which keeps a tenth of the background's loss.",
            "An image without a mask file is trained on everywhere, without a warning.",
            "The timestep shift is applied after the range and moves it: keep `timestep_shift` 1 and "
            "`dynamic_timestep_shifting` off.",
            "Masks must be PNG files."]


def _concepts(config: Config) -> list[dict[str, Any]]:
    listed = [entry for document in config.documents if isinstance(document, list) for entry in document]
    return [entry for entry in [*config.tables("concepts"), *listed] if entry.get("enabled", True)]


def _sources(plan: Plan, config: Config) -> list[Source]:
    sources = []
    for entry in _concepts(config):
        image, sizes = entry.get("image") or {}, config.settings.get("resolution")
        if config.flag("enable_resolution_override", among=image):
            sizes = image.get("resolution_override")
        folder, has_buckets = Path(entry.get("path", "")), config.flag("aspect_ratio_bucketing", True)
        sources += [Source(folder, folder, read_size(size), is_fixed="x" in size or not has_buckets,
                           is_recursive=config.flag("include_subdirectories", among=entry))
                    for size in str(sizes or 0).split(",")]  # one of which is drawn for each image
    return sources


def _check(plan: Plan, config: Config) -> Iterator[str]:
    settings = config.settings
    if not config.flag("masked_training"):
        yield "masked_training is off, so the masks are not used; set it to true."
    elif weight := config.number("unmasked_weight", 0.1):
        yield (f"unmasked_weight is {weight:g}, so this share of the background's loss stays; set it to 0"
               f"{'' if 'unmasked_weight' in settings else ' (it is 0.1 unless it is set)'}.")
    steps = plan.family.num_timesteps
    low = config.number("min_noising_strength", 0)
    found = list(range_findings(plan, low, config.number("max_noising_strength", 1),
                                ("min_noising_strength", "max_noising_strength"), steps))
    yield from found
    if config.flag("dynamic_timestep_shifting"):
        yield "dynamic_timestep_shifting moves the range of timesteps; turn it off."
    shift = config.number("timestep_shift", 1)
    if settings.get("timestep_distribution", "UNIFORM") in _SHIFTED and not found and shift > 0:
        moved = shifted(low, shift)
        if round(moved * steps) < plan.zone.t_min:
            yield (f"timestep_shift {shift:g} moves min_noising_strength from {low:g} to {moved:.3f}, below "
                   f"{plan.zone.t_min / steps:g}; set timestep_shift to 1.")
    for entry in _concepts(config):
        if (entry.get("image") or {}).get("enable_crop_jitter", True):
            yield (f"enable_crop_jitter is on for the concept '{entry.get('name') or entry.get('path')}'; "
                   "turn it off, so that images keep their JPEG blocks.")


ONETRAINER = Trainer(
    name="onetrainer", title="OneTrainer", version="23df383 (2026-08-19)",
    models={"sd15": "STABLE_DIFFUSION_15", "sd2": "STABLE_DIFFUSION_21",
            "sdxl": "STABLE_DIFFUSION_XL_10_BASE", "sd3": "STABLE_DIFFUSION_3", "flux": "FLUX_DEV_1",
            "qwen-image": "QWEN", "z-image": "Z_IMAGE"},
    buckets=aspect_buckets, mask_name="images/{}-masklabel.png", configs=_configs, command=_command,
    traps=_traps, sources=_sources, check=_check,
    has_min_snr=lambda config: config.settings.get("loss_weight_fn") == "MIN_SNR_GAMMA",
    min_snr="loss_weight_fn to MIN_SNR_GAMMA and loss_weight_strength to 5",
    image_suffixes=(".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    mask_suffixes=(".png",))
