"""A latent diffusion model as plain functions,
and THE denoising loss (paper Eq. 1-3) that every part of the project uses.

    z0 = scale * E(x),  z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) noise,
    loss = (prediction(z_t, t, c) - target)^2
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import InputError
from .images import to_vae_range

__all__ = ["LatentDiffusion", "denoising_loss", "denoising_residual", "denoising_target", "evaluating",
           "load_part"]


def denoising_target(scheduler, latents: torch.Tensor, noise: torch.Tensor,
                     timesteps: torch.Tensor) -> torch.Tensor:
    """What the U-Net is trained to predict, shape of `latents`:
    the noise (epsilon) or the velocity (v-prediction)."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise InputError(f"The model predicts '{prediction_type}'; "
                     "only 'epsilon' and 'v_prediction' can be trained.")


def denoising_residual(unet, scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
                       text_states: torch.Tensor, *, latent_mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the U-Net's prediction is off by, prediction - target, float32 (B, C, h, w).

    `latents` and `noise` are (B, C, h, w) in the U-Net's dtype, `timesteps` long (B,),
    `text_states` (B, L, D). A `latent_mask` (B, 1, h, w) multiplies the noised latent (the paper's
    ablation ZM), not the target.
    """
    noised = scheduler.add_noise(latents, noise, timesteps)
    if latent_mask is not None:
        noised = noised * latent_mask.to(noised)
    prediction = unet(noised, timesteps, text_states).sample
    return prediction.float() - denoising_target(scheduler, latents, noise, timesteps).float()


def denoising_loss(*args, **kwargs) -> torch.Tensor:
    """Squared error of the U-Net's prediction per sample and location, float32 (B, C, h, w),
    paper Eq. 2 and 3; arguments of `denoising_residual`."""
    return denoising_residual(*args, **kwargs).square()


def load_part(cls, path: str, subfolder: str, **kwargs: Any):
    """`cls.from_pretrained(path, subfolder=...)`,
    with one clear InputError when the folder or repository has no such part."""
    try:
        return cls.from_pretrained(path, subfolder=subfolder, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if Path(path).is_dir() else ", which is no folder here,"
        raise InputError(f"The model '{path}'{where} has no usable {subfolder or 'files'}: "
                         f"{reason}") from None


@contextlib.contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and back into the mode they were in."""
    modes = [[(part, part.training) for part in module.modules()] for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in (pair for pairs in modes for pair in pairs):
            part.training = training


@dataclass
class LatentDiffusion:
    """The frozen parts of a Stable Diffusion model, on one device and in one dtype."""

    tokenizer: Any
    text_encoder: torch.nn.Module
    vae: torch.nn.Module
    unet: torch.nn.Module
    scheduler: Any

    @classmethod
    def load(cls, path: str, *, revision: str | None = None, variant: str | None = None,
             dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "LatentDiffusion":
        """Load a Diffusers folder or repository, frozen and in evaluation mode;
        InputError when a part is missing."""
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        weights = dict(revision=revision, variant=variant)
        model = cls(
            load_part(CLIPTokenizer, path, "tokenizer", revision=revision),
            load_part(CLIPTextModel, path, "text_encoder", **weights),
            load_part(AutoencoderKL, path, "vae", torch_dtype=dtype, **weights),
            load_part(UNet2DConditionModel, path, "unet", torch_dtype=dtype, **weights),
            load_part(DDPMScheduler, path, "scheduler", revision=revision),
        )
        model.text_encoder.to(dtype)  # the other two came in it, as Diffusers wants it
        for module in (model.text_encoder, model.vae, model.unet):
            module.requires_grad_(False).eval().to(device)
        return model

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Mean latent z0 of (B, 3, H, W) in [0, 1], scaled,
        (B, C, h, w) in the model's dtype; gradients flow."""
        posterior = self.vae.encode(to_vae_range(images.to(self.device)).to(self.vae.dtype)).latent_dist
        return (posterior.mean * self.vae.config.scaling_factor).to(self.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of scaled latents, float32 (B, 3, H, W), about [0, 1] and not clipped; gradients flow."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float() / 2 + 0.5

    @torch.no_grad()
    def embed_text(self, prompts: str | list[str]) -> torch.Tensor:
        """Text encoder states of the prompts, padded to the tokenizer's length, (B, L, D)."""
        ids = self.tokenizer(prompts if isinstance(prompts, list) else [prompts], padding="max_length",
                             truncation=True, max_length=self.tokenizer.model_max_length,
                             return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device))[0].to(self.dtype)

    def residual(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
                 text_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`denoising_residual` of this model."""
        return denoising_residual(self.unet, self.scheduler, latents, noise, timesteps, text_states, **kwargs)

    def loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`denoising_loss` of this model."""
        return denoising_loss(self.unet, self.scheduler, *args, **kwargs)
