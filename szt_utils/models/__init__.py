"""One protocol for every family of latent diffusion models, and THE denoising residual (paper Eq. 1-3).

    z0 = scale * (E(x) - shift)      z_t = noised(z0, noise, t)
    residual = predict(z_t, t, condition) - target(z0, noise, t)

Everything that needs a model takes a `Model`. A family is one file: its parts, the condition of its network,
and its target. `load_model` finds the family of a Diffusers folder.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InputError
from ..schedules import Schedule
from .flow import T5
from .flux import Flux
from .parts import Condition, Step, load_config, load_index, load_part
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import StableDiffusion

__all__ = ["T5", "Condition", "Model", "check_length", "evaluating", "expand", "find_family", "load_model",
           "load_schedule", "min_snr_weights", "residual", "tokenize"]

# By the kind of embeddings that the U-Net takes besides the prompt's states, or by the transformer's class.
_UNETS = {None: StableDiffusion, "text_time": SDXL}
_TRANSFORMERS = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": Flux}


class Model(Protocol):
    """The frozen parts of a latent diffusion model, on one device; images are (B, 3, H, W) in [0, 1]."""

    family: str  # as it is named to users
    path: str
    revision: str | None
    variant: str | None
    tokenizers: list  # CLIP's
    text_encoders: list[torch.nn.Module]  # CLIP's, which may get rows for new tokens
    t5: T5 | None  # the text encoder that never does
    network: torch.nn.Module  # the U-Net or transformer
    network_name: str  # "unet" or "transformer"
    patch: int  # latent cells, along a side, that the network takes together
    vae: torch.nn.Module | None
    scheduler: Any
    num_timesteps: int
    resolution: int  # of the images that it generates, in pixels
    vae_scale_factor: int  # pixels per latent cell along a side
    clip_skip: int  # last layers of the text encoders to skip, as in Diffusers' pipelines
    embedding_keys: tuple[str, ...]  # of the text encoders' rows in an embedding file, as A1111 names them
    uses_sizes: bool  # whether `condition` uses sizes
    pooled_token: str | None  # "upstream" or "end", which token's state is the pooled text; None: no choice
    no_training: str  # why textual inversion is not offered, or ""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance of the images' latents, (B, 2 C, h, w), in the VAE's dtype."""

    def latents(self, moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A sample of latents with these moments, scaled, (B, C, h, w)."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The mean latents, scaled, (B, C, h, w) in the network's dtype; gradients flow."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of scaled latents, float32, about [0, 1] and not clipped; gradients flow."""

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        """The condition of token ids, long (B, L) per tokenizer, T5's last.

        `sizes`, long (B, 4), are height and width of the original images, top and left of the crop; None
        means images of the latents' size that were not cropped.
        """

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t, in the shape of `latents`, for long timesteps (B,)."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is trained to predict, in the shape of `latents`."""

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The network's prediction, in the shape of `noised`."""

    def guide(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition, empty: Condition,
              guidance_scale: float) -> torch.Tensor:
        """The prediction as the family's pipeline guides it, against the condition `empty` if it does so."""

    def unprompted(self, condition: Condition) -> Condition:
        """What the family's pipeline guides against, of the condition of an empty prompt: it, or zeros."""

    def sampler(self, steps: int, latents: torch.Tensor) -> tuple[torch.Tensor, Step]:
        """The timesteps (steps,) of sampling at the size of `latents`, noise first, and one step of it.

        DDIM, or Euler for flow models, whose timesteps may lie between whole ones; gradients flow.
        """

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Natural logarithm of the signal-to-noise ratio, float64 (B,); -inf at pure noise."""

    def pipeline(self, *, tokenizers: list | None = None, from_files: bool = False) -> Any:
        """The Diffusers pipeline of these parts, or with other tokenizers.

        With `from_files` it reads the networks again, in the precision of their files.
        """


def find_family(path: str, revision: str | None = None) -> type:
    """The class of a Diffusers folder or repository's family; reads a config and no weights.

    InputError for a family that is not supported.
    """
    if (Path(path) / "model_index.json").is_file():
        load_index(path, revision)
    try:
        config = load_config(path, "unet", revision)
        name, kind, families = "U-Net", config.get("addition_embed_type"), _UNETS
        found = f"The U-Net of '{path}' takes '{kind}' embeddings"
    except InputError as no_unet:
        try:
            config = load_config(path, "transformer", revision)
        except InputError:
            raise no_unet from None
        name, kind, families = "transformer", config.get("_class_name"), _TRANSFORMERS
        found = f"The transformer of '{path}' is a {kind}"
    if kind not in families:
        *others, last = [family.family for family in (*_UNETS.values(), *_TRANSFORMERS.values())]
        raise InputError(f"{found}; only {', '.join(others)} and {last} are supported.")
    family, channels = families[kind], config.get("in_channels", 4)
    if channels != family.packed * load_config(path, "vae", revision).get("latent_channels", 4):
        raise InputError(f"The {name} of '{path}' takes {channels} channels, more than the latents have, as "
                         "inpainting models do; use a text-to-image model.")
    return family


def load_model(path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               revision: str | None = None, variant: str | None = None, tokenizer: str | None = None,
               text_dtype: torch.dtype | None = None, text_linear: torch.dtype | None = None,
               quantize: str | None = None) -> Model:
    """Load a Diffusers folder or repository of any supported family, frozen and in evaluation mode.

    All parts have `dtype`; the text encoders have `text_dtype` if it is given, their linear layers
    `text_linear`, as autocast computes them anyway, and a VAE that would overflow in float16 stays float32.
    `quantize`, "8bit" or "4bit", quantizes the network (`parts.load_network`).
    `tokenizer` is another folder or id for the (first) tokenizer. InputError when a part is missing or the
    family is not supported.
    """
    return find_family(path, revision).load(path, dtype=dtype, device=device, revision=revision,
                                            variant=variant, tokenizer=tokenizer, text_dtype=text_dtype,
                                            text_linear=text_linear, quantize=quantize)


def load_schedule(path: str, revision: str | None = None) -> Schedule:
    """The noise schedule of a Diffusers folder or repository; reads configs, no weights.

    InputError as of `find_family`.
    """
    _, scheduler = find_family(path, revision)._classes()
    return Schedule(load_part(scheduler, path, "scheduler", revision=revision))


def min_snr_weights(model: Model, gamma: float) -> torch.Tensor:
    """The Min-SNR weight of the squared error at every timestep, float32 (T,) (Hang et al. 2023).

    The errors of denoised latents then count by the signal-to-noise ratio, but not more than `gamma`. Where
    the ratio is below it, that is the loss of noise prediction, whatever the model predicts. (Diffusers'
    `compute_snr` knows DDPM only.)
    """
    snr = model.log_snr(torch.arange(model.num_timesteps)).exp()
    snr = snr.clamp(min=torch.finfo(snr.dtype).tiny)  # pure noise: the limit, not 0 / 0
    kind = model.scheduler.config.get("prediction_type")  # rectified flow has none
    # The squared error of the prediction over that of the denoised latents.
    scale = {"epsilon": snr, "v_prediction": snr + 1}.get(kind, (snr.sqrt() + 1) ** 2)
    return (snr.clamp(max=gamma) / scale).float()


def residual(model: Model, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
             condition: Condition, *, latent_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Prediction error, prediction - target, float32 (B, C, h, w); its square is the denoising loss (Eq. 2).

    `latents` and `noise` are (B, C, h, w) in the network's dtype, `timesteps` long (B,). A `latent_mask`
    (B, 1, h, w) multiplies the noised latents (the paper's ablation ZM), not the target.
    """
    noised = model.noised(latents, noise, timesteps)
    if latent_mask is not None:
        noised = noised * latent_mask.to(noised)
    prediction = model.predict(noised, timesteps, condition)
    return prediction.float() - model.target(latents, noise, timesteps).float()


def tokenize(model: Model, prompts: str | list[str]) -> list[torch.Tensor]:
    """Token ids of the prompts, padded and truncated to the tokenizer's length, long (B, L) per tokenizer.

    Those of T5, if the model has it, are the last.
    """
    prompts = prompts if isinstance(prompts, list) else [prompts]
    ids = [tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids for tokenizer in model.tokenizers]
    return ids if model.t5 is None else [*ids, model.t5.tokenize(prompts)]


def check_length(model: Model, prompt: str) -> None:
    """InputError for a prompt that the tokenizer would cut off."""
    length = model.tokenizers[0].model_max_length
    if len(model.tokenizers[0](prompt, verbose=False).input_ids) > length:
        raise InputError(f"The prompt '{prompt}' has more than the {length} tokens that the model takes; "
                         "shorten it.")


def expand(condition: Condition, count: int) -> Condition:
    """The condition of one sample for `count` samples, without copying it."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}


@contextlib.contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and back into the mode they were in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
