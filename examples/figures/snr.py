r"""When poisons strike, by signal-to-noise ratio: several models on one axis.

    python examples/figures/snr.py --labels U-Net flow --folders results/figures results/figures/flow \
        --tables results/table1 results/flow --output_dir results/figures

Timesteps of a U-Net and sigmas of a flow model are not comparable; their signal-to-noise ratios are. Reads
what fig4.py and fig5.py wrote to each folder: by how much poisons raise the denoising loss, relative to clean
images, and the norm of the gradient, relative to its peak. From each table of `table1.py --preset timesteps`:
the similarity of what is learned from poisons, by the threshold. The dotted line is that of the paper,
t = 500 of Stable Diffusion.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import estimate, paired, text_of

from szt_utils.arguments import script_parser, user_path
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.files import read_json, write_json
from szt_utils.plots import save_figure, subplots
from szt_utils.safe_zone import PAPER_LOG_SNR
from szt_utils.tables import Cell, read_table

COLORS = ("#0072B2", "#D55E00", "#009E73")  # of the models
DASHES = {"adm+": "-", "sds+": "--", "ea": "-."}


@dataclass(frozen=True)
class Curves:
    """What was measured of a model. The log-SNR falls with the timesteps; pure noise is left out."""

    log_snr: np.ndarray  # (T,)
    increase: Mapping[str, np.ndarray]  # poison: (T,) mean loss over that of clean images, less 1
    of_gradient: np.ndarray  # (S,), the log-SNR of the gradients
    gradient: Mapping[str, np.ndarray]  # data: (concepts, S)
    thresholds: np.ndarray  # (K,), log-SNR, interpolated
    similarity: np.ndarray  # (concepts, K), means over the poisons


def read_curves(folder: Path, table: Path) -> Curves:
    """The curves of a model from its JSON files and the cells of its table.

    InputError for a file without the log-SNR, and a table without thresholds.
    """
    losses, norms = (read_json(folder / f"{name}.json")["results"] for name in ("fig4", "fig5"))
    if "log_snr" not in losses["clean"] or "log_snr" not in norms["clean"]:
        raise InputError(f"The figures in '{folder}' have no log_snr; measure them again.")
    known, of_norms = ([i for i, value in enumerate(of["clean"]["log_snr"]) if value is not None]
                       for of in (losses, norms))
    timesteps, log_snr = (np.array(losses["clean"][name], float)[known] for name in ("timesteps", "log_snr"))
    means = {data: paired(losses["clean"], result, "losses").mean(0)[:, known]
             for data, result in losses.items() if data in DASHES}
    thresholds, similarity = read_thresholds(read_table(table))
    return Curves(log_snr,
                  {data: own / clean - 1 for data, (clean, own) in means.items()},
                  np.array(norms["clean"]["log_snr"], float)[of_norms],
                  {data: np.array(result["norms"])[:, of_norms] for data, result in norms.items()},
                  np.interp(thresholds, timesteps, log_snr), similarity)


def read_thresholds(cells: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds (K,) of cells with poisons, and similarities (concepts, K), means over poisons and seeds.

    Only concepts and poisons of all thresholds count; InputError when there are none.
    """
    scores: dict[tuple[int, str], dict[tuple[str, int], float]] = {}
    for cell in cells:
        t_min = re.fullmatch(r"t(\d+)", cell.defence)
        if cell.data != "clean" and t_min and "dino" in cell.metrics:
            place = int(t_min[1]), cell.concept
            scores.setdefault(place, {})[cell.data, cell.seed] = cell.metrics["dino"]
    thresholds = sorted({t for t, _ in scores})
    concepts = [name for name in sorted({name for _, name in scores})
                if all((t, name) in scores for t in thresholds)]
    rows = []
    for name in concepts:
        shared = set.intersection(*(set(scores[t, name]) for t in thresholds))
        if shared:
            rows.append([np.mean([scores[t, name][each] for each in shared]) for t in thresholds])
    if len(thresholds) < 2 or not rows:
        raise InputError("The table has no thresholds; make them with table1.py --preset timesteps.")
    return np.array(thresholds), np.array(rows)


def mean_between(log_snr: np.ndarray, values: np.ndarray, low: float, high: float) -> float:
    """The mean of values (T,), linear between their falling log-SNRs, over the log-SNR from low to high."""
    grid = np.linspace(low, high, 501)
    return float(np.interp(grid, log_snr[::-1], values[::-1]).mean())


def claims(models: Mapping[str, Curves]) -> dict[str, Any]:
    """Means are over the log-SNR, in the range that all models share."""
    found = {}
    low = max(curves.log_snr[-1] for curves in models.values())
    high = min(curves.log_snr[0] for curves in models.values())
    for label, curves in models.items():
        snr, rows = curves.thresholds, curves.similarity
        for data, increase in curves.increase.items():
            for where, ends in (("above", (PAPER_LOG_SNR, high)), ("below", (low, PAPER_LOG_SNR))):
                found[f"{label}, {data}: mean relative loss increase {where} the paper's SNR"] = (
                    mean_between(curves.log_snr, increase, *ends))
        for data, norms in curves.gradient.items():
            found[f"{label}, {data}: log-SNR of the peak of the gradient"] = estimate(
                norms, lambda rows, c=curves: c.of_gradient[rows.mean(0).argmax()])
        found |= {f"{label}: log-SNR of the best threshold": estimate(
                      rows, lambda rows, snr=snr: snr[rows.mean(0).argmax()]),
                  f"{label}: similarity with the best threshold": estimate(
                      rows, lambda rows: rows.mean(0).max()),
                  f"{label}: similarity with the threshold of the paper's SNR": estimate(
                      rows, lambda rows, snr=snr: np.interp(-PAPER_LOG_SNR, -snr, rows.mean(0)))}
    return {sentence: value if isinstance(value, dict) else float(value) for sentence, value in found.items()}


def plot(models: Mapping[str, Curves], path: Path) -> None:
    figure, axes = subplots(3, 1, width=7.5, height=3, sharex=True)
    increase, gradient, similarity = axes[:, 0]
    for (label, curves), color in zip(models.items(), COLORS, strict=False):
        for data, values in curves.increase.items():
            increase.plot(curves.log_snr, values, DASHES[data], color=color, label=f"{label}, {data}")
        for data, norms in curves.gradient.items():
            mean = norms.mean(0)
            gradient.plot(curves.of_gradient, mean / mean.max(), DASHES.get(data, ":"), color=color,
                          label=f"{label}, {data}")
        rows = curves.similarity
        error = rows.std(0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else None
        similarity.errorbar(curves.thresholds, rows.mean(0), error, marker="o", capsize=2, color=color,
                            label=label)
    increase.set(ylabel="loss increase by the poison", yscale="symlog")
    gradient.set(ylabel="gradient norm over its peak")
    similarity.set(ylabel="similarity, by threshold",
                   xlabel="log signal-to-noise ratio (noise grows to the right)")
    for axis in (increase, gradient, similarity):
        axis.axvline(PAPER_LOG_SNR, color="#888888", linestyle=":")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    similarity.invert_xaxis()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--labels", nargs="+", required=True, help="names of the models")
    add("--folders", nargs="+", required=True, type=user_path, help="each model's fig4.json and fig5.json")
    add("--tables", nargs="+", required=True, type=user_path, help="each model's output of table1.py")
    add("--output_dir", type=user_path, default="results/figures")
    args = parser.parse_args(argv)
    if not len(args.labels) == len(args.folders) == len(args.tables):
        parser.error("--labels, --folders and --tables have one entry a model")
    with exit_on_input_error():
        models = {label: read_curves(Path(folder), Path(table)) for label, folder, table
                  in zip(args.labels, args.folders, args.tables, strict=True)}
        plot(models, Path(args.output_dir) / "snr.png")
        found = claims(models)
        write_json(Path(args.output_dir) / "snr_claims.json", found)
        for sentence, value in found.items():
            print(f"{sentence}: {text_of(value)}")


if __name__ == "__main__":
    main()
