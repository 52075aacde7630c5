"""The data sets of the figures: clean and poisoned pictures of concepts, masks, embeddings learned from them.

    python examples/figures/world.py --output_dir figures --data clean adm+ ea

makes `<data>/<concept>/*.png`, `masks/<concept>/*.png` and, of the pocket world's ten novel concepts unless
`--clean_dir` and `--mask_dir` name folders of another's, `learned/<data>/<concept>/`. Runs the real scripts;
the same command again goes on. The rest of this module is what the figures have in common.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from szt_utils import pocket
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.records import write_json

ROOT = Path(__file__).resolve().parents[2]
DATA = ("clean", "adm+", "adm-", "sds+", "sds-", "ea", "da")
TOKEN = "<concept>"


def pictures(folder: Path, data: str, concept: str, limit: int | None = None) -> list[Path]:
    """The pictures of one data set and concept, sorted."""
    from szt_utils.images import list_images

    return list_images(folder / data / concept)[:limit]


def load(paths: list[Path], resolution: int):
    """Pictures, their central squares, as float32 (B, 3, R, R) in [0, 1]."""
    import torch

    from szt_utils.images import crop_and_resize, from_pil, read_image

    return torch.cat([from_pil(crop_and_resize(read_image(path), resolution, True)) for path in paths])


def read_square(path: str):
    """A picture's central square, as a Pillow image."""
    from szt_utils.images import crop_and_resize, read_image

    image = read_image(path)
    return crop_and_resize(image, min(image.size), True)


def load_mask(path: Path, resolution: int, grid: tuple[int, int]):
    """The share of each latent cell that a picture's concept covers, float32 (h, w)."""
    import torch.nn.functional as F

    from szt_utils.images import read_upright
    from szt_utils.masks import prepare_mask, read_mask

    mask = prepare_mask(read_mask(path, read_upright(path).size), resolution, center_crop=True)
    return F.adaptive_avg_pool2d(mask, grid)[0, 0]


def concepts_of(arguments, data: str) -> list[str]:
    """The concepts that a data set has, of those asked for."""
    found = sorted(path.name for path in (arguments.data_dir[0] / data).iterdir() if path.is_dir())
    return [name for name in found if not arguments.concepts or name in arguments.concepts]


def learned(arguments, data: str, concept: str, name: str = "learned_embeds") -> Path:
    return arguments.data_dir[0] / "learned" / data / concept / f"{name}.safetensors"


def load_model(arguments):
    from szt_utils.sensitivity import PromptedModel

    model = PromptedModel.load(arguments.pretrained_model_name_or_path)
    cell = 2 ** (len(model.base.vae.config.block_out_channels) - 1)
    return model, model.base.unet.config.sample_size * cell


def estimate(values, statistic=None) -> dict[str, float]:
    """`evidence.bootstrap` of independent rows; of a mean unless told otherwise. One row has no interval."""
    import numpy as np

    from szt_utils.evidence import bootstrap

    found = bootstrap(np.asarray(values), statistic or np.mean)
    return found if found["n"] > 1 else {**found, "low": None, "high": None}


def figure(name: str, doc: str, measure: Callable, claims: Callable, draw: Callable,
           flags: dict[str, Any], data: tuple[str, ...] = DATA) -> None:
    """Run a figure's script: measure what `<name>.json` lacks, draw it, and print its claims.

    `measure(arguments, data)` gives the JSON of one data set, `claims(results)` a dict of sentences and
    estimates, `draw(results, path)` the picture; `flags` are the script's own, with defaults. `--redraw`
    takes the JSON as it is.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=pocket.model_path(), help="the model (the pocket model)")
    add("--data_dir", type=Path, nargs="+", default=[Path("figures")],
        help="folders that world.py made; embeddings and masks are taken from the first (figures)")
    add("--output_dir", type=Path, default=Path("figures"),
        help=f"folder for {name}.json, {name}.png and {name}_claims.json (figures)")
    add("--data", nargs="+", choices=data, help="data sets (those that are there)")
    add("--concepts", nargs="+", help="concepts (all)")
    add("--redraw", action="store_true", help=f"measure nothing: draw what {name}.json holds")
    for flag, default in flags.items():
        several = isinstance(default, list)
        add(f"--{flag}", type=type(default[0] if several else default), default=default,
            nargs="+" if several else None)
    arguments = parser.parse_args()
    with exit_on_input_error():
        path = arguments.output_dir / f"{name}.json"
        if arguments.redraw:
            results = json.loads(path.read_text())["results"]
        else:
            results = measured(path, arguments, measure, data)
        draw(results, path.with_suffix(".png"))
        found = claims(results)
        write_json(arguments.output_dir / f"{name}_claims.json", found)
        for sentence, value in found.items():
            print(f"{sentence}: {told(value)}")


def told(value) -> str:
    if isinstance(value, dict) and value["low"] is None:
        return f"{value['value']:.3g} (n = 1)"
    if isinstance(value, dict):
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}] (n = {value['n']})"
    return f"{value:.3g}"


def measured(path: Path, arguments, measure: Callable, names: tuple[str, ...]) -> dict[str, Any]:
    """The results of every data set asked for, or there is: those in the file, if it is of the same
    arguments, and those missing."""
    wanted = arguments.data or [name for name in names if (arguments.data_dir[0] / name).is_dir()]
    if "clean" not in wanted:
        raise InputError(f"There is no folder 'clean' in '{arguments.data_dir[0]}', with which the "
                         "others are compared; make it with world.py.")
    arguments.data = wanted
    settings = {name: str(value) for name, value in vars(arguments).items()
                if name not in ("data", "output_dir", "redraw")}
    results = {}
    if path.exists():
        before = json.loads(path.read_text())
        results = before["results"] if before["settings"] == settings else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for data in wanted:
        if data not in results:
            results[data] = measure(arguments, data)
            write_json(path, {"settings": settings, "results": results})
    return {data: results[data] for data in wanted}


def script(name: str, *flags, **options) -> None:
    """Run one of the project's scripts; what it says is shown."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    for flag, value in options.items():
        command += [f"--{flag}", str(value)]
    if subprocess.run(command).returncode:
        sys.exit(1)


def make(arguments) -> None:
    home, model = arguments.output_dir, arguments.pretrained_model_name_or_path
    clean, masks = arguments.clean_dir or home / "clean", arguments.mask_dir or home / "masks"
    if not arguments.clean_dir:
        for concept in arguments.concepts or pocket.NOVEL_CONCEPTS:
            pocket.write_concept(concept, clean / concept, masks / concept, arguments.pictures,
                                 arguments.seed)
    concepts = arguments.concepts or sorted(path.name for path in clean.iterdir() if path.is_dir())
    for data in arguments.data:
        if data != "clean":
            script("poison_images.py", pretrained_model_name_or_path=model, image_dir=clean,
                   output_dir=home / data, method=data, resolution=arguments.resolution, batch_size=8,
                   steps=arguments.poison_steps, step_size=arguments.step_size)
        if arguments.train_steps:
            entries = [{"train_data_dir": str((clean if data == "clean" else home / data) / concept),
                        "output_dir": str(home / "learned" / data / concept),
                        "loss_mask_dir": str(masks / concept), "mask_mode": "none"} for concept in concepts]
            write_json(home / f"concepts-{data}.json", entries)
            script("textual_inversion_szt.py", pretrained_model_name_or_path=model,
                   concepts=home / f"concepts-{data}.json", output_dir=home / "training" / data,
                   placeholder_token=TOKEN, initializer_token=arguments.initializer_token,
                   resolution=arguments.resolution, train_batch_size=arguments.train_batch_size,
                   learning_rate=arguments.learning_rate, max_train_steps=arguments.train_steps,
                   save_steps=arguments.save_steps, checkpointing_steps=arguments.save_steps,
                   checkpoints_total_limit=1, resume_from_checkpoint="latest", seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=pocket.model_path())
    add("--output_dir", type=Path, default=Path("figures"))
    add("--clean_dir", type=Path, help="folder with a folder of pictures per concept (the pocket world's)")
    add("--mask_dir", type=Path, help="folder with a folder of masks per concept (the pocket world's)")
    add("--data", nargs="+", choices=DATA, default=list(DATA))
    add("--concepts", nargs="+", help="concepts (all)")
    add("--pictures", type=int, default=5, help="pictures of each pocket concept (5)")
    add("--seed", type=int, default=0, help="another seed gives other pictures (0)")
    add("--resolution", type=int, default=128)
    add("--poison_steps", type=int, default=100)
    add("--step_size", type=float, default=1.0)
    add("--train_steps", type=int, default=250, help="0 trains nothing (250)")
    add("--save_steps", type=int, default=25)
    add("--train_batch_size", type=int, default=4)
    add("--learning_rate", type=float, default=5e-3)
    add("--initializer_token", default="object")
    arguments = parser.parse_args()
    with exit_on_input_error():
        make(arguments)


if __name__ == "__main__":
    main()
