"""Stable Diffusion 1 and 2: one text encoder, a U-Net that predicts noise or velocity.

    z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) noise
    target:   noise (epsilon)   or   sqrt(abar_t) noise - sqrt(1 - abar_t) z0 (v-prediction)
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError
from ..images import to_vae_range
from ..schedules import ddpm_log_snr, kind_of
from .parts import (
    Condition,
    Step,
    allow_clip_skip,
    file_precision,
    load_network,
    load_part,
    quiet_loading,
)

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
    clip_skip: int = 0  # last layers of the text encoders to skip
    vae_scale_factor: int = field(init=False)
    scaling_factor: float = field(init=False)
    shift_factor: float = field(init=False)

    family = "Stable Diffusion"
    network_name = "unet"  # its folder
    packed = 1  # channels at the network's input for each of the latents
    patch = 1  # latent cells, along a side, that the network takes together
    t5 = None
    no_training = ""  # why textual inversion is not offered
    # Of transformers, the tokenizers and the text encoders.
    text_classes = (("CLIPTokenizer", "CLIPTextModel"),)
    vae_overflows = False  # in float16
    embedding_keys = ("clip_l",)
    uses_sizes = False
    pooled_token = None
    # What the pipeline corrects in a scheduler's config.
    corrected = {"clip_sample": False, "steps_offset": 1}

    def __post_init__(self):
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scaling_factor = self.vae.config.scaling_factor
        self.shift_factor = getattr(self.vae.config, "shift_factor", None) or 0.0
        self._check_scheduler()

    def _check_scheduler(self) -> None:
        if (kind := kind_of(self.scheduler)) != "DDPM":
            raise InputError(f"The model '{self.path}' has the noise schedule of {kind}; "
                             f"only {self.family} models with that of DDPM are supported.")
        prediction = self.scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise InputError(f"The model '{self.path}' predicts '{prediction}'; "
                             "only 'epsilon' and 'v_prediction' are supported.")

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
             revision: str | None = None, variant: str | None = None, tokenizer: str | None = None,
             text_dtype: torch.dtype | None = None, text_linear: torch.dtype | None = None,
             quantize: str | None = None) -> "StableDiffusion":
        """`szt_utils.models.load_model` of this family."""
        from diffusers import AutoencoderKL

        weights = dict(revision=revision, variant=variant)
        network, scheduler = cls._classes()
        tokenizers, text_encoders = cls._load_text(path, tokenizer, **weights)
        vae = load_part(AutoencoderKL, path, "vae", torch_dtype=dtype, **weights)
        if cls.vae_overflows and dtype == torch.float16 and vae.config.force_upcast:
            vae.float()
        for each, encoder in zip(tokenizers, text_encoders, strict=True):
            if len(each) > len(encoder.get_input_embeddings().weight):
                raise InputError(f"The tokenizer of '{tokenizer or path}' has {len(each)} tokens, more than "
                                 "the text encoder knows; it belongs to another model.")
            _set_precision(encoder, text_dtype or dtype, text_linear)
        model = cls(path, tokenizers, text_encoders, vae,
                    load_network(network, path, cls.network_name, dtype, quantize, **weights),
                    load_part(scheduler, path, "scheduler", revision=revision), **weights)
        for module in (*model.text_encoders, model.vae, model.network):
            module.requires_grad_(False).eval().to(device)
        return model

    @staticmethod
    def _classes() -> tuple[type, type]:
        """The classes of the network and of the scheduler."""
        from diffusers import DDPMScheduler, UNet2DConditionModel

        return UNet2DConditionModel, DDPMScheduler

    @classmethod
    def _load_text(cls, path: str, tokenizer: str | None, revision: str | None,
                   variant: str | None) -> tuple[list, list[torch.nn.Module]]:
        import transformers

        tokenizers, encoders = [], []
        for i, names in enumerate(cls.text_classes):
            of_tokenizer, of_encoder = (getattr(transformers, name) for name in names)
            suffix, other = f"_{i + 1}" if i else "", None if i else tokenizer
            tokenizers.append(load_part(of_tokenizer, other or path, "" if other else f"tokenizer{suffix}",
                                        revision=None if other else revision))
            encoders.append(load_part(of_encoder, path, f"text_encoder{suffix}", revision=revision,
                                      variant=variant))
        return tokenizers, encoders

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def resolution(self) -> int:
        return self.network.config.sample_size * self.vae_scale_factor

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        pixels = to_vae_range(images).to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.parameters

    def latents(self, moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        sample = DiagonalGaussianDistribution(moments).sample(generator)
        return ((sample - self.shift_factor) * self.scaling_factor).to(self.dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        mean = self.moments(images.to(self.device)).chunk(2, dim=1)[0]
        return ((mean - self.shift_factor) * self.scaling_factor).to(self.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents / self.scaling_factor + self.shift_factor).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float() / 2 + 0.5

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        (ids,), (encoder,) = ids, self.text_encoders
        if not self.clip_skip:
            return {"states": encoder(ids.to(self.device))[0].to(self.dtype)}
        states = encoder(ids.to(self.device), output_hidden_states=True).hidden_states[-1 - self.clip_skip]
        # transformers 5 has flattened the encoder.
        return {"states": getattr(encoder, "text_model", encoder).final_layer_norm(states).to(self.dtype)}

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.network(noised, timesteps, condition["states"]).sample

    def guide(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition, empty: Condition,
              guidance_scale: float) -> torch.Tensor:
        both = {name: torch.cat([empty[name], condition[name]]) for name in condition}
        unguided, guided = self.predict(torch.cat([noised] * 2), timesteps.repeat(2), both).chunk(2)
        return unguided + guidance_scale * (guided - unguided)

    def unprompted(self, condition: Condition) -> Condition:
        return condition

    def sampler(self, steps: int, latents: torch.Tensor) -> tuple[torch.Tensor, Step]:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.scheduler.config, **self.corrected)
        scheduler.set_timesteps(steps, device=latents.device)

        def step(prediction: torch.Tensor, i: int, latents: torch.Tensor) -> torch.Tensor:
            return scheduler.step(prediction, scheduler.timesteps[i], latents).prev_sample
        return scheduler.timesteps, step

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        return ddpm_log_snr(self.scheduler.alphas_cumprod, timesteps)

    def pipeline(self, *, tokenizers: list | None = None, from_files: bool = False) -> Any:
        from diffusers import StableDiffusionPipeline

        pipeline = self._pipeline(StableDiffusionPipeline, tokenizers, from_files,
                                  safety_checker=None)
        if self.clip_skip:
            allow_clip_skip(pipeline)
        return pipeline

    def _pipeline(self, cls: type, tokenizers: list | None, from_files: bool, **options: Any) -> Any:
        parts = {}
        for name, given in (("tokenizer", tokenizers or self.tokenizers),
                            ("text_encoder", [] if from_files else self.text_encoders)):
            parts |= {name if i == 0 else f"{name}_{i + 1}": part for i, part in enumerate(given)}
        if from_files:
            parts["torch_dtype"] = file_precision(self.path, self.revision, self.variant)
        else:
            parts |= {self.network_name: self.network, "torch_dtype": self.dtype}
            parts |= {} if self.vae is None else {"vae": self.vae}
        with quiet_loading():
            return cls.from_pretrained(self.path, revision=self.revision, variant=self.variant, **parts,
                                       **options)


def _set_precision(encoder: torch.nn.Module, dtype: torch.dtype, of_linear: torch.dtype | None) -> None:
    encoder.to(dtype)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(of_linear or dtype)
