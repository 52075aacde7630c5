"""Safe-Zone Training for other methods (paper Appendix P): LoRA, DreamBooth and Custom Diffusion.

    python examples/methods.py --method lora --output_dir methods
    python examples/methods.py --method lora --preset drift --output_dir methods

Like table1.py, on the pocket world: poisons the images of five concepts, trains the method with each defence,
generates and scores. The same command computes only missing cells; methods of one folder share its poisoned
images, and `--method textual_inversion` is the training script. The table goes to METHOD.csv, .md and .png.

DreamBooth trains the whole U-Net, Custom Diffusion the keys and values of its cross-attention and a token;
both add as many images of the class, which get all timesteps and no mask. `low_t` and `high_t` are the
denoising losses of held-out scenes below and above the timestep 500, divided by those before the training.
`--preset drift` compares what keeps low timesteps as they were. LoRA needs peft: pip install peft.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cells import Score, Train, make_table, score_token, training_entries
from PIL import Image
from safetensors.torch import load_file, save_file
from table_plan import CellSettings, Flags, Table

from szt_utils import pocket
from szt_utils.arguments import local_path, number, script_parser, seed
from szt_utils.datasets import DatasetConcept, read_concepts
from szt_utils.devices import best_device
from szt_utils.embeddings import NewRows, add_placeholder, train_rows
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.files import atomic_path
from szt_utils.generation import use_dpm_solver
from szt_utils.images import from_pil, list_images
from szt_utils.metrics import Networks
from szt_utils.models import Model, expand, load_model, residual, tokenize
from szt_utils.pocket.scenes import attributes_of, draw_scene
from szt_utils.safe_zone import PAPER_T_MIN
from szt_utils.settings import ConceptSettings
from szt_utils.tables import Cell

CONCEPTS = list(pocket.NOVEL_CONCEPTS)[:5]
MASKED = {"loss_mask_dir": "masks"}  # in the concept's folder
DATA = {"clean": {}, **{name: {"method": name} for name in ("adm+", "sds+", "ea")}}
DEFENCES = {
    "nominal": {},
    "jpeg+t": {"jpeg_quality": 25, "t_min": PAPER_T_MIN},
    "lm": {**MASKED, "mask_dilation": 0},
    "jpeg+lm": {"jpeg_quality": 25, **MASKED, "mask_dilation": 0},
    "szt": {"szt": True, **MASKED},
}
# SZT, and what could keep the weights that all timesteps share from drifting at the low ones. "prior" and
# "above" are flags of this script: class images at all timesteps, and a LoRA that is off below t_min.
DRIFT = {
    "nominal": DEFENCES["nominal"],
    "szt": DEFENCES["szt"],
    "szt+prior": {**DEFENCES["szt"], "prior": True},
    "szt tanh": {**DEFENCES["szt"], "t_min": 0, "t_distribution": "tanh", "t_center": 500.0},
    "szt above": {**DEFENCES["szt"], "above": True},
}
CLASS_SEED, CLASS_IMAGES = 14_000_000, 40  # of drawn scenes
HELD_OUT_SEED, HELD_OUT_IMAGES = 15_000_000, 20
CLASS_PROMPT = "a photo of a object"


@dataclass(frozen=True)
class Method:
    """What a method trains: parameters of the network, and perhaps a token; `token` is in its prompts."""

    token: str
    prepare: Callable[[torch.nn.Module], None]  # adds adapters, makes parameters trainable
    steps: int
    learning_rate: float
    batch_size: int
    prior: bool = False  # as many images of the class in every batch
    placeholder: str | None = None  # a new token, trained as well


def prepare_lora(network: torch.nn.Module) -> None:
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian",
                                   target_modules=["to_k", "to_q", "to_v", "to_out.0"]))


def prepare_cross_attention(network: torch.nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            parameter.requires_grad_(True)


METHODS = {
    "lora": Method("sks object", prepare_lora, steps=100, learning_rate=1e-3, batch_size=4),
    "dreambooth": Method("sks object", lambda network: network.requires_grad_(True), steps=60,
                         learning_rate=3e-4, batch_size=2, prior=True),
    "custom_diffusion": Method("<new1> object", prepare_cross_attention, steps=100, learning_rate=2e-3,
                               batch_size=2, prior=True, placeholder="<new1>"),
}


class Trained:
    """The pocket model with what a method trains, from its files or to be trained.

    The seed decides how a LoRA starts.
    """

    def __init__(self, method: Method, path: str, seed: int = 0):
        self.method, self.rows = method, None
        self.model: Model = load_model(path, device=best_device())
        torch.manual_seed(seed)
        method.prepare(self.model.network)
        if method.placeholder:
            tokenizer, encoder = self.model.tokenizers[0], self.model.text_encoders[0]
            add_placeholder(tokenizer, encoder, method.placeholder, "object")
            self.rows: NewRows = train_rows(encoder, 1)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All trainable parameters by name."""
        named = {name: each for name, each in self.model.network.named_parameters() if each.requires_grad}
        return named if self.rows is None else {**named, "token": self.rows.rows}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: each.detach().cpu() for name, each in self.parameters.items()}, temporary)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        parameters = self.parameters
        for name, tensor in load_file(path).items():
            parameters[name].copy_(tensor)

    def pipeline(self, off_below: int | None = None) -> Any:
        """The pipeline, with an adapter that is off below a timestep, if one is given."""
        if self.rows is not None:
            weight = self.rows.weight.detach()
            self.model.text_encoders[0].set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
        pipeline = self.model.pipeline()
        use_dpm_solver(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        if off_below is not None:
            def switch(network: torch.nn.Module, arguments: tuple) -> None:
                (network.enable_adapters if arguments[1] >= off_below else network.disable_adapters)()
            pipeline.unet.register_forward_pre_hook(switch)
        return pipeline


def drawn(first_seed: int, count: int) -> torch.Tensor:
    """Scenes of the class, none of them a novel concept, (count, 3, 128, 128) in [0, 1]."""
    scenes = [draw_scene(seed, attributes_of(seed)) for seed in range(first_seed, first_seed + count)]
    return torch.cat([from_pil(Image.fromarray(scene.image)) for scene in scenes])


@torch.no_grad()
def encoded(model: Model, images: torch.Tensor) -> torch.Tensor:
    """Latents of images and of their mirror images."""
    return model.encode(torch.cat([images, images.flip(-1)]).to(model.device))


def train_one(trained: Trained, settings: CellSettings, entry: Flags) -> None:
    """Train a method on the images of an entry, in the zone of its flags."""
    model, method = trained.model, trained.method
    flags = ConceptSettings.from_flags({"placeholder_token": method.token, "initializer_token": "", **entry})
    zone, masks = flags.make_zone(settings.resolution, model), flags.loss_mask_dir
    prior = bool(method.prior or entry.get("prior"))
    images, masks = zip(*(zone.open(path, settings.resolution, masks)
                          for path in list_images(entry["train_data_dir"])), strict=True)
    latents = encoded(model, torch.cat([from_pil(image) for image in images]))
    masks = torch.stack(masks)
    masks = torch.cat([masks, masks.flip(-1)]).to(model.device)
    of_class = encoded(model, drawn(CLASS_SEED, CLASS_IMAGES)) if prior else None
    prompts = [f"a photo of a {method.token}"] + [CLASS_PROMPT] * prior
    ids = tokenize(model, prompts)
    optimizer = torch.optim.AdamW(trained.parameters.values(), settings.learning_rate)
    torch.manual_seed(entry["seed"])
    for _ in range(settings.steps):
        own = torch.randint(len(latents), (settings.train_batch_size,))
        z0 = latents[own]
        if prior:
            z0 = torch.cat([z0, of_class[torch.randint(len(of_class), (len(own),))]])
        noise = torch.randn_like(z0)
        timesteps = zone.timesteps(model.scheduler, len(z0), prior_preservation=prior, device=z0.device)
        condition = {kind: states.repeat_interleave(len(own), 0)
                     for kind, states in model.condition(ids).items()}
        prediction = model.predict(model.noised(z0, noise, timesteps), timesteps, condition)
        loss = zone.loss(prediction, model.target(z0, noise, timesteps), masks[own],
                         prior_preservation=prior)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def class_losses(model: Model) -> tuple[float, float]:
    """Denoising losses of held-out scenes by the prompt of their class: at timesteps below 500, and above."""
    z0 = model.encode(drawn(HELD_OUT_SEED, HELD_OUT_IMAGES).to(model.device))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z0.shape, generator=generator).to(z0)
    condition = expand(model.condition(tokenize(model, CLASS_PROMPT)), len(z0))
    halves = []
    for low in (0, PAPER_T_MIN):
        timesteps = low + torch.arange(len(z0), device=z0.device) * (PAPER_T_MIN // len(z0))
        halves.append(residual(model, z0, noise, timesteps, condition).square().mean().item())
    return halves[0], halves[1]


@functools.cache
def untrained_losses(path: str) -> tuple[float, float]:
    return class_losses(load_model(path, device=best_device()))


def trainer(name: str) -> Train:
    """Trains the cells of a concept with a method, one after the other."""
    def train_cells(table: Table, concept: DatasetConcept, cells: Sequence[Cell]) -> None:
        entries, failures = training_entries(table, table.home(concept.name), cells)
        for entry in entries:
            trained = Trained(METHODS[name], table.model, entry["seed"])
            train_one(trained, table.settings, entry)
            trained.save(Path(entry["output_dir"]) / table.learned_file)
        if failures:
            raise InputError(" ".join(failures))
    return train_cells


def scorer(name: str) -> Score:
    """Scores a cell of a method: the images' metrics, and how the losses of the class have changed."""
    def score_cell(table: Table, concept: DatasetConcept, cell: Cell) -> dict[str, float]:
        trained = Trained(METHODS[name], table.model)
        before = untrained_losses(table.model)
        trained.load(table.learned(cell))
        after = class_losses(trained.model)
        above = table.defences[cell.defence].get("above")
        pipeline = trained.pipeline(PAPER_T_MIN if above else None)
        metrics = score_token(table, concept, cell, pipeline, METHODS[name].token)
        return metrics | {half: new / old for half, new, old in zip(("low_t", "high_t"), after, before,
                                                                    strict=True)}
    return score_cell


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--method", choices=["textual_inversion", *METHODS], required=True)
    add("--output_dir", type=local_path, default=Path("methods"))
    add("--preset", choices=["drift"], help="what keeps low timesteps as they were, for LoRA")
    add("--data", nargs="+", choices=DATA, help="(all; with --preset, clean and adm+)")
    add("--defences", nargs="+", choices=[*DEFENCES, *(name for name in DRIFT if name not in DEFENCES)],
        metavar="NAME", help=f"some of {', '.join(DEFENCES)}, or of the preset (all)")
    add("--concepts", nargs="+", choices=pocket.NOVEL_CONCEPTS, default=CONCEPTS, metavar="NAME",
        help="(five of the ten)")
    add("--seeds", nargs="+", type=seed, default=[0])
    add("--steps", type=number(int, 1), help="of each training (LoRA, Custom Diffusion 100, DreamBooth 60, "
                                             "textual inversion 200)")
    add("--dry_run", action="store_true", help="list the missing cells and their cost")
    args = parser.parse_args(argv)
    if args.preset and args.method != "lora":
        parser.error("argument --preset: is for --method lora")
    return args


def read_table(args: argparse.Namespace) -> Table:
    """The table of a command line."""
    columns = DRIFT if args.preset else DEFENCES
    settings = CellSettings(resolution=128, steps=200, train_batch_size=4, learning_rate=5e-3,
                            images_per_prompt=1, num_inference_steps=25, guidance_scale=5.0)
    if args.method in METHODS:
        method = METHODS[args.method]
        settings = replace(settings, steps=method.steps, learning_rate=method.learning_rate,
                           train_batch_size=method.batch_size)
    if args.steps:
        settings = replace(settings, steps=args.steps)
    inversion = args.method == "textual_inversion"
    return Table(
        output_dir=args.output_dir, name=f"{args.method}-{args.preset}" if args.preset else args.method,
        rows=DATA, columns=columns, swept=[name for name in columns if name not in DEFENCES],
        data=args.data or (["clean", "adm+"] if args.preset else list(DATA)),
        defences={name: {**DEFENCES, **DRIFT}[name] for name in args.defences or columns}, dataset="pocket",
        settings=settings, metrics=("dino", "attributes"), model=pocket.model_path(), pdmpure_model=None,
        upscaler=None, networks=Networks(pocket.dino_path(), pocket.clip_path()),
        given={} if inversion else {"method": args.method},
        learned_file="learned_embeds.safetensors" if inversion else "weights.safetensors")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_input_error():
        if args.method == "lora" and not importlib.util.find_spec("peft"):
            raise InputError("LoRA needs peft: pip install peft.")
        concepts = read_concepts("pocket", names=args.concepts)
        make = {} if args.method == "textual_inversion" else {
            "train": trainer(args.method), "score": scorer(args.method)}
        make_table(read_table(args), concepts, args.seeds, args.dry_run, **make)


if __name__ == "__main__":
    main()
