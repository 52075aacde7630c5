"""Mask the concept in every image of a folder; the masks are for --loss_mask_dir.

    python precompute_masks.py --image_dir images --output_dir masks --sam_checkpoint sam_vit_b.pth --auto

Exactly one of --auto, --point, --box, --points_file, --text and --ui marks the concept. A Segment Anything
model makes the masks; the bundled one, used by default, only works on pocket-world images. Without a model
for photographs, use --grabcut with --box, or paint with --ui.

A mask is `<stem>.png`, white = concept, of the size of its image. The same command again makes the masks that
are missing or outdated; masks that were saved on the page of --ui are kept.

A points file has one entry per image, in pixels from the upper left corner of the upright image:

    {"a.jpg": {"include": [[210, 340]], "exclude": [[30, 40]]}, "b.jpg": {"box": [120, 80, 400, 460]}}

`include` are points (x, y) in the concept, `exclude` points outside it, `box` is left, top, right, bottom.
Each entry needs a point in the concept or a box.
"""

import argparse

from szt_utils.arguments import given_flags, number, refuse_without, script_parser, user_path
from szt_utils.errors import exit_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--image_dir", type=user_path, required=True, help="Folder of the images.")
    add("--output_dir", type=user_path, required=True,
        help="Folder for the masks, options.json and stats.jsonl.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--sam_checkpoint", type=user_path, metavar="FILE",
                       help="A .pth checkpoint of the segment-anything package, of any size.")
    model.add_argument("--sam_model", type=user_path, metavar="NAME",
                       help="SAM, SAM 2 or SAM 3 of transformers: folder or Hub name.")
    model.add_argument("--grabcut", action="store_true",
                       help="No model: GrabCut of OpenCV, best with a box; needs opencv-python-headless.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--auto", action="store_true", help="Segment what all images have in common.")
    way.add_argument("--point", type=number(float, 0, 1), nargs=2, action="append", metavar=("X", "Y"),
                     help="A point in the concept, the same for all images, as shares of width and height; "
                          "may be repeated.")
    way.add_argument("--box", type=number(float, 0, 1), nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                     help="A box around the concept, the same for all images, as shares of width and height.")
    way.add_argument("--points_file", type=user_path, metavar="FILE",
                     help="JSON of points and boxes per image, as above.")
    way.add_argument("--text", help="Words for the concept; needs a SAM 3 model.")
    way.add_argument("--ui", action="store_true",
                     help="Click and paint on a page that only this computer can open.")
    add("--grid", type=number(int, 2, 64), help="--auto: clicks along each side. (12)")
    add("--preview", action="store_true",
        help="Write a contact sheet, preview/sheet.png in the output folder.")
    add("--port", type=number(int, 0, 65535), help="--ui: port of the page. (any free one)")
    add("--resolution", type=number(int, 8, 8192),
        help="--preview, --ui: the training's --resolution. (512)")
    add("--mask_dilation", type=number(int, 0, 4096),
        help="--preview, --ui: the training's --mask_dilation. (16 at 512, scaled with --resolution)")
    add("--center_crop", action="store_true", help="--preview, --ui: the training's --center_crop.")
    args = parser.parse_args(argv)
    if args.box and not (args.box[0] < args.box[2] and args.box[1] < args.box[3]):
        parser.error("argument --box: expected LEFT < RIGHT and TOP < BOTTOM")
    if args.grabcut and (args.auto or args.text is not None):
        parser.error("argument --grabcut: needs --box, --point, --points_file or --ui")
    refuse_without(parser, args, "--auto", args.auto, "grid")
    refuse_without(parser, args, "--ui", args.ui, "port")
    refuse_without(parser, args, "--preview or --ui", args.preview or args.ui,
                   "resolution", "mask_dilation", "center_crop")
    return args


def main(argv: list[str] | None = None) -> None:
    given = given_flags(parse_args(argv))
    with exit_on_input_error():
        from szt_utils.masking import MaskingSettings, mask_folder

        mask_folder(MaskingSettings(**given))


if __name__ == "__main__":
    main()
