r"""Poison images against latent diffusion models (paper Eq. 4 and 5): a folder in, a folder of PNGs out.

    python poison_images.py --pretrained_model_name_or_path MODEL --image_dir images \
        --output_dir poisoned --method adm+

Images are cut to their central square and resized to --resolution, or keep their size with --keep_size, and
change by at most --eps levels. Sub-folders keep their structure. The same command again resumes. Each image
has its own random numbers, so neither the other images nor their order change a result; with --batch_size
above 1 they may change the last bits of its gradient, which a sign step turns into whole levels.

An attack is adaptive, against a defence that it knows, with --jpeg_quality, --t_min or --loss_mask_dir, or
with --adaptive szt for all three. Then the plain attack is run as well, and you are warned if it does better.
"""

import argparse

from szt_utils.arguments import (
    add_model_flags,
    given_flags,
    number,
    refuse_unused,
    refuse_without,
    script_parser,
    seed,
    user_path,
)
from szt_utils.errors import exit_on_input_error

# The names in szt_utils.poisons.POISONS, which would import torch.
METHODS = ("adm+", "adm-", "sds+", "sds-", "ea", "da")
# The flags that only some methods use: ignoring them silently would hide a mistake.
USED_BY = {"target_image": ("ea", "da"), "chain_steps": ("da",), "strength": ("da",),
           "guidance_scale": ("da",), "t_min": METHODS[:4], "t_max": METHODS[:4],
           "draws": METHODS[:4] + ("da",), "prompt": METHODS[:4] + ("da",),
           "one_graph": METHODS[:2] + ("da",)}
# Where published code differs from the defaults; eps is rounded down to whole levels.
PRESETS = {
    # Xue et al. 2024: the defaults.
    "diff-protect": {"adm+": {}, "adm-": {}, "sds+": {}, "sds-": {}, "ea": {}},
    # Salman et al. 2023. EA: eps 0.12 and steps of 0.01 in [-1, 1], towards a grey image. DA: L2 norms of
    # 16 and 1 over 3 x 512 x 512 elements.
    "photoguard": {
        "ea": dict(eps=15, step_size=1.275, steps=200, step_schedule="linear", target_image="grey"),
        "da": dict(norm="l2", eps=2, step_size=0.144, steps=200, draws=10, prompt="", target_image="grey"),
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings; None is the default of szt_utils.poisoning.PoisonSettings."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", type=user_path, required=True,
        help="Folder of the images to poison, with its sub-folders.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for the poisoned PNGs, options.json and stats.jsonl.")
    add("--method", required=True, choices=METHODS, help="The poison.")
    add_model_flags(parser, "Model in Diffusers format: folder, or id on the Hub.")
    add("--preset", choices=PRESETS, help="Defaults of a published implementation for --method.")
    add("--eps", type=number(int, 0, 255, unit=" of 1/255 levels"), help="Budget, in 1/255 levels. (16)")
    add("--norm", choices=["linf", "l2"],
        help="What the budget bounds: every change, or their root mean square. (linf)")
    add("--step_size", type=number(float, 0, above=True), help="Length of one step, in 1/255 levels. (1)")
    add("--step_schedule", choices=["constant", "linear"],
        help="Whether steps keep their length or fall to a hundredth. (constant)")
    add("--steps", type=number(int, 0), help="Number of steps. (100)")
    add("--draws", type=number(int, 1), help="Draws of timestep and noise averaged in one step. (1)")
    add("--t_min", type=number(int, 0), help="Lowest timestep to attack. (0)")
    add("--t_max", type=number(int, 1),
        help="First timestep above the range to attack. (the model's number of timesteps)")
    add("--prompt", help="Prompt of the attacked model. (a photo)")
    add("--target_image", type=user_path,
        help="ea, da: 'pattern', 'grey', 'zero' (ea: the latent of zeros) or an image file. (pattern)")
    add("--chain_steps", type=number(int, 1), help="da: denoising steps of the attacked image-to-image. (4)")
    add("--strength", type=number(float, 0, 1, above=True),
        help="da: strength of image-to-image, as in Diffusers, up to 1. (0.8)")
    add("--guidance_scale", type=number(float, 0, above=True),
        help="da: classifier-free guidance of image-to-image. (7.5)")
    add("--mask_dir", type=user_path,
        help="Folder of masks, <stem>.png, white where an image may be changed. (everywhere)")
    add("--jpeg_quality", type=number(int, 1, 100), nargs="+", metavar="Q",
        help="Attack through JPEG of this quality, or of a random one between two at every step. (no JPEG)")
    add("--loss_mask_dir", type=user_path,
        help="Folder of masks, <stem>.png: attack only what training inside them will see. (everywhere)")
    add("--mask_dilation", type=number(int, 0),
        help="Growth of the loss masks, in pixels. (16 at 512 px, scaled with --resolution)")
    add("--adaptive", choices=["szt"],
        help="Attack Safe-Zone Training, with the paper's values unless they are given: --jpeg_quality 25, "
             "--t_min 500 (by signal-to-noise ratio) and --mask_dilation; needs --loss_mask_dir.")
    add("--resolution", type=number(int, 8),
        help="Side of the square images, or with --keep_size the shorter side during the attack, in "
             "pixels. (512)")
    add("--keep_size", action="store_true",
        help="Do not crop: attack the whole image at --resolution, enlarge the change, add it to the "
             "original.")
    add("--batch_size", type=number(int, 1), help="Images attacked together. (1)")
    add("--one_graph", action="store_true", default=None,
        help="adm+, adm-, da: hold the graphs of encoder and network together; saves one encoding a step, "
             "for more memory.")
    add("--seed", type=seed, help="Seed of the start, noise and timesteps. (0)")
    args = parser.parse_args(argv)

    refuse_unused(parser, args, args.method, USED_BY)
    if args.preset and args.method not in PRESETS[args.preset]:
        parser.error(f"argument --preset: {args.preset} has no {args.method}, "
                     f"only {', '.join(PRESETS[args.preset])}")
    if args.method == "da" and args.target_image == "zero":
        parser.error("argument --target_image: zero is a latent, and da needs an image")
    if args.jpeg_quality and len(args.jpeg_quality) > 2:
        parser.error("argument --jpeg_quality: one quality or the lowest and the highest")
    refuse_without(parser, args, "--loss_mask_dir", args.loss_mask_dir, "mask_dilation")
    if args.adaptive and not args.loss_mask_dir:
        parser.error("argument --adaptive: szt needs --loss_mask_dir")
    return args


def given_settings(args: argparse.Namespace) -> dict:
    """The settings that the command line or its preset decides, without --output_dir."""
    preset = PRESETS[args.preset][args.method] if args.preset else {}
    given = given_flags(args)
    del given["output_dir"]
    return {**preset, **given}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        from szt_utils.poisoning import PoisonSettings, poison_folder

        poison_folder(PoisonSettings(**given_settings(args)), args.output_dir)


if __name__ == "__main__":
    main()
