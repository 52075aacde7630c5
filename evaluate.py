r"""Score a learned embedding (paper Sec. 5.1.3): generate images of a set of prompts, then compare them with
the clean images and with their prompts.

    python evaluate.py --pretrained_model_name_or_path MODEL --embeddings my-toy --clean_dir images \
        --class_word toy --dino facebook/dinov2-base --clip openai/clip-vit-large-patch14 --output_dir scores

Without a model and networks, the bundled pocket ones are used. Writes the images, `scores.json` and
`contact_sheet.png`. The same command again generates only what is missing.
"""

import argparse

from szt_utils.arguments import add_model_flags, given_flags, number, script_parser, seed, user_path
from szt_utils.errors import exit_on_input_error

# szt_utils.metrics.METRICS, without importing torch.
METRICS = ("dino", "attributes", "fid", "kid", "fd_dino", "clip")


def metric_list(text: str) -> list[str]:
    """An argparse type: names of metrics with commas between."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"unknown metric '{unknown[0]}'; choose from: {', '.join(METRICS)}")
    return names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_model_flags(parser, "Model in Diffusers format: folder, or id on the Hub. "
                            "(the bundled pocket model)", required=False)
    add("--embeddings", type=user_path, required=True,
        help="The learned embedding: the training's output folder, or a file.")
    add("--clean_dir", "--real_dir", type=user_path, required=True,
        help="Folder of the clean images of the concept.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for images/, scores.json, contact_sheet.png, options.json.")
    add("--prompts_file", type=user_path,
        help="Prompts, one a line, with {} for the concept. "
             "(24 built-in ones; for the pocket model its 8 backgrounds)")
    add("--images_per_prompt", type=number(int, 1), default=5, help="Images of each prompt. (5)")
    add("--class_word", default="object",
        help="Word that replaces the placeholder when the CLIP score is computed. (object)")
    add("--metrics", type=metric_list, default=list(METRICS), metavar="NAME,...",
        help=f"Some of {','.join(METRICS)}. (all)")
    add("--dino", type=user_path,
        help="Image encoder in Dinov2Model format: folder or hub name. (the bundled pocket one)")
    add("--clip", type=user_path, help="CLIPModel: folder or hub name. (the bundled pocket one)")
    add("--inception", type=user_path,
        help="InceptionV3 weights for FID and KID, the file of torch-fidelity. (features of --clip instead)")
    add("--num_inference_steps", type=number(int, 1), default=25,
        help="Denoising steps, of DPM-Solver++ or a flow model's own scheduler. (25)")
    add("--guidance_scale", type=number(float, 0, above=True),
        help="Classifier-free guidance. (7.5, pocket model 5)")
    add("--batch_size", type=number(int, 1), default=8, help="Images generated together. (8)")
    add("--seed", type=seed, default=100, help="The i-th image starts from noise of seed + i. (100)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    given = given_flags(parse_args(argv))
    output_dir = given.pop("output_dir")
    with exit_on_input_error():
        from szt_utils.evaluation import EvaluationSettings, evaluate_to_folder

        evaluate_to_folder(EvaluationSettings(**given), output_dir)


if __name__ == "__main__":
    main()
