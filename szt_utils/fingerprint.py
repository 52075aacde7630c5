"""What decides a training's result: recorded in every checkpoint, compared when a run is resumed."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .folder_run import library_versions
from .models import Model

__all__ = ["compare", "fingerprint", "hash_captions", "hash_t5", "hash_weights", "identity"]

# Settings that leave the embedding as it is, or whose effect is recorded otherwise: a model by its weights, a
# folder by its files, the precision as Accelerate has chosen it.
_IRRELEVANT = {
    "pretrained_model_name_or_path", "revision", "variant", "tokenizer_name", "train_data_dir",
    "loss_mask_dir", "concepts", "concepts_per_batch", "output_dir", "logging_dir", "report_to",
    "push_to_hub", "hub_token", "hub_model_id", "szt", "zone_flags", "mixed_precision", "num_train_epochs",
    "scale_lr", "validation_prompt", "num_validation_images", "validation_steps", "validation_epochs",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "no_safe_serialization",
    "save_steps", "save_as_full_pipeline", "use_8bit_adam", "no_cache_latents", "latent_cache_gb",
    "offload"}
# What a resumed run may change: the result differs from an uninterrupted run's, and the run says so.
_FREE = {"max_train_steps", "gradient_checkpointing", "allow_tf32", "compile",
         "enable_xformers_memory_efficient_attention", "versions"}


def fingerprint(options: dict[str, Any], captions: str, images: list[Path],
                masks: list[Path]) -> dict[str, Any]:
    """What decides the result of a concept's training, by flag, or by name for what is no flag.

    `options` are all settings and whatever else decides; `captions` comes from `hash_captions`.
    """
    return {**{name: value for name, value in options.items() if name not in _IRRELEVANT},
            "captions": captions, "images": _hash_files(images), "masks": _hash_files(masks),
            "versions": library_versions()}


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The changes that a resumed run may make since its fingerprint was recorded, a sentence each.

    InputError for the first other change. What an older version did not record is not compared.
    """
    notes = []
    for name, old in before.items():
        new = now.get(name)
        if isinstance(old, dict) and name != "versions":
            _compare_files(name, old, new)
        elif old != new and name in _FREE:
            notes.append(f"{_called(name)} was {old} and is now {new}.")
        elif old != new:
            raise InputError(f"{_called(name)} was {old!r} and is now {new!r}; set it back, or give another "
                             "--output_dir.")
    return notes


def _called(name: str) -> str:
    """A flag with its dashes; anything else in words."""
    words = {"weights": "the hash of the model's weights", "captions": "the hash of the tokenized captions",
             "precision": "the precision (--mixed_precision)", "versions": "the libraries' versions"}
    plain = " " in name or name == "device"
    return words.get(name, f"the {name}" if plain else f"--{name}")


def _compare_files(kind: str, before: dict[str, str | None], now: dict[str, str]) -> None:
    one = kind.removesuffix("s")
    if gone := [name for name in before if name not in now]:
        raise InputError(f"the {one} '{gone[0]}' is missing; put it back, or give another --output_dir.")
    if added := [name for name in now if name not in before]:
        raise InputError(f"the {one} '{added[0]}' is new; remove it, or give another --output_dir.")
    if changed := [name for name, old in before.items() if old is not None and old != now[name]]:
        raise InputError(f"the {one} '{changed[0]}' has other content; put the old one back, or give another "
                         "--output_dir.")


def _hash_files(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def hash_captions(tokenizers: list, templates: Sequence[tuple[str, ...]], placeholder: str) -> str:
    """SHA-256 of the ids that every tokenizer gives each image's caption templates, and the placeholder."""
    digest = hashlib.sha256()
    for tokenizer in tokenizers:
        ids = {each: tokenizer(list(each)).input_ids for each in set(templates)}
        digest.update(str([ids[each] for each in templates]).encode())
        digest.update(str(tokenizer.convert_tokens_to_ids(placeholder)).encode())
    return digest.hexdigest()


def hash_weights(model: Model) -> str:
    """SHA-256 of a model's noise schedule, what it predicts, and the first values of every tensor.

    Models that differ anywhere differ there: training and merging change whole tensors. Quantized tensors,
    which hold no plain values, are skipped.
    """
    digest = hashlib.sha256(model.log_snr(torch.arange(model.num_timesteps)).numpy().tobytes())
    digest.update(str(model.scheduler.config.get("prediction_type")).encode())
    for part in (model.network, model.vae, *model.text_encoders):
        _add_weights(digest, part)
    return digest.hexdigest()


def hash_t5(model: Model) -> str | None:
    """SHA-256 of the first values of every tensor of a model's T5; None without one."""
    if model.t5 is None:
        return None
    digest = hashlib.sha256()
    _add_weights(digest, model.t5.encoder)
    return digest.hexdigest()


@torch.no_grad()
def _add_weights(digest: Any, module: torch.nn.Module) -> None:
    for tensor in module.parameters():
        if type(tensor.data) is torch.Tensor:
            digest.update(tensor.data.flatten()[:16].float().cpu().numpy().tobytes())


@functools.cache
def identity(path: str) -> str:
    """A local model's name and a hash of its files, such as "dino@1f2e3d4c"; an id on the Hub as it is.

    Of every 64 MB of a file the first 64 kB are hashed: training and merging change whole tensors.
    """
    home = Path(path).resolve()
    if not home.exists():
        return path
    digest = hashlib.sha256()
    for file in sorted(home.rglob("*"), key=lambda file: file.parts) if home.is_dir() else [home]:
        name = file.relative_to(home)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):  # such as .cache
            digest.update(f"{name.as_posix()} {file.stat().st_size} ".encode())
            with open(file, "rb") as stream:
                for start in range(0, file.stat().st_size, 2**26):
                    stream.seek(start)
                    digest.update(stream.read(2**16))
    return f"{home.name}@{digest.hexdigest()[:8]}"
