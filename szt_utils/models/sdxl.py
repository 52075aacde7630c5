"""Stable Diffusion XL: two text encoders, a pooled text embedding and time ids beside the prompt's states.

The states are the second-to-last hidden states of both encoders, side by side; the pooled text is the second
encoder's projection. Time ids are the original size, the crop and the target size, in pixels.
"""

from typing import Any

import torch

from .parts import Condition, load_part
from .stable_diffusion import StableDiffusion

__all__ = ["SDXL"]


class SDXL(StableDiffusion):
    """An SDXL model; see `szt_utils.models.Model` for what its methods take and give."""

    family = "SDXL"
    vae_overflows = True

    @staticmethod
    def _load_text(path: str, tokenizer: str | None, revision: str | None,
                   variant: str | None) -> tuple[list, list[torch.nn.Module]]:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        tokenizers, encoders = StableDiffusion._load_text(path, tokenizer, revision, variant)
        return ([*tokenizers, load_part(CLIPTokenizer, path, "tokenizer_2", revision=revision)],
                [*encoders, load_part(CLIPTextModelWithProjection, path, "text_encoder_2", revision=revision,
                                      variant=variant)])

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        outputs = [encoder(of_encoder.to(self.device), output_hidden_states=True)
                   for encoder, of_encoder in zip(self.text_encoders, ids, strict=True)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        condition = {"states": states.to(self.dtype), "pooled": outputs[1].text_embeds.to(self.dtype)}
        return condition if sizes is None else {**condition, "sizes": sizes.to(self.device)}

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        target = torch.tensor(noised.shape[-2:], device=noised.device) * self.vae_scale_factor
        target = target.expand(len(noised), -1)
        sizes = condition.get("sizes", torch.cat([target, torch.zeros_like(target)], dim=1))
        added = {"text_embeds": condition["pooled"],
                 "time_ids": torch.cat([sizes, target], dim=1).to(noised.dtype)}
        return self.network(noised, timesteps, condition["states"], added_cond_kwargs=added).sample

    def pipeline(self, *, tokenizers: list | None = None,
                 text_encoders: list[torch.nn.Module] | None = None, from_files: bool = False) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return self._pipeline(StableDiffusionXLPipeline, tokenizers, text_encoders, from_files,
                              add_watermarker=False)
