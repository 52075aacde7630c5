"""Are these images poisoned? Compare each with clean images by five signals of the analysis (paper Sec. 4).

    python diagnose_images.py --pretrained_model_name_or_path MODEL --image_dir images \
        --clean_dir known-clean-images --output_dir diagnosis

writes `diagnosis.json`: for every image a score, its distance from the clean images, and for the set a
verdict. The signals of the clean images go to `calibration.json`, for --calibration; the bundled pocket model
has a calibration built in. Works with Stable Diffusion and SDXL.

The same command again resumes.
"""

import argparse

from szt_utils.arguments import add_model_flags, number, script_parser, seed, user_path
from szt_utils.errors import exit_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", type=user_path, required=True,
        help="Folder of images to diagnose, with its sub-folders.")
    add("--clean_dir", type=user_path,
        help="Folder of clean images to calibrate with, with its sub-folders: at least 10, of the same kind "
             "as the images to diagnose.")
    add("--calibration", type=user_path, help="A calibration.json of an earlier run, instead of --clean_dir.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for the results, options.json and stats.jsonl.")
    add_model_flags(parser, "Model in Diffusers format: folder, or id on the Hub.")
    add("--resolution", type=number(int, 8),
        help="Side of the images' central squares, in pixels. (the model's own)")
    add("--seed", type=seed, default=0, help="Seed of the noise. (0)")
    args = parser.parse_args(argv)
    if args.clean_dir and args.calibration:
        parser.error("argument --calibration: not used with --clean_dir")
    return args


def main(argv: list[str] | None = None) -> None:
    given = vars(parse_args(argv))
    output_dir = given.pop("output_dir")
    with exit_on_input_error():
        from szt_utils.diagnosing import DiagnosisSettings, diagnose_folder

        diagnose_folder(DiagnosisSettings(**given), output_dir)


if __name__ == "__main__":
    main()
