"""ai-toolkit: one YAML file, masks by file name in a folder of their own, timesteps counted from noise."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from .buckets import area_buckets
from .config_files import Config
from .trainer import LEARNING_RATE, MAX_TRAIN_STEPS, RANK, Plan, Source, Trainer, read_size

__all__ = ["AI_TOOLKIT"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _drawn(plan: Plan, low: float, high: float) -> tuple[float, float]:
    """The first and the last index that are drawn with min_denoising_steps and max_denoising_steps.

    They count the timesteps from pure noise down. Without any between them, `low` itself is drawn.
    """
    high, margin = min(high, plan.family.num_timesteps - 1), 0 if plan.family.flow else 1
    return (low, low) if low == high else (low + margin, high - 1 - margin)


def _zone_size(plan: Plan, timestep_type: str = "linear") -> int:
    """How many of the timesteps from pure noise down are in the zone.

    "sigmoid" makes the table's entries the quantiles of the sigmoid of a normal.
    """
    steps, t_min = plan.family.num_timesteps, plan.zone.t_min
    if timestep_type == "sigmoid" and t_min:
        return int(steps * NormalDist().cdf(math.log((steps - t_min) / t_min)))
    return steps - t_min


def _last_step(plan: Plan, timestep_type: str = "linear") -> int:
    """The max_denoising_steps, with a minimum of 0, that keeps all draws in the zone.

    The draws for diffusion models leave out the first timestep, unless it is the zone's only one.
    """
    size = _zone_size(plan, timestep_type)
    return size if plan.family.flow else size + 1 if size > 1 else 0


def _configs(plan: Plan) -> dict[str, str]:
    dataset: dict[str, Any] = {"folder_path": plan.images, "caption_ext": "txt",
                               "resolution": [plan.resolution], "cache_latents_to_disk": True}
    if plan.has_masks:
        dataset |= {"mask_path": plan.masks, "mask_min_value": 0.0}
    train = {"batch_size": 1, "steps": MAX_TRAIN_STEPS, "lr": LEARNING_RATE, "optimizer": "adamw",
             "train_unet": True, "train_text_encoder": False, "gradient_checkpointing": True, "dtype": "bf16",
             "noise_scheduler": "flowmatch" if plan.family.flow else "ddpm", "content_or_style": "balanced",
             "min_denoising_steps": 0, "max_denoising_steps": _last_step(plan)}
    if plan.family.flow:
        train["timestep_type"] = "linear"
    if plan.min_snr_gamma:
        train["min_snr_gamma"] = plan.min_snr_gamma
    process = {"type": "sd_trainer", "training_folder": plan.output, "device": "cuda:0",
               "network": {"type": "lora", "linear": RANK, "linear_alpha": RANK},
               "save": {"dtype": "float16", "save_every": 250}, "datasets": [dataset], "train": train,
               "model": {"name_or_path": plan.family.repository, "arch": AI_TOOLKIT.model(plan)},
               "sample": {"sampler": train["noise_scheduler"], "sample_every": 250, "width": plan.resolution,
                          "height": plan.resolution, "prompts": [f"a photo of {plan.token}"]}}
    if plan.family.name == "sd2":
        process["model"]["is_v_pred"] = True
    document = {"job": "extension", "config": {"name": "szt", "process": [process]}}
    return {"config.yaml": yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}


def _command(plan: Plan) -> str:
    return f"python run.py {plan.quoted('config.yaml')}"


def _traps(plan: Plan) -> list[str]:
    traps = ["`min_denoising_steps` and `max_denoising_steps` count from pure noise down: "
             f"`max_denoising_steps: {_last_step(plan)}` is t >= {plan.zone.t_min}, and a "
             "`min_denoising_steps` of 500 would train where poisons act.",
             "An image without a mask, in a batch with one that has a mask, is not trained on at all.",
             "Masks need `buckets: true`, the default. They are blurred a little, at random."]
    if plan.family.flow:
        last = _last_step(plan, "sigmoid")
        traps.append("The default `timestep_type: sigmoid` draws other timesteps at the same index; " + (
            f"there it would be `max_denoising_steps: {last}`." if last else "there none is in the zone."))
    return traps


def _processes(config: Config) -> list[dict[str, Any]]:
    return config.tables("config", "process")


def _sources(plan: Plan, config: Config) -> list[Source]:
    sources = []
    for dataset in (entry for process in _processes(config) for entry in process.get("datasets", [])):
        sizes, masks = dataset.get("resolution", 512), dataset.get("mask_path")
        sources += [Source(Path(dataset.get("folder_path", "")), Path(masks) if masks else None,
                           read_size(size), has_alpha=config.flag("alpha_mask", among=dataset),
                           is_fixed=not config.flag("buckets", True, dataset))
                    for size in (sizes if isinstance(sizes, list) else [sizes]) if not dataset.get("is_reg")]
    return sources


def _check(plan: Plan, config: Config) -> Iterator[str]:
    for process in _processes(config):
        train, family = process.get("train", {}), plan.family
        kind, needed = train.get("noise_scheduler", "ddpm"), "flowmatch" if family.flow else "ddpm"
        if kind != needed:
            yield f"noise_scheduler is {kind}; set it to {needed} for {family.title}."
        form = train.get("timestep_type", "sigmoid") if family.flow else "linear"
        size = _zone_size(plan, form)
        form = form if size else "linear"
        last = _last_step(plan, form)
        low, high = (config.number(f"{end}_denoising_steps", default, train)
                     for end, default in (("min", 0), ("max", 999)))
        first, end = _drawn(plan, low, high)
        if first >= size > 0:
            yield (f"min_denoising_steps {low:g} is the wrong way round: it counts from pure noise down, so "
                   f"training draws only timesteps below {plan.zone.t_min}, where poisons act; set it to 0 "
                   f"and max_denoising_steps to {last}.")
        elif end >= size:
            yield (f"max_denoising_steps is {high:g}, so training reaches timesteps below {plan.zone.t_min}, "
                   f"where poisons act; set it to {last}{f' with timestep_type {form}' * family.flow}.")
        if form not in ("linear", "weighted", "sigmoid"):
            yield f"timestep_type {form} moves the timesteps at max_denoising_steps; set it to linear."
        for dataset in process.get("datasets", []):
            if config.number("mask_min_value", 0, dataset) > 0:
                yield (f"mask_min_value is {dataset['mask_min_value']}, so this share of the background's "
                       "loss stays; set it to 0.")
            if config.flag("invert_mask", among=dataset):
                yield "invert_mask trains on the background; set it to false."
            if dataset.get("mask_path") and not config.flag("buckets", True, dataset):
                yield "buckets is false, which ai-toolkit refuses for images with masks; set it to true."


AI_TOOLKIT = Trainer(
    name="ai-toolkit", title="ai-toolkit", version="27a03a9 (2026-08-21)",
    models={"sd15": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux",
            "qwen-image": "qwen_image", "z-image": "zimage"},
    buckets=area_buckets, mask_name="masks/{}.png", configs=_configs, command=_command, traps=_traps,
    sources=_sources, check=_check, kept_step=32, image_suffixes=_SUFFIXES, mask_suffixes=_SUFFIXES,
    is_recursive=True, min_snr="min_snr_gamma to 5",
    has_min_snr=lambda config: all(config.number("min_snr_gamma", 0, process.get("train", {}))
                                   for process in _processes(config)))
