"""Semantic sensitivity maps per second, against a naive loop of two forward passes for every replacement.

    python benchmarks/maps.py
"""

import argparse

import torch
from models import DEVICE, model_folder
from timing import alternate, medians, ratio, report, seconds

from szt_utils.sensitivity import PromptedModel, draw_replacements, semantic_sensitivity


@torch.no_grad()
def naive(model: PromptedModel, latents, prompt, timesteps, *, noise, replaced, drawn) -> torch.Tensor:
    """Eq. 6 as it is written: each replacement for itself, text encoder and U-Net, changed and unchanged."""
    maps = torch.zeros(len(prompt.words), len(timesteps), *latents.shape[-2:], device=DEVICE)
    count = len(replaced) // len(prompt.words)
    for j, t in enumerate(timesteps):
        noised = model.base.scheduler.add_noise(latents, noise, torch.tensor([t], device=DEVICE))
        for i in range(len(replaced)):
            changed = model.predict(noised, t, model.conditions(prompt, replaced[i:i + 1], drawn[i:i + 1]))
            unchanged = model.predict(noised, t, model.conditions(prompt))
            maps[i // count, j] += (unchanged - changed).float().square().sum(1)[0] / count
    return maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--replacements", type=int, default=8)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[100, 500, 900])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    path, resolution = model_folder(options.size)
    model, side = PromptedModel.load(path, device=DEVICE), resolution // 8
    prompt = model.tokenize("a photo of a object")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 4, side, side, generator=generator).to(DEVICE)
    replaced, drawn = draw_replacements(prompt, options.replacements, model.vocabulary_size, generator)
    sides = {name: lambda make=make: make(model, latents, prompt, options.timesteps, noise=noise,
                                          replaced=replaced, drawn=drawn)
             for name, make in (("naive", naive), ("ours", semantic_sensitivity))}
    torch.testing.assert_close(sides["ours"](), sides["naive"](), rtol=1e-3, atol=1e-4)
    durations = alternate({name: lambda work=work: seconds(work, 1) for name, work in sides.items()},
                          options.rounds)
    maps = len(prompt.words) * len(options.timesteps)
    report(f"maps_{options.size}", {
        "options": vars(options), "naive / ours": ratio(durations, "naive", "ours"),
        "maps per second": {name: maps / value for name, value in medians(durations).items()}})


if __name__ == "__main__":
    main()
