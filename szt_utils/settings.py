"""The frozen settings of a training run: those that all concepts share, and those of each concept."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .embedding_files import safe_file_name
from .errors import InputError
from .files import read_json
from .safe_zone import SafeZone

__all__ = ["ConceptSettings", "TrainingSettings", "public_name", "read_concepts"]

_PATHS = {"pretrained_model_name_or_path", "tokenizer_name", "train_data_dir", "loss_mask_dir", "output_dir",
          "project_dir", "logging_dir", "resume_from_checkpoint", "concepts"}


@dataclass(frozen=True)
class ConceptSettings:
    """The settings of one concept; `zone_flags` are the flags of its SafeZone that were given."""

    train_data_dir: str
    placeholder_token: str
    initializer_token: str
    learnable_property: str = "object"
    caption_mode: str = "template"
    output_dir: str = "text-inversion-model"
    seed: int | None = None
    repeats: int = 100
    center_crop: bool = False
    validation_prompt: str | None = None
    snr_gamma: float | None = None
    szt: bool = False
    loss_mask_dir: str | None = None
    zone_flags: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> "ConceptSettings":
        """The settings of a command line's flags by name; None is a flag that was not given."""
        return cls(**_given(cls, flags), zone_flags=_given(SafeZone, flags))

    @classmethod
    def flags(cls) -> tuple[str, ...]:
        """The flags that an entry of --concepts may set, without their dashes."""
        names = [each.name for each in fields(cls) if each.name != "zone_flags"]
        return (*names, *(each.name for each in fields(SafeZone)))

    def make_zone(self, resolution: int, model: Any = None) -> SafeZone:
        """The SafeZone of these flags, with the paper's values for the others if `szt`."""
        if self.szt:
            return SafeZone.paper(resolution, model, **self.zone_flags)
        return SafeZone(**self.zone_flags)


@dataclass(frozen=True)
class TrainingSettings:
    """What all concepts of a run share; names and defaults are those of the Diffusers example."""

    pretrained_model_name_or_path: str
    output_dir: str = "text-inversion-model"
    revision: str | None = None
    variant: str | None = None
    tokenizer_name: str | None = None
    num_vectors: int = 1
    resolution: int = 512
    train_batch_size: int = 16
    num_train_epochs: int | None = None
    max_train_steps: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    lr_num_cycles: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    push_to_hub: bool = False
    hub_token: str | None = None
    hub_model_id: str | None = None
    logging_dir: str = "logs"
    mixed_precision: str = "no"
    allow_tf32: bool = False
    report_to: str | None = None
    num_validation_images: int = 4
    validation_steps: int = 100
    validation_epochs: int | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    enable_xformers_memory_efficient_attention: bool = False
    use_8bit_adam: bool = False
    clip_skip: int = 0
    pooled_token: str = "upstream"
    micro_conditioning: str = "crop"
    no_safe_serialization: bool = False
    save_steps: int = 500
    save_as_full_pipeline: bool = False
    concepts: str | None = None
    concepts_per_batch: int = 8
    compile: bool = False
    quantize: str | None = None
    offload: bool = False
    no_cache_latents: bool = False
    latent_cache_gb: float = 4.0

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> "TrainingSettings":
        """The settings of a command line's flags by name; None is a flag that was not given."""
        return cls(**_given(cls, flags))

    @property
    def suffix(self) -> str:
        """The suffix of embedding files."""
        return "bin" if self.no_safe_serialization else "safetensors"

    def resolved(self, batches_per_epoch: int, num_ranks: int) -> "TrainingSettings":
        """The same with epochs counted in steps, and the learning rate scaled with `scale_lr`."""
        steps_per_epoch = math.ceil(batches_per_epoch / self.gradient_accumulation_steps)
        steps = self.max_train_steps
        if steps is None:
            steps = 5000 if self.num_train_epochs is None else self.num_train_epochs * steps_per_epoch
        scale = self.gradient_accumulation_steps * self.train_batch_size * num_ranks if self.scale_lr else 1
        validation = self.validation_steps if self.validation_epochs is None else (
            self.validation_epochs * steps_per_epoch)
        return replace(self, max_train_steps=steps, validation_steps=validation,
                       learning_rate=self.learning_rate * scale)

    def options(self, concept: ConceptSettings, zone: SafeZone) -> dict[str, Any]:
        """All flags of a concept by name, for options.json and trackers.

        The Hub's token stays secret, and so do the folders of this machine: of paths the last name is left.
        """
        options = {**asdict(self), **asdict(concept), **asdict(zone), "project_dir": self.output_dir}
        return {name: public_name(value) if name in _PATHS else value for name, value in options.items()
                if name not in ("hub_token", "zone_flags")}


def read_concepts(path: str | Path, output_dir: str,
                  parse: Callable[[list[str], str, list[str]], dict[str, Any]]) -> list[ConceptSettings]:
    """The concepts of a --concepts file, a JSON list of objects of `ConceptSettings.flags`.

    `parse(flags, name, unset)` parses an entry's flags on top of the command line's; errors begin with
    `name`, and flags that are `unset` get their defaults. An entry without an output_dir gets a folder in
    `output_dir`. InputError for another file, and for entries that share a folder.
    """
    concepts, folders = [], set()
    for name, entry in _read_entries(path):
        unset = [flag for flag, value in entry.items() if value is None or value is False]  # 0 is a value
        flags = [f"--{flag}" if value is True else f"--{flag}={value}"
                 for flag, value in entry.items() if flag not in unset]
        concept = ConceptSettings.from_flags(parse(flags, name, unset))
        if "output_dir" not in entry or "output_dir" in unset:
            folder = str(Path(output_dir) / safe_file_name(concept.placeholder_token))
            concept = replace(concept, output_dir=folder)
        folder = Path(concept.output_dir).resolve()
        if folder in folders:
            raise InputError(f"{name}: its output folder '{concept.output_dir}' is another concept's, too; "
                             "set an \"output_dir\" of its own.")
        folders.add(folder)
        concepts.append(concept)
    return concepts


def _read_entries(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a --concepts file, each with its name for error messages."""
    entries = read_json(path, "file of --concepts,")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"The file of --concepts, '{path}', must hold a list of objects, one per concept.")
    named = [(f"Concept {i} of '{path}'", entry) for i, entry in enumerate(entries, 1)]
    for name, entry in named:
        if unknown := [flag for flag in entry if flag not in ConceptSettings.flags()]:
            raise InputError(f"{name}: '{unknown[0]}' cannot be set for one concept, only "
                             f"{', '.join(ConceptSettings.flags())}.")
        if nested := [flag for flag, value in entry.items() if isinstance(value, list | dict)]:
            raise InputError(f"{name}: '{nested[0]}' must be a text, a number, true or false, not a list or "
                             "an object.")
    return named


def public_name(path: str | None) -> str | None:
    """The last name of a local path; a Hub id, or anything else that is no path of this machine, as it is."""
    if path and (Path(path).expanduser().is_absolute() or path.startswith(".") or Path(path).exists()):
        return Path(path).expanduser().resolve().name
    return path


def _given(cls: type, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that are fields of `cls` and not None."""
    return {each.name: flags[each.name] for each in fields(cls) if flags.get(each.name) is not None}
