"""Sensitivity maps of image files, as `sensitivity_maps.py` writes them.

An image's folder gets `maps.safetensors`, float32 (tokens, timesteps, h, w) by name with the labels of both
axes in its metadata, and `grid.png`; the run's folder gets `options.json` and `stats.jsonl`.
"""

import collections
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .devices import best_device, dtype_of
from .embedding_files import embedding_paths, trained_with
from .embeddings import add_embedding, with_all_vectors
from .errors import InputError
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

__all__ = ["MapSettings", "image_maps", "make_maps", "render_maps"]

RESULTS = ("maps.safetensors", "grid.png")


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
    arguments = json.loads(json.dumps(asdict(settings)))
    with FolderRun(output_dir, "sensitivity_maps.py", arguments) as run:
        folders = _folders(settings.image)
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
        labels = list(dict.fromkeys(settings.tokens or settings.prompt.split()))
        hashes = {path: _input_hash(path, resolution, settings) for path in folders}
        work = run.missing(list(folders), lambda path: [folders[path] + name for name in RESULTS],
                           lambda path, record: record.get("sha256") == hashes[path])
        if not work:
            return
        run.begin()
        for path in tqdm(work, desc="maps", unit="image"):
            image, pixels = read_square(path, resolution)
            maps = image_maps(model, prompt, pixels, settings)
            records = [{"image": path, "sha256": hashes[path], "token": token, "timestep": t,
                        **{name: of_kind[i, j].mean().item() for name, of_kind in maps.items()}}
                       for i, token in enumerate(labels) for j, t in enumerate(settings.timesteps)]
            contents = render_maps(image, maps, labels, settings)
            files = {folders[path] + name: content for name, content in zip(RESULTS, contents, strict=True)}
            run.save(records, run.without_kept(files))


def _input_hash(path: str, resolution: int, settings: MapSettings) -> str:
    """The hash of what an image's maps are made of: the image and the learned embeddings."""
    sha256 = sha256_of(read_square(path, resolution)[1])
    files = [file for given in settings.embeddings or [] for file in embedding_paths(given)]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(sha256.encode() + content).hexdigest() if files else sha256


def _folders(images: Sequence[str]) -> dict[str, str]:
    """The folder of every image's results within the output folder, "" or with a slash at its end.

    InputError when two have one name and for an unreadable image.
    """
    folders = {image: f"{Path(image).stem}/" if len(images) > 1 else "" for image in images}
    known = collections.Counter(folder.casefold() for folder in folders.values())  # as some file systems do
    for image, folder in folders.items():
        if known[folder.casefold()] > 1:
            raise InputError(f"Several images are called '{Path(image).stem}'; rename them.")
        read_image(image)  # an unreadable file must not stop the run half-way
    return folders


def _tokenize_learned(model: Model, settings: MapSettings) -> TokenizedPrompt:
    """Tokenize the prompt after adding the learned embeddings, `with_all_vectors` as in a pipeline.

    The model reads the text as the embeddings were trained; InputError when they were trained differently.
    """
    for path in settings.embeddings or []:
        add_embedding(model.tokenizers, model.text_encoders, path)
    ways = {trained_with(path) for path in settings.embeddings or []}
    if len(ways) > 1:
        raise InputError("The --embeddings were trained with different --clip_skip or --pooled_token; make "
                         "their maps one by one.")
    if ways:
        model.clip_skip, pooled_token = ways.pop()
        if model.pooled_token is not None:
            model.pooled_token = pooled_token
    tokenizer, within = model.tokenizers[0], None if settings.tokens else settings.prompt
    words = dict.fromkeys(settings.tokens or settings.prompt.split())
    return tokenize_words(model, with_all_vectors(tokenizer, settings.prompt),
                          [with_all_vectors(tokenizer, word, within) for word in words])


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


def render_maps(image: Image.Image, maps: dict[str, torch.Tensor], labels: list[str],
                settings: MapSettings) -> tuple[bytes, bytes]:
    """The contents of an image's `RESULTS`; `labels` are the tokens as the user named them."""
    from safetensors.torch import save

    timesteps = list(settings.timesteps)
    tensors = save(maps, metadata={
        "tokens": json.dumps(labels), "timesteps": json.dumps(timesteps), "prompt": settings.prompt})
    titles = {"ssm": "", "cross_attention": "\nattention"}
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.png"
        map_grid(grid, image, np.concatenate([of_kind.numpy() for of_kind in maps.values()]),
                 [f"{label}{titles[name]}" for name in maps for label in labels], timesteps, settings.prompt)
        return tensors, grid.read_bytes()
