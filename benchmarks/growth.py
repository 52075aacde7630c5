"""How a training's time and memory grow with its images, its resolution, the vectors of its token and its
concepts.

    python benchmarks/growth.py

One of them grows; the others have the first value of their axis. Every point is a run of the training script
in a process of its own: seconds until the first step, in which images are read and encoded, seconds per step,
and the process's peak memory. Writes growth.json and growth.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from timing import RESULTS, peak_memory, report
from training_step import Settings, ours

from szt_utils.arguments import script_parser
from szt_utils.plots import save_figure, subplots
from szt_utils.pocket import write_concept

AXES = {"images": [5, 50, 500, 5000], "resolution": [128, 192, 256, 384], "vectors": [1, 4, 16],
        "concepts": [1, 2, 4, 8, 16]}
LABELS = {"resolution": "resolution, px", "vectors": "vectors of the token"}
FIGURES = {"start": "seconds to the first step", "step": "seconds per step", "peak": "peak memory, MB"}


def measure(settings: Settings, folder: Path, images: int = 5, resolution: int = 128, vectors: int = 1,
            concepts: int = 1) -> dict[str, float]:
    """The FIGURES of one training."""
    write_concept("teal-striped-star", folder / "images", count=images)
    flags = {"resolution": resolution, "num_vectors": vectors}
    if concepts > 1:
        flags |= {"concepts": folder / "concepts.json", "concepts_per_batch": concepts}
        flags["concepts"].write_text(json.dumps([{"placeholder_token": f"<new-{i}>"}
                                                 for i in range(concepts)]))
    start = time.perf_counter()
    step = ours(settings, folder / "images", **flags)
    total = time.perf_counter() - start
    return {"start": total - step * settings.all_steps, "step": step, "peak": peak_memory() / 1e6}


def plot(points: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = subplots(len(FIGURES), len(AXES), width=2.75, height=7 / 3, sharex="col")
    for column, (name, values) in enumerate(AXES.items()):
        for row, (key, label) in enumerate(FIGURES.items()):
            axis, figures = axes[row, column], [points[f"{name}={value}"][key] for value in values]
            axis.plot(values, figures, "o-", color="tab:blue")
            axis.set_xscale("log", base=2 if name != "images" else 10)
            axis.set_xticks(values, [f"{value:,}" for value in values])
            axis.minorticks_off()
            axis.set_ylim(0, 1.12 * max(figures))
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
            if row == len(FIGURES) - 1:
                axis.set_xlabel(LABELS.get(name, name))
    save_figure(figure, path)


def main() -> None:
    parser = script_parser(__doc__)
    Settings.add_flags(parser)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    settings, points = Settings.of(args), {}
    if args.point is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(settings, Path(folder), **args.point)))
        return
    for name, values in AXES.items():
        for value in values:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--point", json.dumps({name: value})], check=True,
                capture_output=True, text=True)
            points[f"{name}={value}"] = json.loads(done.stdout.splitlines()[-1])
            print(name, value, points[f"{name}={value}"], flush=True)
    report("growth", {"options": asdict(settings), "points": points})
    plot(points, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
