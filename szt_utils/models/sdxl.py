"""Stable Diffusion XL: two text encoders, a pooled text embedding and time ids beside the prompt's states.

The states are the second-to-last hidden states of both encoders, side by side; the pooled text is the
second encoder's projection of one token. Time ids are the original size, the crop and the target size, in
pixels.

Which token is pooled depends on the tool. With `eos_token_id: 2`, as SDXL's config says, transformers takes
the token of the largest id: the end of the text, or a placeholder that was added after it. ComfyUI, A1111 and
kohya take the end of the text.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .parts import Condition, load_index
from .stable_diffusion import StableDiffusion

__all__ = ["SDXL"]


@dataclass
class SDXL(StableDiffusion):
    """An SDXL model; see `szt_utils.models.Model` for what its methods take and give.

    `pooled_token` is "upstream", what transformers pools, or "end", what ComfyUI, A1111 and kohya pool.
    """

    pooled_token: str = "upstream"

    family = "SDXL"
    vae_overflows = True
    embedding_keys = ("clip_l", "clip_g")
    uses_sizes = True
    corrected = {"clip_sample": False}
    text_classes = (("CLIPTokenizer", "CLIPTextModel"), ("CLIPTokenizer", "CLIPTextModelWithProjection"))

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        outputs = [encoder(of_encoder.to(self.device), output_hidden_states=True)
                   for encoder, of_encoder in zip(self.text_encoders, ids, strict=True)]
        states = torch.cat([output.hidden_states[-2 - self.clip_skip] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if self.pooled_token == "end":
            is_end = ids[1].to(self.device) == self.tokenizers[1].eos_token_id
            ends = outputs[1].last_hidden_state[torch.arange(len(is_end)), is_end.int().argmax(1)]
            pooled = self.text_encoders[1].text_projection(ends)
        condition = {"states": states.to(self.dtype), "pooled": pooled.to(self.dtype)}
        return condition if sizes is None else {**condition, "sizes": sizes.to(self.device)}

    def unprompted(self, condition: Condition) -> Condition:
        if not load_index(self.path, self.revision).get("force_zeros_for_empty_prompt", True):
            return condition
        return {name: torch.zeros_like(value) for name, value in condition.items()}

    def predict(self, noised: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        target = torch.tensor(noised.shape[-2:], device=noised.device) * self.vae_scale_factor
        target = target.expand(len(noised), -1)
        sizes = condition.get("sizes", torch.cat([target, torch.zeros_like(target)], dim=1))
        added = {"text_embeds": condition["pooled"],
                 "time_ids": torch.cat([sizes, target], dim=1).to(noised.dtype)}
        return self.network(noised, timesteps, condition["states"], added_cond_kwargs=added).sample

    def pipeline(self, *, tokenizers: list | None = None, from_files: bool = False) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return self._pipeline(StableDiffusionXLPipeline, tokenizers, from_files,
                              add_watermarker=False)
