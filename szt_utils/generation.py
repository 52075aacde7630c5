"""Pictures from a pipeline, with or without a learned embedding: batched,
and the same for every batch size."""

from pathlib import Path

import torch
from PIL import Image

__all__ = ["generate", "load_pipeline"]


def load_pipeline(model: str, embedding: str | Path | None = None, device: torch.device | str = "cpu",
                  **kwargs):
    """An ordinary StableDiffusionPipeline, with the embedding's token loaded when one is given."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, **kwargs).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if embedding is not None:
        pipeline.load_textual_inversion(str(embedding))
    return pipeline


def generate(pipeline, prompts: list[str], *, seed: int = 0, steps: int = 25, guidance_scale: float = 5.0,
             batch_size: int = 8) -> list[Image.Image]:
    """One picture per prompt; the i-th starts from noise of `seed + i` whatever the batch."""
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start:start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        images += pipeline(chunk, num_inference_steps=steps, guidance_scale=guidance_scale,
                           generator=generators).images
    return images
