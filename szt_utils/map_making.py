"""Sensitivity maps of image files, as `sensitivity_maps.py` writes them.

An image's folder gets `maps.safetensors`, float32 (tokens, timesteps, h, w) by name with the labels of both
axes in its metadata, and `grid.png`; the run's folder gets `options.json` and `stats.jsonl`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .devices import best_device, dtype_of
from .embeddings import add_embedding, placeholder_prompt
from .errors import InputError
from .files import write_bytes
from .folder_run import FolderRun, sha256_of
from .images import read_image
from .models import Model, find_family, load_model
from .plots import map_grid
from .sensitivity import (
    TokenizedPrompt,
    check_cross_attention,
    cross_attention_maps,
    draw_replacements,
    semantic_sensitivity,
    tokenize_words,
)
from .square_images import read_square, resolution_for

__all__ = ["MapSettings", "image_maps", "make_maps", "save_maps"]


@dataclass(frozen=True)
class MapSettings:
    """What decides the maps; a field has the name and the meaning of its flag."""

    pretrained_model_name_or_path: str
    image: Sequence[str]
    prompt: str
    tokens: Sequence[str] | None = None
    timesteps: Sequence[int] = (100, 300, 500, 700, 900)
    replacements: int = 16
    noise_draws: int = 1
    embeddings: Sequence[str] | None = None
    cross_attention: bool = False
    batch_size: int | None = None
    resolution: int | None = None
    seed: int = 0
    mixed_precision: str = "no"
    revision: str | None = None
    variant: str | None = None


def make_maps(settings: MapSettings, output_dir: str | Path) -> None:
    """Write the maps of every image that lacks them.

    One image's files are written into `output_dir`, those of several into a folder each, named after the
    image. InputError for input that cannot be used, before anything is written.
    """
    run = FolderRun(output_dir, "sensitivity_maps.py", json.loads(json.dumps(asdict(settings))))
    folders = _folders(settings.image, run.folder)
    if settings.cross_attention:
        check_cross_attention(find_family(settings.pretrained_model_name_or_path, settings.revision))
    model = load_model(settings.pretrained_model_name_or_path, revision=settings.revision,
                       variant=settings.variant, dtype=dtype_of(settings.mixed_precision),
                       device=best_device())
    resolution = resolution_for(model, settings.resolution)
    if late := [t for t in settings.timesteps if t >= model.num_timesteps]:
        raise InputError(f"The timestep {late[0]} of --timesteps is above the model's last, "
                         f"{model.num_timesteps - 1}.")
    prompt = _tokenize_learned(model, settings)
    labels = list(settings.tokens or prompt.words)
    run.begin()
    finished = {record["image"]: record["sha256"] for record in run.records}
    for path, folder in tqdm(folders.items(), desc="maps", unit="image"):
        image, pixels = read_square(path, resolution)
        sha256 = sha256_of(pixels)
        if finished.get(path) == sha256 and (folder / "grid.png").exists():
            continue
        maps = image_maps(model, prompt, pixels, settings)
        save_maps(folder, image, maps, labels, settings)
        run.append([{"image": path, "sha256": sha256, "token": token, "timestep": t,
                     **{name: of_kind[i, j].mean().item() for name, of_kind in maps.items()}}
                    for i, token in enumerate(labels) for j, t in enumerate(settings.timesteps)])


def _folders(images: Sequence[str], output_dir: Path) -> dict[str, Path]:
    """The output folder of every image; InputError when two have one name and for an unreadable image."""
    if len(images) == 1:
        folders = {images[0]: output_dir}
    else:
        folders = {}
        for image in images:
            folder = output_dir / Path(image).stem
            if folder in folders.values():
                raise InputError(f"Several images are called '{folder.name}'; rename them.")
            folders[image] = folder
    for image in images:
        read_image(image)  # an unreadable file must not stop the run half-way
    return folders


def _tokenize_learned(model: Model, settings: MapSettings) -> TokenizedPrompt:
    """Tokenize the prompt after adding the learned embeddings, with all vectors of each of their words."""
    learned = [add_embedding(model.tokenizers, model.text_encoders, path)
               for path in settings.embeddings or []]
    words = {token: placeholder_prompt(token, num_vectors) for token, num_vectors in learned}

    def spell_out(text: str) -> str:
        return " ".join(words.get(word, word) for word in text.split())

    return tokenize_words(model, spell_out(settings.prompt),
                          settings.tokens and [spell_out(token) for token in settings.tokens])


def image_maps(model: Model, prompt: TokenizedPrompt, pixels: torch.Tensor,
               settings: MapSettings) -> dict[str, torch.Tensor]:
    """Maps of an image (1, 3, R, R), float32 (tokens, timesteps, h, w) by name: "ssm", "cross_attention".

    The random draws are the same for every image of one size. InputError when a map is not finite.
    """
    with torch.no_grad():
        latents = model.encode(pixels)
    generator = torch.Generator().manual_seed(settings.seed)
    replaced, drawn = draw_replacements(prompt, settings.replacements, model.tokenizers[0].vocab_size,
                                        generator)
    noise = torch.randn((settings.noise_draws, *latents.shape[1:]), generator=generator)
    maps = {"ssm": semantic_sensitivity(model, latents, prompt, settings.timesteps, noise=noise,
                                        replaced=replaced, drawn=drawn, batch_size=settings.batch_size)}
    if settings.cross_attention:
        maps["cross_attention"] = cross_attention_maps(model, latents, prompt, settings.timesteps,
                                                       noise=noise)
    maps = {name: of_kind.float().cpu().contiguous() for name, of_kind in maps.items()}
    if not all(of_kind.isfinite().all() for of_kind in maps.values()):
        raise InputError("The maps are not finite; use --mixed_precision bf16 or no instead of fp16.")
    return maps


def save_maps(folder: Path, image: Image.Image, maps: dict[str, torch.Tensor], labels: list[str],
              settings: MapSettings) -> None:
    """Write an image's maps.safetensors and grid.png; `labels` are the tokens as the user named them."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    timesteps = list(settings.timesteps)
    write_bytes(folder / "maps.safetensors", save(maps, metadata={
        "tokens": json.dumps(labels), "timesteps": json.dumps(timesteps), "prompt": settings.prompt}))
    titles = {"ssm": "", "cross_attention": "\nattention"}
    map_grid(folder / "grid.png", image, np.concatenate([of_kind.numpy() for of_kind in maps.values()]),
             [f"{label}{titles[name]}" for name in maps for label in labels], timesteps, settings.prompt)
