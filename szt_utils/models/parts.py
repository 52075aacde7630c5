"""What the families share: a condition, and loading one part of a Diffusers folder or repository."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import InputError

__all__ = ["Condition", "Step", "absent_parts", "check_weights", "load_config", "load_index", "load_part",
           "quantization"]

# The inputs of the network besides the noised latents and the timestep: tensors (B, ...) by name.
Condition = dict[str, torch.Tensor]

# A step of sampling: prediction, the step's number, latents -> the latents after it.
Step = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def load_part(cls: type, path: str, subfolder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(path, subfolder=...)`; InputError when there is no such part.

    A network is refused unless its files hold all of its weights, no others, and finite ones: libraries fill
    in what is missing with random numbers.
    """
    try:
        if not issubclass(cls, torch.nn.Module):
            return cls.from_pretrained(path, subfolder=subfolder, **kwargs)
        network, report = cls.from_pretrained(path, subfolder=subfolder, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(path, subfolder, error) from None
    check_weights(network, report, f"The {subfolder or 'model'} of '{path}'")
    return network


def check_weights(network: torch.nn.Module, report: dict[str, Any], name: str) -> None:
    """InputError, which begins with `name`, unless a loading report names no weights and all are finite."""
    for kind, problem in (("missing_keys", "lacks {} weights"),
                          ("unexpected_keys", "has {} unknown weights"),
                          ("mismatched_keys", "has {} weights of another shape")):
        # Position ids are buffers that older versions have saved.
        keys = sorted(str(key) for key in report[kind] if "position_ids" not in str(key))
        if keys:
            raise InputError(f"{name} {problem.format(len(keys))}, such as '{keys[0]}'; it is damaged or was "
                             "written by another version of its library.")
    for key, weight in network.named_parameters():
        if type(weight.data) is torch.Tensor and not weight.isfinite().all():  # a quantized one is not plain
            raise InputError(f"{name} has weights that are not finite, such as '{key}'; it cannot be used.")


def quantization(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize the linear layers of a Diffusers network as it is loaded.

    "8bit" holds weights as int8 (torchao), "4bit" as NF4 (bitsandbytes, on a GPU); both compute in `dtype`.
    InputError when the library is not installed.
    """
    if bits is None:
        return {}
    library = {"8bit": "torchao", "4bit": "bitsandbytes"}[bits]
    if importlib.util.find_spec(library) is None:
        raise InputError(f"--quantize {bits} needs {library}: pip install \"szt-utils[quantize]\".")
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if bits == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                      bnb_4bit_compute_dtype=dtype)}


def load_config(path: str, subfolder: str, revision: str | None = None) -> dict[str, Any]:
    """The config of a Diffusers network, without its weights; InputError as of `load_part`."""
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel.load_config(path, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        raise _unusable(path, subfolder, error) from None


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """None for each tokenizer and text encoder that a pipeline lacks: `from_pretrained` asks for it.

    `index` is that of `load_index`.
    """
    return {name: None for name, classes in index.items()
            if name.startswith(("tokenizer", "text_encoder")) and classes[0] is None}


def load_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """The classes of a pipeline's parts by name, (None, None) for one that it lacks; InputError as of
    `load_part`."""
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(path, revision=revision)
    except (OSError, ValueError) as error:
        raise _unusable(path, "model_index.json", error) from None


def _unusable(path: str, subfolder: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "" if Path(path).is_dir() else ", which is no folder here,"
    return InputError(f"The model '{path}'{where} has no usable {subfolder or 'files'}: {reason}")
