"""Fig. 5: the norm of the loss's gradient with respect to the trained embedding, over timesteps.

    python examples/figures/fig5.py --data_dir figures --output_dir results/figures --data clean adm+

The claim (Sec. 4.2): gradients are near zero at t = 0 and at high timesteps; what is learned, and what
poisons teach, comes from lower and middle ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import TOKEN, estimate

from szt_utils.models import residual, tokenize
from szt_utils.plots import COLORS, save_figure, subplots


@dataclass(frozen=True)
class Settings(common.Settings):
    timesteps: int = 21
    draws: int = 10
    prompt: str = "a photo of a {}"
    seed: int = 0


def measure(settings: Settings, data: str) -> dict[str, Any]:
    """Gradient norms (concepts, timesteps) over all text encoders, means over images and draws."""
    model, resolution = settings.load_model()
    timesteps = torch.linspace(0, model.num_timesteps - 1, settings.timesteps).round().long()
    embeddings = common.add_token(model)
    # One row per sample, so that one backward pass gives the gradient of each sample alone.
    ids = tokenize(model, settings.prompt.replace("{}", TOKEN))
    for i, embedding in enumerate(embeddings):
        ids[i] = ids[i] + (ids[i] == len(embedding.frozen)) * torch.arange(len(timesteps)).unsqueeze(1)
    norms, concepts = [], settings.concepts_in(data)
    for concept in concepts:
        common.set_rows(embeddings, common.learned_rows(model, settings.embedding_path(data, concept)),
                        len(timesteps))
        paths, of_concept = settings.image_paths(data, concept), []
        for i in range(settings.draws):
            generator = torch.Generator().manual_seed(settings.seed + i)
            with torch.no_grad():
                latents = model.encode(common.load_images([paths[i % len(paths)]], resolution))
            noise = torch.randn((len(timesteps), *latents.shape[1:]), generator=generator).to(latents)
            error = residual(model, latents.expand_as(noise), noise, timesteps.to(model.device),
                             model.condition(ids)).square()
            gradients = torch.autograd.grad(error.flatten(1).mean(1).sum(),
                                            [embedding.rows for embedding in embeddings])
            of_concept.append(torch.cat(gradients, 1).norm(dim=1))
        norms.append(torch.stack(of_concept).mean(0).tolist())
    return {"timesteps": timesteps.tolist(), "log_snr": common.log_snr(model, timesteps), "norms": norms,
            "names": concepts}


def claims(results: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for data, result in results.items():
        timesteps, norms = np.array(result["timesteps"]), np.array(result["norms"])
        found |= {f"{data}: mean gradient norm at t > 700 over its peak": estimate(
                      norms, lambda rows, t=timesteps: rows.mean(0)[t > 700].mean() / rows.mean(0).max()),
                  f"{data}: gradient norm at t = 0 over its peak": estimate(
                      norms, lambda rows: rows.mean(0)[0] / rows.mean(0).max()),
                  f"{data}: timestep of the peak": estimate(
                      norms, lambda rows, t=timesteps: t[rows.mean(0).argmax()])}
        if data != "clean":
            found[f"{data}: gradient norm at t < 500 over that of clean"] = estimate(
                common.paired(results["clean"], result, "norms"), lambda rows, t=timesteps:
                rows[:, 1, t < 500].mean() / rows[:, 0, t < 500].mean())
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    figure, ((axis,),) = subplots(1, 1, width=6.5, height=4)
    for data, result in results.items():
        norms = np.array(result["norms"])
        low, middle, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=0)
        axis.fill_between(result["timesteps"], low, high, color=COLORS[data], alpha=0.25, linewidth=0)
        axis.plot(result["timesteps"], middle, color=COLORS[data], label=f"{data} ({len(norms)} concepts)")
    axis.set(xlabel="timestep", ylabel="norm of the loss's gradient", ylim=(0, None))
    axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    common.run_figure("fig5", __doc__, measure, claims, plot, Settings)
