"""Pictures per second of the evaluation, against one plain pipeline call a picture.

    python benchmarks/evaluation.py
"""

import argparse

import torch
from models import DEVICE, model_folder
from timing import alternate, medians, ratio, report, seconds

from szt_utils.generation import generate, load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    pipeline = load_pipeline(model_folder(options.size)[0], device=DEVICE)
    prompts = [f"a photo of object {i}" for i in range(options.pictures)]

    def plain():
        for i, prompt in enumerate(prompts):
            pipeline(prompt, num_inference_steps=options.steps, guidance_scale=5.0,
                     generator=torch.Generator().manual_seed(i))

    sides = {"plain": plain, "ours": lambda: generate(pipeline, prompts, steps=options.steps)}
    durations = alternate({name: lambda work=work: seconds(work, 1) for name, work in sides.items()},
                          options.rounds)
    report(f"evaluation_{options.size}", {
        "options": vars(options), "plain / ours": ratio(durations, "plain", "ours"),
        "pictures per second": {name: options.pictures / value
                                for name, value in medians(durations).items()}})


if __name__ == "__main__":
    main()
