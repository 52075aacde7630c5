"""diffusion-pipe: two TOML files, masks by file name in a folder of their own, no range of timesteps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .buckets import area_buckets
from .config_files import Config, to_toml
from .trainer import (
    LEARNING_RATE,
    MAX_TRAIN_STEPS,
    RANK,
    SIGMOID_SCALE,
    Plan,
    Source,
    Trainer,
    flux_shift,
    share_findings,
    share_in_zone,
)

__all__ = ["DIFFUSION_PIPE"]

_FILES = "/path/to/"


def _sampling(plan: Plan) -> str:
    return f"timestep_sample_method logit_normal, shift {plan.shift:g} and sigmoid_scale {SIGMOID_SCALE:g}"


def _configs(plan: Plan) -> dict[str, str]:
    directory: dict[str, Any] = {"path": plan.images, "num_repeats": 10}
    if plan.has_masks:
        directory["mask_path"] = plan.masks
    dataset = {"size_buckets": [[*size, 1] for size in plan.sizes], "directory": [directory]}
    settings = {"output_dir": plan.output, "dataset": plan.file("dataset.toml"), "epochs": 1000,
                "max_steps": MAX_TRAIN_STEPS, "micro_batch_size_per_gpu": 1, "pipeline_stages": 1,
                "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "warmup_steps": 10,
                "save_every_n_steps": 250, "checkpoint_every_n_minutes": 120,
                "activation_checkpointing": True, "partition_method": "parameters", "save_dtype": "bfloat16",
                "caching_batch_size": 1, "steps_per_print": 1, "model": _model(plan),
                "adapter": {"type": "lora", "rank": RANK, "dtype": "bfloat16"},
                "optimizer": {"type": "adamw_optimi", "lr": LEARNING_RATE}}
    return {"dataset.toml": to_toml(dataset), "config.toml": to_toml(settings)}


def _model(plan: Plan) -> dict[str, Any]:
    kind = DIFFUSION_PIPE.model(plan)
    if kind == "sdxl":
        return {"type": kind, "checkpoint_path": f"{_FILES}sd_xl_base_1.0.safetensors", "dtype": "bfloat16"}
    files: dict[str, Any] = {"diffusers_path": f"{_FILES}{plan.family.repository.partition('/')[2]}"}
    if kind == "z_image":
        files = {"diffusion_model": f"{_FILES}z_image_bf16.safetensors",
                 "vae": f"{_FILES}flux_vae.safetensors",
                 "text_encoders": [{"path": f"{_FILES}qwen_3_4b.safetensors", "type": "lumina2"}]}
    return {"type": kind, "dtype": "bfloat16", "timestep_sample_method": "logit_normal", "shift": plan.shift,
            "sigmoid_scale": SIGMOID_SCALE, **files}


def _command(plan: Plan) -> str:
    return f"deepspeed --num_gpus=1 train.py --deepspeed --config {plan.quoted('config.toml')}"


def _traps(plan: Plan) -> list[str]:
    traps = ["`min_t` and `max_t` count for Wan only; for all other models they are ignored.",
             "An image without a mask is trained on everywhere, with a warning; a mask of another size ends "
             "the training."]
    if plan.family.flow:
        share = share_in_zone(plan, plan.shift, SIGMOID_SCALE)
        return [*traps, f"The nearest to a range is {_sampling(plan)}, as in config.toml, which draws "
                        f"{share:.1%} at {plan.zone.t_min} or above."]
    return [*traps, f"For {plan.family.title} the timesteps cannot be chosen: only JPEG and masks protect "
                    "here. Other trainers can do more."]


def _sources(plan: Plan, config: Config) -> list[Source]:
    sources = []
    for directory in config.tables("directory"):
        masks = directory.get("mask_path")
        sources.append(Source(Path(directory.get("path", "")), Path(masks) if masks else None))
    return sources


def _check(plan: Plan, config: Config) -> Iterator[str]:
    models = [document["model"] for document in config.documents
              if isinstance(document, dict) and isinstance(document.get("model"), dict)]
    for document in config.documents:
        for directory in Config([document]).tables("directory"):
            if "size_buckets" not in document | directory:
                yield ("size_buckets is not set, so images are resized again; set it to the images' sizes, "
                       "each [width, height, 1].")
    for model in models:
        for name in ("min_t", "max_t"):
            if name in model and model.get("type") != "wan":
                yield f"{name} is ignored for {plan.family.title}; set {_sampling(plan)} instead."
        if plan.family.flow:
            sampling = model.get("timestep_sample_method", "logit_normal")
            default = flux_shift(plan.resolution) if config.flag("flux_shift", among=model) else 1
            scale = config.number("sigmoid_scale", 1, model) if sampling == "logit_normal" else None
            yield from share_findings(plan, config.number("shift", default, model), scale,
                                      _sampling(plan))


DIFFUSION_PIPE = Trainer(
    name="diffusion-pipe", title="diffusion-pipe", version="8f83dbf (2026-08-20)",
    models={"sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "qwen-image": "qwen_image", "z-image": "z_image"},
    buckets=area_buckets, mask_name="masks/{}.png", configs=_configs, command=_command, traps=_traps,
    sources=_sources, check=_check)
