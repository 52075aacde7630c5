"""Stable Diffusion 1 and 2: one text encoder, a U-Net that predicts noise or velocity.

    z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) noise
    target:   noise (epsilon)   or   sqrt(abar_t) noise - sqrt(1 - abar_t) z0 (v-prediction)
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError
from ..images import to_vae_range
from .parts import Condition, load_part

__all__ = ["StableDiffusion"]


@dataclass
class StableDiffusion:
    """A Stable Diffusion model; see `szt_utils.models.Model` for what its methods take and give."""

    path: str
    tokenizers: list
    text_encoders: list[torch.nn.Module]
    vae: torch.nn.Module | None
    network: torch.nn.Module
    scheduler: Any
    revision: str | None = None
    variant: str | None = None
    vae_scale_factor: int = field(init=False)
    scaling_factor: float = field(init=False)

    family = "Stable Diffusion"
    vae_overflows = False  # in float16

    def __post_init__(self):
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scaling_factor = self.vae.config.scaling_factor
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"The model '{self.path}' predicts '{self.scheduler.config.prediction_type}'; "
                             "only 'epsilon' and 'v_prediction' are supported.")

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
             revision: str | None = None, variant: str | None = None, tokenizer: str | None = None,
             text_dtype: torch.dtype | None = None) -> "StableDiffusion":
        """`szt_utils.models.load_model` of this family."""
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        weights = dict(revision=revision, variant=variant)
        tokenizers, text_encoders = cls._load_text(path, tokenizer, **weights)
        vae = load_part(AutoencoderKL, path, "vae", torch_dtype=dtype, **weights)
        if cls.vae_overflows and dtype == torch.float16 and vae.config.force_upcast:
            vae.float()
        model = cls(path, tokenizers, [encoder.to(text_dtype or dtype) for encoder in text_encoders],
                    vae,
                    load_part(UNet2DConditionModel, path, "unet", torch_dtype=dtype, **weights),
                    load_part(DDPMScheduler, path, "scheduler", revision=revision), **weights)
        for module in (*model.text_encoders, model.vae, model.network):
            module.requires_grad_(False).eval().to(device)
        return model

    @staticmethod
    def _load_text(path: str, tokenizer: str | None, revision: str | None,
                   variant: str | None) -> tuple[list, list[torch.nn.Module]]:
        from transformers import CLIPTextModel, CLIPTokenizer

        return ([load_part(CLIPTokenizer, tokenizer or path, "" if tokenizer else "tokenizer",
                           revision=None if tokenizer else revision)],
                [load_part(CLIPTextModel, path, "text_encoder", revision=revision, variant=variant)])

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        pixels = to_vae_range(images).to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.parameters

    def latents(self, moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        sample = DiagonalGaussianDistribution(moments).sample(generator)
        return (sample * self.scaling_factor).to(self.dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        mean = self.moments(images.to(self.device)).chunk(2, dim=1)[0]
        return (mean * self.scaling_factor).to(self.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents / self.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float() / 2 + 0.5

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        (ids,), (encoder,) = ids, self.text_encoders
        return {"states": encoder(ids.to(self.device))[0].to(self.dtype)}

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.network(noised, timesteps, condition["states"]).sample

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        signal = self.scheduler.alphas_cumprod.double()[timesteps.cpu()]
        return signal.log() - (1 - signal).log()

    def pipeline(self, *, tokenizers: list | None = None,
                 text_encoders: list[torch.nn.Module] | None = None, from_files: bool = False) -> Any:
        from diffusers import StableDiffusionPipeline

        return self._pipeline(StableDiffusionPipeline, tokenizers, text_encoders, from_files,
                              safety_checker=None)

    def _pipeline(self, cls: type, tokenizers: list | None, text_encoders: list[torch.nn.Module] | None,
                  from_files: bool, **options: Any) -> Any:
        parts = {}
        for name, given in (("tokenizer", tokenizers or self.tokenizers),
                            ("text_encoder", text_encoders or self.text_encoders)):
            parts |= {name if i == 0 else f"{name}_{i + 1}": part for i, part in enumerate(given)}
        if not from_files:
            parts |= {"unet": self.network, "torch_dtype": self.dtype}
            parts |= {} if self.vae is None else {"vae": self.vae}
        return cls.from_pretrained(self.path, revision=self.revision, variant=self.variant, **parts,
                                   **options)
