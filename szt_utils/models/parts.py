"""What the families share: a condition, and loading one part of a Diffusers folder or repository."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import InputError

__all__ = ["Condition", "load_config", "load_part"]

# What the network is told besides the noised latents: tensors (B, ...) by name.
Condition = dict[str, torch.Tensor]


def load_part(cls: type, path: str, subfolder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(path, subfolder=...)`; InputError when there is no such part."""
    try:
        return cls.from_pretrained(path, subfolder=subfolder, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(path, subfolder, error) from None


def load_config(path: str, subfolder: str, revision: str | None = None) -> dict[str, Any]:
    """The config of a Diffusers network, without its weights; InputError as of `load_part`."""
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel.load_config(path, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        raise _unusable(path, subfolder, error) from None


def _unusable(path: str, subfolder: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "" if Path(path).is_dir() else ", which is no folder here,"
    return InputError(f"The model '{path}'{where} has no usable {subfolder or 'files'}: {reason}")
