"""Semantic sensitivity maps per second, against a naive loop of two forward passes for every replacement.

    python benchmarks/maps.py
"""

import torch
from models import DEVICE, model_folder
from timing import alternate, medians, ratio, report, seconds

from szt_utils.arguments import script_parser
from szt_utils.models import Model, load_model
from szt_utils.sensitivity import (
    TokenizedPrompt,
    draw_replacements,
    prompt_conditions,
    semantic_sensitivity,
    tokenize_words,
)


@torch.no_grad()
def naive(model: Model, latents: torch.Tensor, prompt: TokenizedPrompt, timesteps: list[int], *,
          noise: torch.Tensor, replaced: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Eq. 6 word for word: text encoder and network twice per replacement, changed and unchanged."""
    maps = torch.zeros(len(prompt.words), len(timesteps), *latents.shape[-2:], device=DEVICE)
    count = len(replaced) // len(prompt.words)
    for j, t in enumerate(torch.tensor(timesteps, device=DEVICE).split(1)):
        noised = model.noised(latents, noise, t)
        for i in range(len(replaced)):
            changed = model.predict(noised, t, prompt_conditions(model, prompt, replaced[i:i + 1],
                                                                 drawn[i:i + 1]))
            unchanged = model.predict(noised, t, prompt_conditions(model, prompt))
            maps[i // count, j] += (unchanged - changed).float().square().sum(1)[0] / count
    return maps


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--replacements", type=int, default=8)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[100, 500, 900])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    path, resolution = model_folder(args.size)
    model, side = load_model(path, device=DEVICE), resolution // 8
    prompt = tokenize_words(model, "a photo of a object")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 4, side, side, generator=generator).to(DEVICE)
    replaced, drawn = draw_replacements(prompt, args.replacements, model.tokenizers[0].vocab_size, generator)
    sides = {name: lambda make=make: make(model, latents, prompt, args.timesteps, noise=noise,
                                          replaced=replaced, drawn=drawn)
             for name, make in (("naive", naive), ("ours", semantic_sensitivity))}
    torch.testing.assert_close(sides["ours"](), sides["naive"](), rtol=1e-3, atol=1e-4)
    durations = alternate({name: lambda work=work: seconds(work, 1) for name, work in sides.items()},
                          args.rounds)
    maps = len(prompt.words) * len(args.timesteps)
    report(f"maps_{args.size}", {
        "options": vars(args), "naive / ours": ratio(durations, "naive", "ours"),
        "maps per second": {name: maps / value for name, value in medians(durations).items()}})


if __name__ == "__main__":
    main()
