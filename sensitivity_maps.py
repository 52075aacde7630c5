r"""Where and when the words of a prompt act on an image: semantic sensitivity maps (paper Sec. 4.1, Eq. 6).

    python sensitivity_maps.py --pretrained_model_name_or_path MODEL --image dog.png \
        --prompt "a puppy wearing a hat" --tokens puppy hat --timesteps 100 300 500 700 900 --output_dir maps

writes `maps.safetensors` - `ssm` (tokens, timesteps, h, w) on the latent grid, with --cross_attention also
`cross_attention`, and both axes' labels in its metadata - and `grid.png`, the maps over the image. Each of
several images gets a folder. Takes models of every family; --embeddings loads learned tokens.

The same command again resumes.
"""

import argparse
import sys

from szt_utils.arguments import add_model_flags, number, script_parser, seed, user_path
from szt_utils.errors import exit_on_input_error

# Flags of --diagnose, which is a script of its own now and will be removed here in the next release.
MOVED = ("diagnose", "clean_dir", "calibration")
MAPS_ONLY = ("prompt", "tokens", "embeddings", "cross_attention")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=user_path, nargs="+", help="Images to make maps of.")
    what.add_argument("--diagnose", type=user_path, metavar="IMAGE_DIR",
                      help="Moved to diagnose_images.py --image_dir.")
    parser.add_argument("--clean_dir", type=user_path, help=argparse.SUPPRESS)
    parser.add_argument("--calibration", type=user_path, help=argparse.SUPPRESS)
    add_model_flags(parser, "Model in Diffusers format: folder, or id on the Hub.")
    add = parser.add_argument
    add("--output_dir", type=user_path, required=True,
        help="Folder for the results, options.json and stats.jsonl.")
    add("--prompt", help="What the images show.")
    add("--tokens", nargs="+",
        help="Words of the prompt, or <|startoftext|>; all occurrences of a word count together. "
             "(every word)")
    add("--timesteps", type=number(int, 0), nargs="+", default=[100, 300, 500, 700, 900],
        help="Timesteps of the maps. (100 300 500 700 900)")
    add("--replacements", type=number(int, 1), default=16,
        help="Random words in place of a token, in one batch of the network. (16)")
    add("--noise_draws", type=number(int, 1), default=1, help="Draws of noise to average over. (1)")
    add("--embeddings", type=user_path, nargs="+",
        help="Learned embeddings, whose tokens the prompt may use: training folders, or files.")
    add("--cross_attention", action="store_true", help="Cross-attention maps as well.")
    add("--batch_size", type=number(int, 1),
        help="Most samples in a batch of the network. (replacements + 1)")
    add("--resolution", type=number(int, 8),
        help="Side of the images' central squares, in pixels. (the model's own)")
    add("--seed", type=seed, default=0, help="Seed of noise and replacements. (0)")
    args = parser.parse_args(argv)
    for name in MOVED if args.image else MAPS_ONLY:
        if getattr(args, name):
            parser.error(f"argument --{name}: not used with {'--image' if args.image else '--diagnose'}")
    if args.image and not args.prompt:
        parser.error("argument --image: needs --prompt")
    if args.clean_dir and args.calibration:
        parser.error("argument --calibration: not used with --clean_dir")
    return args


def main(argv: list[str] | None = None) -> None:
    given = vars(parse_args(argv))
    output_dir = given.pop("output_dir")
    image_dir, clean_dir, calibration = (given.pop(name) for name in MOVED)
    with exit_on_input_error():
        if image_dir:
            print("warning: --diagnose has moved to diagnose_images.py --image_dir and will be removed from "
                  "sensitivity_maps.py in the next release.", file=sys.stderr)
            from szt_utils.diagnosing import DiagnosisSettings, diagnose_folder

            shared = ("pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "resolution",
                      "seed")
            diagnose_folder(DiagnosisSettings(image_dir=image_dir, clean_dir=clean_dir,
                                              calibration=calibration,
                                              **{name: given[name] for name in shared}), output_dir)
        else:
            from szt_utils.map_making import MapSettings, make_maps

            make_maps(MapSettings(**given), output_dir)


if __name__ == "__main__":
    main()
