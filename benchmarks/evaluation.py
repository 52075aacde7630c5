"""Images per second of the evaluation, against one plain pipeline call an image.

    python benchmarks/evaluation.py
"""

import torch
from models import DEVICE, model_folder
from timing import alternate, medians, ratio, report, seconds

from szt_utils.arguments import script_parser
from szt_utils.generation import generate, load_pipeline


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--size", choices=["pocket", "sd15"], default="pocket")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    pipeline = load_pipeline(model_folder(args.size)[0], device=DEVICE)
    prompts = [f"a photo of object {i}" for i in range(args.images)]

    def plain():
        for i, prompt in enumerate(prompts):
            pipeline(prompt, num_inference_steps=args.num_inference_steps, guidance_scale=5.0,
                     generator=torch.Generator().manual_seed(i))

    sides = {"plain": plain, "ours": lambda: generate(pipeline, prompts, steps=args.num_inference_steps)}
    durations = alternate({name: lambda work=work: seconds(work, 1) for name, work in sides.items()},
                          args.rounds)
    report(f"evaluation_{args.size}", {
        "options": vars(args), "plain / ours": ratio(durations, "plain", "ours"),
        "images per second": {name: args.images / value for name, value in medians(durations).items()}})


if __name__ == "__main__":
    main()
