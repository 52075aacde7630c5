"""The plan of a table of poisons and defences: its cells, what they are made with, and what they cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from szt_utils.datasets import DatasetConcept
from szt_utils.fingerprint import identity
from szt_utils.metrics import Networks
from szt_utils.poisoning import PoisonSettings
from szt_utils.tables import Cell, read_cells, settings_key

__all__ = ["POCKET_SECONDS", "CellSettings", "Flags", "Table", "passes", "plan"]

Flags = dict[str, Any]  # by their names without dashes

# Cost in forward passes of one image through the U-Net; a backward pass counts as two.
POISON_PASSES = {"adm+": 3, "adm-": 3, "sds+": 2, "sds-": 2, "ea": 1, "da": 24}
PURIFY_PASSES = {"regen": 6, "pdmpure": 6, "advclean": 4}
POCKET_SECONDS = 0.015  # of one pass on two cores, by the quickstart; the rate of earlier cells replaces it
IMAGES = 5  # of a concept, as a rule
# What decides each stage and those after it, but not those before it.
OF_TRAINING = ("method", "steps", "train_batch_size", "learning_rate", "initializer_token")
OF_GENERATION = ("images_per_prompt", "num_inference_steps", "guidance_scale", "prompts")
OF_SCORES = ("dino", "clip", "inception")


@dataclass(frozen=True)
class CellSettings:
    """How the embedding of a cell is trained, and how images are generated with it."""

    resolution: int
    steps: int
    train_batch_size: int
    learning_rate: float
    images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Table:
    """A table: its rows of data and columns of defences, the cells to make, and what they are made with.

    A row holds flags of poison_images.py, or none for the clean images. A column and a defence hold flags of
    the training, and two entries that are not: "purify", flags of purify_images.py, and "dilation", the
    mask_dilation at a resolution of 512. A loss_mask_dir is a folder in the concept's own folder.
    """

    output_dir: Path
    name: str  # of its files
    rows: Mapping[str, Flags]
    columns: Mapping[str, Flags]
    swept: Sequence[str]  # the columns that only an ablation has; none in the main table
    data: Sequence[str]  # rows to make
    defences: Mapping[str, Flags]  # columns to make, perhaps of another table
    dataset: str
    settings: CellSettings
    metrics: Sequence[str]
    model: str
    pdmpure_model: str | None
    upscaler: str | None
    networks: Networks
    mixed_precision: str = "no"
    given: Flags = field(default_factory=dict)  # what else decides the cells, where it is not the default
    learned_file: str = "learned_embeds.safetensors"  # of every cell's training

    @property
    def record(self) -> Flags:
        """What decides the cells, as run.json holds it; models by their `identity`."""
        models = {"model": self.model, "pdmpure_model": self.pdmpure_model, "upscaler": self.upscaler,
                  **asdict(self.networks)}
        return {**asdict(self.settings), "dataset": self.dataset, "mixed_precision": self.mixed_precision,
                **{name: identity(path) for name, path in models.items() if path}, **self.given}

    def key(self, *without: str) -> str:
        """The `settings_key` of the record, or of the part of it that decides an earlier stage."""
        return settings_key({name: value for name, value in self.record.items() if name not in without})

    @property
    def needs_masks(self) -> bool:
        """Whether a cell to make needs the concept's masks."""
        return any("loss_mask_dir" in flags
                   for flags in (*self.defences.values(), *(self.rows[data] for data in self.data)))

    @property
    def plain_poisons(self) -> list[str]:
        """The rows whose poison knows no defence."""
        return [name for name, flags in self.rows.items() if flags and "adaptive" not in flags]

    def cells(self) -> list[Cell]:
        """All finished cells of the table and its settings, also those of earlier runs.

        An ablation shares cells with the main table: it takes those of its data, and of the concepts and
        seeds that its own columns have been trained on.
        """
        cells = [cell for cell in self.finished() if cell.defence in self.columns]
        if not self.swept:
            return cells
        own = {(cell.concept, cell.seed) for cell in cells if cell.defence in self.swept}
        return [cell for cell in cells if cell.data in self.data and (cell.concept, cell.seed) in own]

    def finished(self) -> list[Cell]:
        """The finished cells of these settings; those of unknown settings count as well."""
        return read_cells(self.output_dir, self.key())

    def home(self, concept: str) -> Path:
        """The folder of a concept's images: clean, masks, and one for each poison and purifier."""
        key = self.key(*OF_TRAINING, *OF_GENERATION, *OF_SCORES)
        return self.output_dir / "data" / f"{concept}-{key}"

    def learned(self, cell: Cell) -> Path:
        """The file of what a cell's training learned."""
        name = f"{cell.name}-{self.key(*OF_GENERATION, *OF_SCORES)}"
        return self.output_dir / "learned" / name / self.learned_file

    def generated(self, cell: Cell) -> Path:
        """The folder of the images that are generated for a cell."""
        return self.output_dir / "generated" / f"{cell.name}-{self.key(*OF_SCORES)}"


def passes(table: Table, cells: Sequence[Cell], concepts: Mapping[str, DatasetConcept]) -> dict[str, int]:
    """Forward passes of one image through the U-Net that cells cost, by stage."""
    settings, total = table.settings, defaultdict(int)
    for data, _ in {(cell.data, cell.concept) for cell in cells}:
        if poison := table.rows[data]:
            attacks = 2 if "adaptive" in poison else 1  # the plain one is run beside an adaptive one
            total["poison"] += attacks * IMAGES * PoisonSettings.steps * POISON_PASSES[poison["method"]]
    for _, defence, _ in {(cell.data, cell.defence, cell.concept) for cell in cells}:
        purifier = table.defences[defence].get("purify", {}).get("method")
        total["purify"] += IMAGES * PURIFY_PASSES.get(purifier, 0)
    for cell in cells:
        total["train"] += settings.steps * settings.train_batch_size * 3
        total["generate"] += (len(concepts[cell.concept].prompts) * settings.images_per_prompt * 2
                              * settings.num_inference_steps)
    return dict(total)


def plan(missing: Sequence[Cell], passes: dict[str, int], finished: Sequence[Cell],
         seconds: float | None) -> str:
    """The missing cells and their cost, `passes` of an image through the U-Net by stage.

    `seconds` of one pass are used until there are finished cells to measure it by; None is unknown.
    """
    rates = [cell.seconds / cell.passes for cell in finished if cell.passes]
    rate, source = (mean(rates), "the rate of the cells that are there") if rates else (
        seconds, "the rate of two CPU cores")
    lines = [cell.name for cell in missing]
    lines += [f"{stage:9s} {count:12,d} passes of an image through the U-Net"
              for stage, count in passes.items()]
    if rate is not None:
        total = sum(passes.values()) * rate
        time = f"{total / 3600:.1f} hours" if total > 5400 else f"{total / 60:.0f} minutes"
        lines.append(f"about {time} on one process at {source}")
    elif missing:
        lines.append("how long that takes is not known yet: run a few cells, then --dry_run again")
    return "\n".join(lines)
