"""Generated images of a Diffusers pipeline, with or without a learned embedding.

Images are generated in batches, and are the same for every batch size.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .embeddings import load_into
from .errors import InputError
from .images import read_image, save_png
from .models.parts import absent_parts

__all__ = ["generate", "load_pipeline", "use_dpm_solver"]

# A safety checker would blank images, a watermark would change them.
_WITHOUT = {"safety_checker": None, "add_watermarker": False}


def load_pipeline(model: str | Path, embedding: str | Path | None = None,
                  device: torch.device | str = "cpu", **kwargs: Any) -> Any:
    """The text-to-image pipeline of a Diffusers folder or repository, with DPM-Solver++ and without filters.

    The embedding's token is loaded when an embedding is given; `kwargs` go to `from_pretrained`. InputError
    for a model that is none of images from prompts or cannot be loaded.
    """
    import diffusers
    from safetensors import SafetensorError

    try:
        config = diffusers.DiffusionPipeline.load_config(model, revision=kwargs.get("revision"))
        accepted = inspect.signature(getattr(diffusers, config["_class_name"], object).__init__).parameters
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
            model, **{name: value for name, value in _WITHOUT.items() if name in accepted},
            **absent_parts(config), **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"The model '{model}' cannot be loaded as a text-to-image pipeline: "
                         f"{reason}") from None
    pipeline.to(device).set_progress_bar_config(disable=True)
    use_dpm_solver(pipeline)
    if embedding is not None:
        load_into(pipeline, embedding)
    return pipeline


def use_dpm_solver(pipeline: Any) -> None:
    """Sample with DPM-Solver++, but for flow models, which keep their own scheduler."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def generate(pipeline: Any, prompts: list[str], *, seed: int = 0, steps: int = 25,
             guidance_scale: float = 5.0, batch_size: int = 8, folder: str | Path | None = None,
             progress: bool = False) -> list[Image.Image]:
    """Generate one image per prompt; the i-th starts from noise of `seed + i` whatever the batch.

    With a `folder`, images are saved there as `000.png`, `001.png`, ..., and only missing ones are generated.
    """
    paths = [Path(folder) / f"{i:03d}.png" for i in range(len(prompts))] if folder is not None else []
    missing = [i for i in range(len(prompts)) if not paths or not paths[i].exists()]
    generated = {}
    for start in tqdm(range(0, len(missing), batch_size), unit="batch", disable=not progress):
        chunk = missing[start:start + batch_size]
        images = pipeline([prompts[i] for i in chunk], num_inference_steps=steps,
                          guidance_scale=guidance_scale,
                          generator=[torch.Generator().manual_seed(seed + i) for i in chunk]).images
        generated |= dict(zip(chunk, images, strict=True))
        if paths:
            for i, image in zip(chunk, images, strict=True):
                save_png(image, paths[i])
    return [generated[i] if i in generated else read_image(paths[i]) for i in range(len(prompts))]
