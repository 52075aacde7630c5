"""Copy trained networks into the package:

    python examples/train_pocket/bundle.py --work_dir pocket_training

The networks of pipelines are stored in float16, which Diffusers loads as float32, and transformers too where
the config says float32. The metric networks stay float32.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from szt_utils.arguments import local_path, script_parser
from szt_utils.pocket import WEIGHTS


def halve(path: Path) -> None:
    """Rewrite a safetensors file in float16."""
    state = {name: tensor.half() for name, tensor in load_file(path).items()}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--work_dir", type=local_path, default=Path("pocket_training"))
    args = parser.parse_args()
    for name, source in {"diffusion": "model", "sdxl": "model-sdxl", "flow-3": "model-flow", "dino": "dino",
                         "clip": "clip", "pixel": "pixel"}.items():
        if (args.work_dir / source).is_dir():
            shutil.rmtree(WEIGHTS / name, ignore_errors=True)
            shutil.copytree(args.work_dir / source, WEIGHTS / name)
    if (args.work_dir / "sam.pth").exists():
        (WEIGHTS / "sam").mkdir(exist_ok=True)
        shutil.copy(args.work_dir / "sam.pth", WEIGHTS / "sam")
    for path in WEIGHTS.glob("*/*/*.safetensors"):  # those of pipelines
        halve(path)
    for path in WEIGHTS.rglob("config.json"):  # without paths of the machine that trained them
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{WEIGHTS}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
