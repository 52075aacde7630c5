"""Peak memory and checkpoint size of a training, ours and upstream's loop, each in a process of its own.

    python benchmarks/memory.py
    python benchmarks/memory.py --size sd15 --steps 2

On a CPU the peak is the whole process's resident memory, with libraries and weights. Upstream's checkpoint is
what accelerate saves of the text encoder and its optimizer: all their tensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from models import model_folder
from timing import HONEST_MALLOC, peak_memory, report
from training_step import Settings, ours, upstream, write_images
from transformers import CLIPTextModel

from szt_utils.arguments import script_parser


def measure(settings: Settings, side: str, folder: Path) -> dict[str, int]:
    """Bytes at the peak of a short training of "ours" or "upstream", and bytes of its checkpoint."""
    images, saved = write_images(settings, folder), folder / "saved"
    if side == "ours":
        ours(settings, images, checkpointing_steps=settings.all_steps, output_dir=saved)
        return {"peak": peak_memory(), "checkpoint": size_of(saved / f"checkpoint-{settings.all_steps}")}
    upstream(settings, images)
    peak = peak_memory()
    save_upstream(settings, saved)
    return {"peak": peak, "checkpoint": size_of(saved)}


def save_upstream(settings: Settings, folder: Path) -> None:
    """Write what a checkpoint of upstream's holds: the text encoder with a new token, AdamW's state."""
    encoder = CLIPTextModel.from_pretrained(model_folder(settings.size)[0], subfolder="text_encoder")
    encoder.resize_token_embeddings(encoder.config.vocab_size + 1)
    weight = encoder.get_input_embeddings().weight
    weight.grad, optimizer = torch.zeros_like(weight), torch.optim.AdamW([weight])
    optimizer.step()
    folder.mkdir()
    torch.save(encoder.state_dict(), folder / "model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = script_parser(__doc__)
    Settings.add_flags(parser)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    settings = Settings.of(args)
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(settings, args.side, Path(folder))))
        return
    model_folder(settings.size)
    results = {}
    for side in ("upstream", "ours"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True,
                              capture_output=True, text=True, env={**os.environ, **HONEST_MALLOC})
        results[side] = json.loads(done.stdout.splitlines()[-1])
    report(f"memory_{settings.size}_batch{settings.batch_size}_{settings.precision}",
           {"options": asdict(settings), "bytes": results})


if __name__ == "__main__":
    main()
