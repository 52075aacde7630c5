"""Generated images of a Diffusers pipeline, with or without a learned embedding.

Images are generated in batches, and are the same for every batch size.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .embeddings import add_embedding, load_embedding
from .errors import InputError
from .images import read_image, save_png

__all__ = ["generate", "load_into_pipeline", "load_pipeline"]

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
            model, **{name: value for name, value in _WITHOUT.items() if name in accepted}, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"The model '{model}' cannot be loaded as a text-to-image pipeline: "
                         f"{reason}") from None
    pipeline.to(device).set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    if embedding is not None:
        load_into_pipeline(pipeline, embedding)
    return pipeline


def load_into_pipeline(pipeline: Any, embedding: str | Path) -> str:
    """Load a learned embedding into a pipeline's CLIP text encoders; returns its token.

    InputError for an embedding that cannot be read or is of another model.
    """
    parts = [(getattr(pipeline, f"tokenizer{suffix}", None), getattr(pipeline, f"text_encoder{suffix}", None))
             for suffix in ("", "_2")]
    parts = [(tokenizer, encoder) for tokenizer, encoder in parts
             if encoder is not None and encoder.config.model_type == "clip_text_model"]
    if not parts:
        raise InputError(f"A {type(pipeline).__name__} has no CLIP text encoder, which the embedding "
                         f"'{embedding}' needs.")
    if len(parts) > 1:
        return add_embedding(*map(list, zip(*parts, strict=True)), embedding)[0]
    token, rows = load_embedding(embedding)
    width = parts[0][1].get_input_embeddings().weight.shape[1]
    if rows.shape[-1] != width:
        raise InputError(f"The embedding '{embedding}' has vectors of shape {tuple(rows.shape)}, but the "
                         f"model's are {width} wide; it was learned with another model.")
    try:
        pipeline.load_textual_inversion(str(embedding))
    except ValueError as error:
        raise InputError(f"The embedding '{embedding}' cannot be loaded into the model: {error}") from None
    return token


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
