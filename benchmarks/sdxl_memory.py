"""Peak memory of SDXL trainings with random weights: upstream's loop and ours, each in a process of its own.

    python benchmarks/sdxl_memory.py --resolution 512 --steps 1

On a CPU the peak is the whole process's resident memory, with libraries and weights. In upstream's script
`--gradient_checkpointing` does not reach the U-Net, so that its loop is measured without.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from models import model_folder
from timing import HONEST_MALLOC, peak_memory, report

import textual_inversion_szt
from szt_utils.arguments import command_line, script_parser
from szt_utils.pocket import write_concept

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from upstream import upstream_sdxl

SIDES = {"upstream": None, "ours": {}, "ours, checkpointed": {"gradient_checkpointing": True},
         "ours, checkpointed, 8 bits": {"gradient_checkpointing": True, "quantize": "8bit"}}


def train(side: str, resolution: int, steps: int, precision: str, folder: Path) -> None:
    """Train one embedding with batch 1."""
    model, _ = model_folder("sdxl")
    write_concept("teal-striped-star", folder / "images")
    common = {"resolution": resolution, "mixed_precision": precision}
    if side == "upstream":
        upstream_sdxl(model, folder / "images", token="<new>", initializer="object", batch_size=1,
                      steps=steps, repeats=100, lr=1e-4, **common)
    else:
        textual_inversion_szt.main(command_line(
            pretrained_model_name_or_path=model, train_data_dir=folder / "images",
            output_dir=folder / "learned", placeholder_token="<new>", initializer_token="object",
            train_batch_size=1, max_train_steps=steps, **common, **SIDES[side]))


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            train(args.side, args.resolution, args.steps, args.precision, Path(folder))
        print(json.dumps(peak_memory()))
        return
    model_folder("sdxl")
    peaks = {}
    for side in args.sides:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True,
                              stdout=subprocess.PIPE, text=True, env={**os.environ, **HONEST_MALLOC})
        peaks[side] = json.loads(done.stdout.splitlines()[-1])
        print(side, peaks[side], flush=True)
    whole = peaks.get("upstream")
    report(f"sdxl_memory_{args.resolution}px_{args.precision}", {
        "options": {"resolution": args.resolution, "steps": args.steps, "precision": args.precision},
        "bytes": peaks, "of upstream": {side: peak / whole for side, peak in peaks.items()} if whole else {}})


if __name__ == "__main__":
    main()
