"""Poisons against defences, one JSON file per cell (paper Table 1), and the ablations of Sec. 5.2.

    python examples/table1.py --output_dir table1 --concepts teal-striped-star red-dotted-heart
    python examples/table1.py --output_dir table1 --preset timesteps
    python examples/table1.py --output_dir table1 --dataset dreambooth --dataset_dir dataset \
        --mask_dir masks --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

Runs the real scripts: poisons each concept's pictures, purifies them, trains the embeddings of all its
cells in one run, generates and scores. Cells that are there are not done again. Started by `accelerate
launch` or torchrun, every process takes its share of the concepts. `--dry_run` lists what is missing and
what it costs. The table of all cells goes to table1.csv, .md and .png (or the preset's name), a sheet of
pictures per concept to sheets/.

Data sets: `pocket` draws its concepts; `dreambooth` has one sub-folder of pictures per concept;
`customconcept101` has dataset.json beside them. Masks lie in MASK_DIR/<concept>/<stem>.png.
"""

import argparse
import csv
import io
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from szt_utils import pocket
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.pocket.scenes import NOVEL_CONCEPTS
from szt_utils.records import provenance, write_bytes, write_json

ROOT = Path(__file__).resolve().parent.parent
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
# Each preset: its data and its variants; "dilation" is in pixels at 512, as the paper tells it.
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
# What the paper trains with (Sec. 5.1.2), and what does on the pocket world.
SETTINGS = {
    "pocket": dict(resolution=128, steps=400, train_batch_size=4, learning_rate=5e-3, images_per_prompt=1,
                   num_inference_steps=25, guidance_scale=5.0),
    "dreambooth": dict(resolution=512, steps=5000, train_batch_size=1, learning_rate=5e-4,
                       images_per_prompt=5, num_inference_steps=25, guidance_scale=7.5),
}
SETTINGS["customconcept101"] = {**SETTINGS["dreambooth"], "steps": 2500}
METRICS = ("dino", "fid", "kid", "fd_dino", "clip")
# Cost in forward passes of one picture through the U-Net; a backward pass counts as two.
POISON_PASSES = {"adm+": 3, "adm-": 3, "sds+": 2, "sds-": 2, "ea": 1, "da": 24}
PURIFY_PASSES = {"regen": 6, "pdmpure": 6, "advclean": 4}
POCKET_SECONDS = 0.015  # of one pass on two cores, by the quickstart; the rate of earlier cells replaces it


@dataclass(frozen=True)
class Concept:
    """One thing to learn: where its pictures are and the words for it."""

    name: str
    images: Path | None  # None: drawn
    masks: Path | None
    initializer: str
    class_word: str
    prompts: tuple[str, ...]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("table1"))
    add("--dataset", choices=SETTINGS, default="pocket")
    add("--dataset_dir", type=Path, help="folder of a dreambooth or customconcept101 data set")
    add("--mask_dir", type=Path,
        help="its masks, <concept>/<stem>.png, for lm, jpeg+lm, szt and adaptive poisons")
    add("--pretrained_model_name_or_path", help="the model (pocket: the bundled one)")
    add("--pdmpure_model", help="model of pixels for pdmpure (pocket: the bundled one)")
    add("--upscaler", help="its second stage, when it is DeepFloyd IF")
    add("--dino", help="image encoder for the scores (pocket: the bundled one)")
    add("--clip", help="CLIPModel for the scores (pocket: the bundled one)")
    add("--inception", help="InceptionV3 weights for FID and KID (default: features of --clip)")
    add("--preset", choices=PRESETS, help="an ablation instead of the table")
    add("--data", nargs="+", choices=DATA,
        help="(clean and the six poisons; 'adm+ szt' and 'ea szt' are adaptive)")
    add("--defences", nargs="+", choices=VARIANTS, metavar="NAME",
        help=f"some of {', '.join(DEFENCES)}, or of a preset (the ten; with --preset, its own)")
    add("--concepts", nargs="+", help="(all of the data set)")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    add("--prompts_file",
        help="prompts with {} (pocket: its backgrounds; else the concept's own or 24 of ours)")
    add("--initializer_token", help="(object, or the class word of customconcept101)")
    add("--steps", type=int, help="training steps (400, dreambooth 5000, customconcept101 2500)")
    for name in ("resolution", "train_batch_size", "images_per_prompt", "num_inference_steps"):
        add(f"--{name}", type=int)
    for name in ("learning_rate", "guidance_scale"):
        add(f"--{name}", type=float)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--dry_run", action="store_true", help="list the missing cells and their cost")
    args = parser.parse_args(argv)
    for name, value in SETTINGS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset == "pocket":
        for name, path in (("pretrained_model_name_or_path", pocket.model_path), ("dino", pocket.dino_path),
                           ("clip", pocket.clip_path)):
            setattr(args, name, getattr(args, name) or path())
    else:
        for name in ("dataset_dir", "pretrained_model_name_or_path", "dino", "clip"):
            if not getattr(args, name):
                parser.error(f"argument --{name}: --dataset {args.dataset} needs it")
    data, variants = PRESETS[args.preset] if args.preset else (["clean", *POISONS], DEFENCES)
    args.data, args.defences = args.data or list(data), args.defences or list(variants)
    return args


# --- Data sets

def pocket_concepts(args) -> dict[str, Concept]:
    prompts = given_prompts(args) or pocket.PROMPTS
    return {name: Concept(name, None, None, args.initializer_token or "object", "object", prompts)
            for name in NOVEL_CONCEPTS}


def dreambooth_concepts(args) -> dict[str, Concept]:
    from szt_utils.captions import EVALUATION_PROMPTS

    if not args.dataset_dir.is_dir():
        raise InputError(f"The data set '{args.dataset_dir}' is no folder.")
    folders = sorted(p for p in args.dataset_dir.iterdir() if p.is_dir() and not p.name.startswith("."))
    word, prompts = args.initializer_token or "object", given_prompts(args) or EVALUATION_PROMPTS
    return {folder.name: Concept(folder.name, folder, args.mask_dir and args.mask_dir / folder.name, word,
                                 word, prompts) for folder in folders}


def customconcept101_concepts(args) -> dict[str, Concept]:
    from szt_utils.captions import EVALUATION_PROMPTS, read_prompts

    index, concepts = args.dataset_dir / "dataset.json", {}
    try:
        entries = [(Path(entry["instance_data_dir"]), entry["class_prompt"], entry.get("prompt_filename"))
                   for entry in json.loads(index.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{index}' cannot be read as CustomConcept101's list of concepts "
                         f"({type(error).__name__}: {error}).") from None
    for folder, class_word, prompt_file in entries:
        name, own = folder.name, args.dataset_dir / prompt_file if prompt_file else None
        # The list tells folders from where its authors stood: the last name is what counts.
        found = args.dataset_dir / folder if (args.dataset_dir / folder).is_dir() else args.dataset_dir / name
        prompts = given_prompts(args) or (tuple(read_prompts(own)) if own and own.is_file() else None)
        concepts[name] = Concept(name, found, args.mask_dir and args.mask_dir / name,
                                 args.initializer_token or class_word.split()[-1], class_word,
                                 prompts or EVALUATION_PROMPTS)
    return concepts


def given_prompts(args) -> tuple[str, ...] | None:
    from szt_utils.captions import read_prompts

    return tuple(read_prompts(args.prompts_file)) if args.prompts_file else None


def find_concepts(args) -> dict[str, Concept]:
    """The concepts of --concepts, or all, by name."""
    known = {"pocket": pocket_concepts, "dreambooth": dreambooth_concepts,
             "customconcept101": customconcept101_concepts}[args.dataset](args)
    if not known:
        raise InputError(f"The data set '{args.dataset_dir}' holds no concept.")
    if unknown := [name for name in args.concepts or [] if name not in known]:
        raise InputError(f"The data set has no concept '{unknown[0]}'; choose from: {', '.join(known)}.")
    return {name: known[name] for name in args.concepts or known}


def prepare(args, concept: Concept, home: Path) -> None:
    """The concept's clean pictures and masks at training resolution, as PNGs of the same stems."""
    from PIL import Image

    from szt_utils.images import crop_and_resize, list_images, read_image, save_png
    from szt_utils.masks import find_masks, read_mask

    if concept.images is None:
        pocket.write_concept(concept.name, home / "clean", home / "masks")
        return
    paths = list_images(concept.images)
    masks = find_masks(concept.masks, paths) if needs_masks(args) else [None] * len(paths)
    for path, mask in zip(paths, masks, strict=True):
        image, name = read_image(path), f"{path.stem}.png"
        save_png(crop_and_resize(image, args.resolution, center_crop=True), home / "clean" / name)
        if mask is not None:
            save_png(crop_and_resize(read_mask(mask, image.size), args.resolution, True,
                                     Image.Resampling.NEAREST), home / "masks" / name)


def needs_masks(args) -> bool:
    return (any("loss_mask_dir" in VARIANTS[name] for name in args.defences)
            or any(data in ADAPTIVE for data in args.data))


# --- The work

def script(name: str, **flags) -> None:
    """Run one of the project's scripts quietly, on this process's GPU; what it says is shown when it
    fails."""
    command = [sys.executable, str(ROOT / name)]
    for flag, value in flags.items():
        command += [] if value is None else [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    # A child that saw the launcher's variables would wait for the other processes.
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    if "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        rank = int(os.environ["LOCAL_RANK"])
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)] if visible != [""] else str(rank)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def poisoned(args, home: Path, data: str) -> Path:
    """The folder of a concept's pictures with that poison, made if need be."""
    images = home / data.replace(" ", "-")
    if data == "clean":
        return images
    flags = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "image_dir": home / "clean",
             "output_dir": images, "resolution": args.resolution, "batch_size": 5,
             "mixed_precision": args.mixed_precision, **DATA[data]}
    if "adaptive" in flags:
        flags |= {"loss_mask_dir": home / "masks", "mask_dilation": round(16 * args.resolution / 512)}
    script("poison_images.py", **flags)
    return images


def purified(args, home: Path, images: Path, defence: str) -> Path:
    """The folder of those pictures after a defence that changes pictures, made if need be."""
    if "purify" not in VARIANTS[defence]:
        return images
    flags = {"image_dir": images, "output_dir": home / f"{images.name}-{defence}",
             **VARIANTS[defence]["purify"]}
    if defence == "regen":
        flags |= {"pretrained_model_name_or_path": args.pretrained_model_name_or_path}
    if defence == "pdmpure":
        flags |= {"pretrained_model_name_or_path": args.pdmpure_model or pocket.pixel_path(),
                  "upscaler": args.upscaler}
    if defence in ("regen", "pdmpure"):
        flags |= {"mixed_precision": args.mixed_precision, "batch_size": 5}
    script("purify_images.py", **flags)
    return flags["output_dir"]


def train(args, concept: Concept, home: Path, cells: list[tuple]) -> None:
    """Train the embeddings of all cells of one concept in one run, whose concepts they are."""
    entries, folders = [], {}
    for data, defence, name, seed in cells:
        learned = args.output_dir / "learned" / cell_name(data, defence, name, seed)
        if (learned / "learned_embeds.safetensors").exists():
            continue
        if data not in folders:
            folders[data] = poisoned(args, home, data)
        if (data, defence) not in folders:
            folders[data, defence] = purified(args, home, folders[data], defence)
        flags = {flag: value for flag, value in VARIANTS[defence].items()
                 if flag not in ("purify", "dilation")}
        if "loss_mask_dir" in flags:
            flags["loss_mask_dir"] = str(home / "masks")
        if "dilation" in VARIANTS[defence]:
            flags["mask_dilation"] = round(VARIANTS[defence]["dilation"] * args.resolution / 512)
        entries.append({"train_data_dir": str(folders[data, defence]), "output_dir": str(learned),
                        "seed": seed, **flags})
    if entries:
        write_json(home / "concepts.json", entries)
        script("textual_inversion_szt.py", pretrained_model_name_or_path=args.pretrained_model_name_or_path,
               output_dir=home / "training", concepts=home / "concepts.json", placeholder_token="<concept>",
               initializer_token=concept.initializer, resolution=args.resolution,
               train_batch_size=args.train_batch_size, learning_rate=args.learning_rate,
               max_train_steps=args.steps, checkpointing_steps=max(100, args.steps // 5),
               checkpoints_total_limit=1, resume_from_checkpoint="latest",
               mixed_precision=args.mixed_precision)


def score(args, concept: Concept, home: Path, cell: tuple) -> dict:
    """Generate with a cell's embedding and compare with the clean pictures."""
    import torch

    from szt_utils.images import list_images, read_image
    from szt_utils.metrics import Networks, evaluate_embedding

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FID and FD-DINOv2 rest")  # the table's foot says it once
        _, metrics = evaluate_embedding(
            args.pretrained_model_name_or_path,
            args.output_dir / "learned" / cell_name(*cell) / "learned_embeds.safetensors",
            [read_image(path) for path in list_images(home / "clean")], concept.prompts,
            Networks(args.dino, args.clip, args.inception), images_per_prompt=args.images_per_prompt,
            class_word=concept.class_word, metrics=args.metrics, device=device,
            folder=args.output_dir / "generated" / cell_name(*cell), steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale, pipeline_options={"torch_dtype": dtype})
    return metrics


def cell_name(data: str, defence: str, concept: str, seed: int) -> str:
    return f"{data}_{defence}_{concept}_{seed}".replace(" ", "-")


def passes(args, cells: list[tuple], concepts: dict[str, Concept]) -> dict[str, int]:
    """Forward passes of one picture through the U-Net that cells cost, by stage."""
    pictures, total = 5, defaultdict(int)
    for data, _ in {(cell[0], cell[2]) for cell in cells}:
        if data != "clean":
            attacks = 2 if data in ADAPTIVE else 1  # the plain one is run beside an adaptive one
            total["poison"] += attacks * pictures * 100 * POISON_PASSES[DATA[data]["method"]]
    for _, defence, _ in {cell[:3] for cell in cells}:
        total["purify"] += pictures * PURIFY_PASSES.get(defence, 0)
    for _, _, concept, _ in cells:
        total["train"] += args.steps * args.train_batch_size * 3
        total["generate"] += (len(concepts[concept].prompts) * args.images_per_prompt * 2
                              * args.num_inference_steps)
    return dict(total)


def plan(args, missing: list[tuple], concepts: dict[str, Concept]) -> str:
    """The missing cells and what they cost."""
    costs = passes(args, missing, concepts)
    rates = [cell["seconds"] / cell["passes"] for cell in finished_cells(args) if cell.get("passes")]
    rate = mean(rates) if rates else POCKET_SECONDS if args.dataset == "pocket" else None
    lines = [cell_name(*cell) for cell in missing]
    lines += [f"{stage:9s} {count:12,d} passes of a picture through the U-Net"
              for stage, count in costs.items()]
    if rate is not None:
        total = sum(costs.values()) * rate
        source = "the rate of the cells that are there" if rates else "the rate of two CPU cores"
        lines.append(f"about {total / 3600:.1f} hours on one process at {source}" if total > 5400 else
                     f"about {total / 60:.0f} minutes on one process at {source}")
    elif missing:
        lines.append("how long that takes, the first cells will tell: run a few, then --dry_run again")
    return "\n".join(lines)


# --- The table

def finished_cells(args) -> list[dict]:
    """What the files of all cells hold, whichever table or preset they are of."""
    return [json.loads(path.read_text()) for path in sorted((args.output_dir / "cells").glob("*.json"))]


def read_cells(args) -> list[dict]:
    """All finished cells of the table, or of the preset, also those of earlier runs.

    A preset shares cells with the table: it takes those of its data, and of the concepts and seeds that its
    own variants have been trained on.
    """
    cells = [cell for cell in finished_cells(args) if cell["defence"] in columns(args)]
    if args.preset:
        own = {(cell["concept"], cell["seed"]) for cell in cells if cell["defence"] not in DEFENCES}
        cells = [cell for cell in cells if cell["data"] in args.data
                 and (cell["concept"], cell["seed"]) in own]
    return cells


def columns(args) -> list[str]:
    """The defences of the table, or of the preset, in their order."""
    return list(PRESETS[args.preset][1] if args.preset else DEFENCES)


def statistics(cells: list[dict], metric: str) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    """Mean, standard error and number of cells by data and defence.

    Seeds are averaged within a concept first; the error is over concepts, or over seeds of the only one.
    """
    values = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if metric in cell["metrics"]:
            values[cell["data"], cell["defence"]][cell["concept"]].append(cell["metrics"][metric])
    result = {}
    for key, concepts in values.items():
        samples = [mean(v) for v in concepts.values()] if len(concepts) > 1 else next(iter(concepts.values()))
        error = stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else None
        result[key] = mean(samples), error, sum(map(len, concepts.values()))
    return result


def poison_average(cells: list[dict], defences: list[str],
                   metric: str) -> dict[str, tuple[float, float | None]]:
    """Mean over the poisons that are there, by defence, and its standard error over concepts if there are
    several; only for defences that every such poison was met with."""
    there = [poison for poison in POISONS if any(cell["data"] == poison for cell in cells)]
    result = {}
    for defence in defences:
        own = [cell for cell in cells if cell["defence"] == defence and cell["data"] in there]
        if len(there) < 2 or {cell["data"] for cell in own} != set(there):
            continue
        value, error, _ = statistics([{**cell, "data": "all"} for cell in own], metric)["all", defence]
        result[defence] = value, error if len({cell["concept"] for cell in own}) > 1 else None
    return result


def recovered(defended: float, nominal: float, clean: float) -> float | None:
    """Share of what a poison took that a defence gives back; None where it took less than 0.05."""
    return (defended - nominal) / (clean - nominal) if clean - nominal > 0.05 else None


def table(cells: list[dict], metric: str = "dino", order: list[str] = tuple(VARIANTS)) -> str:
    """Means over concepts and seeds with standard errors, the average over poisons,
    and for similarity the recovered share, Markdown."""
    means = statistics(cells, metric)
    defences = [name for name in order if any(key[1] == name for key in means)]
    data = [name for name in DATA if any(key[0] == name for key in means)]
    average = poison_average(cells, defences, metric)

    def line(name: str, values: list[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def shown(value, error=None) -> str:
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")

    lines = [line("data", defences), "| --- |" + " --- |" * len(defences)]
    for name in data:
        lines.append(line(name, [shown(*means[name, d][:2]) if (name, d) in means else "" for d in defences]))
    if average:
        lines.append(line("poisons' mean", [shown(*average[d]) if d in average else "" for d in defences]))
    if metric == "dino" and ("clean", "nominal") in means:
        rows = {name: {d: means[name, d][0] for d in defences if (name, d) in means}
                for name in data if name != "clean"}
        if average:
            rows["poisons' mean"] = {d: value[0] for d, value in average.items()}
        for name, row in rows.items():
            if "nominal" in row and len(row) > 1:
                shares = {d: recovered(value, row["nominal"], means["clean", "nominal"][0])
                          for d, value in row.items() if d != "nominal"}
                lines.append(line(f"{name}: recovered", [
                    f"{shares[d]:.0%}" if shares.get(d) is not None else "" for d in defences]))
    return "\n".join(lines) + "\n"


def write_results(args) -> str:
    """CSV, Markdown and picture of the finished cells; returns the table of similarity."""
    from szt_utils.plots import score_sweep, score_table

    cells, stem = read_cells(args), args.output_dir / (args.preset or "table1")
    metrics = [name for name in METRICS if any(name in cell["metrics"] for cell in cells)]
    rows, text = [["metric", "data", "defence", "mean", "standard_error", "cells"]], ""
    for metric in metrics:
        values = statistics(cells, metric)
        rows += [[metric, data, defence, *("" if x is None else x for x in values[data, defence])]
                 for data, defence in itertools.product(DATA, columns(args)) if (data, defence) in values]
        text += f"## {metric}\n\n{table(cells, metric, columns(args))}\n"
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    write_bytes(stem.with_suffix(".csv"), written.getvalue().encode())
    count = len({(cell["concept"], cell["seed"]) for cell in cells})
    foot = (f"{len(cells)} cells, at most {count} a place; ± is the standard error over concepts. FID, KID "
            "and FD-DINOv2 of so few pictures serve for comparison within this table only.\n")
    write_bytes(stem.with_suffix(".md"), (text + foot).encode())
    if not metrics or metrics[0] != "dino":
        return text
    values = statistics(cells, "dino")
    data = [name for name in DATA if any(key[0] == name for key in values)]
    defences = [name for name in columns(args) if any(key[1] == name for key in values)]
    means, errors = ([[values[d, v][i] if (d, v) in values else None for v in defences] for d in data]
                     for i in (0, 1))
    if args.preset:
        score_sweep(stem.with_suffix(".png"), defences, dict(zip(data, means, strict=True)),
                    dict(zip(data, errors, strict=True)), args.preset, "similarity to the clean concept")
    else:
        score_table(stem.with_suffix(".png"), data, defences, means, errors,
                    "similarity to the clean concept")
    return table(cells, order=columns(args))


def write_sheet(args, concept: str) -> None:
    """One generated picture of each cell of a concept: a row per data set, a column per defence."""
    from szt_utils.images import contact_sheet, list_images, read_image, save_png

    scores = {(c["data"], c["defence"]): c["metrics"] for c in read_cells(args)
              if c["concept"] == concept and c["seed"] == args.seeds[0]}
    rows = [(f"{concept}: the clean pictures",
             [read_image(path) for path in list_images(args.output_dir / "data" / concept / "clean")])]
    for data in DATA:
        pictures, caption = [], f"{data}:"
        for defence in columns(args):
            cell = cell_name(data, defence, concept, args.seeds[0])
            path = args.output_dir / "generated" / cell / "000.png"
            if (data, defence) in scores and path.exists():
                pictures.append(read_image(path))
                caption += f"   {defence} {scores[data, defence].get('dino', float('nan')):.2f}"
        if pictures:
            rows.append((caption, pictures))
    name = f"{args.preset}-{concept}" if args.preset else concept
    save_png(contact_sheet(rows), args.output_dir / "sheets" / f"{name}.png")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        run(args)


def run(args) -> None:
    folder, concepts = args.output_dir / "cells", find_concepts(args)
    if args.dataset != "pocket" and "pdmpure" in args.defences and not args.pdmpure_model:
        raise InputError("pdmpure needs --pdmpure_model, a model of pixels; or name the other --defences.")
    if args.dataset != "pocket" and needs_masks(args) and not args.mask_dir:
        raise InputError("The defences with masks need --mask_dir; or name the other --defences.")
    cells = [(data, defence, concept, seed) for seed, concept, data, defence in itertools.product(
        args.seeds, concepts, args.data, args.defences)]
    missing = [cell for cell in cells if not (folder / f"{cell_name(*cell)}.json").exists()]
    print(f"{len(cells)} cells, {len(missing)} of them to do.")
    if args.dry_run:
        print(plan(args, missing, concepts))
        return
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Seeds of a concept share its poisoned pictures: concepts are what processes can do apart.
    for concept in list(concepts.values())[rank::processes]:
        of_concept = [cell for cell in missing if cell[2] == concept.name]
        if of_concept:
            do_concept(args, concept, of_concept, concepts)
        if (args.output_dir / "data" / concept.name).exists():  # cells may have come without the pictures
            write_sheet(args, concept.name)
    print(write_results(args))


def do_concept(args, concept: Concept, cells: list[tuple], concepts: dict[str, Concept]) -> None:
    """Train and score a concept's missing cells, and write their files."""
    start, home = time.perf_counter(), args.output_dir / "data" / concept.name
    prepare(args, concept, home)
    train(args, concept, home, cells)
    shared = (time.perf_counter() - start) / len(cells)
    share = sum(passes(args, cells, concepts).values()) / len(cells)
    for i, cell in enumerate(cells, 1):
        start = time.perf_counter()
        metrics = score(args, concept, home, cell)
        record = dict(zip(("data", "defence", "concept", "seed"), cell, strict=True), metrics=metrics)
        record |= {name: getattr(args, name) for name in SETTINGS["pocket"]}
        record |= {"dataset": args.dataset, "model": Path(args.pretrained_model_name_or_path).name,
                   "seconds": round(shared + time.perf_counter() - start, 2), "passes": round(share),
                   **provenance()}
        write_json(args.output_dir / "cells" / f"{cell_name(*cell)}.json", record)
        print(f"{i}/{len(cells)} {', '.join(map(str, cell))}: "
              + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)


if __name__ == "__main__":
    main()
