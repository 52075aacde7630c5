"""Poisons against defences on the pocket world's novel concepts, one JSON file per cell (paper Table 1).

    python examples/table1.py --output_dir table1 --data clean adm+ ea --defences nominal szt

Runs the real scripts: draws the concept, poisons it, trains the embeddings of all its cells in one run,
generates with each and compares with the clean pictures. Cells that are there are not done again. `--dry_run`
lists what is missing. The table of all cells goes to `table.md`.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from szt_utils import pocket
from szt_utils.errors import exit_on_input_error
from szt_utils.pocket.scenes import BACKGROUNDS, NOVEL_CONCEPTS
from szt_utils.records import write_json

ROOT = Path(__file__).resolve().parent.parent
POISONS = {name: {"method": name} for name in ("adm+", "adm-", "sds+", "sds-", "ea", "da")}
POISONS |= {f"{name} szt": {"method": name, "adaptive": "szt"} for name in ("adm+", "ea")}
DEFENCES = {
    "nominal": {},
    "t600": {"t_min": 600},
    "lm": {"loss_mask_dir": "masks"},
    "jpeg": {"jpeg_quality": 25},
    "jpeg+t600": {"jpeg_quality": 25, "t_min": 600},
    "jpeg+lm": {"jpeg_quality": 25, "loss_mask_dir": "masks"},
    "szt": {"szt": True, "loss_mask_dir": "masks"},
}


def script(name: str, **flags) -> None:
    """Run one of the project's scripts quietly; what it says is shown when it fails."""
    command = [sys.executable, str(ROOT / name)]
    for flag, value in flags.items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def poisoned(home: Path, data: str) -> Path:
    """The folder of a concept's pictures with that poison, made if need be."""
    images = home / data.replace(" ", "-")
    flags = {"pretrained_model_name_or_path": pocket.model_path(), "image_dir": home / "clean",
             "output_dir": images, "resolution": 128, "batch_size": 5, **POISONS.get(data, {})}
    if "adaptive" in flags:
        flags |= {"loss_mask_dir": home / "masks", "mask_dilation": 4}
    if data != "clean":
        script("poison_images.py", **flags)
    return images


def train(arguments, home: Path, cells: list[tuple]) -> None:
    """Train the embeddings of all cells of one concept in one run, whose concepts they are."""
    entries = []
    for data, defence, concept, seed in cells:
        learned = arguments.output_dir / "learned" / cell_name(data, defence, concept, seed)
        if not (learned / "learned_embeds.safetensors").exists():
            flags = dict(DEFENCES[defence])
            if "loss_mask_dir" in flags:
                flags |= {"loss_mask_dir": str(home / "masks"), "mask_dilation": 4}
            entries.append({"train_data_dir": str(poisoned(home, data)), "output_dir": str(learned),
                            "seed": seed, **flags})
    if entries:
        write_json(home / "concepts.json", entries)
        script("textual_inversion_szt.py", pretrained_model_name_or_path=pocket.model_path(),
               output_dir=home / "training", concepts=home / "concepts.json", placeholder_token="<concept>",
               initializer_token="object", resolution=128, train_batch_size=4, learning_rate=5e-3,
               max_train_steps=arguments.steps, checkpointing_steps=100, checkpoints_total_limit=1,
               resume_from_checkpoint="latest")


def score(arguments, home: Path, cell: tuple) -> dict:
    """Generate with a cell's embedding and compare with the clean pictures."""
    from szt_utils.generation import generate, load_pipeline
    from szt_utils.images import list_images, read_image
    from szt_utils.metrics import image_features, pairwise_similarity, similarity

    learned = arguments.output_dir / "learned" / cell_name(*cell) / "learned_embeds.safetensors"
    real = image_features([read_image(path) for path in list_images(home / "clean")], pocket.dino_path())
    generated = generate(load_pipeline(pocket.model_path(), learned),
                         [f"a photo of a <concept> on {background}" for background in BACKGROUNDS], seed=100)
    return {"dino": similarity(image_features(generated, pocket.dino_path()), real),
            "real_real": pairwise_similarity(real)}


def cell_name(data: str, defence: str, concept: str, seed: int) -> str:
    return f"{data}_{defence}_{concept}_{seed}".replace(" ", "-")


def table(cells: list[dict]) -> str:
    """Mean similarity over concepts and seeds with its standard error, Markdown."""
    values = defaultdict(list)
    for cell in cells:
        values[cell["data"], cell["defence"]].append(cell["metrics"]["dino"])
    defences = [name for name in DEFENCES if any(key[1] == name for key in values)]
    lines = ["| data | " + " | ".join(defences) + " |", "| --- |" + " --- |" * len(defences)]
    for data in ["clean", *POISONS]:
        row = [values.get((data, defence), []) for defence in defences]
        if any(row):
            lines.append(f"| {data} | " + " | ".join(
                f"{mean(v):.3f}" + (f" ± {stdev(v) / len(v) ** 0.5:.3f}" if len(v) > 1 else "") if v else ""
                for v in row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("table1"))
    parser.add_argument("--data", nargs="+", choices=["clean", *POISONS], default=["clean", *POISONS])
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    parser.add_argument("--concepts", nargs="+", choices=NOVEL_CONCEPTS, default=list(NOVEL_CONCEPTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each embedding")
    parser.add_argument("--dry_run", action="store_true")
    arguments = parser.parse_args()
    with exit_on_input_error():
        run(arguments)


def run(arguments) -> None:
    folder = arguments.output_dir / "cells"
    cells = [(data, defence, concept, seed) for seed, concept, data, defence in itertools.product(
        arguments.seeds, arguments.concepts, arguments.data, arguments.defences)]
    missing = [cell for cell in cells if not (folder / f"{cell_name(*cell)}.json").exists()]
    print(f"{len(cells)} cells, {len(missing)} of them to do.")
    if arguments.dry_run:
        print("\n".join(cell_name(*cell) for cell in missing))
        return
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for concept in arguments.concepts:
        home = arguments.output_dir / "data" / concept
        pocket.write_concept(concept, home / "clean", home / "masks")
        of_concept = [cell for cell in missing if cell[2] == concept]
        train(arguments, home, of_concept)
        for cell in of_concept:
            metrics, done = score(arguments, home, cell), done + 1
            record = dict(zip(("data", "defence", "concept", "seed"), cell, strict=True),
                          steps=arguments.steps, metrics=metrics)
            write_json(folder / f"{cell_name(*cell)}.json", record)
            print(f"{done}/{len(missing)} {', '.join(map(str, cell))}: {metrics['dino']:.3f} "
                  f"(real {metrics['real_real']:.3f})", flush=True)
    text = table([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
    (arguments.output_dir / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
