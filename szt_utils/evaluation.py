"""Evaluation of a learned embedding (paper Sec. 5.1.3): generate images of prompts, then score them.

`evaluate_embedding` returns images and scores; `evaluate_to_folder` is what `evaluate.py` does: it writes
`images/`, `scores.json`, `contact_sheet.png` and `options.json`.
"""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from . import pocket
from .captions import EVALUATION_PROMPTS, read_prompt_templates
from .devices import best_device, dtype_of
from .embedding_files import embedding_paths, trained_with
from .embeddings import load_into, with_all_vectors
from .errors import InputError
from .files import write_json
from .folder_run import FolderRun
from .generation import generate, load_pipeline, spell_out
from .images import contact_sheet, list_images, read_image, save_png
from .metrics import METRICS, Networks, score_images

__all__ = ["EvaluationSettings", "evaluate_embedding", "evaluate_to_folder", "evaluate_token"]

# The settings that decide the images; metrics and networks may change from run to run.
_DECISIVE = ("pretrained_model_name_or_path", "revision", "variant", "images_per_prompt",
             "num_inference_steps", "guidance_scale", "seed", "mixed_precision")


@dataclass(frozen=True)
class EvaluationSettings:
    """What decides an evaluation; a field has the name and the meaning of its flag.

    Without a model, it is the pocket model and its prompts; without `dino` and `clip`, the pocket networks.
    """

    embeddings: str
    clean_dir: str
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    prompts_file: str | None = None
    images_per_prompt: int = 5
    class_word: str = "object"
    metrics: Sequence[str] = METRICS
    dino: str | None = None
    clip: str | None = None
    inception: str | None = None
    num_inference_steps: int = 25
    guidance_scale: float | None = None  # 7.5, of a pocket model 5
    batch_size: int = 8
    seed: int = 100
    mixed_precision: str = "no"

    def __post_init__(self):
        if self.guidance_scale is None:
            object.__setattr__(self, "guidance_scale", 5.0 if self.is_pocket else 7.5)

    @property
    def prompts(self) -> list[str]:
        """The prompts, with `{}` for the concept; InputError for an invalid prompts file."""
        if self.prompts_file:
            return read_prompt_templates(self.prompts_file)
        return list(pocket.PROMPTS if self.is_pocket else EVALUATION_PROMPTS)

    @property
    def is_pocket(self) -> bool:
        """Whether the model is a pocket one."""
        path = self.pretrained_model_name_or_path
        return path is None or pocket.is_bundled(path)

    @property
    def networks(self) -> Networks:
        """The networks of the metrics."""
        return Networks(self.dino or pocket.dino_path(), self.clip or pocket.clip_path(), self.inception)


def find_embedding(path: str | Path) -> Path:
    """The file of an embedding, given as the file or the training's output folder; InputError if missing."""
    file = embedding_paths(path)[0]
    if not file.is_file():
        raise InputError(f"The embedding '{file}' does not exist; "
                         "give its file or the training's output folder.")
    return file


def evaluate_embedding(model: str, embedding: str | Path, real: list[Image.Image], prompts: Sequence[str],
                       networks: Networks, **options: Any) -> tuple[list[Image.Image], dict[str, float]]:
    """`evaluate_token` of a learned embedding's file with a Diffusers model, `as_trained`."""
    pipeline = load_pipeline(model)
    token = load_into(pipeline, embedding)
    return evaluate_token(pipeline, token, real, prompts, networks, **as_trained(embedding), **options)


def as_trained(embedding: str | Path) -> dict[str, int]:
    """The options of `generation.generate` that an embedding was `trained_with`.

    Warns of an embedding that SDXL's pipeline pools in another way.
    """
    clip_skip, pooled_token = trained_with(embedding)
    if pooled_token == "end":
        warnings.warn("The embedding was trained with --pooled_token end, as ComfyUI, A1111 and kohya pool; "
                      "Diffusers' pipeline, which generates here, pools another token.", stacklevel=2)
    return {"clip_skip": clip_skip} if clip_skip else {}


def evaluate_token(pipeline: Any, token: str, real: list[Image.Image], prompts: Sequence[str],
                   networks: Networks, *, images_per_prompt: int = 1, class_word: str = "object",
                   metrics: Iterable[str] = ("dino",), seed: int = 100, folder: str | Path | None = None,
                   **sampling: Any) -> tuple[list[Image.Image], dict[str, float]]:
    """Generate images of a pipeline's token and score them against `real`, the clean images.

    Returns the images, `images_per_prompt` of the first prompt, then of the next, and their scores. `prompts`
    hold `{}` for the token, for the CLIP score replaced by `class_word`. `sampling` and `folder` go to
    `generation.generate`.
    """
    token = spell_out(pipeline, token)
    for prompt in prompts:
        _check_room(pipeline, token, prompt.format(token))
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    generated = generate(pipeline, [prompt.format(token) for prompt in repeated], seed=seed, folder=folder,
                         **sampling)
    texts = [prompt.format(class_word) for prompt in repeated]
    return generated, score_images(generated, real, texts, networks, metrics, pipeline.device)


def _check_room(pipeline: Any, token: str, prompt: str) -> None:
    """InputError for a prompt that is so long that a CLIP tokenizer cuts off vectors of the embedding."""
    tokenizer = pipeline.tokenizer
    kept = tokenizer(with_all_vectors(tokenizer, prompt), truncation=True,
                     max_length=tokenizer.model_max_length).input_ids
    vectors = with_all_vectors(tokenizer, token).split()
    if not {*tokenizer.convert_tokens_to_ids(vectors)} <= {*kept}:
        raise InputError(f"The prompt '{prompt}' leaves no room for all vectors of '{token}' among the "
                         f"{tokenizer.model_max_length} tokens that the model takes; shorten it.")


def evaluate_to_folder(settings: EvaluationSettings, output_dir: str | Path) -> None:
    """Write and print an evaluation; images that the folder holds are not generated again.

    InputError for input that cannot be used: networks are loaded after the images are generated, everything
    else before anything is written.
    """
    output_dir, embedding, prompts = Path(output_dir), find_embedding(settings.embeddings), settings.prompts
    if output_dir.resolve().is_relative_to(Path(settings.clean_dir).resolve()):
        raise InputError(f"--output_dir '{output_dir}' is --clean_dir or lies in it; "
                         "give another --output_dir.")
    arguments = {name: getattr(settings, name) for name in _DECISIVE}
    content = b"".join(path.read_bytes() for path in embedding_paths(embedding))
    arguments |= {"embeddings": hashlib.sha256(content).hexdigest(), "prompts_file": prompts}
    with (FolderRun(output_dir, "evaluate.py", arguments) as run,
          warnings.catch_warnings(record=True) as caught):
        real = [read_image(path) for path in list_images(settings.clean_dir)]
        warnings.simplefilter("always", UserWarning)
        pipeline = load_pipeline(settings.pretrained_model_name_or_path or pocket.model_path(),
                                 device=best_device(), revision=settings.revision, variant=settings.variant,
                                 dtype=dtype_of(settings.mixed_precision))
        token = load_into(pipeline, embedding)
        run.begin(settings=asdict(settings))
        generated, scores = evaluate_token(
            pipeline, token, real, prompts, settings.networks, folder=output_dir / "images",
            images_per_prompt=settings.images_per_prompt, class_word=settings.class_word,
            metrics=settings.metrics, seed=settings.seed, steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale, batch_size=settings.batch_size, progress=True,
            **as_trained(embedding))
        messages = []
        if not settings.is_pocket and not (settings.dino and settings.clip):
            messages.append("The bundled networks only know the pocket world; "
                            "give --dino and --clip for photos.")
        messages += [str(message.message) for message in caught if message.category is UserWarning]
        _write(settings, output_dir, prompts, real, generated, scores, messages)


def _write(settings: EvaluationSettings, output_dir: Path, prompts: list[str], real: list[Image.Image],
           generated: list[Image.Image], scores: dict[str, float], messages: list[str]) -> None:
    """Write scores.json and contact_sheet.png, and print warnings and scores."""
    absent = [name for name in ("real_real", *METRICS) if name not in scores and name != "attributes"
              and (name in settings.metrics or (name == "real_real" and "dino" in scores))]
    write_json(output_dir / "scores.json", {
        "metrics": {**scores, **dict.fromkeys(absent)}, "generated": len(generated), "real": len(real),
        "dino": settings.dino or "pocket", "clip": settings.clip or "pocket",
        "inception": settings.inception, "class_word": settings.class_word, "warnings": messages})
    count = settings.images_per_prompt
    rows = [("the clean images", real)]
    rows += [(prompt.format("<concept>"), generated[i * count:(i + 1) * count])
             for i, prompt in enumerate(prompts)]
    save_png(contact_sheet(rows), output_dir / "contact_sheet.png")
    for message in dict.fromkeys(messages):
        print(f"warning: {message}")
    print(f"{len(generated)} generated images, {len(real)} clean ones")
    for name, value in scores.items():
        print(f"  {name:10s} {value:.4f}")
    for name in absent:
        print(f"  {name:10s} n/a: too few images")
