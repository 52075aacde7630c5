"""How well `sensitivity_maps.py --diagnose` tells poisoned from clean pictures: the area under the ROC curve.

    python examples/figures/roc.py --clean diagnosis/clean --poisoned diagnosis/adm+ diagnosis/ea

Takes folders with a diagnosis.json, of one calibration and of pictures that it never saw. Writes roc.json and
roc.png, and prints the area per poison, over all pictures and over photographs alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from szt_utils.errors import exit_on_input_error
from szt_utils.evidence import bootstrap, roc_auc
from szt_utils.plots import COLOURS, save_figure, subplots
from szt_utils.records import write_json


def scores(folder: Path) -> dict[str, float]:
    pictures = json.loads((folder / "diagnosis.json").read_text())["pictures"]
    return {name: picture["score"] for name, picture in pictures.items()}


def area(clean: list[float], poisoned: list[float]) -> dict[str, float]:
    """ROC-AUC with its interval over resamples of both."""
    tagged = np.array([(value, 0) for value in clean] + [(value, 1) for value in poisoned])

    def auc(rows):
        kinds = [rows[rows[:, 1] == kind, 0] for kind in (0, 1)]
        return roc_auc(*kinds) if len(kinds[0]) and len(kinds[1]) else np.nan
    return bootstrap(tagged, auc, draws=500)


def draw(clean: list[float], poisoned: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = subplots(1, 1, width=4.5, height=4.2)
    for name, of_name in poisoned.items():
        ends = np.unique([-np.inf, *clean, *of_name.values(), np.inf])[::-1]
        axes[0, 0].plot([np.mean(np.array(clean) >= end) for end in ends],
                        [np.mean(np.array(list(of_name.values())) >= end) for end in ends],
                        color=COLOURS.get(name, "#777777"), label=name)
    axes[0, 0].set(xlabel="clean pictures called poisoned", ylabel="poisoned pictures called poisoned")
    axes[0, 0].legend(loc="lower right")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--poisoned", type=Path, nargs="+", required=True, help="folders named after poisons")
    parser.add_argument("--output_dir", type=Path, default=Path("figures"))
    arguments = parser.parse_args()
    with exit_on_input_error():
        clean = scores(arguments.clean)
        poisoned = {folder.name: scores(folder) for folder in arguments.poisoned}
        found = {}
        for name, of_name in poisoned.items():
            found[name] = area(list(clean.values()), list(of_name.values()))
            photographs = [[value for file, value in of_kind.items() if "photo" in file]
                           for of_kind in (clean, of_name)]
            if all(photographs):
                found[f"{name}, photographs"] = area(*photographs)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output_dir / "roc.json", found)
        draw(list(clean.values()), poisoned, arguments.output_dir / "roc.png")
        for name, value in found.items():
            interval = f"[{value['low']:.3f}, {value['high']:.3f}]"
            print(f"{name}: {value['value']:.3f} {interval} (n = {value['n']})")


if __name__ == "__main__":
    main()
