"""The cells of a table: each poisons and purifies a concept's images, learns them, generates and scores.

`data/<concept>` holds the images, `learned/<cell>` the embeddings, `generated/<cell>` what they generate, and
`cells/<concept>.jsonl` the scores. Only what is missing is made.
"""

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from table_plan import POCKET_SECONDS, Flags, Table, passes, plan

from szt_utils.arguments import command_line
from szt_utils.datasets import DatasetConcept, write_images
from szt_utils.devices import best_device, dtype_of
from szt_utils.embeddings import load_into
from szt_utils.errors import InputError
from szt_utils.evaluation import evaluate_token
from szt_utils.files import atomic_path, write_json
from szt_utils.folder_run import provenance
from szt_utils.generation import load_pipeline
from szt_utils.images import contact_sheet, list_images, read_image
from szt_utils.metrics import SCORES, SET_METRICS
from szt_utils.notices import notice
from szt_utils.poisoning import PoisonSettings, poison_folder
from szt_utils.purifying import PurifySettings, purify_folder
from szt_utils.tables import OF_PURIFIER, Cell, append_cell, read_cells, read_runs, run_index, write_table

__all__ = ["Score", "Train", "make_cells", "make_table", "score", "score_token", "train", "training_entries"]

TRAINING = Path(__file__).resolve().parent.parent / "textual_inversion_szt.py"
BATCH_SIZE = 5  # images poisoned or purified together

# How a method trains the missing cells of a concept, and how it scores one.
Train = Callable[[Table, DatasetConcept, Sequence[Cell]], None]
Score = Callable[[Table, DatasetConcept, Cell], dict[str, float]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the block prints, and print it to stderr when the block fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except BaseException as error:
        if not isinstance(error, InputError | OSError):  # their messages say it all
            print(printed.getvalue(), file=sys.stderr)
        raise
    finally:  # the training is another process: leave it the GPU's memory
        gc.collect()
        torch.cuda.empty_cache()


def image_folder(home: Path, data: str) -> Path:
    """The folder of a concept's images with this data, before any purifier."""
    return home / data.replace(" ", "-")


def poison(table: Table, home: Path, data: str) -> Path:
    """The folder of a concept's images with a poison; poisons the images that are missing."""
    images = image_folder(home, data)
    if table.rows[data]:
        with quiet():
            poison_folder(PoisonSettings(
                table.model, str(home / "clean"), resolution=table.settings.resolution, batch_size=BATCH_SIZE,
                mixed_precision=table.mixed_precision, **with_masks(table.rows[data], home)), images)
    return images


def purify(table: Table, home: Path, images: Path, defence: str) -> Path:
    """The folder of images after a defence's purifier, if it has one; purifies those that are missing."""
    if "purify" not in table.defences[defence]:
        return images
    flags = table.defences[defence]["purify"]
    models = {"regen": (table.model, None), "pdmpure": (table.pdmpure_model, table.upscaler)}
    if flags["method"] in models:
        model, upscaler = models[flags["method"]]
        flags = {**flags, "pretrained_model_name_or_path": model, "upscaler": upscaler,
                 "mixed_precision": table.mixed_precision, "batch_size": BATCH_SIZE}
    output = home / f"{images.name}-{defence}"
    with quiet():
        purify_folder(PurifySettings(str(images), **flags), output)
    return output


def with_masks(flags: Flags, home: Path) -> Flags:
    """Flags whose loss_mask_dir, if there is one, is that of a concept."""
    return {name: str(home / value) if name == "loss_mask_dir" else value for name, value in flags.items()}


def training_flags(table: Table, home: Path, defence: str) -> Flags:
    """The flags of a defence that the training has."""
    flags = with_masks(table.defences[defence], home)
    flags.pop("purify", None)
    if "dilation" in flags:
        flags["mask_dilation"] = round(flags.pop("dilation") * table.settings.resolution / 512)
    return flags


def training_entries(table: Table, home: Path, cells: Sequence[Cell]) -> tuple[list[Flags], list[str]]:
    """The entries of --concepts for the cells to train, and a sentence for each poison and purifier that
    failed; poisons and purifies the cells' images."""
    failures = []

    @functools.cache
    def poisoned(data: str) -> Path | None:
        try:
            return poison(table, home, data)
        except InputError as error:
            failures.append(f"{data}: {error}")

    @functools.cache
    def purified(data: str, defence: str) -> Path | None:
        try:
            return (images := poisoned(data)) and purify(table, home, images, defence)
        except InputError as error:
            failures.append(f"{data}, {defence}: {error}")

    missing = [cell for cell in cells if not table.learned(cell).exists()]
    return [{"train_data_dir": str(images), "output_dir": str(table.learned(cell).parent), "seed": cell.seed,
             **training_flags(table, home, cell.defence)}
            for cell in missing if (images := purified(cell.data, cell.defence))], failures


def train(table: Table, concept: DatasetConcept, cells: Sequence[Cell]) -> None:
    """Train the missing embeddings of a concept's cells in one run; each is one of its --concepts.

    InputError when any of them fails; the others are trained.
    """
    settings, home = table.settings, table.home(concept.name)
    entries, failures = training_entries(table, home, cells)
    if entries:
        write_json(home / "concepts.json", entries)
        try:
            train_apart(pretrained_model_name_or_path=table.model, output_dir=home / "training",
                        concepts=home / "concepts.json", placeholder_token="<concept>",
                        initializer_token=concept.initializer, resolution=settings.resolution,
                        learning_rate=settings.learning_rate, train_batch_size=settings.train_batch_size,
                        max_train_steps=settings.steps, checkpointing_steps=max(100, settings.steps // 5),
                        checkpoints_total_limit=1, resume_from_checkpoint="latest",
                        mixed_precision=table.mixed_precision)
        except InputError as error:
            failures.append(str(error))
    if failures:
        raise InputError(" ".join(failures))


def train_apart(**flags: object) -> None:
    """Run the training in a process of its own, on the GPU of this one.

    InputError with its message when it reports an error; SystemExit with the command and what it printed,
    when it ends otherwise.
    """
    # A child that saw the launcher's variables would wait for the other processes.
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    if "LOCAL_RANK" in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        rank = int(os.environ["LOCAL_RANK"])
        if visible == [""]:
            visible = [str(i) for i in range(max(1, torch.cuda.device_count()))]
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)]
    command = [sys.executable, str(TRAINING), *command_line(**flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 1 and (found := re.findall(r"^error: (.+)", done.stderr, re.M)):
        raise InputError(found[-1])
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def score(table: Table, concept: DatasetConcept, cell: Cell) -> dict[str, float]:
    """Generate with a cell's embedding and compare with the clean images."""
    pipeline = load_pipeline(table.model, device=best_device(), dtype=dtype_of(table.mixed_precision))
    return score_token(table, concept, cell, pipeline, load_into(pipeline, table.learned(cell)))


def score_token(table: Table, concept: DatasetConcept, cell: Cell, pipeline: Any,
                token: str) -> dict[str, float]:
    """Generate with the token of a cell's pipeline and compare with the clean images."""
    settings = table.settings
    clean = [read_image(path) for path in list_images(table.home(concept.name) / "clean")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FID and FD-DINOv2 rest")  # the table's foot says it once
        _, metrics = evaluate_token(
            pipeline, token, clean, concept.prompts, table.networks, class_word=concept.class_word,
            images_per_prompt=settings.images_per_prompt, metrics=table.metrics,
            folder=table.generated(cell), steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale)
    return metrics


def make_cells(table: Table, concept: DatasetConcept, cells: Sequence[Cell], train: Train = train,
               score: Score = score) -> list[str]:
    """Train and score a concept's missing cells, and add them to its file; returns what failed, a sentence
    each. InputError when no cell of the concept can be trained."""
    start, home, failures = time.perf_counter(), table.home(concept.name), []
    finished = table.finished()
    run = run_index(table.output_dir, {**table.record, **provenance()})
    write_images(concept, home / "clean", home / "masks" if table.needs_masks else None,
                 table.settings.resolution, concept.prompts)
    try:
        train(table, concept, cells)
    except InputError as error:  # of one of several cells, perhaps
        if not any(table.learned(cell).exists() for cell in (*cells, *finished)
                   if cell.concept == concept.name):
            raise
        failures.append(str(error))
    is_told = bool(failures)  # why an embedding is missing
    hashes = {data: hash_images(image_folder(home, data)) for data in {cell.data for cell in cells}}
    shared = (time.perf_counter() - start) / len(cells)
    share = sum(passes(table, cells, {concept.name: concept}).values()) / len(cells)
    for i, cell in enumerate(cells, 1):
        start = time.perf_counter()
        if not table.learned(cell).exists():
            if not is_told:
                failures.append(f"{cell.name}: its training left no '{table.learned_file}'.")
            continue
        try:
            metrics = score(table, concept, cell)
        except InputError as error:
            failures.append(f"{cell.name}: {error}")
            continue
        if old := next((old for old in finished if old == cell), None):
            made = replace(old, metrics={**old.metrics, **metrics})
        else:
            seconds = round(shared + time.perf_counter() - start, 2)
            made = replace(cell, metrics=metrics, seconds=seconds, passes=round(share), run=run,
                           images=hashes[cell.data])
        append_cell(table.output_dir, made, instead_of=old)
        print(f"{i}/{len(cells)} {cell.data}, {cell.defence}, {cell.concept}, {cell.seed}: "
              + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True)
    return failures


def _scores_of(table: Table, concept: DatasetConcept) -> set[str]:
    """The scores that each cell of a concept has: a finished one that lacks some is scored again.

    Attributes are the pocket world's, and sets of fewer than two images have no score of their own.
    """
    count = len(concept.prompts) * table.settings.images_per_prompt
    if concept.image_dir is not None:
        count = min(count, len(list_images(concept.image_dir)))
    return {name for name in table.metrics if name != "attributes" and (count > 1 or name not in SET_METRICS)}


def check_purifier(table: Table, finished: Iterable[Cell]) -> None:
    """InputError when finished cells were purified by another model than those to make."""
    runs = dict(enumerate(read_runs(table.output_dir)))
    record = table.record
    ours = [record.get(name) for name in OF_PURIFIER]
    for cell in finished:
        uses = table.defences.get(cell.defence, {}).get("purify", {}).get("method") == "pdmpure"
        if uses and cell.run in runs and [runs[cell.run].get(name) for name in OF_PURIFIER] != ours:
            raise InputError(f"The cells of {cell.defence} in '{table.output_dir}' were made with another "
                             "--pdmpure_model or --upscaler; give another --output_dir.")


def write_sheet(table: Table, concept: str, seed: int) -> None:
    """One generated image of each cell of a concept: a row per data set, a column per defence."""
    scores = {(cell.data, cell.defence): cell.metrics for cell in table.cells()
              if cell.concept == concept and cell.seed == seed}
    rows: list = [(f"{concept}: the clean images. Below, the first generated image of each cell, with the "
                   "mean similarity of all its images",
                   [read_image(path) for path in list_images(table.home(concept) / "clean")])]
    for data in table.rows:
        images, captions = [], []
        for defence in table.columns:
            path = table.generated(Cell(data, defence, concept, seed)) / "000.png"
            if (data, defence) in scores and path.exists():
                images.append(read_image(path))
                captions.append(f"{data}, {defence} {scores[data, defence].get('dino', float('nan')):.2f}")
        if images:
            rows.append((captions, images))
    path = table.output_dir / "sheets" / f"{table.name}-{concept}.jpg"
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        contact_sheet(rows).save(temporary, format="JPEG", quality=85)


def hash_images(folder: Path) -> str | None:
    """A hash of the files of a folder's images; None where they have been removed since the training."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in list_images(folder):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def mixed_images(cells: Iterable[Cell]) -> list[str]:
    """The data sets of which a concept's cells were made with different images."""
    hashes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        if cell.images is not None:
            hashes[cell.data, cell.concept].add(cell.images)
    return list(dict.fromkeys(data for (data, _), of_one in hashes.items() if len(of_one) > 1))


def wait_for_others(processes: int) -> None:
    """Wait until all processes of a launcher have made their cells: it ends all when one fails."""
    if processes > 1 and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def make_table(table: Table, concepts: Mapping[str, DatasetConcept], seeds: Sequence[int],
               dry_run: bool = False, train: Train = train, score: Score = score) -> None:
    """Make the missing cells of this process's concepts, then write the table of all that are finished.

    With `dry_run`, print which cells are missing and what they cost instead. `train` and `score` are textual
    inversion's, or another method's. A cell that fails is left out, and an InputError at the end names it.
    """
    finished = {cell: cell.metrics for cell in table.finished()}
    check_purifier(table, finished)
    if not finished and read_cells(table.output_dir):
        notice(f"the cells in '{table.output_dir}' were made with other settings, models or an earlier "
               "version: they are not used")
    cells = list(dict.fromkeys(Cell(data, defence, concept, seed) for seed, concept, data, defence
                               in itertools.product(seeds, concepts, table.data, table.defences)))
    wanted = {name: _scores_of(table, concept) for name, concept in concepts.items()}
    missing = [cell for cell in cells if not wanted[cell.concept] <= {*finished.get(cell, ())}]
    print(f"{len(cells)} cells, {len(missing)} of them to do.")
    if dry_run:
        print(plan(missing, passes(table, missing, concepts), read_cells(table.output_dir),
                   POCKET_SECONDS if table.dataset == "pocket" else None))
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    failures = []
    # Seeds of a concept share its poisoned images, and one process writes its file: processes share concepts.
    for concept in list(concepts.values())[rank::processes]:
        if own := [cell for cell in missing if cell.concept == concept.name]:
            try:
                failures += make_cells(table, concept, own, train, score)
            except InputError as error:
                if processes == 1 and not table.finished():  # it is not this concept
                    raise
                failures.append(f"{concept.name}: {error}")
        if table.home(concept.name).exists():  # cells may have come without the images
            write_sheet(table, concept.name, seeds[0])
    wait_for_others(processes)
    table.output_dir.mkdir(parents=True, exist_ok=True)
    cells = table.cells()
    if mixed := mixed_images(cells):
        notice(f"cells of {', '.join(mixed)} were made with different images of one concept: the last "
               "bits of poisons differ from machine to machine, and so do the scores")
    scores = dict.fromkeys(SCORES) | dict.fromkeys(name for cell in cells for name in cell.metrics
                                                   if name != "real_real")
    print(write_table(table.output_dir / table.name, cells, list(scores), list(table.rows),
                      list(table.columns), table.plain_poisons, sweep=bool(table.swept)))
    if failures:
        raise InputError(f"Cells failed, and the same command tries them again: {' '.join(failures)}")
