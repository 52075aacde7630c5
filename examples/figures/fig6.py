"""Fig. 6: the loss inside and outside the concept during training, on clean and on poisoned images.

    python examples/figures/fig6.py --data_dir figures --output_dir results/figures --data clean adm+ sds+ ea

Measured with the embeddings that the training saved as it went, all with the same noise and timesteps. (The
training's own record of both losses, stats.jsonl, has other noise and timesteps at every step.) The claim
(Sec. 4.3): on clean images training lowers the loss inside the concept and not the rest; on poisoned images
both fall by the same proportion.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import TOKEN, estimate

from szt_utils.masks import masked_mean
from szt_utils.models import expand, residual, tokenize
from szt_utils.plots import COLORS, save_figure, subplots
from szt_utils.timesteps import sample_timesteps


@dataclass(frozen=True)
class Settings(common.Settings):
    saved_steps: tuple[int, ...] = (25, 50, 75, 100, 125, 150)
    draws: int = 16
    prompt: str = "a photo of a {}"
    initializer: str = "object"
    seed: int = 0


@torch.no_grad()
def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Mean losses inside and outside the concept, (concepts, steps, 2); step 0 is before training."""
    model, resolution = settings.load_model()
    initial = common.word_rows(model, settings.initializer)
    embeddings = common.add_token(model)
    ids = tokenize(model, settings.prompt.replace("{}", TOKEN))
    steps, losses = [0, *settings.saved_steps], []
    for concept in settings.concepts_in(data):
        paths, of_concept = settings.image_paths(data, concept), []
        latents = torch.cat([model.encode(common.load_images([path], resolution)) for path in paths])
        masks = torch.stack([common.load_mask(settings.mask_path(concept, path), resolution,
                                              latents.shape[-2:]) for path in paths]).unsqueeze(1)
        masks = (masks >= 0.5).to(latents)
        for step in steps:
            common.set_rows(embeddings, initial if step == 0 else common.learned_rows(
                model, settings.embedding_path(data, concept, f"learned_embeds-steps-{step}")))
            condition = expand(model.condition(ids), len(paths))
            generator, totals = torch.Generator().manual_seed(settings.seed), torch.zeros(2)
            for _ in range(settings.draws):
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                timesteps = sample_timesteps(len(paths), 0, model.num_timesteps, generator=generator)
                error = residual(model, latents, noise, timesteps.to(model.device), condition).square()
                totals += torch.stack([masked_mean(error, mask, "area") for mask in (masks, 1 - masks)]).cpu()
            of_concept.append((totals / settings.draws).tolist())
        losses.append(of_concept)
    return {"steps": steps, "losses": losses}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for data, result in results.items():
        losses = np.array(result["losses"])  # (concepts, steps, 2)

        def reduction(rows, part):
            return 1 - rows[:, -1, part].mean() / rows[:, 0, part].mean()
        found |= {f"{data}: relative loss reduction inside":
                      estimate(losses, lambda rows: reduction(rows, 0)),
                  f"{data}: relative loss reduction outside":
                      estimate(losses, lambda rows: reduction(rows, 1)),
                  f"{data}: outside's reduction over inside's": estimate(
                      losses, lambda rows: reduction(rows, 1) / reduction(rows, 0))}
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = subplots(1, 2, sharey=True)
    for data, result in results.items():
        losses = np.array(result["losses"]).mean(0)
        for part, name in enumerate(("inside", "outside")):
            change = 100 * (losses[:, part] / losses[0, part] - 1)
            axes[0, part].plot(result["steps"], change, "o-", color=COLORS[data], label=data, markersize=3)
            axes[0, part].set(title=f"{name} the concept", xlabel="training step",
                              ylabel="change of the loss, %")
    axes[0, 0].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    common.run_figure("fig6", __doc__, measure, claims, plot, Settings)
