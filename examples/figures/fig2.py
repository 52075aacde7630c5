"""Fig. 2: semantic sensitivity maps against cross-attention maps, of words that the model knows.

    python examples/figures/fig2.py --data_dir figures --output_dir results/figures

The name of a concept's folder gives the prompt: "a photo of a teal striped star" for `teal-striped-star`. The
word under test is the last one, which names what the mask covers. The claim (Sec. 4.1): sensitivity lies
where the word acts; cross-attention spreads out and favors the start token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import estimate

from szt_utils.plots import map_grid
from szt_utils.sensitivity import cross_attention_maps, tokenize_words
from szt_utils.statistics import mass_inside


@dataclass(frozen=True)
class Settings(common.Settings):
    images: int = 3  # of each concept
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    replacements: int = 16
    noise_draws: int = 1
    seed: int = 0


def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Numbers of every image, and the maps of the first image of three concepts.

    The numbers are the share of each map's mass inside the true mask, the mask's area, and the start token's
    mean attention and sensitivity relative to the word's.
    """
    model, resolution = settings.load_model()
    start, timesteps, rows, maps = model.tokenizers[0].bos_token, list(settings.timesteps), [], {}
    for concept in settings.concepts_in(data):
        words = concept.split("-")
        prompt = tokenize_words(model, f"a photo of a {' '.join(words)}", [start, words[-1]])
        paths = settings.image_paths(data, concept)
        for path in paths[:settings.images]:
            with torch.no_grad():
                latents = model.encode(common.load_images([path], resolution))
            ssm, noise = common.sensitivity(
                model, latents, prompt, timesteps, replacements=settings.replacements,
                noise_draws=settings.noise_draws, seed=settings.seed)
            attention = cross_attention_maps(model, latents, prompt, timesteps, noise=noise).cpu()
            mask = common.load_mask(settings.mask_path(concept, path), resolution, latents.shape[-2:])
            rows.append({"name": f"{concept}/{path.stem}", "area": mask.mean().item(),
                         "ssm": mass_inside(ssm[1], mask).tolist(),
                         "attention": mass_inside(attention[1], mask).tolist(),
                         "start_ssm": (ssm[0].mean((1, 2)) / ssm[1].mean((1, 2))).tolist(),
                         "start_attention": (attention[0].mean((1, 2)) / attention[1].mean((1, 2))).tolist()})
            if len(maps) < 3 and path == paths[0]:
                maps[str(path)] = {"words": ["start token", words[-1]], "ssm": ssm.tolist(),
                                   "attention": attention.tolist()}
    return {"timesteps": timesteps, "rows": rows, "maps": maps}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    clean = results["clean"]
    names = [row.get("name", str(i)) for i, row in enumerate(clean["rows"])]

    def of_concepts(values, statistic=np.mean):
        return estimate(values, statistic, names)
    found = {"share of the image that the mask covers": of_concepts([row["area"] for row in clean["rows"]])}
    for i, t in enumerate(clean["timesteps"]):
        value = {name: np.array([row[name][i] for row in clean["rows"]])
                 for name in ("ssm", "attention", "start_ssm", "start_attention")}
        found |= {f"t = {t}: share of the map's mass inside the mask, SSM": of_concepts(value["ssm"]),
                  f"t = {t}: share of the map's mass inside the mask, cross-attention":
                      of_concepts(value["attention"]),
                  f"t = {t}: SSM less cross-attention": of_concepts(value["ssm"] - value["attention"]),
                  f"t = {t}: start token's mean map over the word's, SSM":
                      of_concepts(value["start_ssm"], np.median),
                  f"t = {t}: start token's mean map over the word's, cross-attention":
                      of_concepts(value["start_attention"], np.median)}
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    rows, labels, images = [], [], []
    for name, of_image in results["clean"]["maps"].items():
        for kind in ("ssm", "attention"):
            for word, maps in zip(of_image["words"], of_image[kind], strict=True):
                rows.append(maps)
                labels.append(f"{word}\n{kind}")
                images.append(common.central_square(name))
    map_grid(path, images, np.array(rows), labels, results["clean"]["timesteps"])


if __name__ == "__main__":
    common.run_figure("fig2", __doc__, measure, claims, plot, Settings, data=("clean",))
