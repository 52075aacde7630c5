"""musubi-tuner: two TOML files, no masks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .buckets import area_buckets
from .config_files import Config, to_toml
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

__all__ = ["MUSUBI"]

_FILES = "/path/to/"


def _configs(plan: Plan) -> dict[str, str]:
    general = {"resolution": [plan.resolution, plan.resolution], "caption_extension": ".txt", "batch_size": 1,
               "enable_bucket": True, "bucket_no_upscale": True}
    dataset = {"image_directory": plan.images, "cache_directory": f"{plan.output}/cache", "num_repeats": 10}
    settings: dict[str, Any] = {
        "dit": f"{_FILES}dit.safetensors", "vae": f"{_FILES}vae.safetensors",
        "text_encoder": f"{_FILES}text_encoder.safetensors", "dataset_config": plan.file("dataset.toml"),
        "network_module": MUSUBI.model(plan)[1], "network_dim": RANK, "network_alpha": RANK,
        "learning_rate": LEARNING_RATE, "max_train_steps": MAX_TRAIN_STEPS, "optimizer_type": "adamw",
        "mixed_precision": "bf16", "sdpa": True, "gradient_checkpointing": True, "seed": 0,
        "weighting_scheme": "none", "timestep_sampling": "uniform", "min_timestep": plan.zone.t_min,
        "max_timestep": plan.family.num_timesteps, "output_dir": plan.output, "output_name": "szt"}
    return {"dataset.toml": to_toml({"general": general, "datasets": [dataset]}),
            "config.toml": to_toml(settings)}


def _command(plan: Plan) -> str:
    script, dataset = f"src/musubi_tuner/{MUSUBI.model(plan)[0]}", plan.quoted("dataset.toml")
    return (f"python {script}_cache_latents.py --dataset_config {dataset} --vae {_FILES}vae.safetensors\n"
            f"python {script}_cache_text_encoder_outputs.py --dataset_config {dataset} "
            f"--text_encoder {_FILES}text_encoder.safetensors\n"
            f"accelerate launch {script}_train_network.py --config_file {plan.quoted('config.toml')}")


def _traps(plan: Plan) -> list[str]:
    t_min, steps = plan.zone.t_min, plan.family.num_timesteps
    return ["It has no masked loss: only JPEG and timesteps protect here. Masks are not exported.",
            "With the default `timestep_sampling` sigma, the range counts from pure noise down: "
            f"`--min_timestep {t_min}` would train where poisons act, and `--max_timestep {steps - t_min}` "
            "is right. Keep `uniform`."]


def _sources(plan: Plan, config: Config) -> list[Source]:
    sources = []
    for dataset in config.tables("datasets"):
        given = config.settings | dataset
        sources.append(Source(Path(dataset.get("image_directory", "")), None,
                              read_size(given.get("resolution")),
                              is_fixed=not config.flag("enable_bucket", among=given)))
    return sources


def _check(plan: Plan, config: Config) -> Iterator[str]:
    settings, t_min, steps = config.settings, plan.zone.t_min, plan.family.num_timesteps
    for dataset in config.tables("datasets"):
        if not config.flag("bucket_no_upscale", among=settings | dataset):
            yield "bucket_no_upscale is not true, so images are resized again; set it to true."
    low, high = config.number("min_timestep", 0), config.number("max_timestep", steps)
    if settings.get("timestep_sampling", "sigma") != "sigma":
        yield from range_findings(plan, low, high, ("min_timestep", "max_timestep"))
        return
    shift = config.number("discrete_flow_shift", 1)
    reached = steps * shifted(1 - (high - 1) / steps, shift) if shift > 0 else 0
    if low >= steps - t_min:
        yield (f"min_timestep {low:g} is the wrong way round: with timestep_sampling sigma it counts from "
               f"pure noise down, so training draws only timesteps below {t_min}, where poisons act; set "
               "timestep_sampling to uniform.")
    elif round(reached) < t_min:
        yield (f"With timestep_sampling sigma, max_timestep {high:g} and discrete_flow_shift {shift:g}, "
               f"training reaches timestep {reached:.0f}, below {t_min}, where poisons act; set "
               f"timestep_sampling to uniform and min_timestep to {t_min}.")


MUSUBI = Trainer(
    name="musubi", title="musubi-tuner", version="0.3.4 (30c658c, 2026-06-24)",
    models={"qwen-image": ("qwen_image", "networks.lora_qwen_image"),
            "z-image": ("zimage", "networks.lora_zimage")},
    buckets=area_buckets, mask_name=None, configs=_configs, command=_command, traps=_traps, sources=_sources,
    check=_check, kept_step=16, image_suffixes=(".avif", ".bmp", ".jpeg", ".jpg", ".png", ".webp"))
