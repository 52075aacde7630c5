"""Copy trained networks into the package: python examples/pocket/bundle.py --work_dir pocket_training

The U-Nets and the VAE are stored in float16, which Diffusers loads back as float32; transformers would keep
float16, so the text encoder and the metric networks stay float32.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).resolve().parents[2] / "szt_utils" / "pocket" / "weights"


def halve(path: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(path).items()}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("pocket_training"))
    arguments = parser.parse_args()
    for name, source in {"diffusion": "model", "dino": "dino", "clip": "clip",
                         "pixel": "pixel"}.items():
        if (arguments.work_dir / source).is_dir():
            shutil.rmtree(WEIGHTS / name, ignore_errors=True)
            shutil.copytree(arguments.work_dir / source, WEIGHTS / name)
    if (arguments.work_dir / "sam.pth").exists():
        (WEIGHTS / "sam").mkdir(exist_ok=True)
        shutil.copy(arguments.work_dir / "sam.pth", WEIGHTS / "sam")
    for part in ("diffusion/unet", "diffusion/vae", "pixel/unet"):
        halve(WEIGHTS / part / "diffusion_pytorch_model.safetensors")
    for path in WEIGHTS.rglob("config.json"):  # no paths of the machine that trained them
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{WEIGHTS}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
