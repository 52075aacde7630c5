"""Purify images that may be poisoned (the other defences of Table 1): a folder in, a folder of PNGs out.

    python purify_images.py --image_dir images --output_dir purified --method advclean

advclean filters and jpeg compresses, without a model. regen passes each image through an image-to-image
pipeline at low noise. pdmpure does so in pixel space, with a DDPMPipeline, or with DeepFloyd IF's second
stage and --upscaler, which you must have. Images keep their size unless --resolution is given; sub-folders
keep their structure. The same command again resumes. Each image has its own random numbers, so neither the
other images nor their order change a result; with --batch_size above 1, single values may differ by a level.
"""

import argparse

from szt_utils.arguments import (
    add_model_flags,
    given_flags,
    number,
    refuse_unused,
    script_parser,
    seed,
    user_path,
)
from szt_utils.errors import exit_on_input_error

METHODS = ("advclean", "jpeg", "regen", "pdmpure")
# The flags that only some methods use: ignoring them silently would hide a mistake.
USED_BY = {"jpeg_quality": ("jpeg",), "pretrained_model_name_or_path": ("regen", "pdmpure"),
           "revision": ("regen", "pdmpure"), "variant": ("regen", "pdmpure"),
           "mixed_precision": ("regen", "pdmpure"), "seed": ("regen", "pdmpure"), "upscaler": ("pdmpure",),
           "strength": ("regen", "pdmpure"), "steps": ("regen", "pdmpure"),
           "guidance_scale": ("regen", "pdmpure"), "prompt": ("regen", "pdmpure")}
POCKET = {"regen": "diffusion", "pdmpure": "pixel"}  # the bundled networks, for a hint


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings, by the names of szt_utils.purifying.PurifySettings."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", type=user_path, required=True,
        help="Folder of the images to purify, with its sub-folders.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for the purified PNGs, options.json and stats.jsonl.")
    add("--method", required=True, choices=METHODS, help="The purifier.")
    add("--jpeg_quality", type=number(int, 1, 100), help="jpeg: its quality. (25)")
    add_model_flags(parser, "regen: an image-to-image pipeline; pdmpure: a DDPMPipeline or DeepFloyd IF's "
                            "second stage. Folder, or id on the Hub.", required=False)
    add("--upscaler", type=user_path,
        help="pdmpure with DeepFloyd IF: a StableDiffusionUpscalePipeline, folder or id on the Hub.")
    add("--strength", type=number(float, 0, 1, above=True),
        help="regen, pdmpure: noise level, up to 1. (regen 0.06, pdmpure 0.12, with IF 0.45)")
    add("--steps", type=number(int, 1),
        help="regen, pdmpure: steps of the whole schedule, of which --strength is taken. (50, with IF 110)")
    add("--guidance_scale", type=number(float, 0, above=True),
        help="regen, pdmpure with IF: classifier-free guidance. (regen 7.5, IF 7)")
    add("--prompt", help="regen, pdmpure with IF: the prompt. (regen '', IF 'a picture')")
    add("--resolution", type=number(int, 16),
        help="Cut images to their central square and resize it to this side, in pixels. "
             "(images stay whole)")
    add("--batch_size", type=number(int, 1), default=1, help="Images of one size purified together. (1)")
    add("--seed", type=seed, help="regen, pdmpure: seed of the noise. (0)")
    args = parser.parse_args(argv)
    refuse_unused(parser, args, args.method, USED_BY)
    if args.method in POCKET and not args.pretrained_model_name_or_path:
        parser.error(f"argument --pretrained_model_name_or_path: {args.method} needs a model; the bundled "
                     f"one's path is printed by: python -m szt_utils.pocket --network {POCKET[args.method]}")
    return args


def main(argv: list[str] | None = None) -> None:
    given = given_flags(parse_args(argv))
    output_dir = given.pop("output_dir")
    with exit_on_input_error():
        from szt_utils.purifying import PurifySettings, purify_folder

        purify_folder(PurifySettings(**given), output_dir)


if __name__ == "__main__":
    main()
