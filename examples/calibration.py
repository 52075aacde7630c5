r"""Clean images that the bundled calibration of `diagnose_images.py` is made of, and others to test it with.

    python examples/calibration.py --output_dir images
    python diagnose_images.py --pretrained_model_name_or_path $(python -m szt_utils.pocket) \
        --clean_dir images/calibrate --image_dir images/test --output_dir diagnosis

Writes drawn scenes and scikit-image's photographs, 128 px, to the folders `calibrate` and `test`. Scenes and
photographs go to the two folders in turns, and every photograph gives squares of four sizes, so that no image
of one folder is a part of an image of the other.
"""

from pathlib import Path

from PIL import Image

from szt_utils.arguments import number, script_parser, user_path
from szt_utils.errors import exit_on_input_error
from szt_utils.images import read_image, save_png
from szt_utils.pocket.scenes import attributes_of, draw_scene

try:
    import skimage
except ImportError:
    raise SystemExit("error: This needs scikit-image: pip install scikit-image") from None

PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
               "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
               "motorcycle_left.png", "retina.jpg", "rocket.jpg")
SIDE, FIRST_SEED = 128, 5_000_000  # neither training nor held-out scenes have these seeds


def write_images(output_dir: Path, scenes: int) -> list[Path]:
    """Write `scenes` drawn scenes and all photographs; returns the two folders."""
    halves = [output_dir / name for name in ("calibrate", "test")]
    for i in range(scenes):
        scene = draw_scene(FIRST_SEED + i, attributes_of(FIRST_SEED + i))
        save_png(Image.fromarray(scene.image), halves[i % 2] / "scenes" / f"{i:03d}.png")
    for i, name in enumerate(PHOTOGRAPHS):
        photograph = read_image(Path(skimage.__file__).parent / "data" / name)
        for share in (1, 0.7, 0.5, 0.35):  # from the whole central square to a detail of it
            side = int(share * min(photograph.size))
            left, top = ((length - side) // 2 for length in photograph.size)
            square = photograph.crop((left, top, left + side, top + side))
            save_png(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC),
                     halves[i % 2] / "photographs" / f"{Path(name).stem}-{round(100 * share)}.png")
    return halves


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output_dir", type=user_path, default="images")
    parser.add_argument("--scenes", type=number(int, 0), default=80,
                        help="drawn scenes, half of them to test with (80)")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        for folder in write_images(Path(args.output_dir), args.scenes):
            print(folder)


if __name__ == "__main__":
    main()
