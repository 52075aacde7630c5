"""Print the bundled pocket world's figures on held-out scenes: python examples/pocket/check.py

Parts (`--parts`): size, vae, classifier, generation, inversion, jpeg, masks. `--model` and `--dino`
name other folders than the bundled ones. The figures also go to `--output` as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recipe import HELD_OUT_SEEDS, draw
from train_metrics import accuracy, labels_of

from szt_utils import pocket
from szt_utils.diffusion import LatentDiffusion
from szt_utils.generation import generate, load_pipeline
from szt_utils.images import from_pil, list_images, read_image
from szt_utils.metrics import Networks, evaluate_embedding
from szt_utils.pocket.scenes import NOVEL_CONCEPTS, caption
from szt_utils.records import write_json

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *flags) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def held_out(count: int):
    return [draw(HELD_OUT_SEEDS + i) for i in range(count)]


def picture(scene) -> torch.Tensor:
    """A scene's picture, float32 (1, 3, 128, 128) in [0, 1]."""
    return from_pil(Image.fromarray(scene.image))


@torch.no_grad()
def check_vae(arguments) -> dict:
    """Reconstruction in dB (>= 28) and the error of the object's mean colour in levels of 255 (<= 8)."""
    model = LatentDiffusion.load(arguments.model)
    quality, colour = [], []
    for scene in held_out(256):
        x = picture(scene)
        y = model.decode(model.encode(x)).clamp(0, 1)
        quality.append(-10 * ((x - y) ** 2).mean().log10().item())
        inside = torch.from_numpy(scene.mask)
        colour.append((x[0, :, inside].mean(1) - y[0, :, inside].mean(1)).abs().mean().item() * 255)
    return {"psnr_db": np.mean(quality), "object_colour_error_levels": np.mean(colour)}


def _reader(arguments):
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    state = load_file(Path(arguments.dino) / "attributes.safetensors")
    heads = torch.nn.Linear(*reversed(state["weight"].shape))
    heads.load_state_dict(state)
    return Dinov2Model.from_pretrained(arguments.dino).eval(), heads


def check_classifier(arguments) -> dict:
    """Accuracy of the attribute reader on real held-out scenes (>= 97 %)."""
    scenes = held_out(512)
    return accuracy(*_reader(arguments), np.stack([s.image for s in scenes]),
                    labels_of([s.attributes for s in scenes]), "cpu")


def check_generation(arguments) -> dict:
    """Attributes read in generated pictures, 25 steps, guidance 5:
    shape >= 80 %, colour, background >= 90 %, pattern >= 85 %."""
    attributes = [scene.attributes for scene in held_out(arguments.pictures)]
    images = generate(load_pipeline(arguments.model), [caption(a) for a in attributes], seed=1, steps=25,
                      guidance_scale=5.0, batch_size=16)
    return accuracy(*_reader(arguments), np.stack([np.asarray(image) for image in images]),
                    labels_of(attributes), "cpu")


def check_inversion(arguments) -> dict:
    """Similarity after clean textual inversion over that among real pictures,
    per novel concept and on average (>= 0.80)."""
    ratios = {}
    networks = Networks(arguments.dino, pocket.clip_path())
    with tempfile.TemporaryDirectory() as temporary:
        for concept in NOVEL_CONCEPTS:
            folder = Path(temporary) / concept
            paths = pocket.write_concept(concept, folder / "images")
            subprocess.run([sys.executable, str(ROOT / "textual_inversion_szt.py"),
                            "--pretrained_model_name_or_path", arguments.model,
                            "--train_data_dir", str(folder / "images"),
                            "--output_dir", str(folder / "learned"), "--placeholder_token", "<c>",
                            "--initializer_token", "object", "--resolution", "128",
                            "--train_batch_size", "4", "--max_train_steps", str(arguments.steps),
                            "--learning_rate", "5e-3", "--seed", "0"],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, scores = evaluate_embedding(
                arguments.model, folder / "learned" / "learned_embeds.safetensors",
                [read_image(path) for path in paths], pocket.PROMPTS, networks)
            ratios[concept] = scores["dino"] / scores["real_real"]
            print(f"  {concept}: {ratios[concept]:.3f}", flush=True)
    return {"mean": float(np.mean(list(ratios.values()))), **ratios}


def check_size(arguments) -> dict:
    """Size of all bundled weights in megabytes (<= 40)."""
    folder = Path(pocket.model_path()).parent
    return {"megabytes": sum(path.stat().st_size for path in folder.rglob("*")
                             if path.suffix in (".safetensors", ".pth")) / 1e6}


def check_jpeg(arguments) -> dict:
    """Share of an encoder attack's latent shift that JPEG at quality 25 removes (>= 0.4), and the shift's
    root mean square in scaled latents: eps 16, 100 steps away from the latent."""
    from szt_utils.jpeg import jpeg_tensor
    from szt_utils.objectives import through_encoder
    from szt_utils.pgd import pgd

    model = LatentDiffusion.load(arguments.model)

    def shift(images, origin):
        with torch.no_grad():
            return model.encode(images) - model.encode(origin)

    shifts = []
    for scene in held_out(8):
        x = picture(scene)
        with torch.no_grad():
            origin = model.encode(x)
        attacked = pgd(x, lambda images, z0=origin: through_encoder(
            model.encode, images, lambda z: (z - z0, (z - z0).pow(2).flatten(1).sum(1))),
            eps=16, step_size=1, steps=100, generators=[torch.Generator().manual_seed(0)])
        healed = shift(jpeg_tensor(attacked, 25), jpeg_tensor(x, 25))
        shifts.append([s.square().mean().sqrt().item() for s in (shift(attacked, x), healed)])
    attacked, healed = np.array(shifts).T
    return {"share_removed": np.mean(1 - healed / attacked), "shift": attacked.mean(),
            "shift_after": healed.mean()}


def check_masks(arguments) -> dict:
    """Mean overlap with the true mask over the novel concepts, from one random click (>= 0.90) and by --auto
    (>= 0.85), on clean pictures and poisoned ones (ADM+ and EA, eps 16, 100 steps)."""
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for concept in NOVEL_CONCEPTS:
            pocket.write_concept(concept, home / "clean" / concept, home / "true" / concept, arguments.count)
        for data in ("clean", "ea", "adm+"):
            if data != "clean":
                run_script("poison_images.py", "--pretrained_model_name_or_path", arguments.model,
                           "--image_dir", home / "clean", "--output_dir", home / data, "--method", data,
                           "--resolution", 128, "--batch_size", 5)
            figures |= {f"{data}_{way}": value
                        for way, value in mask_overlaps(home / data, home / "true").items()}
            print(f"  {data}: {figures}", flush=True)
    return figures


def mask_overlaps(image_dir: Path, true_dir: Path) -> dict[str, float]:
    """Mean overlap of what precompute_masks.py makes of folders of pictures with the true masks."""
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
            for way, flags in {"click": ["--points_file", file], "auto": ["--auto"]}.items():
                run_script("precompute_masks.py", "--image_dir", image_dir / concept,
                           "--output_dir", Path(temporary) / way, *flags)
                for name, mask in true.items():
                    found = np.asarray(Image.open(Path(temporary) / way / name)) > 127
                    overlaps[way].append((found & mask).sum() / (found | mask).sum())
    return {way: float(np.mean(values)) for way, values in overlaps.items()}


CHECKS = {"size": check_size, "vae": check_vae, "classifier": check_classifier,
          "generation": check_generation, "inversion": check_inversion, "jpeg": check_jpeg,
          "masks": check_masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--model", default=None)
    parser.add_argument("--dino", default=None)
    parser.add_argument("--pictures", type=int, default=256, help="number of generated pictures")
    parser.add_argument("--steps", type=int, default=600, help="steps of textual inversion")
    parser.add_argument("--count", type=int, default=5, help="masks: pictures of each concept")
    parser.add_argument("--output", type=Path, default=Path("pocket_check.json"))
    arguments = parser.parse_args()
    arguments.model = arguments.model or pocket.model_path()
    arguments.dino = arguments.dino or pocket.dino_path()
    figures = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for part in arguments.parts:
        figures[part] = {k: round(float(v), 4) for k, v in CHECKS[part](arguments).items()}
        print(part, json.dumps(figures[part], indent=2), flush=True)
        write_json(arguments.output, figures)


if __name__ == "__main__":
    main()
