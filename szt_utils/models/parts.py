"""What the families share: a condition, and loading one part of a Diffusers folder or repository."""

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, first_line

__all__ = ["Condition", "Step", "absent_parts", "check_weights", "file_precision", "load_config",
           "load_index", "load_network", "load_part", "pipeline_parts", "quiet_loading", "read_pipeline",
           "unusable"]

# The inputs of the network besides the noised latents and the timestep: tensors (B, ...) by name.
Condition = dict[str, torch.Tensor]

# A step of sampling: prediction, the step's number, latents -> the latents after it.
Step = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]

# What a pipeline is loaded without: a safety checker would blank images, a watermark would change them.
_WITHOUT = {"safety_checker": None, "add_watermarker": False, "watermarker": None}


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """For a while, diffusers and transformers show no bars of what they load; downloads keep theirs."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    hidden = are_progress_bars_disabled()
    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    if not hidden:
        enable_progress_bars()  # which transformers disables with its own
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_part(cls: type, path: str, subfolder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(path, subfolder=...)`; InputError when there is no such part.

    A network is refused unless its files hold all of its weights, no others, and finite ones: libraries fill
    in what is missing with random numbers.
    """
    try:
        with quiet_loading():
            if not issubclass(cls, torch.nn.Module):
                part = cls.from_pretrained(path, subfolder=subfolder, **kwargs)
                # Without its files, a tokenizer of transformers 5 is an empty one.
                if hasattr(part, "get_vocab") and len(part.get_vocab()) <= len(part.all_special_ids):
                    raise ValueError("its vocabulary is missing.")
                return part
            network, report = cls.from_pretrained(path, subfolder=subfolder, output_loading_info=True,
                                                  **kwargs)
    except Exception as error:  # the libraries raise what a broken config or file leads them to
        raise unusable(path, subfolder, error) from None
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


def load_network(cls: type, path: str, subfolder: str, dtype: torch.dtype, quantize: str | None,
                 **weights: Any) -> torch.nn.Module:
    """The U-Net or transformer by `load_part`, quantized to "8bit" or "4bit" if that is asked for."""
    network = load_part(cls, path, subfolder, torch_dtype=dtype, **weights, **_quantization(quantize, dtype))
    if quantize:
        # What is not quantized is a view of the mapped file, which would stay in memory as a whole.
        for tensor in (*network.parameters(), *network.buffers()):
            if type(tensor.data) is torch.Tensor:
                tensor.data = tensor.data.clone()
    return network


def _quantization(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
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

    return _read_config(UNet2DConditionModel, path, subfolder, subfolder=subfolder, revision=revision)


def allow_clip_skip(pipeline: Any) -> None:
    """Let a Stable Diffusion pipeline skip layers of its text encoder.

    It asks for the encoder's part `text_model`, but transformers 5 has flattened the encoder. The part must
    not become a submodule: a module that holds itself would be walked through for ever.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is not None and not hasattr(encoder, "text_model"):
        object.__setattr__(encoder, "text_model", encoder)


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """None for each tokenizer and text encoder that a pipeline lacks: `from_pretrained` asks for it.

    `index` is that of `load_index`.
    """
    return {name: None for name, classes in index.items()
            if name.startswith(("tokenizer", "text_encoder")) and classes == [None, None]}


def pipeline_parts(index: dict[str, Any], path: str, dtype: torch.dtype, revision: str | None = None,
                   variant: str | None = None) -> dict[str, Any]:
    """Arguments of a pipeline's `from_pretrained`: its networks by `load_part`, and what it goes without.

    By itself a pipeline would fill in weights that its files lack. `index` is that of `load_index`.
    """
    import diffusers

    accepted = inspect.signature(getattr(diffusers, index["_class_name"], object).__init__).parameters
    parts: dict[str, Any] = {name: value for name, value in _WITHOUT.items() if name in accepted}
    parts |= absent_parts(index)
    for name, classes in index.items():
        if isinstance(classes, list) and classes[0] in ("diffusers", "transformers"):
            cls = getattr(importlib.import_module(classes[0]), classes[1], None)
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                precision = {"dtype" if classes[0] == "transformers" else "torch_dtype": dtype}
                parts[name] = load_part(cls, path, name, revision=revision, variant=variant, **precision)
    return parts


def read_pipeline(cls: type, path: str, dtype: torch.dtype, revision: str | None = None,
                  variant: str | None = None, name: str | None = None) -> Any:
    """A Diffusers pipeline of class `cls`, on the CPU and without bars; InputError when it cannot be loaded.

    `name` is what the error calls it, else the class.
    """
    try:
        parts = pipeline_parts(load_index(path, revision), path, dtype, revision, variant)
        with quiet_loading():
            pipeline = cls.from_pretrained(path, revision=revision, **parts)
    except Exception as error:
        raise unusable(path, name or cls.__name__, error) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def file_precision(path: str, revision: str | None = None,
                   variant: str | None = None) -> dict[str, torch.dtype]:
    """The precision of a pipeline's parts in their safetensors files, as `torch_dtype` of `from_pretrained`.

    Other parts are float32, the "default".
    """
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    home = Path(path) if Path(path).is_dir() else Path(
        DiffusionPipeline.download(path, revision=revision, variant=variant, safety_checker=None))
    known = {"F16": torch.float16, "BF16": torch.bfloat16}
    found = {"default": torch.float32}
    for folder in home.iterdir():
        files = sorted(folder.glob("*.safetensors"))
        own = [file for file in files if f".{variant}" in file.name] or [
            file for file in files if "." not in file.stem]
        if own:
            with safe_open(own[0], "pt") as weights:
                kind = weights.get_slice(next(iter(weights.keys()))).get_dtype()
            found[folder.name] = known.get(kind, torch.float32)
    return found


def load_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """The classes of a pipeline's parts by name, (None, None) for one that it lacks.

    InputError as of `load_part`, and for parts with code of their own, which some versions of Diffusers run.
    """
    from diffusers import DiffusionPipeline, pipelines

    index = _read_config(DiffusionPipeline, path, "pipeline", revision=revision)
    for name, classes in index.items():
        library = classes[0] if isinstance(classes, list) and classes else None
        if library is not None and ((Path(path) / name / f"{library}.py").exists() or not (
                library in ("diffusers", "transformers") or hasattr(pipelines, str(library)))):
            raise InputError(f"The model '{path}' comes with code of its own for its part '{name}', which is "
                             "never run; use a model of Diffusers' own classes.")
        if classes is None and name.startswith(("tokenizer", "text_encoder")):
            index[name] = [None, None]
    return index


def _read_config(cls: type, path: str, what: str, **kwargs: Any) -> dict[str, Any]:
    try:
        config = cls.load_config(path, **kwargs)
        if not isinstance(config, dict):
            raise ValueError("its config is not an object of JSON.")
        return config
    except Exception as error:
        raise unusable(path, what, error) from None


def unusable(path: str, what: str, error: Exception) -> InputError:
    """The InputError for a model folder or repository whose part `what` raised `error` when it was loaded."""
    if isinstance(error, InputError):
        return error
    if Path(path).is_file():
        if Path(path).suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
            return InputError(f"The model '{path}' is a file, not a folder in Diffusers format.")
        return InputError(
            f"The model '{path}' is one file, not a folder in Diffusers format; convert it with python -c "
            f"\"from diffusers import *; StableDiffusionPipeline.from_single_file('{path}').save_pretrained("
            "'model')\" (for SDXL StableDiffusionXLPipeline), and give the folder 'model'.")
    if what.lower().endswith("pipeline"):
        return InputError(f"The model '{path}' cannot be loaded as a {what}: {first_line(error)}")
    where = "" if Path(path).is_dir() else ", which is no folder here,"
    return InputError(f"The model '{path}'{where} has no usable {what or 'files'}: {first_line(error)}")
