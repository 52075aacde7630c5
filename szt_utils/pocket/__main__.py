"""python -m szt_utils.pocket: print a network's path, list the novel concepts, or write images of one."""

import argparse

from ..errors import InputError, exit_on_input_error
from . import NOVEL_CONCEPTS, clip_path, dino_path, model_path, pixel_path, write_concept

PATHS = {"diffusion": model_path, "pixel": pixel_path, "dino": dino_path, "clip": clip_path}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m szt_utils.pocket", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the novel concepts, one per line")
    parser.add_argument("--network", choices=PATHS, default="diffusion",
                        help="network whose path to print (default: diffusion)")
    parser.add_argument("--concept", help="a novel concept, e.g. teal-striped-star")
    parser.add_argument("--output_dir", help="folder for the concept's images")
    parser.add_argument("--masks", metavar="DIR", help="folder for the concept's masks")
    parser.add_argument("--count", type=int, default=5, help="number of images (default: 5)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed gives other images of the same concept")
    args = parser.parse_args()
    with exit_on_input_error():
        if args.list:
            print("\n".join(NOVEL_CONCEPTS))
        elif args.concept:
            if args.concept not in NOVEL_CONCEPTS:
                raise InputError(f"'{args.concept}' is not a novel concept; "
                                 f"choose from: {', '.join(NOVEL_CONCEPTS)}.")
            if not args.output_dir or args.count < 1:
                parser.error("--concept needs --output_dir and a --count of at least 1")
            for path in write_concept(args.concept, args.output_dir, args.masks,
                                      args.count, args.seed):
                print(path)
        else:
            print(PATHS[args.network]())


if __name__ == "__main__":
    main()
