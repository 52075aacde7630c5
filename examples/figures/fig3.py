"""Fig. 3: sensitivity to the learned word over timesteps, of clean and poisoned images, before and after
training.

    python examples/figures/fig3.py --data_dir figures --concepts teal-striped-star

The claim (Sec. 4.1): before training, and after training on clean images, the concept stands out at middle
timesteps; after training on poisoned images sensitivity spreads far beyond it, most of all at lower ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import TOKEN, estimate

from szt_utils.plots import map_grid
from szt_utils.sensitivity import tokenize_words
from szt_utils.statistics import mass_inside


@dataclass(frozen=True)
class Settings(common.Settings):
    images: int = 2  # of each concept
    timesteps: tuple[int, ...] = (50, 200, 350, 500, 650, 800, 950)
    replacements: int = 16
    noise_draws: int = 1
    prompt: str = "a photo of a {} on grass"
    initializer: str = "object"
    seed: int = 0


def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Per image the map's mass inside the mask and its mean outside, by timestep, before and after training;
    and the maps of the first image of the first concept."""
    model, resolution = settings.load_model()
    rows, shown = [], None
    before = common.word_rows(model, settings.initializer)
    embeddings = common.add_token(model)
    prompt = tokenize_words(model, settings.prompt.replace("{}", TOKEN), [TOKEN])
    for concept in settings.concepts_in(data):
        after = common.learned_rows(model, settings.embedding_path(data, concept))
        for path in settings.image_paths(data, concept)[:settings.images]:
            with torch.no_grad():
                latents = model.encode(common.load_images([path], resolution))
            mask = common.load_mask(settings.mask_path(concept, path), resolution, latents.shape[-2:])
            row, maps = {"concept": concept, "area": mask.mean().item()}, []
            for when, vectors in (("before", before), ("after", after)):
                common.set_rows(embeddings, vectors)
                (of_word,), _ = common.sensitivity(
                    model, latents, prompt, settings.timesteps, replacements=settings.replacements,
                    noise_draws=settings.noise_draws, seed=settings.seed)
                maps.append(of_word.tolist())
                row[when] = mass_inside(of_word, mask).tolist()
                row[f"{when}_outside"] = ((of_word * (1 - mask)).sum((1, 2)) / (1 - mask).sum()).tolist()
            rows.append(row)
            shown = shown or {"path": str(path), "before": maps[0], "after": maps[1]}
    return {"timesteps": list(settings.timesteps), "rows": rows, "shown": shown}


def by_concept(rows: list[dict], value: Callable[[dict], float]) -> dict[str, float]:
    """Mean of `value(row)` for every concept."""
    return {name: np.mean([value(row) for row in rows if row["concept"] == name], axis=0)
            for name in sorted({row["concept"] for row in rows})}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    timesteps = np.array(results["clean"]["timesteps"])
    low = timesteps < 500
    found = {"share of the image that the mask covers": estimate(
        list(by_concept(results["clean"]["rows"], lambda row: row["area"]).values()))}

    def after(data: str, name: str) -> dict[str, float]:
        """A number of every concept, at low timesteps."""
        return by_concept(results[data]["rows"], lambda row: np.array(row[name])[low].mean())

    clean, clean_outside = after("clean", "after"), after("clean", "after_outside")
    for data, result in results.items():
        for when in ("before", "after"):
            for name, at in (("t < 500", low), ("t >= 500", ~low)):
                value = by_concept(result["rows"],
                                   lambda row, when=when, at=at: np.array(row[when])[at].mean())
                found[f"{data}, {when}: mass inside the mask, {name}"] = estimate(list(value.values()))
        if data != "clean":
            own, outside = after(data, "after"), after(data, "after_outside")
            found[f"{data}, after: mass inside less that of clean, t < 500"] = estimate(
                [own[name] - clean[name] for name in own if name in clean])
            found[f"{data}, after: mean outside the mask over that of clean, t < 500"] = estimate(
                [[outside[name], clean_outside[name]] for name in own if name in clean],
                lambda rows: rows[:, 0].mean() / rows[:, 1].mean())
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    rows, labels, images = [], [], []
    for when in ("before", "after"):
        for data, result in results.items():
            rows.append(result["shown"][when])
            labels.append(f"{data}\n{when}")
            images.append(common.central_square(result["shown"]["path"]))
    map_grid(path, images, np.array(rows), labels, results["clean"]["timesteps"])


if __name__ == "__main__":
    common.run_figure("fig3", __doc__, measure, claims, plot, Settings)
