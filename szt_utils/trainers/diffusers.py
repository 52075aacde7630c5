"""The LoRA scripts of Diffusers, patched by `szt_utils.patch`: square images, captions in metadata.jsonl."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..image_formats import SUFFIXES
from .buckets import square
from .config_files import Config
from .trainer import LEARNING_RATE, MAX_TRAIN_STEPS, RANK, Plan, Source, Trainer, range_findings, read_size

__all__ = ["DIFFUSERS"]


def _configs(plan: Plan) -> dict[str, str]:
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n"
             for name, text in plan.captions.items()]
    return {"images/metadata.jsonl": "".join(lines), "train.sh": _script(plan)}


def _script(plan: Plan) -> str:
    folder, script = DIFFUSERS.model(plan)
    flags: dict[str, Any] = {"pretrained_model_name_or_path": plan.family.repository}
    if folder == "text_to_image":
        flags |= {"train_data_dir": plan.images, "caption_column": "text"}
    else:
        flags |= {"dataset_name": plan.images, "caption_column": "text",
                  "instance_prompt": f"a photo of {plan.token}"}
    flags |= {"resolution": plan.resolution, "center_crop": True, "train_batch_size": 1, "rank": RANK,
              "learning_rate": LEARNING_RATE, "max_train_steps": MAX_TRAIN_STEPS, "mixed_precision": "bf16",
              "seed": 0, "output_dir": plan.output, "t_min": plan.zone.t_min,
              "loss_mask_dir": plan.masks if plan.has_masks else None, "snr_gamma": plan.min_snr_gamma}
    written = [f"--{name}" + ("" if value is True else f" {shlex.quote(str(value))}")
               for name, value in flags.items() if value is not None]
    return "\n".join([
        "# In the folder of Diffusers:", "set -e", f"cd examples/{folder}",
        f"python -m szt_utils.patch {script}.py > {script}_szt.py",
        " \\\n  ".join([f"accelerate launch {script}_szt.py", *written])]) + "\n"


def _command(plan: Plan) -> str:
    return f"bash {plan.quoted('train.sh')}"


def _traps(plan: Plan) -> list[str]:
    traps = ["The script must be patched by `python -m szt_utils.patch`, as in train.sh: Diffusers has "
             "neither masks nor a range of timesteps.",
             "Leave out --mask_dilation and --jpeg_quality: masks are grown and images compressed here."]
    if DIFFUSERS.model(plan)[0] == "dreambooth":
        traps += ["With --cache_latents the DreamBooth scripts of Stable Diffusion 3 and FLUX.1 give an "
                  "image the caption of another one: leave it out.",
                  "--instance_data_dir takes a folder that holds images only; captions need --dataset_name."]
    if plan.family.name == "sdxl":
        traps.append("An embedding of a new token pools at the token, not at the end of the text as in kohya "
                     "and ComfyUI, so one file gives different images there.")
    return traps


def _sources(plan: Plan, config: Config) -> list[Source]:
    settings = config.settings
    masks, size = settings.get("loss_mask_dir"), read_size(settings.get("resolution"))
    return [Source(Path(str(settings[name])), Path(str(masks)) if masks else None, size)
            for name in ("train_data_dir", "dataset_name", "instance_data_dir") if name in settings]


def _check(plan: Plan, config: Config) -> Iterator[str]:
    settings = config.settings
    if "resolution" not in settings and "t_min" not in settings:
        return  # not a command line
    if config.flag("szt"):
        yield ("--szt compresses and grows masks once more; leave it out and set "
               f"--t_min {plan.zone.t_min}.")
    else:
        high = config.number("t_max", plan.family.num_timesteps)
        yield from range_findings(plan, config.number("t_min", 0), high, ("--t_min", "--t_max"))
    if not config.flag("szt") and not config.settings.get("loss_mask_dir"):
        yield "--loss_mask_dir is not set, so the masks are not used."
    for name in ("mask_dilation", "jpeg_quality"):
        if name in settings:
            yield f"--{name} is done in the data set already; leave it out."
    if config.flag("cache_latents") and plan.family.name in ("sd3", "flux"):
        yield "--cache_latents gives an image the caption of another one in this script; leave it out."
    if "instance_data_dir" in settings:
        folder = plan.folder / str(settings["instance_data_dir"])
        others = [path.name for path in sorted(folder.glob("*")) if path.suffix.lower() not in SUFFIXES]
        if others:
            yield (f"--instance_data_dir '{folder}' holds '{others[0]}', which the script would open as an "
                   "image; use --dataset_name.")


DIFFUSERS = Trainer(
    name="diffusers", title="Diffusers", version="0.39 and later (58eb52c, 2026-08-23)",
    models={"sd15": ("text_to_image", "train_text_to_image_lora"),
            "sd2": ("text_to_image", "train_text_to_image_lora"),
            "sdxl": ("text_to_image", "train_text_to_image_lora_sdxl"),
            "sd3": ("dreambooth", "train_dreambooth_lora_sd3"),
            "flux": ("dreambooth", "train_dreambooth_lora_flux"),
            "qwen-image": ("dreambooth", "train_dreambooth_lora_qwen_image"),
            "z-image": ("dreambooth", "train_dreambooth_lora_z_image")},
    buckets=square, mask_name="masks/{}.png", configs=_configs, command=_command, traps=_traps,
    sources=_sources, check=_check, caption_files=False,
    has_min_snr=lambda config: bool(config.number("snr_gamma", 0)), min_snr="--snr_gamma to 5",
    is_recursive=True, reads_any_mask=True)
