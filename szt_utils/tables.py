"""Tables of scores: cells of data against defences as JSON lines, and the statistics made of them.

A folder holds `cells/<concept>.jsonl`, one line per cell, and `run.json`, the list of the settings, versions
and commits of its runs, to which a cell refers by position. Only one process may write a concept's file.
Cells of other settings are other cells.
"""

import csv
import hashlib
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .files import parse_json, read_json, write_bytes, write_json
from .plots import score_sweep, score_table
from .statistics import bootstrap

__all__ = ["OF_PURIFIER", "Average", "Cell", "append_cell", "averages", "csv_table", "markdown_table",
           "poison_average", "read_cells", "read_runs", "read_table", "recovered", "recovered_share",
           "run_index", "settings_key", "share_text", "shared_cells", "write_table"]

OF_PURIFIER = ("pdmpure_model", "upscaler")  # what only the cells with PDMPure are made with
SIMILARITY = "dino"  # the metric of which shares are recovered and plots are made


@dataclass(frozen=True)
class Cell:
    """The scores of one training, by its data, defence, concept and seed: cells are equal when these are."""

    data: str
    defence: str
    concept: str
    seed: int
    metrics: dict[str, float] = field(default_factory=dict, compare=False)
    seconds: float | None = field(default=None, compare=False)
    passes: int | None = field(default=None, compare=False)  # of one image through the U-Net
    run: int | None = field(default=None, compare=False)  # position in run.json
    images: str | None = field(default=None, compare=False)  # hash of the concept's images with this data

    @property
    def name(self) -> str:
        """Name of the cell's folders."""
        return f"{self.data}_{self.defence}_{self.concept}_{self.seed}".replace(" ", "-")


class Average(NamedTuple):
    """A mean over concepts, its standard error (None for a single value) and the number of cells."""

    mean: float
    error: float | None
    count: int


def read_cells(folder: str | Path, settings: str | None = None) -> list[Cell]:
    """Finished cells of a folder, sorted by file, then in the order they were added; none if it is new.

    With `settings`, a `settings_key`, only those whose run has them, or is not recorded. A last line that a
    crash cut short is ignored. InputError names a damaged line or a cell's second line.
    """
    cells, records = {}, read_runs(folder)
    runs = {i: (settings_key(record), *map(record.get, OF_PURIFIER)) for i, record in enumerate(records)}
    for path in sorted((Path(folder) / "cells").glob("*.jsonl")):
        for number, line in enumerate(_whole_lines(path), 1):
            try:
                cell = Cell(**parse_json(line))
                if not all(isinstance(value, int | float) for value in cell.metrics.values()):
                    raise TypeError
                place = cell, runs.get(cell.run, (None,))
                known = place in cells  # a list in the place of a name has no hash
            except (ValueError, TypeError, AttributeError):
                raise InputError(f"Line {number} of '{path}' is damaged; restore the line, or remove it to "
                                 "compute its cell again.") from None
            if known:
                raise InputError(f"Line {number} of '{path}' repeats the cell '{cell.name}'; "
                                 "remove one of the two lines.")
            cells[place] = None
    return list(dict.fromkeys(cell for cell, own in cells if settings is None or own[0] in (None, settings)))


def read_table(folder: str | Path) -> list[Cell]:
    """Finished cells of a folder that holds one table; InputError when their settings differ."""
    if len({settings_key(run) for run in read_runs(folder)}) > 1:
        raise InputError(f"The cells of '{folder}' were made with different settings and cannot be compared; "
                         "keep one setting in run.json and its lines in cells.")
    return read_cells(folder)


def append_cell(folder: str | Path, cell: Cell, instead_of: Cell | None = None) -> None:
    """Add a line to the file of the cell's concept, atomically, perhaps `instead_of` an earlier one of it.

    Only one process may write to a concept.
    """
    path = Path(folder) / "cells" / f"{cell.concept}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = _whole_lines(path) if path.exists() else []
    if instead_of is not None:
        lines = [line for line in lines if parse_json(line) != asdict(instead_of)]
    lines.append(json.dumps(asdict(cell)).encode())
    write_bytes(path, b"".join(line + b"\n" for line in lines))


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a JSON lines file without a last one that a crash cut short."""
    content = path.read_bytes()
    lines = content.split(b"\n")
    try:
        parse_json(lines[-1])  # whole, but an editor has removed the newline
    except ValueError:
        lines.pop()
    return lines


def run_index(folder: str | Path, record: dict[str, Any]) -> int:
    """Position of a run's settings, versions and commit in the folder's run.json; a new record is added.

    Processes of one launch may do this at the same time: they add the same record to the same list.
    """
    records = read_runs(folder)
    position = records.index(record) if record in records else len(records)
    if position == len(records):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "run.json", [*records, record])
    return position


def settings_key(record: Mapping[str, Any]) -> str:
    """A hash of what decides all cells of a run: its record without versions, commit, and what is a
    purifier's own."""
    settings = {name: value for name, value in record.items()
                if name not in ("versions", "commit", *OF_PURIFIER)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a folder's run.json, none if it has none; InputError when it is damaged."""
    path = Path(folder) / "run.json"
    records = read_json(path, "list of runs") if path.exists() else []
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"The list of runs '{path}', to which the cells refer, is damaged; restore it.")
    return records


def averages(cells: Sequence[Cell], metric: str) -> dict[tuple[str, str], Average]:
    """Averages of a metric by data and defence; cells without the metric do not count.

    Seeds are averaged within a concept first; the error is over concepts, or over the seeds of a single one.
    """
    values: dict = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if metric in cell.metrics:
            values[cell.data, cell.defence][cell.concept].append(cell.metrics[metric])
    result = {}
    for place, concepts in values.items():
        samples = [mean(v) for v in concepts.values()] if len(concepts) > 1 else next(iter(concepts.values()))
        error = stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else None
        result[place] = Average(mean(samples), error, sum(map(len, concepts.values())))
    return result


def shared_cells(cells: Sequence[Cell], metric: str, places: Sequence[tuple[str, str]]) -> list[Cell]:
    """The cells of several places, each a data set and a defence, of concepts and seeds that have them all.

    So averages over these cells compare like with like.
    """
    own: dict = defaultdict(dict)
    for cell in cells:
        if metric in cell.metrics and (cell.data, cell.defence) in places:
            own[cell.concept, cell.seed][cell.data, cell.defence] = cell
    return [cell for of_one in own.values() if len(of_one) == len(set(places)) for cell in of_one.values()]


def poison_average(cells: Sequence[Cell], poisons: Sequence[str], defences: Sequence[str],
                   metric: str) -> dict[str, Average]:
    """Averages over those of the poisons that have cells, by defence; the error is over concepts, if several.

    They are over the concepts and seeds of which the first of the defences has all these poisons. There is
    none for a single poison, nor for a defence that lacks one of these cells.
    """
    present = {cell.data for cell in cells if metric in cell.metrics} & set(poisons)
    result, needed = {}, set()
    for defence in defences if len(present) > 1 else ():
        own = shared_cells(cells, metric, [(data, defence) for data in present])
        places = {(cell.concept, cell.seed) for cell in own}
        needed = needed or places
        if places and places >= needed:
            own = [replace(cell, data="all") for cell in own if (cell.concept, cell.seed) in needed]
            average = averages(own, metric)["all", defence]
            several = len({concept for concept, _ in needed}) > 1
            result[defence] = average if several else average._replace(error=None)
    return result


def recovered(defended: float, nominal: float, clean: float) -> float | None:
    """Share of a poison's damage that a defence undoes: (defended - nominal) / (clean - nominal).

    None where the damage is 0.05 or less.
    """
    return (defended - nominal) / (clean - nominal) if clean - nominal > 0.05 else None


def recovered_share(cells: Sequence[Cell], poisons: Sequence[str], defence: str,
                    metric: str) -> dict[str, Any] | None:
    """What a defence recovers of a score that poisons took, with its 95 % interval over concepts: a result of
    `bootstrap`.

    It compares means over the concepts and seeds that have all cells for it. Fewer than four concepts have no
    interval, "low" and "high" are None. None where nothing can be compared, and where the damage is not above
    0 in its interval, or is at most 0.05 for want of one.
    """
    places = [("clean", "nominal"), *((data, name) for data in poisons for name in ("nominal", defence))]
    shared = [replace(cell, data="poisoned" if cell.data != "clean" else "clean")
              for cell in shared_cells(cells, metric, places)]
    rows = []
    for concept in dict.fromkeys(cell.concept for cell in shared):
        means = averages([cell for cell in shared if cell.concept == concept], metric)
        rows.append([means[place].mean for place in (
            ("poisoned", defence), ("poisoned", "nominal"), ("clean", "nominal"))])
    if not rows:
        return None
    values = np.array(rows)
    defended, nominal, clean = values.mean(0)
    if len(rows) < 4:
        share = recovered(defended, nominal, clean)
        return None if share is None else {"value": share, "low": None, "high": None, "n": len(rows)}
    if bootstrap(values[:, 2] - values[:, 1])["low"] <= 0:
        return None

    def share_of(rows: np.ndarray) -> float:
        damage = (rows[:, 2] - rows[:, 1]).mean()
        return (rows[:, 0] - rows[:, 1]).mean() / damage if abs(damage) > 1e-9 else math.nan

    return bootstrap(values, share_of)


def share_text(share: dict[str, Any] | None) -> str:
    """A `recovered_share` in percent: "95% [73, 107]"; nothing for None."""
    if share is None:
        return ""
    interval = "" if share["low"] is None else f" [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
    return f"{share['value']:.0%}{interval}"


def markdown_table(cells: Sequence[Cell], metric: str, data: Sequence[str], defences: Sequence[str],
                   poisons: Sequence[str]) -> str:
    """Mean ± error by data (rows) and defence (columns), in the given order and without empty ones.

    Below follow the average over the poisons and, for similarity and attributes, the recovered shares.
    """
    places = averages(cells, metric)
    data, defences = _present(places, data, defences)
    rows = {name: {d: places[name, d] for d in defences if (name, d) in places} for name in data}
    of_row = {name: [name] for name in data if name != "clean"}
    if average := poison_average(cells, poisons, defences, metric):
        rows["poisons' mean"] = average
        of_row["poisons' mean"] = [name for name in data if name in poisons]

    def line(name: str, values: Iterable[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def shown(average: Average | None) -> str:
        if average is None:
            return ""
        return f"{average.mean:.3f}" + (f" ± {average.error:.3f}" if average.error is not None else "")

    lines = [line("data", defences), "| --- |" + " --- |" * len(defences)]
    lines += [line(name, [shown(row.get(d)) for d in defences]) for name, row in rows.items()]
    if metric in (SIMILARITY, "attributes") and "nominal" in rows.get("clean", {}):
        for name, of_poisons in of_row.items():
            if "nominal" in rows[name] and len(rows[name]) > 1:
                shares = [recovered_share(cells, of_poisons, d, metric)
                          if d in rows[name] and d != "nominal" else None for d in defences]
                lines.append(line(f"{name}: recovered", map(share_text, shares)))
    return "\n".join(lines) + "\n"


def csv_table(cells: Sequence[Cell], metrics: Sequence[str], data: Sequence[str],
              defences: Sequence[str]) -> str:
    """A row per metric, data and defence with cells: the mean, its standard error, the number of cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "data", "defence", "mean", "standard_error", "cells"])
    for metric in metrics:
        places = averages(cells, metric)
        for place in itertools.product(data, defences):
            if place in places:
                average = places[place]
                writer.writerow([metric, *place, average.mean, average.error, average.count])
    return text.getvalue()


def write_table(stem: Path, cells: Sequence[Cell], metrics: Sequence[str], data: Sequence[str],
                defences: Sequence[str], poisons: Sequence[str], sweep: bool = False) -> str:
    """Write <stem>.csv and <stem>.md of all metrics, and <stem>.png of similarity: a colored table, or with
    `sweep` a line per data set. Returns the Markdown table of similarity, or all tables if there is none."""
    metrics = [metric for metric in metrics if any(metric in cell.metrics for cell in cells)]
    tables = {metric: markdown_table(cells, metric, data, defences, poisons) for metric in metrics}
    text = "".join(f"## {metric}\n\n{table}\n" for metric, table in tables.items())
    most, concepts = len({(cell.concept, cell.seed) for cell in cells}), len({c.concept for c in cells})
    of_what = "concepts" if concepts > 1 else "seeds"
    foot = (f"{len(cells)} cells, at most {most} a place, of {concepts} concept{'s' * (concepts > 1)}; ± is "
            f"the standard error over {of_what}, of each place by itself: differences between columns vary "
            "less. [ ] is a 95 % interval over concepts, given for four or more. FID, KID and FD-DINOv2 of "
            "so few images serve for comparison within this table only.\n")
    write_bytes(stem.with_suffix(".csv"), csv_table(cells, metrics, data, defences).encode())
    write_bytes(stem.with_suffix(".md"), (text + foot).encode())
    if SIMILARITY not in tables:
        return text
    places = averages(cells, SIMILARITY)
    label = f"similarity to the clean concept ({concepts} concept{'s' * (concepts > 1)})"
    data, defences = _present(places, data, defences)
    means, errors = ([[places[d, v][i] if (d, v) in places else None for v in defences] for d in data]
                     for i in (0, 1))
    if sweep:
        means, errors = (dict(zip(data, rows, strict=True)) for rows in (means, errors))
        score_sweep(stem.with_suffix(".png"), defences, means, errors, label)
    else:
        score_table(stem.with_suffix(".png"), data, defences, means, errors, label)
    return tables[SIMILARITY]


def _present(places: Iterable[tuple[str, str]], data: Sequence[str],
             defences: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the data sets and defences that have cells."""
    places = set(places)
    return ([name for name in data if any(place[0] == name for place in places)],
            [name for name in defences if any(place[1] == name for place in places)])
