"""Peak memory of SDXL trainings with random weights: upstream's loop and ours, each in a process of its own.

    python benchmarks/sdxl_memory.py --resolution 512

The peak is that of the steps, after loading. On a CPU it is the whole process's resident memory, with
libraries and weights. In upstream's script `--gradient_checkpointing` does not reach the U-Net, so that its
loop is measured without.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from models import model_folder
from timing import HONEST_MALLOC, peak_memory, report, reset_peak
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import textual_inversion_szt
from szt_utils.arguments import command_line, script_parser
from szt_utils.pocket import write_concept

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from upstream import upstream_sdxl

SIDES = {"upstream": None, "ours": {}, "ours, checkpointed": {"gradient_checkpointing": True},
         "ours, checkpointed, 8 bits": {"gradient_checkpointing": True, "quantize": "8bit"}}


class WideArithmetic(TorchDispatchMode):
    """Computes the heavy operators of bfloat16 in float32, one at a time; everything is stored in bfloat16.

    A CPU without instructions for bfloat16 needs a hundred times as long otherwise. The peak grows by the
    float32 copy of one layer's operands, on every side alike.
    """

    heavy = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_backward")
        if name not in self.heavy or not any(isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16
                                             for arg in args):
            return func(*args, **(kwargs or {}))
        return tree_map(narrow, func(*tree_map(widen, args), **tree_map(widen, kwargs or {})))


def widen(value: Any) -> Any:
    """A bfloat16 tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def narrow(value: Any) -> Any:
    """A float32 tensor in bfloat16; anything else as it is."""
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def arithmetic(precision: str) -> contextlib.AbstractContextManager:
    """`WideArithmetic` where bfloat16 is asked for and the CPU has no instructions for it."""
    slow = not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return WideArithmetic() if precision == "bf16" and slow else contextlib.nullcontext()


def count_from_the_optimizer() -> None:
    """Let the peak begin where a training makes its optimizer, after loading its models."""
    make = torch.optim.AdamW.__init__

    def made(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> None:
        reset_peak()
        make(self, *arguments, **options)

    torch.optim.AdamW.__init__ = made


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
        count_from_the_optimizer()
        with tempfile.TemporaryDirectory() as folder, arithmetic(args.precision):
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
