"""How a training's time and memory grow with its pictures, its resolution, the vectors of its token and its
concepts, the others being as in the first point of each; the figure is growth.png.

    python benchmarks/growth.py

Every point is a run of the real script in a process of its own: seconds until the first step, in which the
pictures are read and encoded, seconds per step, and the process's peak memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import training_step
from timing import RESULTS, peak_memory, report

from szt_utils.pocket import write_concept

AXES = {"pictures": [5, 50, 500, 5000], "resolution": [128, 192, 256, 384], "vectors": [1, 4, 16],
        "concepts": [1, 2, 4, 8, 16]}
LABELS = {"resolution": "resolution, px", "vectors": "vectors of the token"}
FIGURES = {"start": "seconds to the first step", "step": "seconds per step", "peak": "peak memory, MB"}


def measure(options, folder: Path, pictures: int = 5, resolution: int = 128, vectors: int = 1,
            concepts: int = 1) -> dict[str, float]:
    write_concept("teal-striped-star", folder / "pictures", count=pictures)
    listed = folder / "concepts.json"
    listed.write_text(json.dumps([{"placeholder_token": f"<new-{i}>"} for i in range(concepts)]))
    start = time.perf_counter()
    step = training_step.ours(
        options, folder / "pictures", "--resolution", str(resolution), "--num_vectors", str(vectors),
        *(["--concepts", str(listed), "--concepts_per_batch", str(concepts)] if concepts > 1 else []))
    whole = time.perf_counter() - start
    return {"start": whole - step * (options.steps + 3), "step": step, "peak": peak_memory() / 1e6}


def plot(points: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((11, 7), layout="constrained")
    axes = figure.subplots(len(FIGURES), len(AXES), sharex="col", squeeze=False)
    for column, (name, values) in enumerate(AXES.items()):
        for row, (key, label) in enumerate(FIGURES.items()):
            axis = axes[row, column]
            axis.plot(values, [points[f"{name}={value}"][key] for value in values], "o-", color="tab:blue")
            axis.set_xscale("log", base=2 if name != "pictures" else 10)
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.minorticks_off()
            axis.set_ylim(0, 1.12 * max(points[f"{name}={value}"][key] for value in values))
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
            if row == len(FIGURES) - 1:
                axis.set_xlabel(LABELS.get(name, name))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    training_step.add_options(parser)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.point is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, Path(folder), **options.point)))
        return
    points = {}
    for name, values in AXES.items():
        for value in values:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--point", json.dumps({name: value})], check=True,
                capture_output=True, text=True)
            points[f"{name}={value}"] = json.loads(done.stdout.splitlines()[-1])
            print(name, value, points[f"{name}={value}"], flush=True)
    report("growth", {"options": vars(options), "points": points})
    plot(points, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
