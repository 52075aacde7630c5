r"""Poisons against defences (paper Table 1), and the ablations of Sec. 5.2.

    python examples/table1.py --output_dir table1 --concepts teal-striped-star red-dotted-heart
    python examples/table1.py --output_dir table1 --preset timesteps
    python examples/table1.py --output_dir table1 --dataset dreambooth --dataset_dir dataset \
        --mask_dir masks --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

Poisons each concept's images, purifies them, trains the embeddings of all its cells in one run, generates and
scores, as the scripts do. A cell is a line of cells/<concept>.jsonl; the same command again computes only
missing ones. Cells, embeddings and images made with other settings stay in the folder but are not used. Flags
that you leave out keep the values of the folder's last run. Started by `accelerate launch` or torchrun, every
process takes its share of the concepts. `--dry_run` lists what is missing and what it costs. The table of all
cells goes to table1.csv, .md and .png (or the preset's name), a sheet of images per concept to sheets/.

Data sets: `pocket` draws its concepts; `dreambooth` has one sub-folder of images per concept;
`customconcept101` has dataset.json beside them. Masks are in MASK_DIR/<concept>/<stem>.png.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from cells import make_table
from table_plan import CellSettings, Table

from szt_utils import pocket
from szt_utils.arguments import local_path, number, script_parser, seed, user_path
from szt_utils.captions import read_prompt_templates
from szt_utils.datasets import READERS, read_concepts
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.metrics import METRICS, Networks
from szt_utils.notices import notice
from szt_utils.tables import read_runs

MASKED = {"loss_mask_dir": "masks"}  # in the concept's folder
# The data: flags of poison_images.py.
POISONS = {name: {"method": name} for name in ("adm+", "adm-", "sds+", "sds-", "ea", "da")}
ADAPTIVE = {f"{name} szt": {"method": name, "adaptive": "szt", **MASKED} for name in ("adm+", "ea")}
DATA = {"clean": {}, **POISONS, **ADAPTIVE}
# The defences: flags of the training, and as "purify" those of purify_images.py.
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
    # What each part of SZT adds, and SZT with less or none of the noisiest timesteps.
    "parts": (["clean", "adm+"], {
        "nominal": {}, "jpeg+t500": {"jpeg_quality": 25, "t_min": 500},
        "t500+lm16": {"t_min": 500, **MASKED, "dilation": 16}, "szt": DEFENCES["szt"],
        "szt+snr": {**DEFENCES["szt"], "snr_gamma": 5},
        **{f"szt{t}": {**DEFENCES["szt"], "t_max": t} for t in (900, 800, 700)}}),
}
VARIANTS = {name: flags for variants in (DEFENCES, *(v for _, v in PRESETS.values()))
            for name, flags in variants.items()}
# What the paper trains with (Sec. 5.1.2), and what is enough in the pocket world.
SETTINGS = {
    "pocket": CellSettings(resolution=128, steps=400, train_batch_size=4, learning_rate=5e-3,
                           images_per_prompt=1, num_inference_steps=25, guidance_scale=5.0),
    "dreambooth": CellSettings(resolution=512, steps=5000, train_batch_size=1, learning_rate=5e-4,
                               images_per_prompt=5, num_inference_steps=25, guidance_scale=7.5),
}
SETTINGS["customconcept101"] = replace(SETTINGS["dreambooth"], steps=2500)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=local_path, default=Path("table1"))
    add("--dataset", choices=READERS, default="pocket")
    add("--dataset_dir", type=local_path, help="folder of a dreambooth or customconcept101 data set")
    add("--mask_dir", type=local_path,
        help="its masks, <concept>/<stem>.png, for lm, jpeg+lm, szt and adaptive poisons")
    for name, text in {
            "pretrained_model_name_or_path": "the model (pocket: the bundled one)",
            "pdmpure_model": "pixel-space model for pdmpure (pocket: the bundled one)",
            "upscaler": "its second stage, when it is DeepFloyd IF",
            "dino": "image encoder for the scores (pocket: the bundled one)",
            "clip": "CLIPModel for the scores (pocket: the bundled one)",
            "inception": "InceptionV3 weights for FID and KID (default: features of --clip)",
            "prompts_file": "prompts with {} (pocket: backgrounds; else the concept's or 24 built-in ones)",
            "initializer_token": "first word (object; customconcept101: the class word)"}.items():
        add(f"--{name}", help=text, type=str if name == "initializer_token" else user_path)
    add("--preset", choices=PRESETS, help="an ablation instead of the table")
    add("--data", nargs="+", choices=DATA,
        help="the rows: 'adm+ szt' and 'ea szt' are adaptive (clean and the six poisons)")
    add("--defences", nargs="+", choices=VARIANTS, metavar="NAME",
        help=f"the columns: some of {', '.join(DEFENCES)}, or of a preset (the ten; with --preset, its own)")
    add("--concepts", nargs="+", help="the concepts (all of the data set)")
    add("--seeds", nargs="+", type=seed, default=[0], help="seeds of the training (0)")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="the scores (all)")
    add("--max_train_steps", "--steps", dest="steps", metavar="N", type=number(int, 1),
        help="training steps of each embedding (400, dreambooth 5000, customconcept101 2500)")
    for name, value in asdict(SETTINGS["pocket"]).items():
        if name != "steps":
            lowest = {"resolution": 8, "learning_rate": 0, "guidance_scale": 0}.get(name, 1)
            add(f"--{name}", type=number(type(value), lowest))
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the training (no)")
    add("--dry_run", action="store_true", help="list the missing cells and their cost")
    args = parser.parse_args(argv)
    if args.dataset == "pocket":
        for name, path in (("pretrained_model_name_or_path", pocket.model_path), ("dino", pocket.dino_path),
                           ("clip", pocket.clip_path), ("pdmpure_model", pocket.pixel_path)):
            setattr(args, name, getattr(args, name) or path())
    else:
        for name in ("dataset_dir", "pretrained_model_name_or_path", "dino", "clip"):
            if not getattr(args, name):
                parser.error(f"argument --{name}: --dataset {args.dataset} needs it")
    return args


def read_settings(args: argparse.Namespace) -> Table:
    """The table of a command line; fills in what it leaves out."""
    take_from_last_run(args)
    data, columns = PRESETS[args.preset] if args.preset else (["clean", *POISONS], DEFENCES)
    given = {"initializer_token": args.initializer_token, "prompts": args.prompts}
    return Table(
        output_dir=args.output_dir, name=args.preset or "table1", rows=DATA,
        columns=columns | {name: VARIANTS[name] for name in args.defences or []},
        swept=[name for name in columns if name not in DEFENCES], data=args.data or data,
        defences={name: VARIANTS[name] for name in args.defences or columns}, dataset=args.dataset,
        settings=CellSettings(**{name: getattr(args, name) for name in asdict(SETTINGS[args.dataset])}),
        metrics=args.metrics, model=args.pretrained_model_name_or_path,
        pdmpure_model=args.pdmpure_model, upscaler=args.upscaler,
        networks=Networks(args.dino, args.clip, args.inception), mixed_precision=args.mixed_precision,
        given={name: value for name, value in given.items() if value})


def take_from_last_run(args: argparse.Namespace) -> None:
    """Give settings that the command line leaves out the values of the folder's last run with the data set,
    so that a table goes on as it was begun; else the data set's own."""
    args.prompts = read_prompt_templates(args.prompts_file) if args.prompts_file else None
    runs = [run for run in read_runs(args.output_dir) if run.get("dataset") == args.dataset]
    own = {**asdict(SETTINGS[args.dataset]), "mixed_precision": "no", "initializer_token": None,
           "prompts": None}
    last, taken = (runs or [{}])[-1], {}
    for name, value in own.items():
        if getattr(args, name) is None:
            kind = {"initializer_token": str, "prompts": list}.get(name, type(value))
            setattr(args, name, last[name] if isinstance(last.get(name), kind) else value)
            if getattr(args, name) != value:
                taken[name] = getattr(args, name)
    if taken:
        flags = ", ".join("other prompts" if name == "prompts" else f"--{name} {value}"
                          for name, value in taken.items())
        notice(f"'{args.output_dir}' was made with {flags}; flags that you leave out keep these values.")


def main(argv: list[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
        table = read_settings(args)
        concepts = read_concepts(args.dataset, args.dataset_dir, args.mask_dir, names=args.concepts,
                                 initializer=args.initializer_token, prompts=args.prompts)
        if "pdmpure" in table.defences and not table.pdmpure_model:
            raise InputError("pdmpure needs --pdmpure_model, a pixel-space model; "
                             "or name the other --defences.")
        if args.dataset != "pocket" and table.needs_masks and not args.mask_dir:
            raise InputError("The defences with masks need --mask_dir; or name the other --defences.")
        make_table(table, concepts, args.seeds, args.dry_run)


if __name__ == "__main__":
    main()
