"""Pictures from a pipeline, with or without a learned embedding: batched,
and the same for every batch size."""

from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from .images import read_image, save_png

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
             batch_size: int = 8, folder: str | Path | None = None,
             progress: bool = False) -> list[Image.Image]:
    """One picture per prompt; the i-th starts from noise of `seed + i` whatever the batch.

    With a `folder`, pictures are kept there as `000.png`, `001.png`, ..., and those that are there are not
    made again.
    """
    paths = [Path(folder) / f"{i:03d}.png" for i in range(len(prompts))] if folder is not None else []
    missing = [i for i in range(len(prompts)) if not paths or not paths[i].exists()]
    made = {}
    for start in tqdm(range(0, len(missing), batch_size), unit="batch", disable=not progress):
        chunk = missing[start:start + batch_size]
        images = pipeline([prompts[i] for i in chunk], num_inference_steps=steps,
                          guidance_scale=guidance_scale,
                          generator=[torch.Generator().manual_seed(seed + i) for i in chunk]).images
        made |= dict(zip(chunk, images, strict=True))
        if paths:
            for i, image in zip(chunk, images, strict=True):
                save_png(image, paths[i])
    return [made[i] if i in made else read_image(paths[i]) for i in range(len(prompts))]
