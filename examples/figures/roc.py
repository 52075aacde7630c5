"""How well `diagnose_images.py` separates poisoned from clean images: the area under the ROC curve.

    python examples/figures/roc.py --clean diagnosis/clean --poisoned diagnosis/adm+ diagnosis/ea

Takes folders with a diagnosis.json, made with one calibration that contains none of their images. Scores are
the model's where a model was given, else those of the pixels; an image without a score is left out. Writes
roc.json and roc.png, and prints the area per poison, over all images and over photographs alone.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from szt_utils.arguments import local_path, script_parser
from szt_utils.errors import exit_on_input_error
from szt_utils.files import write_json
from szt_utils.plots import COLORS, save_figure, subplots
from szt_utils.statistics import bootstrap, roc_auc


def scores(folder: Path) -> dict[str, float]:
    """The score of every image of a diagnosis that has one."""
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    images = diagnosis.get("model", diagnosis)["images"]
    return {name: image["score"] for name, image in images.items() if image["score"] is not None}


def area(clean: dict[str, float], poisoned: dict[str, float]) -> dict[str, float]:
    """ROC-AUC with its interval.

    An image is resampled with its poisoned copy, and squares of one photograph together: their names differ
    in what follows the last dash.
    """
    names = sorted({*clean, *poisoned})
    rows = np.array([[clean.get(name, np.nan), poisoned.get(name, np.nan)] for name in names])

    def auc(rows):
        kinds = [column[~np.isnan(column)] for column in rows.T]
        return roc_auc(*kinds) if len(kinds[0]) and len(kinds[1]) else np.nan
    return bootstrap(rows, auc, groups=[name.rpartition("-")[0] or name for name in names], draws=500)


def areas(clean: dict[str, float], poisoned: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Areas by poison, and for photographs alone (by file name) where both sides have some."""
    found = {}
    for name, of_poison in poisoned.items():
        found[name] = area(clean, of_poison)
        photographs = [{file: value for file, value in of_kind.items() if "photo" in file}
                       for of_kind in (clean, of_poison)]
        if all(photographs):
            found[f"{name}, photographs"] = area(*photographs)
    return found


def plot(clean: list[float], poisoned: dict[str, dict[str, float]], path: Path) -> None:
    figure, ((axis,),) = subplots(1, 1, width=4.5, height=4.2)
    dashes = itertools.cycle(["-", "--", ":"])  # of folders that are no poison, such as noise
    for name, of_poison in poisoned.items():
        known = name in COLORS
        ends = np.unique([-np.inf, *clean, *of_poison.values(), np.inf])[::-1]
        axis.plot([np.mean(np.array(clean) >= end) for end in ends],
                  [np.mean(np.array(list(of_poison.values())) >= end) for end in ends],
                  color=COLORS.get(name, "#777777"), linestyle="-" if known else next(dashes), label=name)
    axis.set(xlabel="clean images called poisoned", ylabel="poisoned images called poisoned")
    axis.legend(loc="lower right")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--clean", type=local_path, required=True,
                        help="folder of the clean images' diagnosis")
    parser.add_argument("--poisoned", type=local_path, nargs="+", required=True,
                        help="folders named after poisons")
    parser.add_argument("--output_dir", type=local_path, default=Path("results/figures"))
    args = parser.parse_args(argv)
    with exit_on_input_error():
        clean = scores(args.clean)
        poisoned = {folder.name: scores(folder) for folder in args.poisoned}
        found = areas(clean, poisoned)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(args.output_dir / "roc.json", found)
        plot(list(clean.values()), poisoned, args.output_dir / "roc.png")
        for name, value in found.items():
            interval = f"[{value['low']:.3f}, {value['high']:.3f}]"
            print(f"{name}: {value['value']:.3f} {interval} (n = {value['n']})")


if __name__ == "__main__":
    main()
