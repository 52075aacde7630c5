"""Make the data sets of the figures: clean and poisoned images of concepts, masks, and embeddings learned
from them.

    python examples/figures/make_data.py --output_dir figures --data clean adm+ ea

Writes `<data>/<concept>/*.png`, `masks/<concept>/*.png` and `learned/<data>/<concept>/`. The concepts are the
ten novel ones of the pocket world, or those of `--clean_dir` and `--mask_dir`. The same command again makes
what is missing.
"""

import argparse
from pathlib import Path

from common import DATA, TOKEN

import poison_images
import textual_inversion_szt
from szt_utils import pocket
from szt_utils.arguments import command_line, local_path, script_parser
from szt_utils.datasets import read_concepts, write_images
from szt_utils.errors import exit_on_input_error
from szt_utils.files import write_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=pocket.model_path(), help="the model (the pocket model)")
    add("--output_dir", type=local_path, default=Path("figures"))
    add("--clean_dir", type=local_path,
        help="folder with a folder of images per concept (the pocket world's)")
    add("--mask_dir", type=local_path, help="folder with a folder of masks per concept (the pocket world's)")
    add("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets to make (all)")
    add("--concepts", nargs="+", help="concepts (all)")
    add("--images", type=int, default=5, help="images of each pocket concept (5)")
    add("--seed", type=int, default=0, help="another seed gives other images of the pocket concepts (0)")
    add("--resolution", type=int, default=128)
    add("--poison_steps", type=int, default=100)
    add("--step_size", type=float, default=1.0)
    add("--train_steps", type=int, default=250, help="steps of each embedding; 0 trains none (250)")
    add("--save_steps", type=int, default=25)
    add("--train_batch_size", type=int, default=4)
    add("--learning_rate", type=float, default=5e-3)
    add("--initializer_token", default="object")
    args = parser.parse_args(argv)
    if bool(args.clean_dir) != bool(args.mask_dir):
        parser.error("--clean_dir and --mask_dir go together")
    return args


def write_clean(output_dir: Path, clean_dir: Path | None, mask_dir: Path | None, names: list[str] | None,
                images: int, seed: int, resolution: int) -> list[str]:
    """Write the clean images and the masks of the concepts `names`, or of all; returns their names.

    Images of one's own become square PNGs of `resolution` pixels.
    """
    clean, masks = output_dir / "clean", output_dir / "masks"
    concepts = read_concepts("dreambooth" if clean_dir else "pocket", clean_dir, mask_dir, names=names)
    for name, concept in concepts.items():
        if clean_dir:
            write_images(concept, clean / name, masks / name, resolution)
        else:
            pocket.write_concept(name, clean / name, masks / name, images, seed)
    return names or sorted(concepts)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    home, model = args.output_dir, args.pretrained_model_name_or_path
    with exit_on_input_error():
        concepts = write_clean(home, args.clean_dir, args.mask_dir, args.concepts, args.images, args.seed,
                               args.resolution)
        for data in args.data:
            if data != "clean":
                poison_images.main(command_line(
                    pretrained_model_name_or_path=model, image_dir=home / "clean", output_dir=home / data,
                    method=data, resolution=args.resolution, batch_size=8, steps=args.poison_steps,
                    step_size=args.step_size))
            if args.train_steps:
                entries = [{"train_data_dir": str(home / data / concept),
                            "output_dir": str(home / "learned" / data / concept),
                            "loss_mask_dir": str(home / "masks" / concept), "mask_mode": "none"}
                           for concept in concepts]
                write_json(home / f"concepts-{data}.json", entries)
                textual_inversion_szt.main(command_line(
                    pretrained_model_name_or_path=model, concepts=home / f"concepts-{data}.json",
                    output_dir=home / "training" / data, placeholder_token=TOKEN,
                    initializer_token=args.initializer_token, resolution=args.resolution,
                    train_batch_size=args.train_batch_size, learning_rate=args.learning_rate,
                    max_train_steps=args.train_steps, save_steps=args.save_steps,
                    checkpointing_steps=args.save_steps, checkpoints_total_limit=1,
                    resume_from_checkpoint="latest", seed=0))


if __name__ == "__main__":
    main()
