"""Stable Diffusion 3 and 3.5: rectified flow, two CLIP text encoders, and T5 beside them if it is there.

The prompt's states are the second-to-last hidden states of both CLIP encoders side by side, padded with zeros
to the width of T5's, and T5's states behind them. Without T5 those are zeros, as in Diffusers' pipeline. The
pooled text is that of both CLIP encoders.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .flow import Flow
from .parts import Condition

__all__ = ["SD3"]


@dataclass
class SD3(Flow):
    """A Stable Diffusion 3 model; see `szt_utils.models.Model` for what its methods take and give."""

    family = "Stable Diffusion 3"
    embedding_keys = ("clip_l", "clip_g")
    t5_parts = ("_3", 256)  # as in Diffusers' pipeline
    t5_is_optional = True
    text_classes = (("CLIPTokenizer", "CLIPTextModelWithProjection"),) * 2

    @staticmethod
    def _classes() -> tuple[type, type]:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

        return SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        outputs = [encoder(of_encoder.to(self.device), output_hidden_states=True)
                   for encoder, of_encoder in zip(self.text_encoders, ids, strict=False)]
        clip = torch.cat([output.hidden_states[-2 - self.clip_skip] for output in outputs], dim=-1)
        width = self.network.config.joint_attention_dim
        t5 = clip.new_zeros(len(clip), self.t5_parts[1], width) if self.t5 is None else self.t5.states(ids[2])
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        states = torch.cat([clip.to(self.dtype), t5.to(self.dtype)], dim=1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return {"states": states, "pooled": pooled.to(self.dtype)}

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.network(noised, encoder_hidden_states=condition["states"],
                            pooled_projections=condition["pooled"],
                            timestep=self.sigmas(timesteps) * self.num_timesteps).sample

    def pipeline(self, *, tokenizers: list | None = None, from_files: bool = False) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return self._pipeline(StableDiffusion3Pipeline, tokenizers, from_files)
