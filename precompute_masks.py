"""Mask the concept in every picture with Segment Anything: a folder in, a folder of masks out, for
--loss_mask_dir.

    python precompute_masks.py --image_dir pictures --output_dir masks --sam_checkpoint sam_vit_b.pth --auto

Say what the concept is with exactly one of --auto (nothing: what all pictures show), --point and --box
(shares of the width and height, the same for all pictures), --points_file (JSON, in pixels of each picture),
--text (SAM 3) or --ui (click on a local page). Without a model it is the bundled one, which knows the pocket
world.

A mask is `<stem>.png`, white = concept, as large as its picture. The same command again does what is missing
or has changed; masks that were made by hand on the page stay.

A points file: {"cat.jpg": {"include": [[210, 340]], "exclude": [[30, 40]], "box": [120, 80, 400, 460]}, ...}
with points (x, y) in the concept or outside of it, and a box left, top, right, bottom; a point in the concept
or a box must be there.
"""

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from szt_utils.arguments import number
from szt_utils.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from PIL import Image

SMALL, LARGE = 0.02, 0.8  # shares of a picture beyond which a mask is worth a look
UNSURE = 0.3  # the same for the confidence of --auto


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image_dir", required=True, help="Folder of the pictures.")
    add("--output_dir", required=True, help="Folder for the masks, options.json and stats.jsonl.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--sam_checkpoint", metavar="FILE",
                       help="A .pth checkpoint of the segment-anything package; its type is found out.")
    model.add_argument("--sam_model", metavar="NAME",
                       help="SAM, SAM 2 or SAM 3 of transformers: folder or hub name.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--auto", action="store_true", help="Find what all pictures show.")
    way.add_argument("--point", type=number(float, 0, 1), nargs=2, action="append", metavar=("X", "Y"),
                     help="A point in the concept in every picture, in shares of its size; may be repeated.")
    way.add_argument("--box", type=number(float, 0, 1), nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                     help="A box around the concept in every picture, in shares of its size.")
    way.add_argument("--points_file", metavar="FILE", help="JSON of points and boxes, as above.")
    way.add_argument("--text", help="Words for the concept, where the model takes words.")
    way.add_argument("--ui", action="store_true", help="Click on a page that only this computer can open.")
    add("--grid", type=number(int, 2, 64), default=12, help="--auto: clicks along each side. (12)")
    add("--preview", action="store_true",
        help="Write a contact sheet, preview/sheet.png in the output folder.")
    add("--port", type=number(int, 0, 65535), default=0, help="--ui: port of the page. (any free one)")
    add("--resolution", type=number(int, 8, 8192), default=512,
        help="--preview, --ui: the training's --resolution. (512)")
    add("--mask_dilation", type=number(int, 0, 4096),
        help="--preview, --ui: the training's --mask_dilation. (16 at 512, and in proportion)")
    add("--center_crop", action="store_true", help="--preview, --ui: the training's --center_crop.")
    args = parser.parse_args(argv)
    if args.box and not (args.box[0] < args.box[2] and args.box[1] < args.box[3]):
        parser.error("argument --box: expected LEFT < RIGHT and TOP < BOTTOM")
    if args.mask_dilation is None:
        args.mask_dilation = round(16 * args.resolution / 512)
    return args


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, upright RGB, and the name of its mask."""

    path: Path
    name: str
    image: "Image.Image"

    def sha256(self) -> str:
        return hashlib.sha256(repr(self.image.size).encode() + self.image.tobytes()).hexdigest()


def find_pictures(image_dir: str) -> list[Picture]:
    """Every picture of the folder; two that would share a mask raise InputError."""
    from szt_utils.images import name_results, read_image

    return [Picture(path, name, read_image(path))
            for name, path in name_results(image_dir, recursive=False).items()]


def say_what(args: argparse.Namespace, pictures: list[Picture]) -> list:
    """The prompt of every picture."""
    from szt_utils.prompts import Prompt, read_prompts, relative_prompt

    if args.points_file:
        prompts = read_prompts(args.points_file, {p.path.name: p.image.size for p in pictures})
        return [prompts[picture.path.name] for picture in pictures]
    if args.text is not None:
        return [Prompt(text=args.text)] * len(pictures)
    return [relative_prompt(picture.image.size, args.point, args.box) for picture in pictures]


class Masks:
    """The output folder: saves masks with their records, and knows what is there already."""

    def __init__(self, args: argparse.Namespace):
        from szt_utils.records import open_run

        self.folder = Path(args.output_dir)
        self.arguments = {name: getattr(args, name)
                          for name in ("image_dir", "sam_checkpoint", "sam_model")}
        records = open_run(self.folder, Path(__file__).name, self.arguments, args.image_dir)
        self.records = {record["file"]: record for record in records
                        if (self.folder / record["file"]).exists()}

    def begin(self) -> None:
        from szt_utils.records import provenance, write_json

        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "options.json",
                   {"script": Path(__file__).name, "arguments": self.arguments, **provenance()})

    def is_done(self, picture: Picture, way: str, prompt: dict) -> bool:
        """Whether the mask of this very picture was made in this way from this prompt, or by hand."""
        record = self.records.get(picture.name)
        return (record is not None and record["sha256"] == picture.sha256()
                and (record["way"] == "ui" or (record["way"], record["prompt"]) == (way, prompt)))

    def save(self, picture: Picture, mask, way: str, prompt: dict, score: float, **more) -> dict:
        """Write a mask, bool (H, W), and its record, which is returned."""
        from PIL import Image

        from szt_utils.images import save_png
        from szt_utils.records import append_stats

        save_png(Image.fromarray(mask.numpy()).convert("L"), self.folder / picture.name)
        record = {"file": picture.name, "source": picture.path.name, "sha256": picture.sha256(),
                  "way": way, "prompt": prompt, "area": round(mask.float().mean().item(), 4),
                  "score": round(score, 4), **more}
        append_stats(self.folder / "stats.jsonl", [record])
        self.records[picture.name] = record
        return record

    def read(self, picture: Picture):
        """The mask on the disk, "L" of 0 and 255, black if it marks nothing; None if there is none."""
        from PIL import Image

        path = self.folder / picture.name
        return Image.open(path).convert("L") if picture.name in self.records and path.exists() else None


def area_warning(record: dict) -> str | None:
    """What is odd about a mask's size."""
    if SMALL <= record["area"] <= LARGE:
        return None
    if not record["area"]:
        return f"{record['source']}: the mask is black, and training will refuse it"
    return f"{record['source']}: the mask covers {record['area']:.1%} of the picture"


def by_prompt(args: argparse.Namespace, pictures: list[Picture], masks: Masks, segmenter_of) -> None:
    """Mask every picture by its own prompt."""
    from tqdm.auto import tqdm

    from szt_utils.prompts import prompt_to_json
    from szt_utils.segment import segment

    way = next(name for name in ("point", "box", "points_file", "text") if getattr(args, name) is not None)
    prompts = say_what(args, pictures)
    work = [(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)
            if not masks.is_done(picture, way, as_read(prompt_to_json(prompt)))]
    print(f"{len(pictures)} pictures in '{args.image_dir}', {len(work)} of them to do.")
    if not work:
        return
    segmenter = segmenter_of()
    if args.text is not None and not segmenter.takes_text:
        raise InputError(f"The model '{segmenter.name}' takes no --text; say what the concept is with "
                         "--point, --box, --points_file, --auto or --ui, or take a SAM 3 model.")
    masks.begin()
    for picture, prompt in tqdm(work, unit="picture"):
        try:
            mask, score = segment(segmenter, segmenter.see(picture.image), prompt)
        except InputError as error:
            raise InputError(f"'{picture.path}': {error}") from None
        masks.save(picture, mask, way, as_read(prompt_to_json(prompt)), score)


def as_read(value):
    """A value as it will be after a round trip through JSON, to be compared with a record."""
    import json

    return json.loads(json.dumps(value))


def by_consensus(args: argparse.Namespace, pictures: list[Picture], masks: Masks, segmenter_of) -> None:
    """Mask what the pictures have in common; the choice in one depends on the others."""
    from tqdm.auto import tqdm

    from szt_utils.consensus import candidates, choose
    from szt_utils.segment import enlarge

    together = hashlib.sha256("".join(picture.sha256() for picture in pictures).encode()).hexdigest()
    prompt = {"grid": args.grid, "pictures": together}
    work = [picture for picture in pictures if not masks.is_done(picture, "auto", prompt)]
    print(f"{len(pictures)} pictures in '{args.image_dir}', {len(work)} of them to do.")
    if not work:
        return
    segmenter = segmenter_of()
    masks.begin()
    seen, found = {}, []
    for picture in tqdm(pictures, unit="picture"):
        looked = segmenter.see(picture.image)
        found.append(candidates(segmenter, looked, args.grid))
        # Of the embedding only the picture's place in the model's square is needed from here on.
        seen[picture.name] = dataclasses.replace(looked, embedding=None, features=None)
    for picture, of_picture, choice in zip(pictures, found, choose(found), strict=True):
        if picture in work:
            logits = of_picture.logits[choice.index][None, None]
            masks.save(picture, enlarge(logits, seen[picture.name])[0, 0] > 0, "auto", prompt,
                       of_picture.merit[choice.index].item(), confidence=round(choice.confidence, 3))


def by_hand(args: argparse.Namespace, pictures: list[Picture], masks: Masks, segmenter_of) -> None:
    """Serve the page until Ctrl-C."""
    from szt_utils.mask_page import MaskPage, serve
    from szt_utils.prompts import prompt_to_json

    def save(index: int, mask, prompt, score: float) -> str | None:
        """Save one mask; what is odd about it is returned."""
        return area_warning(masks.save(pictures[index], mask, "ui", as_read(prompt_to_json(prompt)), score))

    segmenter = segmenter_of()
    masks.begin()
    made = [masks.records.get(picture.name, {}) for picture in pictures]
    page = MaskPage(segmenter, [picture.path.name for picture in pictures],
                    [picture.image for picture in pictures], [masks.read(picture) for picture in pictures],
                    [record.get("prompt", {}) if record.get("way") in ("ui", "points_file", "point") else {}
                     for record in made],
                    save, args.resolution, args.mask_dilation, args.center_crop)
    serve(page, args.port, lambda url: print(f"Open {url} in a browser on this computer; Ctrl-C ends.",
                                             flush=True))


def summarise(pictures: list[Picture], masks: Masks) -> None:
    """Print what there is now, and what to look at."""
    records = [masks.records[picture.name] for picture in pictures if picture.name in masks.records]
    if not records:
        return
    areas = [record["area"] for record in records]
    print(f"{len(records)} masks in '{masks.folder}'; the concept covers {sum(areas) / len(areas):.1%} "
          f"of a picture, from {min(areas):.1%} to {max(areas):.1%}.")
    sure = [record["confidence"] for record in records if "confidence" in record]
    if sure:
        print("confidence: " + ", ".join(f"{record['source']} {record['confidence']:.2f}"
                                         for record in records if "confidence" in record))
    for record in records:
        if warning := area_warning(record):
            print(f"warning: {warning}; look at it.")
        if record.get("confidence", 1) < UNSURE:
            print(f"warning: {record['source']}: not sure of this mask ({record['confidence']:.2f}); "
                  "look at it, and correct it with --ui.")


def preview(args: argparse.Namespace, pictures: list[Picture], masks: Masks) -> None:
    from szt_utils.images import save_png
    from szt_utils.mask_preview import mask_sheet

    made = [(picture, mask) for picture in pictures if (mask := masks.read(picture)) is not None]
    if not made:
        return
    path = masks.folder / "preview" / "sheet.png"
    names, images = [picture.path.name for picture, _ in made], [picture.image for picture, _ in made]
    save_png(mask_sheet(names, images, [mask for _, mask in made], args.resolution, args.mask_dilation,
                        args.center_crop), path)
    print(f"Look at '{path}'.")


def run(args: argparse.Namespace) -> None:
    def segmenter_of():
        import torch

        from szt_utils.segment import load_segmenter

        return load_segmenter(args.sam_checkpoint, args.sam_model,
                              "cuda" if torch.cuda.is_available() else "cpu")

    masks, pictures = Masks(args), find_pictures(args.image_dir)
    way = by_consensus if args.auto else by_hand if args.ui else by_prompt
    way(args, pictures, masks, segmenter_of)
    summarise(pictures, masks)
    if args.preview:
        preview(args, pictures, masks)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


if __name__ == "__main__":
    main()
