"""SimpleTuner: two JSON files, masks of the images' names in a data set of their own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .buckets import rounded_buckets
from .config_files import Config
from .trainer import LEARNING_RATE, MAX_TRAIN_STEPS, RANK, Plan, Source, Trainer, range_findings, read_size

__all__ = ["SIMPLETUNER"]

_WEIGHT = 1e6  # of the range, relative to the timesteps outside of it
_MASKS = "Every image needs a mask of its very name, suffix included, with the same crop settings."
_LAYOUT = ("resolution", "resolution_type", "crop", "crop_style", "crop_aspect")


def _flow_timesteps(plan: Plan) -> list[int]:
    """Every twentieth timestep from pure noise down to the zone's begin, rising."""
    return list(range(plan.family.num_timesteps, plan.zone.t_min - 1, -20))[::-1]


def _configs(plan: Plan) -> dict[str, str]:
    layout = dict(zip(_LAYOUT, (plan.resolution, "pixel_area", True, "center", "preserve"), strict=True))
    images = {"id": "images", "type": "local", "dataset_type": "image", "instance_data_dir": plan.images,
              "caption_strategy": "textfile", "cache_dir_vae": f"{plan.output}/cache/vae", "repeats": 9,
              **layout}
    datasets: list[dict[str, Any]] = [images]
    if plan.has_masks:
        images["conditioning_data"] = "masks"
        datasets.append({"id": "masks", "type": "local", "dataset_type": "conditioning",
                         "conditioning_type": "mask", "instance_data_dir": plan.masks, **layout})
    datasets.append({"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True,
                     "cache_dir": f"{plan.output}/cache/text"})
    settings: dict[str, Any] = {
        "model_type": "lora", "lora_type": "standard", "lora_rank": RANK,
        "model_family": SIMPLETUNER.model(plan), "pretrained_model_name_or_path": plan.family.repository,
        "data_backend_config": plan.file("multidatabackend.json"), "output_dir": plan.output,
        "resolution": plan.resolution, "resolution_type": "pixel_area", "aspect_bucket_alignment": 64,
        "aspect_bucket_rounding": 2, "disable_bucket_pruning": True, "train_batch_size": 1,
        "max_train_steps": MAX_TRAIN_STEPS, "num_train_epochs": 0, "learning_rate": LEARNING_RATE,
        "optimizer": "adamw_bf16", "lr_scheduler": "constant", "mixed_precision": "bf16",
        "gradient_checkpointing": True, "caption_dropout_probability": 0.0, "seed": 0, "report_to": "none",
        "validation_prompt": f"a photo of {plan.token}"}
    if plan.family.flow:
        settings["flow_custom_timesteps"] = ",".join(map(str, _flow_timesteps(plan)))
    else:
        settings |= {"timestep_bias_strategy": "range", "timestep_bias_begin": plan.zone.t_min,
                     "timestep_bias_end": plan.family.num_timesteps, "timestep_bias_multiplier": _WEIGHT,
                     "disable_segmented_timestep_sampling": True}
    if plan.min_snr_gamma:
        settings["snr_gamma"] = plan.min_snr_gamma
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            for name, content in (("config.json", settings), ("multidatabackend.json", datasets))}


def _command(plan: Plan) -> str:
    return (f"mkdir -p config/szt && cp {plan.quoted('config.json')} config/szt/\n"
            "simpletuner train env=szt config_backend=json")


def _traps(plan: Plan) -> list[str]:
    if plan.family.flow:
        return ["`timestep_bias_*` is ignored for flow models; `flow_custom_timesteps` lists the timesteps, "
                "and no shift moves them.",
                _MASKS]
    return ["Batches of more than one image are spread over all timesteps, whatever the bias says, unless "
            "`disable_segmented_timestep_sampling` is true.",
            "Timesteps outside of the range keep the weight 1, so the multiplier must be large.",
            _MASKS]


def _datasets(config: Config) -> dict[str, dict[str, Any]]:
    return {entry.get("id", ""): entry for document in config.documents if isinstance(document, list)
            for entry in document if not entry.get("disabled")}


def _images(config: Config) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The data sets of images, each with those of its masks."""
    datasets = _datasets(config)
    pairs = []
    for entry in datasets.values():
        if entry.get("dataset_type", "image") == "image":
            named = entry.get("conditioning_data") or []
            masks = [datasets.get(name, {}) for name in ([named] if isinstance(named, str) else named)]
            pairs.append((entry, [mask for mask in masks if mask.get("conditioning_type") == "mask"]))
    return pairs


def _sources(plan: Plan, config: Config) -> list[Source]:
    return [Source(Path(entry.get("instance_data_dir", "")),
                   Path(masks[0].get("instance_data_dir", "")) if masks else None,
                   read_size(entry.get("resolution")))
            for entry, masks in _images(config)]


def _check(plan: Plan, config: Config) -> Iterator[str]:
    yield from _check_timesteps(plan, config)
    linked = [mask.get("id") for _, masks in _images(config) for mask in masks]
    for name, entry in _datasets(config).items():
        if entry.get("dataset_type") == "conditioning" and name not in linked:
            yield (f"The data set '{name}' is not used as masks: it needs conditioning_type mask, and the "
                   f"images' data set needs conditioning_data '{name}'.")
    for entry, masks in _images(config):
        for key in _LAYOUT:
            if any(mask.get(key) != entry.get(key) for mask in masks):
                yield (f"{key} differs between '{entry.get('id')}' and its masks, so they do not lie on each "
                       "other; make it the same.")


def _check_timesteps(plan: Plan, config: Config) -> Iterator[str]:
    settings, t_min = config.settings, plan.zone.t_min
    if plan.family.flow:
        if settings.get("timestep_bias_strategy", "none") != "none":
            yield (f"timestep_bias_strategy is ignored for {plan.family.title}; set flow_custom_timesteps "
                   "instead.")
        lowest = min(_listed(settings.get("flow_custom_timesteps")), default=0)
        if lowest < t_min:
            yield (f"flow_custom_timesteps {'begins at' if lowest else 'is not set, so training begins at'} "
                   f"{lowest:g}, below {t_min}, where poisons act; set it to "
                   f"{','.join(map(str, _flow_timesteps(plan)[:2]))},...,{plan.family.num_timesteps}.")
        return
    if settings.get("flow_custom_timesteps"):
        yield f"flow_custom_timesteps is ignored for {plan.family.title}; set timestep_bias_strategy instead."
    if settings.get("timestep_bias_strategy", "none") != "range":
        yield (f"timestep_bias_strategy is not range, so training reaches timesteps below {t_min}, where "
               f"poisons act; set it to range, timestep_bias_begin to {t_min} and timestep_bias_multiplier "
               f"to {_WEIGHT:g}.")
        return
    yield from range_findings(plan, config.number("timestep_bias_begin", 0),
                              config.number("timestep_bias_end", plan.family.num_timesteps),
                              ("timestep_bias_begin", "timestep_bias_end"))
    weight = config.number("timestep_bias_multiplier", 1)
    if weight < 1000:
        yield (f"timestep_bias_multiplier is {weight:g}, so timesteps below {t_min} are drawn too often; set "
               f"it to {_WEIGHT:g}.")
    if not config.flag("disable_segmented_timestep_sampling") and config.number("train_batch_size", 4) > 1:
        yield ("Batches of more than one image are spread over all timesteps, whatever the bias says; set "
               "disable_segmented_timestep_sampling to true.")


def _listed(value: Any) -> list[float]:
    """The timesteps of `flow_custom_timesteps`: a list, or text with commas; up to 1 they are sigmas."""
    parts = value if isinstance(value, list) else str(value or "").strip("[] ").replace(";", ",").split(",")
    numbers = [float(part) for part in parts if str(part).strip()]
    return [1000 * number for number in numbers] if numbers and max(numbers) <= 1 else numbers


SIMPLETUNER = Trainer(
    name="simpletuner", title="SimpleTuner", version="bc8e6ab (2026-08-22)",
    models={"sd15": "sd1x", "sd2": "sd2x", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux",
            "qwen-image": "qwen_image", "z-image": "z_image"},
    buckets=rounded_buckets, mask_name="masks/{}.png", configs=_configs, command=_command, traps=_traps,
    sources=_sources, check=_check, has_min_snr=lambda config: bool(config.number("snr_gamma", 0)),
    min_snr="snr_gamma to 5", mask_suffixes=None, is_recursive=True)
