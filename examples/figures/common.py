"""What the figures have in common: their flags, the data sets of make_data.py, and the steps of a figure.

A figure is three functions: `measure(settings, data)` returns the measurements of one data set for JSON,
`claims(results)` the numbers that carry a claim of the paper, by sentence, and `plot(results, path)` writes
the PNG. `run_figure` makes a command line of them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from szt_utils import pocket
from szt_utils.arguments import local_path, script_parser
from szt_utils.devices import best_device
from szt_utils.embedding_files import ANY_ENCODER, read_embedding
from szt_utils.embeddings import NewRows
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.files import write_json
from szt_utils.images import crop_and_resize, list_images, read_image, read_upright
from szt_utils.masks import prepare_mask, read_mask
from szt_utils.models import Model, load_model
from szt_utils.plots import subplots
from szt_utils.sensitivity import TokenizedPrompt, draw_replacements, semantic_sensitivity
from szt_utils.square_images import read_square
from szt_utils.statistics import bootstrap

DATA = ("clean", "adm+", "adm-", "sds+", "sds-", "ea", "da")
TOKEN = "<concept>"


@dataclass(frozen=True)
class Settings:
    """What decides a figure's numbers. A figure adds fields with defaults; each of them is a flag."""

    pretrained_model_name_or_path: str
    data_dir: tuple[Path, ...]  # masks and embeddings are in the first
    concepts: tuple[str, ...] | None  # None: all

    def concepts_in(self, data: str, folder: Path | None = None) -> list[str]:
        """The concepts of a data set in a folder (the first), sorted: those asked for that it has."""
        names = sorted(path.name for path in ((folder or self.data_dir[0]) / data).glob("*") if path.is_dir())
        return [name for name in names if not self.concepts or name in self.concepts]

    def named_images(self, data: str) -> dict[str, Path]:
        """The images of a data set in all folders, by `<folder>/<concept>/<stem>`.

        InputError for two images of one name.
        """
        named: dict[str, Path] = {}
        for folder in self.data_dir:
            for concept in self.concepts_in(data, folder):
                for path in list_images(folder / data / concept):
                    name = f"{folder.name}/{concept}/{path.stem}"
                    if named.setdefault(name, path) != path:
                        raise InputError(f"The images '{named[name]}' and '{path}' are both named '{name}'; "
                                         "rename a folder or a file.")
        return named

    def hash_of(self, data: str) -> str:
        """A hash of a data set's images, masks and embeddings."""
        first, digest = self.data_dir[0], hashlib.sha256()
        files = [*self.named_images(data).values()]
        for concept in self.concepts_in(data):
            files += sorted((first / "masks" / concept).glob("*.png"))
            files += sorted((first / "learned" / data / concept).glob("learned_embeds*.safetensors"))
        for file in files:
            digest.update(f"{file.parent.name}/{file.name}".encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    def image_paths(self, data: str, concept: str) -> list[Path]:
        """The images of a data set's concept, sorted."""
        return list_images(self.data_dir[0] / data / concept)

    def mask_path(self, concept: str, image: Path) -> Path:
        """The mask of an image."""
        return self.data_dir[0] / "masks" / concept / f"{image.stem}.png"

    def embedding_path(self, data: str, concept: str, name: str = "learned_embeds") -> Path:
        """An embedding that was learned from a data set's concept."""
        return self.data_dir[0] / "learned" / data / concept / f"{name}.safetensors"

    def load_model(self) -> tuple[Model, int]:
        """The model, on the GPU if there is one, and the resolution of its images in pixels."""
        model = load_model(self.pretrained_model_name_or_path, device=best_device())
        return model, model.resolution


def load_images(paths: Sequence[Path], resolution: int) -> torch.Tensor:
    """The images' central squares, float32 (B, 3, R, R) in [0, 1]."""
    return torch.cat([read_square(path, resolution)[1] for path in paths])


def central_square(path: str | Path) -> Image.Image:
    """An image's central square."""
    image = read_image(path)
    return crop_and_resize(image, min(image.size), True)


def load_mask(path: Path, resolution: int, grid: tuple[int, int]) -> torch.Tensor:
    """The share of each latent cell that a mask covers, float32 (h, w) for `grid` (h, w)."""
    mask = prepare_mask(read_mask(path, read_upright(path).size), resolution, center_crop=True)
    return F.adaptive_avg_pool2d(mask, grid)[0, 0]


def add_token(model: Model) -> list[NewRows]:
    """Add TOKEN to a model; its vectors are the `rows` (n, D) of what is returned for each text encoder.

    Set `rows` before use; TOKEN itself is the first of them.
    """
    embeddings = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        weight = encoder.get_input_embeddings().weight[:len(tokenizer)]
        embeddings.append(NewRows(weight, torch.zeros_like(weight[:1])))
        tokenizer.add_tokens([TOKEN])
        encoder.set_input_embeddings(embeddings[-1])
    return embeddings


def set_rows(embeddings: Sequence[NewRows], rows: Sequence[torch.Tensor], copies: int = 1) -> None:
    """Give TOKEN the rows (1, D) of each text encoder, several times for a gradient of each copy."""
    for embedding, row in zip(embeddings, rows, strict=True):
        embedding.rows = torch.nn.Parameter(row.to(embedding.frozen).expand(copies, -1))


def word_rows(model: Model, word: str) -> list[torch.Tensor]:
    """The embedding (1, D) of a word's first token in each text encoder."""
    rows = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        token = tokenizer(word, add_special_tokens=False).input_ids[0]
        rows.append(encoder.get_input_embeddings().weight[token:token + 1].detach())
    return rows


def learned_rows(model: Model, path: Path) -> list[torch.Tensor]:
    """The first vector (1, D) of an embedding's file for each text encoder."""
    of_encoder = read_embedding(path)[1]
    return [of_encoder.get(key, of_encoder.get(ANY_ENCODER))[:1] for key in model.embedding_keys]


def log_snr(model: Model, timesteps: torch.Tensor) -> list[float | None]:
    """The logarithm of the signal-to-noise ratio at timesteps, None for pure noise."""
    return [value if math.isfinite(value) else None for value in model.log_snr(timesteps).tolist()]


def sensitivity(model: Model, latents: torch.Tensor, prompt: TokenizedPrompt, timesteps: Sequence[int], *,
                replacements: int, noise_draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sensitivity maps (words, timesteps, h, w) of latents (1, C, h, w), on the CPU, and the noise that they
    were made with, (noise_draws, C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    replaced, drawn = draw_replacements(prompt, replacements, model.tokenizers[0].vocab_size, generator)
    noise = torch.randn((noise_draws, *latents.shape[1:]), generator=generator)
    maps = semantic_sensitivity(model, latents, prompt, list(timesteps), noise=noise, replaced=replaced,
                                drawn=drawn)
    return maps.cpu(), noise


def estimate(values: Any, statistic: Callable[[np.ndarray], float] = np.mean,
             names: Sequence[str] | None = None) -> dict[str, float | None]:
    """`statistics.bootstrap` of concepts; a single one has no interval.

    A row is a concept, or an image, whose name, `.../<concept>/<stem>`, says of which.
    """
    groups = None if names is None else [str(name).split("/")[-2:][0] for name in names]
    result = bootstrap(np.asarray(values), statistic, groups=groups)
    return result if result["n"] > 1 else {**result, "low": None, "high": None}


def paired(clean: dict[str, Any], own: dict[str, Any], key: str) -> np.ndarray:
    """The rows of clean and of another data set that have the same name, (N, 2, ...); see `pair_names`."""
    of_clean, of_own = (dict(zip(names_of(result, key), result[key], strict=True)) for result in (clean, own))
    return np.array([[of_clean[name], of_own[name]] for name in pair_names(clean, own, key)])


def pair_names(clean: dict[str, Any], own: dict[str, Any], key: str) -> list[str]:
    """The names (N,) of the rows of `paired`."""
    known = set(names_of(clean, key))
    return [name for name in names_of(own, key) if name in known]


def names_of(result: dict[str, Any], key: str) -> list[str]:
    """The names of a data set's rows; rows of an older file without names are called by their place."""
    return result.get("names") or [str(i) for i in range(len(result[key]))]


def plot_grid(count: int, **options: Any) -> tuple[Any, list]:
    """A figure and its axes, at most three in a row; those beyond `count` are hidden."""
    columns = min(3, max(1, count))
    figure, axes = subplots(-(-max(1, count) // columns), columns, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def run_figure(name: str, doc: str, measure: Callable, claims: Callable, plot: Callable,
               settings: type[Settings] = Settings, data: tuple[str, ...] = DATA) -> None:
    """The command line of a figure: measure what `<name>.json` lacks, plot it, print and write its claims.

    `--redraw` takes the JSON as it is.
    """
    parser = script_parser(doc)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=pocket.model_path(), help="the model (the pocket model)")
    add("--data_dir", type=local_path, nargs="+", default=[Path("figures")],
        help="folders that make_data.py made; embeddings and masks are taken from the first (figures)")
    add("--output_dir", type=local_path, default=Path("results/figures"),
        help=f"folder for {name}.json, {name}.png and {name}_claims.json (results/figures)")
    add("--data", nargs="+", choices=data, help="data sets (all that --data_dir has)")
    add("--concepts", nargs="+", help="concepts (all)")
    add("--redraw", action="store_true", help=f"measure nothing: plot what {name}.json holds")
    for field in fields(settings)[len(fields(Settings)):]:
        several = isinstance(field.default, tuple)
        add(f"--{field.name}", type=type(field.default[0] if several else field.default),
            default=field.default, nargs="+" if several else None)
    args = parser.parse_args()
    with exit_on_input_error():
        path = args.output_dir / f"{name}.json"
        if args.redraw:
            results = json.loads(path.read_text())["results"]
        else:
            results = measured(path, settings(**{
                field.name: tuple(value) if isinstance(value := getattr(args, field.name), list) else value
                for field in fields(settings)}), measure, args.data, data)
        plot(results, path.with_suffix(".png"))
        found = claims(results)
        write_json(args.output_dir / f"{name}_claims.json", found)
        for sentence, value in found.items():
            print(f"{sentence}: {text_of(value)}")


def measured(path: Path, settings: Settings, measure: Callable, names: Sequence[str] | None,
             known: Sequence[str]) -> dict[str, Any]:
    """The results of the data sets `names`, or of all `known` ones that share images with 'clean'.

    Those in the file are kept if settings, clean images and their own images are the same; the others are
    measured and written to it.
    """
    images = {data: list(settings.named_images(data)) for data in ("clean", *(names or known))}
    shared = [data for data in images if not set(images["clean"]).isdisjoint(images[data])]
    names = names or shared
    if "clean" not in names or not images["clean"]:
        raise InputError(f"The data set 'clean' is not in '{settings.data_dir[0]}', --concepts or --data, "
                         "but the others are compared with it; make it with make_data.py or name it.")
    if alone := [data for data in names if data not in shared]:
        raise InputError(f"The data set '{alone[0]}' in '{settings.data_dir[0]}' has none of the images of "
                         "'clean'; make it with make_data.py.")
    record = json.loads(json.dumps({**asdict(settings), "clean": images["clean"]}, default=str))
    hashes = {data: settings.hash_of(data) for data in names}
    results = {}
    if path.exists():
        before = json.loads(path.read_text())
        results = before["results"] if before["settings"] == record else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for data in names:
        made_of = {"images": images[data], "sha256": hashes[data] + hashes["clean"]}
        if {name: results.get(data, {}).get(name) for name in made_of} != made_of:
            results[data] = {**made_of, **measure(settings, data)}
            write_json(path, {"settings": record, "results": results})
    return {data: results[data] for data in names}


def text_of(value: float | dict[str, Any]) -> str:
    """A claim's number with its interval."""
    if not isinstance(value, dict):
        return f"{value:.3g}"
    interval = "" if value["low"] is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value['value']:.3g}{interval} (n = {value['n']})"
