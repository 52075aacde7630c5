"""FLUX.1: rectified flow, the states of T5, and the pooled text of CLIP.

The transformer takes latents packed, each 2 x 2 cells as one token of four times the channels, and the
position of every token. A distilled model (FLUX.1-dev) also takes a guidance scale, which replaces the
second, unguided prediction. That of training is 3.5, as in Diffusers' training examples.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .flow import Flow
from .parts import Condition

__all__ = ["Flux", "pack", "unpack"]

_LATENT_SIDE = 128  # the pipeline's default; the transformer's config names none


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (B, h w / 4, 4 C) of latents (B, C, h, w)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents (B, C, h, w) of a size (h, w) from their tokens: the inverse of `pack`."""
    grid = tokens.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2))
    return torch.nn.functional.pixel_shuffle(grid, 2)


@dataclass
class Flux(Flow):
    """A FLUX.1 model; see `szt_utils.models.Model` for what its methods take and give."""

    guidance_scale: float = 3.5  # of a distilled model, in training and attacks

    family = "FLUX"
    packed = 4
    t5_parts = ("_2", 512)  # as in Diffusers' pipeline
    no_training = "FLUX textual inversion is not offered: users found it weak; train a LoRA instead."

    @staticmethod
    def _classes() -> tuple[type, type]:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        return FluxTransformer2DModel, FlowMatchEulerDiscreteScheduler

    @property
    def resolution(self) -> int:
        return _LATENT_SIDE * self.vae_scale_factor

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        pooled = self.text_encoders[0](ids[0].to(self.device)).pooler_output
        condition = {"states": self.t5.states(ids[1]).to(self.dtype), "pooled": pooled.to(self.dtype)}
        if self.network.config.guidance_embeds:
            condition["guidance"] = condition["pooled"].new_full((len(ids[0]),), self.guidance_scale)
        return condition

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        height, width = noised.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        states = condition["states"]
        tokens = self.network(pack(noised), encoder_hidden_states=states,
                              pooled_projections=condition["pooled"], guidance=condition.get("guidance"),
                              timestep=self.sigmas(timesteps), img_ids=places.to(noised),
                              txt_ids=noised.new_zeros(states.shape[1], 3)).sample
        return unpack(tokens, (height, width))

    def guide(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition, empty: Condition,
              guidance_scale: float) -> torch.Tensor:
        if "guidance" in condition:
            condition = {**condition, "guidance": torch.full_like(condition["guidance"], guidance_scale)}
        return self.predict(noised, timesteps, condition)

    def _unshifted(self, steps: int) -> list[float] | None:
        return torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()

    def pipeline(self, *, tokenizers: list | None = None, from_files: bool = False) -> Any:
        from diffusers import FluxPipeline

        return self._pipeline(FluxPipeline, tokenizers, from_files)
