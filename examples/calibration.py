"""Clean pictures that the bundled calibration of `sensitivity_maps.py --diagnose` is made of, and others to
test it with.

    python examples/calibration.py --output_dir clean
    python sensitivity_maps.py --pretrained_model_name_or_path $(python -m szt_utils.pocket) \
        --clean_dir clean/calibrate --diagnose clean/test --output_dir diagnosis

Writes to `calibrate` and to `test` drawn scenes and scikit-image's photographs, 128 px: every second scene
and every second photograph, in squares of four sizes, so that no picture of one is a part of the other.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from szt_utils.errors import exit_on_input_error
from szt_utils.images import read_image, save_png
from szt_utils.pocket.scenes import draw_scene, training_attributes

PHOTOGRAPHS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
               "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
               "motorcycle_left.png", "retina.jpg", "rocket.jpg")
SIDE, FIRST_SEED = 128, 5_000_000  # seeds that neither training nor held-out scenes have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("clean"))
    parser.add_argument("--scenes", type=int, default=80, help="drawn scenes, half of them to test with (80)")
    arguments = parser.parse_args()
    with exit_on_input_error():
        write(arguments)


def write(arguments) -> None:
    import skimage

    halves = [arguments.output_dir / name for name in ("calibrate", "test")]
    for i in range(arguments.scenes):
        scene = draw_scene(FIRST_SEED + i, training_attributes(np.random.default_rng(FIRST_SEED + i)))
        save_png(Image.fromarray(scene.image), halves[i % 2] / "scenes" / f"{i:03d}.png")
    for i, name in enumerate(PHOTOGRAPHS):
        photograph = read_image(Path(skimage.__file__).parent / "data" / name)
        for share in (1, 0.7, 0.5, 0.35):  # from the whole central square to a detail of it
            side = int(share * min(photograph.size))
            left, top = ((length - side) // 2 for length in photograph.size)
            square = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.BICUBIC)
            save_png(square, halves[i % 2] / "photographs" / f"{Path(name).stem}-{round(100 * share)}.png")
    for half in halves:
        print(half)


if __name__ == "__main__":
    main()
