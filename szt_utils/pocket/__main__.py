"""python -m szt_utils.pocket: print the path of a bundled network, list the novel concepts,
or write the pictures of one."""

import argparse

from ..errors import InputError, exit_on_input_error
from . import NOVEL_CONCEPTS, clip_path, dino_path, model_path, pixel_path, write_concept

PATHS = {"diffusion": model_path, "pixel": pixel_path, "dino": dino_path, "clip": clip_path}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m szt_utils.pocket", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the novel concepts, one a line")
    parser.add_argument("--network", choices=PATHS, default="diffusion",
                        help="whose path to print (default: diffusion)")
    parser.add_argument("--concept", help="a novel concept, e.g. teal-striped-star")
    parser.add_argument("--output_dir", help="folder for the concept's pictures")
    parser.add_argument("--masks", metavar="DIR", help="folder for the concept's masks")
    parser.add_argument("--count", type=int, default=5, help="number of pictures (default: 5)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed gives other pictures of the same concept")
    arguments = parser.parse_args()
    with exit_on_input_error():
        if arguments.list:
            print("\n".join(NOVEL_CONCEPTS))
        elif arguments.concept:
            if arguments.concept not in NOVEL_CONCEPTS:
                raise InputError(f"'{arguments.concept}' is not a novel concept; "
                                 f"choose from: {', '.join(NOVEL_CONCEPTS)}.")
            if not arguments.output_dir or arguments.count < 1:
                parser.error("--concept needs --output_dir and a --count of at least 1")
            for path in write_concept(arguments.concept, arguments.output_dir, arguments.masks,
                                      arguments.count, arguments.seed):
                print(path)
        else:
            print(PATHS[arguments.network]())


if __name__ == "__main__":
    main()
