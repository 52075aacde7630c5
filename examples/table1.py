"""Poisons against defences (paper Table 1), and the ablations of Sec. 5.2.

    python examples/table1.py --output_dir table1 --concepts teal-striped-star red-dotted-heart
    python examples/table1.py --output_dir table1 --preset timesteps
    python examples/table1.py --output_dir table1 --dataset dreambooth --dataset_dir dataset \
        --mask_dir masks --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

Runs the real scripts: poisons each concept's images, purifies them, trains the embeddings of all its cells in
one run, generates and scores. A cell is a line of cells/<concept>.jsonl; the same command again computes only
missing ones. Started by `accelerate launch` or torchrun, every process takes its share of the concepts.
`--dry_run` lists what is missing and what it costs. The table of all cells goes to table1.csv, .md and .png
(or the preset's name), a sheet of images per concept to sheets/.

Data sets: `pocket` draws its concepts; `dreambooth` has one sub-folder of images per concept;
`customconcept101` has dataset.json beside them. Masks are in MASK_DIR/<concept>/<stem>.png.
"""

import argparse
import contextlib
import gc
import io
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import torch

import poison_images
import purify_images
from szt_utils import pocket
from szt_utils.arguments import command_line, script_parser
from szt_utils.captions import read_prompt_templates
from szt_utils.datasets import READERS, DatasetConcept, read_concepts, write_images
from szt_utils.devices import best_device, dtype_of
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.evaluation import evaluate_embedding
from szt_utils.files import atomic_path, write_json
from szt_utils.folder_run import provenance
from szt_utils.images import contact_sheet, list_images, read_image
from szt_utils.metrics import METRICS, Networks
from szt_utils.tables import Cell, append_cell, plan, read_cells, run_index, write_table

TRAINING = Path(__file__).resolve().parent.parent / "textual_inversion_szt.py"
POISONS = {name: {"method": name} for name in ("adm+", "adm-", "sds+", "sds-", "ea", "da")}
ADAPTIVE = {f"{name} szt": {"method": name, "adaptive": "szt"} for name in ("adm+", "ea")}
DATA = {"clean": {}, **POISONS, **ADAPTIVE}
MASKED = {"loss_mask_dir": "masks"}
# "purify" holds flags of purify_images.py, the rest flags of the training.
DEFENCES = {
    "nominal": {},
    "regen": {"purify": {"method": "regen"}},
    "pdmpure": {"purify": {"method": "pdmpure"}},
    "advclean": {"purify": {"method": "advclean"}},
    "jpeg": {"jpeg_quality": 25},
    "t600": {"t_min": 600},
    "lm": {**MASKED, "mask_dilation": 0},
    "jpeg+t600": {"jpeg_quality": 25, "t_min": 600},
    "jpeg+lm": {"jpeg_quality": 25, **MASKED, "mask_dilation": 0},
    "szt": {"szt": True, **MASKED},
}
SWEPT = ["clean", "adm+", "adm-", "ea"]  # the data of the paper's ablations
# Each preset: its data and its variants; "dilation" is in pixels at 512, the paper's resolution.
PRESETS = {
    "timesteps": (SWEPT, {
        "nominal": {}, **{f"t{t}": {"t_min": t} for t in range(100, 1000, 100)},
        **{f"power{k}": {"t_distribution": "power", "t_power": k} for k in (1, 2, 4)},
        **{f"tanh{c}": {"t_distribution": "tanh", "t_center": c, "t_width": 100} for c in (500, 600, 700)}}),
    "masks": (["clean", *POISONS], {
        "nominal": {}, "lm": DEFENCES["lm"],
        **{name: {**MASKED, "mask_dilation": 0, "mask_mode": mode}
           for name, mode in (("im", "image"), ("zm", "latent"), ("lim", "image_and_loss"))}}),
    "dilation": (SWEPT, {
        "nominal": {}, "lm": DEFENCES["lm"],
        **{f"lm{px}": {**MASKED, "dilation": px} for px in (4, 8, 16, 32, 64)}}),
    "jpeg": (SWEPT, {
        "nominal": {}, **{f"jpeg{q}": {"jpeg_quality": q} for q in (10, 15, 25, 35, 50, 65, 75, 85, 95)}}),
}
VARIANTS = {name: flags for variants in (DEFENCES, *(v for _, v in PRESETS.values()))
            for name, flags in variants.items()}
# What the paper trains with (Sec. 5.1.2), and what is enough in the pocket world.
SETTINGS = {
    "pocket": dict(resolution=128, steps=400, train_batch_size=4, learning_rate=5e-3, images_per_prompt=1,
                   num_inference_steps=25, guidance_scale=5.0),
    "dreambooth": dict(resolution=512, steps=5000, train_batch_size=1, learning_rate=5e-4,
                       images_per_prompt=5, num_inference_steps=25, guidance_scale=7.5),
}
SETTINGS["customconcept101"] = {**SETTINGS["dreambooth"], "steps": 2500}
# Cost in forward passes of one image through the U-Net; a backward pass counts as two.
POISON_PASSES = {"adm+": 3, "adm-": 3, "sds+": 2, "sds-": 2, "ea": 1, "da": 24}
PURIFY_PASSES = {"regen": 6, "pdmpure": 6, "advclean": 4}
POCKET_SECONDS = 0.015  # of one pass on two cores, by the quickstart; the rate of earlier cells replaces it


@dataclass(frozen=True)
class Table:
    """What the cells of a table are, and what they are made with."""

    output_dir: Path
    dataset: str
    preset: str | None
    data: list[str]
    defences: list[str]
    settings: dict[str, int | float]
    metrics: list[str]
    pretrained_model_name_or_path: str
    pdmpure_model: str | None
    upscaler: str | None
    dino: str
    clip: str
    inception: str | None
    mixed_precision: str

    @property
    def columns(self) -> list[str]:
        """All defences of the table or preset, in their order."""
        return list(PRESETS[self.preset][1] if self.preset else DEFENCES)

    @property
    def needs_masks(self) -> bool:
        return (any("loss_mask_dir" in VARIANTS[name] for name in self.defences)
                or any(data in ADAPTIVE for data in self.data))

    def cells(self) -> list[Cell]:
        """All finished cells of the table or preset, also those of earlier runs.

        A preset shares cells with the table: it takes those of its data, and of the concepts and seeds that
        its own variants have been trained on.
        """
        cells = [cell for cell in read_cells(self.output_dir) if cell.defence in self.columns]
        if not self.preset:
            return cells
        own = {(cell.concept, cell.seed) for cell in cells if cell.defence not in DEFENCES}
        return [cell for cell in cells if cell.data in self.data and (cell.concept, cell.seed) in own]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("table1"))
    add("--dataset", choices=READERS, default="pocket")
    add("--dataset_dir", type=Path, help="folder of a dreambooth or customconcept101 data set")
    add("--mask_dir", type=Path,
        help="its masks, <concept>/<stem>.png, for lm, jpeg+lm, szt and adaptive poisons")
    for name, text in {
            "pretrained_model_name_or_path": "the model (pocket: the bundled one)",
            "pdmpure_model": "pixel-space model for pdmpure (pocket: the bundled one)",
            "upscaler": "its second stage, when it is DeepFloyd IF",
            "dino": "image encoder for the scores (pocket: the bundled one)",
            "clip": "CLIPModel for the scores (pocket: the bundled one)",
            "inception": "InceptionV3 weights for FID and KID (default: features of --clip)",
            "prompts_file": "prompts with {} (pocket: its backgrounds; else the concept's own or 24 of ours)",
            "initializer_token": "(object, or the class word of customconcept101)"}.items():
        add(f"--{name}", help=text)
    add("--preset", choices=PRESETS, help="an ablation instead of the table")
    add("--data", nargs="+", choices=DATA,
        help="(clean and the six poisons; 'adm+ szt' and 'ea szt' are adaptive)")
    add("--defences", nargs="+", choices=VARIANTS, metavar="NAME",
        help=f"some of {', '.join(DEFENCES)}, or of a preset (the ten; with --preset, its own)")
    add("--concepts", nargs="+", help="(all of the data set)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    add("--max_train_steps", "--steps", dest="steps", metavar="N", type=int,
        help="(400, dreambooth 5000, customconcept101 2500)")
    for name, value in SETTINGS["pocket"].items():
        if name != "steps":
            add(f"--{name}", type=type(value))
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--dry_run", action="store_true", help="list the missing cells and their cost")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in SETTINGS["pocket"] if getattr(args, name) is not None}
    args.settings = {**SETTINGS[args.dataset], **given}
    if args.dataset == "pocket":
        for name, path in (("pretrained_model_name_or_path", pocket.model_path), ("dino", pocket.dino_path),
                           ("clip", pocket.clip_path), ("pdmpure_model", pocket.pixel_path)):
            setattr(args, name, getattr(args, name) or path())
    else:
        for name in ("dataset_dir", "pretrained_model_name_or_path", "dino", "clip"):
            if not getattr(args, name):
                parser.error(f"argument --{name}: --dataset {args.dataset} needs it")
    data, variants = PRESETS[args.preset] if args.preset else (["clean", *POISONS], DEFENCES)
    args.data, args.defences = args.data or list(data), args.defences or list(variants)
    return args


def run_quietly(script: ModuleType, **flags: object) -> None:
    """Run a script's main() in this process; what it printed is shown when it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            script.main(command_line(**flags))
    except BaseException as error:
        if not (isinstance(error, SystemExit) and isinstance(error.code, str)):  # such a message says it all
            print(printed.getvalue(), file=sys.stderr)
        raise
    finally:  # the training is another process: leave it the GPU's memory
        gc.collect()
        torch.cuda.empty_cache()


def train_apart(**flags: object) -> None:
    """Run the training in a process of its own, on the same GPU; what it printed is shown when it fails."""
    # A child that saw the launcher's variables would wait for the other processes.
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    if "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        rank = int(os.environ["LOCAL_RANK"])
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)] if visible != [""] else str(rank)
    command = [sys.executable, str(TRAINING), *command_line(**flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def poisoned(table: Table, home: Path, data: str) -> Path:
    """The folder of a concept's images with that poison, made if need be."""
    images = home / data.replace(" ", "-")
    if data != "clean":
        run_quietly(poison_images, pretrained_model_name_or_path=table.pretrained_model_name_or_path,
                    image_dir=home / "clean", output_dir=images, resolution=table.settings["resolution"],
                    batch_size=5, mixed_precision=table.mixed_precision,
                    loss_mask_dir=home / "masks" if data in ADAPTIVE else None, **DATA[data])
    return images


def purified(table: Table, home: Path, images: Path, defence: str) -> Path:
    """The folder of those images after a defence that changes images, made if need be."""
    if "purify" not in VARIANTS[defence]:
        return images
    flags = {"regen": {"pretrained_model_name_or_path": table.pretrained_model_name_or_path},
             "pdmpure": {"pretrained_model_name_or_path": table.pdmpure_model, "upscaler": table.upscaler},
             }.get(defence, {})
    if flags:
        flags |= {"mixed_precision": table.mixed_precision, "batch_size": 5}
    output = home / f"{images.name}-{defence}"
    run_quietly(purify_images, image_dir=images, output_dir=output, **VARIANTS[defence]["purify"], **flags)
    return output


def train(table: Table, concept: DatasetConcept, home: Path, cells: list[Cell]) -> None:
    """Train the embeddings of all cells of one concept in one run, whose concepts they are."""
    entries, folders = [], {}
    for cell in cells:
        learned = table.output_dir / "learned" / cell.name
        if (learned / "learned_embeds.safetensors").exists():
            continue
        if cell.data not in folders:
            folders[cell.data] = poisoned(table, home, cell.data)
        if (cell.data, cell.defence) not in folders:
            folders[cell.data, cell.defence] = purified(table, home, folders[cell.data], cell.defence)
        flags = {flag: value for flag, value in VARIANTS[cell.defence].items()
                 if flag not in ("purify", "dilation")}
        if "loss_mask_dir" in flags:
            flags["loss_mask_dir"] = str(home / "masks")
        if "dilation" in VARIANTS[cell.defence]:
            at_512 = VARIANTS[cell.defence]["dilation"]
            flags["mask_dilation"] = round(at_512 * table.settings["resolution"] / 512)
        entries.append({"train_data_dir": str(folders[cell.data, cell.defence]), "output_dir": str(learned),
                        "seed": cell.seed, **flags})
    if entries:
        write_json(home / "concepts.json", entries)
        steps = table.settings["steps"]
        train_apart(pretrained_model_name_or_path=table.pretrained_model_name_or_path,
                    output_dir=home / "training", concepts=home / "concepts.json",
                    placeholder_token="<concept>", initializer_token=concept.initializer,
                    resolution=table.settings["resolution"], learning_rate=table.settings["learning_rate"],
                    train_batch_size=table.settings["train_batch_size"], max_train_steps=steps,
                    checkpointing_steps=max(100, steps // 5), checkpoints_total_limit=1,
                    resume_from_checkpoint="latest", mixed_precision=table.mixed_precision)


def score(table: Table, concept: DatasetConcept, home: Path, cell: Cell) -> dict[str, float]:
    """Generate with a cell's embedding and compare with the clean images."""
    embedding = table.output_dir / "learned" / cell.name / "learned_embeds.safetensors"
    clean = [read_image(path) for path in list_images(home / "clean")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FID and FD-DINOv2 rest")  # the table's foot says it once
        _, metrics = evaluate_embedding(
            table.pretrained_model_name_or_path, embedding, clean, concept.prompts,
            Networks(table.dino, table.clip, table.inception), class_word=concept.class_word,
            images_per_prompt=table.settings["images_per_prompt"], metrics=table.metrics,
            device=best_device(), folder=table.output_dir / "generated" / cell.name,
            steps=table.settings["num_inference_steps"], guidance_scale=table.settings["guidance_scale"],
            pipeline_options={"torch_dtype": dtype_of(table.mixed_precision)})
    return metrics


def do_concept(table: Table, concept: DatasetConcept, cells: list[Cell]) -> None:
    """Train and score a concept's missing cells, and add them to its file."""
    start, home = time.perf_counter(), table.output_dir / "data" / concept.name
    run = run_index(table.output_dir, {
        **table.settings, "dataset": table.dataset, "model": Path(table.pretrained_model_name_or_path).name,
        **provenance()})
    write_images(concept, home / "clean", home / "masks" if table.needs_masks else None,
                 table.settings["resolution"])
    train(table, concept, home, cells)
    shared = (time.perf_counter() - start) / len(cells)
    share = sum(passes(table, cells, {concept.name: concept}).values()) / len(cells)
    for i, cell in enumerate(cells, 1):
        start = time.perf_counter()
        metrics = score(table, concept, home, cell)
        seconds = round(shared + time.perf_counter() - start, 2)
        append_cell(table.output_dir,
                    replace(cell, metrics=metrics, seconds=seconds, passes=round(share), run=run))
        print(f"{i}/{len(cells)} {cell.data}, {cell.defence}, {cell.concept}, {cell.seed}: "
              + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)


def passes(table: Table, cells: list[Cell], concepts: dict[str, DatasetConcept]) -> dict[str, int]:
    """Forward passes of one image through the U-Net that cells cost, by stage."""
    images, settings, total = 5, table.settings, defaultdict(int)
    for data, _ in {(cell.data, cell.concept) for cell in cells}:
        if data != "clean":
            attacks = 2 if data in ADAPTIVE else 1  # the plain one is run beside an adaptive one
            total["poison"] += attacks * images * 100 * POISON_PASSES[DATA[data]["method"]]
    for _, defence, _ in {(cell.data, cell.defence, cell.concept) for cell in cells}:
        total["purify"] += images * PURIFY_PASSES.get(defence, 0)
    for cell in cells:
        total["train"] += settings["steps"] * settings["train_batch_size"] * 3
        total["generate"] += (len(concepts[cell.concept].prompts) * settings["images_per_prompt"] * 2
                              * settings["num_inference_steps"])
    return dict(total)


def write_sheet(table: Table, concept: str, seed: int) -> None:
    """One generated image of each cell of a concept: a row per data set, a column per defence."""
    scores = {(cell.data, cell.defence): cell.metrics for cell in table.cells()
              if cell.concept == concept and cell.seed == seed}
    rows = [(f"{concept}: the clean images",
             [read_image(path) for path in list_images(table.output_dir / "data" / concept / "clean")])]
    for data in DATA:
        images, caption = [], f"{data}:"
        for defence in table.columns:
            path = table.output_dir / "generated" / Cell(data, defence, concept, seed).name / "000.png"
            if (data, defence) in scores and path.exists():
                images.append(read_image(path))
                caption += f"   {defence} {scores[data, defence].get('dino', float('nan')):.2f}"
        if images:
            rows.append((caption, images))
    path = table.output_dir / "sheets" / f"{f'{table.preset}-' if table.preset else ''}{concept}.jpg"
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        contact_sheet(rows).save(temporary, format="JPEG", quality=85)


def run(table: Table, concepts: dict[str, DatasetConcept], seeds: list[int], dry_run: bool) -> None:
    """Compute the missing cells of this process's concepts, and write the table of all that are finished."""
    finished = set(read_cells(table.output_dir))
    cells = list(dict.fromkeys(Cell(data, defence, concept, seed) for seed, concept, data, defence
                               in itertools.product(seeds, concepts, table.data, table.defences)))
    missing = [cell for cell in cells if cell not in finished]
    print(f"{len(cells)} cells, {len(missing)} of them to do.")
    if dry_run:
        print(plan(missing, passes(table, missing, concepts), read_cells(table.output_dir),
                   POCKET_SECONDS if table.dataset == "pocket" else None))
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Seeds of a concept share its poisoned images, and one process writes its file: processes share concepts.
    for concept in list(concepts.values())[rank::processes]:
        if own := [cell for cell in missing if cell.concept == concept.name]:
            do_concept(table, concept, own)
        if (table.output_dir / "data" / concept.name).exists():  # cells may have come without the images
            write_sheet(table, concept.name, seeds[0])
    table.output_dir.mkdir(parents=True, exist_ok=True)
    print(write_table(table.output_dir / (table.preset or "table1"), table.cells(), METRICS, list(DATA),
                      table.columns, list(POISONS), sweep=bool(table.preset)))


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
        concepts = read_concepts(args.dataset, args.dataset_dir, args.mask_dir, names=args.concepts,
                                 initializer=args.initializer_token,
                                 prompts=args.prompts_file and read_prompt_templates(args.prompts_file))
        table = Table(**{field.name: getattr(args, field.name) for field in fields(Table)})
        if "pdmpure" in table.defences and not table.pdmpure_model:
            raise InputError("pdmpure needs --pdmpure_model, a pixel-space model; "
                             "or name the other --defences.")
        if args.dataset != "pocket" and table.needs_masks and not args.mask_dir:
            raise InputError("The defences with masks need --mask_dir; or name the other --defences.")
        run(table, concepts, args.seeds, args.dry_run)


if __name__ == "__main__":
    main()
