"""Peak memory and checkpoint size of a training, ours and upstream's algorithm, each in a process of its own.

    python benchmarks/memory.py
    python benchmarks/memory.py --size sd15 --steps 2

On a CPU the figure is the process's whole resident memory, libraries and weights included. Upstream's
checkpoint is what accelerate saves of a prepared text encoder and its optimizer: all their tensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import training_step
from models import model_folder
from timing import HONEST_MALLOC, peak_memory, report

from szt_utils.pocket import write_concept


def measure(options, side: str, folder: Path) -> dict[str, int]:
    """Train for a few steps, save a checkpoint; bytes at the peak and bytes of the checkpoint."""
    write_concept("teal-striped-star", folder / "pictures")
    saved = folder / "saved"
    if side == "ours":
        training_step.ours(options, folder / "pictures", "--checkpointing_steps", str(options.steps + 3),
                           "--output_dir", str(saved))
        return {"peak": peak_memory(), "checkpoint": size_of(saved / f"checkpoint-{options.steps + 3}")}
    upstream = training_step.Upstream(options, folder / "pictures")
    upstream.run()
    peak = peak_memory()
    saved.mkdir()
    torch.save(upstream.model.text_encoder.state_dict(), saved / "model.bin")
    torch.save(upstream.optimizer.state_dict(), saved / "optimizer.bin")
    return {"peak": peak, "checkpoint": size_of(saved)}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    training_step.add_options(parser)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options, options.side, Path(folder))))
        return
    model_folder(options.size)
    results = {}
    for side in ("upstream", "ours"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True,
                              capture_output=True, text=True, env={**os.environ, **HONEST_MALLOC})
        results[side] = json.loads(done.stdout.splitlines()[-1])
    report(f"memory_{options.size}_batch{options.batch_size}_{options.precision}",
           {"options": vars(options), "bytes": results})


if __name__ == "__main__":
    main()
