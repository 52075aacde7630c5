"""Are these images poisoned? Tested on 81 real poisons of 11 methods (60 found) and 418 clean images.

    python diagnose_images.py --image_dir images --output_dir diagnosis

looks at the pixels of every image, at its full size and without a model, and writes `diagnosis.json`: for
every image and for the set "poisoned", "clean" or "cannot tell". Give it the files as you received them. Of
the 418 clean images it accuses 3; poisons that were saved as JPEG or upscaled afterwards it never finds.

With --pretrained_model_name_or_path, five signals of the analysis (paper Sec. 4) join them under "model":
each image's distance from known clean images (--clean_dir, whose signals go to `calibration.json`, for
--calibration). They suit the bundled pocket model and its drawn scenes, whose calibration is built in.

The same command again resumes.
"""

import argparse

from szt_utils.arguments import (
    add_model_flags,
    given_flags,
    number,
    refuse_without,
    script_parser,
    seed,
    user_path,
)
from szt_utils.errors import exit_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", type=user_path, required=True,
        help="Folder of images to diagnose, with its sub-folders.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for the results, options.json and, with a model, stats.jsonl.")
    group = parser.add_argument_group("With a model")
    add_model_flags(group, "Model in Diffusers format: folder, or id on the Hub.", required=False)
    add = group.add_argument
    add("--clean_dir", type=user_path,
        help="Folder of clean images to calibrate with, with its sub-folders: at least 10, of the same kind "
             "as the images to diagnose.")
    add("--calibration", type=user_path, help="A calibration.json of an earlier run, instead of --clean_dir.")
    add("--resolution", type=number(int, 8),
        help="Side of the images' central squares, in pixels. (the model's own)")
    add("--seed", type=seed, help="Seed of the noise. (0)")
    args = parser.parse_args(argv)
    if args.clean_dir and args.calibration:
        parser.error("argument --calibration: not used with --clean_dir")
    refuse_without(parser, args, "--pretrained_model_name_or_path", args.pretrained_model_name_or_path,
                   "clean_dir", "calibration", "resolution", "revision", "variant", "mixed_precision", "seed")
    return args


def main(argv: list[str] | None = None) -> None:
    given = given_flags(parse_args(argv))
    output_dir = given.pop("output_dir")
    with exit_on_input_error():
        from szt_utils.diagnosing import DiagnosisSettings, diagnose_folder

        diagnose_folder(DiagnosisSettings(**given), output_dir)


if __name__ == "__main__":
    main()
