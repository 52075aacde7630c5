"""python -m szt_utils.pocket: print a network's path, list the novel concepts, or write images of one."""

import argparse

from ..arguments import number, refuse_without, script_parser, seed, user_path
from ..errors import exit_on_input_error
from . import NOVEL_CONCEPTS, clip_path, dino_path, model_path, pixel_path, write_concept

PATHS = {"diffusion": model_path, "sdxl": lambda: model_path("sdxl"), "flow": lambda: model_path("flow"),
         "pixel": pixel_path, "dino": dino_path, "clip": clip_path}


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__, prog="python -m szt_utils.pocket")
    add = parser.add_argument
    add("--list", action="store_true", help="print the novel concepts, one per line")
    add("--network", choices=PATHS, default="diffusion", help="network whose path to print (diffusion)")
    add("--concept", help="a novel concept, e.g. teal-striped-star")
    add("--output_dir", type=user_path, help="folder for the concept's images")
    add("--mask_dir", "--masks", type=user_path, metavar="DIR", help="folder for the concept's masks")
    add("--count", type=number(int, 1), help="number of images (5)")
    add("--seed", type=seed, help="another seed gives other images of the same concept")
    args = parser.parse_args()
    if args.concept and not args.output_dir:
        parser.error("--concept needs --output_dir")
    refuse_without(parser, args, "--concept", args.concept, "output_dir", "mask_dir", "count", "seed")
    return args


def main() -> None:
    args = parse_args()
    with exit_on_input_error():
        if args.list:
            print("\n".join(NOVEL_CONCEPTS))
        elif args.concept:
            for path in write_concept(args.concept, args.output_dir, args.mask_dir, args.count or 5,
                                      args.seed or 0):
                print(path)
        else:
            print(PATHS[args.network]())


if __name__ == "__main__":
    main()
