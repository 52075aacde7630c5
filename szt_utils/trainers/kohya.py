"""kohya sd-scripts: two TOML files, masks by file name in a folder of their own."""

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
    any_case,
    flux_shift,
    range_findings,
    read_size,
    share_findings,
    share_in_zone,
)

__all__ = ["KOHYA"]

_HAS_RANGE = ("sd15", "sd2", "sdxl", "sd3")  # whose scripts read --min_timestep
_FILES = "/path/to/"
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def _sampling(plan: Plan) -> str:
    return f"timestep_sampling shift, discrete_flow_shift {plan.shift:g} and sigmoid_scale {SIGMOID_SCALE:g}"


def _configs(plan: Plan) -> dict[str, str]:
    subset: dict[str, Any] = {"image_dir": plan.images, "caption_extension": ".txt", "num_repeats": 10}
    if plan.has_masks:
        subset["conditioning_data_dir"] = plan.masks
    dataset = {"resolution": plan.resolution, "batch_size": 1, "enable_bucket": True,
               "bucket_no_upscale": False, "bucket_reso_steps": 64,
               "min_bucket_reso": plan.resolution // 2 // 64 * 64, "max_bucket_reso": 2 * plan.resolution,
               "subsets": [subset]}
    return {"dataset.toml": to_toml({"datasets": [dataset]}), "config.toml": to_toml(_settings(plan))}


def _settings(plan: Plan) -> dict[str, Any]:
    settings = {"pretrained_model_name_or_path": plan.family.repository,
                "dataset_config": plan.file("dataset.toml"), "output_dir": plan.output, "output_name": "szt",
                "save_model_as": "safetensors", "network_module": "networks.lora", "network_dim": RANK,
                "network_alpha": RANK, "learning_rate": LEARNING_RATE, "max_train_steps": MAX_TRAIN_STEPS,
                "mixed_precision": "bf16", "gradient_checkpointing": True, "sdpa": True, "seed": 0}
    if plan.has_masks:
        settings["masked_loss"] = True
    if plan.family.name in _HAS_RANGE:
        settings |= {"min_timestep": plan.zone.t_min, "max_timestep": plan.family.num_timesteps}
    if plan.family.name == "sd2":
        settings |= {"v2": True, "v_parameterization": True}
    if plan.min_snr_gamma:
        settings["min_snr_gamma"] = plan.min_snr_gamma
    if plan.family.name == "sd3":
        settings |= {"pretrained_model_name_or_path": f"{_FILES}sd3_medium.safetensors",
                     "clip_l": f"{_FILES}clip_l.safetensors", "clip_g": f"{_FILES}clip_g.safetensors",
                     "t5xxl": f"{_FILES}t5xxl_fp16.safetensors", "network_module": "networks.lora_sd3",
                     "weighting_scheme": "uniform"}
    if plan.family.name == "flux":
        settings |= {"pretrained_model_name_or_path": f"{_FILES}flux1-dev.safetensors",
                     "clip_l": f"{_FILES}clip_l.safetensors", "t5xxl": f"{_FILES}t5xxl_fp16.safetensors",
                     "ae": f"{_FILES}ae.safetensors", "network_module": "networks.lora_flux",
                     "timestep_sampling": "shift", "discrete_flow_shift": plan.shift,
                     "sigmoid_scale": SIGMOID_SCALE, "model_prediction_type": "raw", "guidance_scale": 1.0}
    return settings


def _command(plan: Plan) -> str:
    return f"accelerate launch {KOHYA.model(plan)} --config_file {plan.quoted('config.toml')}"


def _traps(plan: Plan) -> list[str]:
    traps = ["`conditioning_data_dir` counts only in the TOML of the data set, in every subset; as a flag of "
             "the command line it is ignored.",
             "Without `masked_loss` the masks are read and not used.",
             "Regularization images need a `[[datasets]]` block of their own, without masks."]
    if plan.family.name not in _HAS_RANGE:
        traps.append("`--min_timestep` and `--max_timestep` are accepted and ignored for this model. The "
                     f"nearest is {_sampling(plan)}, as in config.toml, which draws "
                     f"{share_in_zone(plan, plan.shift, SIGMOID_SCALE):.1%} at {plan.zone.t_min} or above.")
    return traps


def _subsets(config: Config) -> list[dict[str, Any]]:
    """The settings of each subset, with those of its data set, [general] and the command line."""
    general = {name: value for name, value in config.settings.items() if name != "conditioning_data_dir"}
    return [general | dataset | subset for dataset in config.tables("datasets")
            for subset in dataset.get("subsets", [])]


def _sources(plan: Plan, config: Config) -> list[Source]:
    sources = []
    for subset in _subsets(config):
        masks = subset.get("conditioning_data_dir")
        if not subset.get("is_reg"):
            sources.append(Source(Path(subset.get("image_dir", "")), Path(masks) if masks else None,
                                  read_size(subset.get("resolution")),
                                  has_alpha=config.flag("alpha_mask", among=subset),
                                  is_fixed=not config.flag("enable_bucket", among=subset)))
    return sources


def _check(plan: Plan, config: Config) -> Iterator[str]:
    yield from _check_data(config)
    if plan.family.name in _HAS_RANGE:
        yield from range_findings(plan, config.number("min_timestep", 0),
                                  config.number("max_timestep", plan.family.num_timesteps),
                                  ("min_timestep", "max_timestep"))
        return
    for name in sorted({"min_timestep", "max_timestep"} & set(config.settings)):
        yield f"{name} is ignored for {plan.family.title}; set {_sampling(plan)} instead."
    sampling = config.settings.get("timestep_sampling", "sigma")
    given = config.number("discrete_flow_shift", 3)
    shifts = {"sigma": given, "shift": given, "flux_shift": flux_shift(plan.resolution)}
    scale = None if sampling in ("sigma", "uniform") else config.number("sigmoid_scale", 1)
    yield from share_findings(plan, shifts.get(sampling, 1), scale, _sampling(plan))


def _check_data(config: Config) -> Iterator[str]:
    subsets = _subsets(config)
    if isinstance(config.settings.get("conditioning_data_dir"), str):
        yield ("--conditioning_data_dir is ignored on the command line; write it into every subset of the "
               "data set's TOML.")
    if any("conditioning_data_dir" in subset for subset in subsets) and not config.flag("masked_loss"):
        yield "masked_loss is not set, so the masks are not used; set it to true."
    for extension in {subset.get("caption_extension", ".caption") for subset in subsets} - {".txt"}:
        yield f"caption_extension is {extension}, so captions in .txt files are not read; set it to .txt."
    for dataset in config.tables("datasets"):
        parts = dataset.get("subsets", [])
        if any(part.get("is_reg") for part in parts) and any("conditioning_data_dir" in p for p in parts):
            yield ("A subset with is_reg stands in one [[datasets]] block with masks, which kohya refuses; "
                   "give it a block of its own.")


KOHYA = Trainer(
    name="kohya", title="kohya sd-scripts", version="0.10.1 (48d368f, 2026-02-16)",
    models={"sd15": "train_network.py", "sd2": "train_network.py", "sdxl": "sdxl_train_network.py",
            "sd3": "sd3_train_network.py", "flux": "flux_train_network.py"},
    buckets=area_buckets, mask_name="masks/{}.png", configs=_configs, command=_command, traps=_traps,
    sources=_sources, check=_check, has_min_snr=lambda config: bool(config.number("min_snr_gamma", 0)),
    min_snr="min_snr_gamma to 5", image_suffixes=_SUFFIXES, mask_suffixes=any_case(_SUFFIXES))
