"""How long a user waits before anything happens: `--help` of every script, the library's import beyond
torch's, the first training step of the pocket model, each from the start of the process.

    python benchmarks/startup.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import alternate, medians, report

from szt_utils import pocket

ROOT = Path(__file__).parent.parent


def wall(*command) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - start


def first_step() -> float:
    """Seconds until the first step of a run has left its record."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pocket.write_concept("teal-striped-star", folder / "pictures", folder / "masks")
        return wall(ROOT / "textual_inversion_szt.py", "--pretrained_model_name_or_path", pocket.model_path(),
                    "--train_data_dir", folder / "pictures", "--output_dir", folder / "out",
                    "--placeholder_token", "<new>", "--initializer_token", "object", "--resolution", 128,
                    "--train_batch_size", 1, "--max_train_steps", 1, "--szt",
                    "--loss_mask_dir", folder / "masks")


def main() -> None:
    scripts = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
    three = "szt_utils.jpeg, szt_utils.masks, szt_utils.timesteps"  # what README's three lines need
    modules = ", ".join(f"szt_utils.{path.stem}" for path in sorted((ROOT / "szt_utils").glob("[a-z]*.py")))
    sides = {f"{script.name} --help": lambda script=script: wall(script, "--help") for script in scripts}
    sides |= {"import torch": lambda: wall("-c", "import torch"),
              "import torch and jpeg, masks, timesteps": lambda: wall("-c", f"import torch; import {three}"),
              "import torch and all of szt_utils": lambda: wall("-c", f"import torch; import {modules}"),
              "first training step": first_step}
    report("startup", {"seconds": medians(alternate(sides, 5))})


if __name__ == "__main__":
    main()
