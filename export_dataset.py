"""Export images, masks and captions for another trainer, with Safe-Zone Training done as far as it allows.

    python export_dataset.py --trainer kohya --model sdxl --image_dir images --loss_mask_dir masks \\
        --placeholder_token "sks dog" --output_dir exported

The images get the size at which the trainer trains and are JPEG-compressed there; masks are grown, and named
as the trainer wants them; config files set the timesteps. README.md says how to start, and what to mind. A
caption is `<stem>.txt` beside its image, a line of metadata.jsonl ({"file_name": ..., "text": ...}), or a
template; {} in it, or else the word of --initializer_token, becomes --placeholder_token. No model is loaded.

--check says what is wrong with such a data set and its config files, whoever wrote them, and exits with 1 if
anything is:

    python export_dataset.py --trainer kohya --model sdxl --check images --config dataset.toml train.sh
"""

import argparse
import sys

from szt_utils.arguments import given_flags, number, refuse_unused, refuse_without, script_parser, user_path
from szt_utils.errors import exit_on_input_error, printable

TRAINERS = ("kohya", "onetrainer", "ai-toolkit", "simpletuner", "diffusion-pipe", "musubi", "diffusers")
MODELS = ("sd15", "sd2", "sdxl", "sd3", "flux", "qwen-image", "z-image")
REQUIRED = ("image_dir", "output_dir", "placeholder_token")  # of an export
USED_BY = {"config": ("--check",), **dict.fromkeys(
    (*REQUIRED, "initializer_token", "learnable_property", "loss_mask_dir", "mask_dilation"), ("an export",))}


def resolution(text: str) -> int:
    """An argparse type: a multiple of 64."""
    value = int(number(int, 128, 8192)(text))
    if value % 64:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 64, as the trainers' sizes are")
    return value


def words(text: str) -> str:
    """An argparse type: text in one line."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return " ".join(text.split())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings; those of an export by the names of szt_utils.export.ExportSettings."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--trainer", required=True, choices=TRAINERS, help="The trainer.")
    add("--model", required=True, choices=MODELS, help="The model that is trained.")
    add("--image_dir", type=user_path, help="Folder of the images. (required for an export)")
    add("--output_dir", type=user_path, help="Folder for the data set. (required for an export)")
    add("--placeholder_token", type=words,
        help="What captions call the concept, such as '<my-toy>' or 'sks dog'. (required for an export)")
    add("--initializer_token", type=words, metavar="WORD",
        help="The word that --placeholder_token replaces in captions.")
    add("--learnable_property", choices=["object", "style"],
        help="Templates for images without a caption. (object)")
    add("--loss_mask_dir", type=user_path,
        help="Folder of masks, <image's stem>.png, white = the concept. (no masks)")
    add("--resolution", type=resolution,
        help="The trainer's resolution in pixels, a multiple of 64. (512 for sd15, 768 for sd2, else 1024)")
    add("--jpeg_quality", type=number(int, 1, 100), help="JPEG quality. (25)")
    add("--t_min", type=number(int, 0, 999),
        help="Lowest timestep to train at. (at the signal-to-noise ratio 0.382: 500, 618 for flow models)")
    add("--mask_dilation", type=number(int, 0, 4096),
        help="Grow masks by this many pixels. (16 at 512, scaled with --resolution)")
    add("--check", type=user_path, metavar="DIR", help="Check this data set instead of exporting one.")
    add("--config", type=user_path, nargs="+", metavar="FILE",
        help="--check: config files, or command lines in text files, of one training. (those of an export)")
    args = parser.parse_args(argv)
    refuse_unused(parser, args, "--check" if args.check else "an export", USED_BY)
    refuse_without(parser, args, "--loss_mask_dir", args.check or args.loss_mask_dir, "mask_dilation")
    missing = [f"--{name}" for name in REQUIRED if not args.check and not getattr(args, name)]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return args


def main(argv: list[str] | None = None) -> None:
    given = given_flags(parse_args(argv))
    with exit_on_input_error():
        from szt_utils.export import ExportSettings, export_folder
        from szt_utils.export_check import check_folder

        if "check" not in given:
            output_dir = given.pop("output_dir")
            export_folder(ExportSettings(**given), output_dir)
        elif findings := check_folder(given.pop("check"), **given):
            sys.exit("\n".join(map(printable, findings)))
        else:
            print("Nothing is wrong.")


if __name__ == "__main__":
    main()
