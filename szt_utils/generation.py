"""Generated images of a Diffusers pipeline, with or without a learned embedding.

Images are generated in batches, and are the same for every batch size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .embeddings import with_all_vectors
from .errors import InputError
from .images import read_image, save_png
from .models.parts import allow_clip_skip, read_pipeline
from .schedules import kind_of

__all__ = ["generate", "load_pipeline", "spell_out", "use_dpm_solver"]


def load_pipeline(model: str | Path, device: torch.device | str = "cpu", *, revision: str | None = None,
                  variant: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The text-to-image pipeline of a Diffusers folder or repository, with DPM-Solver++ and without filters.

    InputError for a model that is none of images from prompts, cannot be loaded or lacks weights.
    """
    from diffusers import AutoPipelineForText2Image

    pipeline = read_pipeline(AutoPipelineForText2Image, str(model), dtype, revision, variant,
                             "text-to-image pipeline").to(device)
    use_dpm_solver(pipeline)
    return pipeline


def use_dpm_solver(pipeline: Any) -> None:
    """Sample with DPM-Solver++, but for models of rectified flow and of EDM, which keep their schedulers."""
    from diffusers import DPMSolverMultistepScheduler

    if kind_of(pipeline.scheduler) == "DDPM":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def spell_out(pipeline: Any, prompt: str) -> str:
    """A prompt `with_all_vectors`, unless the pipeline adds them itself."""
    if hasattr(pipeline, "maybe_convert_prompt"):
        return prompt
    return with_all_vectors(pipeline.tokenizer, prompt)


def generate(pipeline: Any, prompts: list[str], *, seed: int = 0, steps: int = 25,
             guidance_scale: float = 5.0, clip_skip: int = 0, batch_size: int = 8,
             folder: str | Path | None = None, progress: bool = False) -> list[Image.Image]:
    """Generate one image per prompt; the i-th starts from noise of `seed + i` whatever the batch.

    `clip_skip` last layers of the text encoders are skipped.

    With a `folder`, images are saved there as `000.png`, `001.png`, ..., and only missing ones are generated.
    Models with zero terminal SNR get a guidance_rescale of 0.7 (Lin et al. 2023, "Common diffusion noise
    schedules and sample steps are flawed"). InputError names an image that is not finite.
    """
    options = {"guidance_rescale": 0.7} if pipeline.scheduler.config.get("rescale_betas_zero_snr") else {}
    if clip_skip:
        allow_clip_skip(pipeline)
        options["clip_skip"] = clip_skip
    paths = [Path(folder) / f"{i:03d}.png" for i in range(len(prompts))] if folder is not None else []
    missing = [i for i in range(len(prompts)) if not paths or not paths[i].exists()]
    generated = {}
    for start in tqdm(range(0, len(missing), batch_size), unit="batch", disable=not (progress and missing)):
        chunk = missing[start:start + batch_size]
        levels = pipeline([prompts[i] for i in chunk], num_inference_steps=steps,
                          guidance_scale=guidance_scale, output_type="np", **options,
                          generator=[torch.Generator().manual_seed(seed + i) for i in chunk]).images
        for i, image in zip(chunk, levels, strict=True):
            if not np.isfinite(image).all():  # it would be saved as a black image
                raise InputError(f"Image {i:03d}, '{prompts[i]}', is not finite; use --mixed_precision bf16 "
                                 "or no instead of fp16, or another embedding.")
        images = pipeline.image_processor.numpy_to_pil(levels)
        generated |= dict(zip(chunk, images, strict=True))
        if paths:
            for i, image in zip(chunk, images, strict=True):
                save_png(image, paths[i])
    return [generated[i] if i in generated else read_image(paths[i]) for i in range(len(prompts))]
