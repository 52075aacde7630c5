"""Measure the bundled pocket world on held-out scenes, against the bounds in CHECKS:

    python examples/train_pocket/check.py

Prints the figures and adds them to `--output`, a JSON file; exits with 1 and a list when figures are out of
bounds. `--parts` chooses among size, textures, vae, classifier, generation, inversion, jpeg and masks;
`--model` and `--dino` name other networks than the bundled ones.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from jpeg_response import LEFT, attack, left, left_in_pixels, luminance, random_signs, shift
from PIL import Image
from recipe import HELD_OUT_SEEDS, draw

import poison_images
import precompute_masks
import textual_inversion_szt
from szt_utils import pocket
from szt_utils.arguments import command_line, local_path, number, script_parser
from szt_utils.attributes import WORDS, read_attributes
from szt_utils.evaluation import evaluate_embedding
from szt_utils.files import write_json
from szt_utils.generation import generate, load_pipeline
from szt_utils.images import from_pil, list_images, read_image, save_png, to_pil
from szt_utils.metrics import Networks, image_features
from szt_utils.models import load_model
from szt_utils.pocket.scenes import NOVEL_CONCEPTS, Scene, caption, concept_scenes
from szt_utils.poisons import POISONS

Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    model: str
    dino: str
    images: int = 256  # to generate
    steps: int = 600  # of textual inversion
    count: int = 5  # images of each concept, for classifier and masks
    home: Path = Path("concepts")  # folder for the concepts' images, clean and poisoned


def run_quietly(script: ModuleType, **flags: object) -> None:
    """Run one of the project's scripts in this process, without its output."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        script.main(command_line(**flags))


def held_out(count: int) -> list[Scene]:
    return [draw(HELD_OUT_SEEDS + i) for i in range(count)]


def as_tensor(scene: Scene) -> torch.Tensor:
    """A scene's image, float32 (1, 3, 128, 128) in [0, 1]."""
    return from_pil(Image.fromarray(scene.image))


def reader_accuracy(settings: Settings, scenes: list[Scene], images: list[Image.Image]) -> Figures:
    """Share of images in which the attribute reader finds the words of the scenes that they show."""
    read = read_attributes(image_features(images, settings.dino, normalized=False), settings.dino)
    return {kind: np.mean([words[kind] == getattr(scene.attributes, kind)
                           for words, scene in zip(read, scenes, strict=True)]) for kind in WORDS}


@torch.no_grad()
def check_vae(settings: Settings) -> Figures:
    """Reconstruction in dB and the error of the object's mean color in levels of 255."""
    model = load_model(settings.model)
    quality, color = [], []
    for scene in held_out(256):
        x = as_tensor(scene)
        y = model.decode(model.encode(x)).clamp(0, 1)
        quality.append(-10 * ((x - y) ** 2).mean().log10().item())
        inside = torch.from_numpy(scene.mask)
        color.append((x[0, :, inside].mean(1) - y[0, :, inside].mean(1)).abs().mean().item() * 255)
    return {"psnr_db": np.mean(quality), "object_color_error_levels": np.mean(color)}


def check_classifier(settings: Settings) -> Figures:
    """Accuracy of the attribute reader on real held-out scenes, and on the novel concepts, clean and poisoned
    (ADM+ and EA, eps 16, 100 steps)."""
    scenes = held_out(512)
    figures = reader_accuracy(settings, scenes, [Image.fromarray(scene.image) for scene in scenes])
    for data in ("clean", "ea", "adm+"):
        scenes, images = [], []
        for concept in NOVEL_CONCEPTS:
            scenes += concept_scenes(concept, settings.count)
            images += map(read_image, list_images(concept_images(settings, data, concept)))
        accuracy = reader_accuracy(settings, scenes, images)
        figures |= {f"novel_{data}_{kind}": share for kind, share in accuracy.items()}
    return figures


def check_generation(settings: Settings) -> Figures:
    """Attributes read in generated images, 25 steps, guidance 5."""
    scenes = held_out(settings.images)
    images = generate(load_pipeline(settings.model), [caption(scene.attributes) for scene in scenes], seed=1,
                      steps=25, guidance_scale=5.0, batch_size=16)
    return reader_accuracy(settings, scenes, images)


def check_inversion(settings: Settings) -> Figures:
    """Similarity after clean textual inversion over that among real images, per novel concept and on
    average."""
    ratios, networks = {}, Networks(settings.dino, pocket.clip_path())
    for concept in NOVEL_CONCEPTS:
        with tempfile.TemporaryDirectory() as folder:
            images, learned = Path(folder) / "images", Path(folder) / "learned"
            paths = pocket.write_concept(concept, images)
            run_quietly(textual_inversion_szt, pretrained_model_name_or_path=settings.model,
                        train_data_dir=images, output_dir=learned, placeholder_token="<c>",
                        initializer_token="object", resolution=128, train_batch_size=4,
                        max_train_steps=settings.steps, learning_rate=5e-3, seed=0)
            _, scores = evaluate_embedding(
                settings.model, learned / "learned_embeds.safetensors",
                [read_image(path) for path in paths], pocket.PROMPTS, networks)
        ratios[concept] = scores["dino"] / scores["real_real"]
        print(f"  {concept}: {ratios[concept]:.3f}", flush=True)
    return {"mean": np.mean(list(ratios.values())), **ratios}


def concept_images(settings: Settings, data: str, concept: str) -> Path:
    """Folder of a novel concept's images, clean or poisoned, whose masks are in home/true/<concept>.

    Images that are there already are not poisoned again.
    """
    home = settings.home
    clean, folder = home / "clean" / concept, home / data / concept
    pocket.write_concept(concept, clean, home / "true" / concept, settings.count)
    if data != "clean":
        run_quietly(poison_images, pretrained_model_name_or_path=settings.model, image_dir=clean,
                    output_dir=folder, method=data, resolution=128, batch_size=settings.count)
    return folder


def check_size(settings: Settings) -> Figures:
    """Size of all bundled weights in megabytes."""
    return {"megabytes": sum(path.stat().st_size for path in pocket.WEIGHTS.rglob("*")
                             if path.suffix in (".safetensors", ".pth")) / 1e6}


def check_textures(settings: Settings) -> Figures:
    """Share of random signs that JPEG at quality 25 leaves in luminance, by background and on average: of 16
    levels, and of 6, for which photographs of 512 and 128 pixels leave 0.15 and 0.22."""
    kept: dict[str, list[float]] = {}
    for i, scene in enumerate(held_out(128)):
        image = as_tensor(scene)
        for levels in (16, 6):
            noisy = random_signs(image, levels, torch.Generator().manual_seed(i))
            share = left_in_pixels(noisy, image, 25, view=luminance)
            for name in (scene.attributes.background, "mean"):
                kept.setdefault(f"{name}_{levels}", []).append(share.item())
    return {name: np.mean(shares) for name, shares in sorted(kept.items())}


def check_jpeg(settings: Settings) -> Figures:
    """The encoder's answer to an attack, 16 levels, 100 steps away from the clean latent: the shift in
    standard deviations of the latents, and what JPEG on both sides leaves of it; what JPEG at quality 25
    leaves of the six poisons in pixels."""
    model, images = load_model(settings.model), torch.cat([as_tensor(scene) for scene in held_out(8)])
    attacked = attack(model.encode, images, 100, 1, [torch.Generator().manual_seed(0) for _ in images])
    with torch.no_grad():
        size = shift(model.encode, attacked, images)
        figures = {"shift": (size.mean() / model.encode(images).std()).item()}
        figures |= {f"left_{quality}": left(model.encode, attacked, images, quality, size).mean().item()
                    for quality in LEFT}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for i, image in enumerate(to_pil(images)):
            save_png(image, home / "clean" / f"{i}.png")
        for method in POISONS:
            run_quietly(poison_images, pretrained_model_name_or_path=settings.model, image_dir=home / "clean",
                        output_dir=home / method, method=method, resolution=128, batch_size=8)
            poisoned = from_pil([read_image(path) for path in list_images(home / method)])
            figures[f"pixels_{method}"] = left_in_pixels(poisoned, images, 25).mean().item()
    print("  real poisons leave in pixels:", REAL_POISONS, flush=True)
    return figures


def check_masks(settings: Settings) -> Figures:
    """Mean overlap with the true mask over the novel concepts, from one random click and by --auto, on clean
    and on poisoned images (ADM+ and EA, eps 16, 100 steps)."""
    figures = {}
    for data in ("clean", "ea", "adm+"):
        folders = [concept_images(settings, data, concept) for concept in NOVEL_CONCEPTS]
        figures |= {f"{data}_{way}": value for way, value
                    in mask_overlaps(folders[0].parent, settings.home / "true").items()}
        print(f"  {data}: {figures}", flush=True)
    return figures


def mask_overlaps(image_dir: Path, true_dir: Path) -> Figures:
    """Mean overlap of masks by precompute_masks.py with the true ones, over folders of images."""
    rng, overlaps = np.random.default_rng(0), {"click": [], "auto": []}
    for concept in NOVEL_CONCEPTS:
        true = {path.name: np.asarray(Image.open(path).convert("L")) > 127
                for path in list_images(true_dir / concept)}
        points = {}
        for name, mask in true.items():
            y, x = np.argwhere(mask)[rng.integers(mask.sum())]
            points[name] = {"include": [[int(x), int(y)]]}
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "points.json"
            write_json(file, points)
            for way, flags in {"click": {"points_file": file}, "auto": {"auto": True}}.items():
                run_quietly(precompute_masks, image_dir=image_dir / concept,
                            output_dir=Path(temporary) / way, **flags)
                for name, mask in true.items():
                    found = np.asarray(Image.open(Path(temporary) / way / name)) > 127
                    overlaps[way].append((found & mask).sum() / (found | mask).sum())
    return {way: float(np.mean(values)) for way, values in overlaps.items()}


@dataclass(frozen=True)
class Check:
    """A part of the check, and the lowest and highest value of some of its figures."""

    measure: Callable[[Settings], Figures]
    bounds: dict[str, tuple[float, float]]

    def outside(self, figures: Figures) -> list[str]:
        """What is out of bounds, one line a figure; a figure that is not a number is."""
        return [f"{name} is {figures[name]:.4g}, not within {low:g} and {high:g}"
                for name, (low, high) in self.bounds.items() if not low <= figures[name] <= high]


INF = math.inf
CHECKS = {
    "size": Check(check_size, {"megabytes": (0, 80)}),
    "textures": Check(check_textures, {"mean_16": (0.12, INF), "mean_6": (0.15, INF)}),
    "vae": Check(check_vae, {"psnr_db": (28, INF), "object_color_error_levels": (0, 8)}),
    "classifier": Check(check_classifier, {name: (0.97, 1) for word in WORDS
                                           for name in (word, f"novel_clean_{word}")}),
    "generation": Check(check_generation, {"shape": (0.8, 1), "color": (0.9, 1), "pattern": (0.85, 1),
                                           "background": (0.9, 1)}),
    "inversion": Check(check_inversion, {"mean": (0.8, INF)}),
    "jpeg": Check(check_jpeg, {
        "shift": (1.5, 2.5),
        **{f"left_{quality}": (share - 0.08, share + 0.08) for quality, share in LEFT.items()},
        **{f"pixels_{method}": (0.3, 0.55) for method in ("adm+", "sds+", "ea")}}),
    "masks": Check(check_masks, {f"{data}_{way}": (low, 1) for data in ("clean", "ea", "adm+")
                                 for way, low in (("click", 0.9), ("auto", 0.85))}),
}
# What JPEG at quality 25 leaves of poisons that were made with real Stable Diffusion weights.
REAL_POISONS = {"SDS-": 0.29, "AdvDM": (0.33, 0.46), "ASPL": 0.37, "SDST": 0.40, "Mist": 0.43,
                "StyleGuard": 0.49, "MetaCloak": 0.59}


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("--parts", nargs="+", choices=CHECKS, default=list(CHECKS))
    add("--model", default=pocket.model_path())
    add("--dino", default=pocket.dino_path())
    add("--images", type=count, default=Settings.images, help="generation: number of images (256)")
    add("--steps", type=count, default=Settings.steps, help="inversion: training steps (600)")
    add("--count", type=count, default=Settings.count, help="classifier, masks: images of each concept (5)")
    add("--output", type=local_path, default=Path("pocket_check.json"))
    args = parser.parse_args(argv)
    figures = json.loads(args.output.read_text()) if args.output.exists() else {}
    outside = []
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(args.model, args.dino, args.images, args.steps, args.count, Path(home))
        for part in args.parts:
            measured = CHECKS[part].measure(settings)
            figures[part] = {name: round(float(value), 4) for name, value in measured.items()}
            print(part, json.dumps(figures[part], indent=2), flush=True)
            write_json(args.output, figures)
            outside += [f"{part}: {line}" for line in CHECKS[part].outside(figures[part])]
    if outside:
        raise SystemExit("\n".join(["Out of bounds:", *outside]))


if __name__ == "__main__":
    main()
