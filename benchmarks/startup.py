"""How long a user waits before anything happens, from the start of the process: `--help` of every script, the
library's import in addition to torch's, the first training step of the pocket model.

    python benchmarks/startup.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import alternate, medians, report

from szt_utils import pocket
from szt_utils.arguments import command_line, script_parser

ROOT = Path(__file__).resolve().parent.parent


def wall(*command: object) -> float:
    """Seconds of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - start


def first_step() -> float:
    """Seconds of a training of one step."""
    with tempfile.TemporaryDirectory() as folder:
        images, masks = Path(folder) / "images", Path(folder) / "masks"
        pocket.write_concept("teal-striped-star", images, masks)
        return wall(ROOT / "textual_inversion_szt.py", *command_line(
            pretrained_model_name_or_path=pocket.model_path(), train_data_dir=images,
            output_dir=Path(folder) / "out", placeholder_token="<new>", initializer_token="object",
            resolution=128, train_batch_size=1, max_train_steps=1, szt=True, loss_mask_dir=masks))


def main() -> None:
    script_parser(__doc__).parse_args()
    scripts = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
    modules = ", ".join(f"szt_utils.{path.stem}" for path in sorted((ROOT / "szt_utils").glob("[a-z]*.py")))
    sides = {f"{script.name} --help": lambda script=script: wall(script, "--help") for script in scripts}
    sides |= {"import torch": lambda: wall("-c", "import torch"),
              "import torch and SafeZone": lambda: wall("-c", "import torch, szt_utils.safe_zone"),
              "import torch and all of szt_utils": lambda: wall("-c", f"import torch; import {modules}"),
              "first training step": first_step}
    report("startup", {"seconds": medians(alternate(sides, 5))})


if __name__ == "__main__":
    main()
