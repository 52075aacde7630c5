"""Compare tables of poisons and defences with each other and with the paper's Table 1.

    python examples/compare_tables.py results/table1 results/world-0.1/table1

Prints the similarity by defence, on clean images and on average over the poisons, and the recovered share of
what the poisons took, for each folder and for the paper; then Spearman's rank correlation with the paper over
the defences. Only concepts and seeds that all folders have count. Needs scipy: pip install scipy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from scipy.stats import spearmanr

from szt_utils.arguments import script_parser, user_path
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.tables import Cell, averages, read_cells, recovered

DEFENCES = ("nominal", "regen", "pdmpure", "advclean", "jpeg", "t600", "lm", "jpeg+t600", "jpeg+lm", "szt")
# DINOv2 similarity on CustomConcept101, in the order of DEFENCES.
PAPER = {
    "clean": (.46, .46, .25, .45, .45, .50, .47, .47, .46, .48),
    "adm+": (.10, .17, .23, .15, .36, .25, .30, .41, .44, .45),
    "adm-": (.33, .25, .23, .35, .41, .27, .43, .45, .45, .46),
    "sds+": (.10, .16, .25, .16, .34, .23, .32, .40, .45, .44),
    "sds-": (.31, .22, .23, .35, .40, .23, .42, .45, .45, .47),
    "ea": (.10, .09, .24, .19, .33, .12, .29, .44, .44, .46),
    "da": (.29, .25, .27, .35, .39, .22, .42, .44, .46, .47),
}
POISONS = tuple(PAPER)[1:]
Row = Mapping[str, float]  # by defence
Rows = Mapping[str, Row]  # by data, and the poisons' mean


def with_mean(rows: dict[str, Row]) -> Rows:
    """The rows and, under "poisons", the mean of those of the poisons."""
    defences = set.intersection(*(set(rows[name]) for name in POISONS if name in rows))
    return {**rows, "poisons": {defence: mean(rows[name][defence] for name in POISONS if name in rows)
                                for defence in DEFENCES if defence in defences}}


def read_rows(cells: Sequence[Cell]) -> Rows:
    """Mean similarities of cells."""
    places = averages(cells, "dino")
    return with_mean({name: {d: places[name, d].mean for d in DEFENCES if (name, d) in places}
                      for name in PAPER if any((name, d) in places for d in DEFENCES)})


def read_folders(folders: Sequence[Path]) -> dict[str, Rows]:
    """The rows of each folder over the concepts and seeds that all of them have.

    InputError when they have none, or no poison, in common.
    """
    tables = {str(folder): read_cells(folder) for folder in folders}
    shared = set.intersection(*({(cell.concept, cell.seed) for cell in cells if cell.data in POISONS}
                                for cells in tables.values()))
    if not shared:
        raise InputError("The folders have no cells of poisons of the same concepts and seeds.")
    print(f"concepts: {len({concept for concept, _ in shared})}, seeds: {len({s for _, s in shared})}\n")
    return {name: read_rows([cell for cell in cells if (cell.concept, cell.seed) in shared])
            for name, cells in tables.items()}


def rank_correlation(row: Row, other: Row) -> float:
    """Spearman's rank correlation of the defences that both rows have."""
    both = [defence for defence in row if defence in other]
    return float(spearmanr([row[d] for d in both], [other[d] for d in both]).statistic)


def report(tables: Mapping[str, Rows]) -> str:
    """The tables beside the paper's, as Markdown."""
    paper = with_mean({name: dict(zip(DEFENCES, row, strict=True)) for name, row in PAPER.items()})

    def line(*parts: str) -> str:
        return "| " + " | ".join(parts) + " |"
    lines = [line("", *DEFENCES), "| --- |" + " --- |" * len(DEFENCES)]
    for name, rows in {**tables, "the paper": paper}.items():
        nominal, clean = rows["poisons"].get("nominal"), rows.get("clean", {}).get("nominal")
        for data in ("clean", "poisons"):
            lines.append(line(f"{name}, {data}", *(f"{rows[data][d]:.2f}" if d in rows.get(data, {}) else ""
                                                   for d in DEFENCES)))
        if nominal is not None and clean is not None:
            shares = {d: recovered(value, nominal, clean) for d, value in rows["poisons"].items()}
            lines.append(line(f"{name}, recovered", *("" if d == "nominal" or shares.get(d) is None
                                                      else f"{shares[d]:.0%}" for d in DEFENCES)))
    lines += ["", line("rank correlation with the paper", "poisons", *PAPER),
              "| --- |" + " --- |" * (len(PAPER) + 1)]
    for name, rows in tables.items():
        lines.append(line(name, *(f"{rank_correlation(rows[data], paper[data]):.2f}" if data in rows else ""
                                  for data in ("poisons", *PAPER))))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, help="output folders of examples/table1.py")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        print(report(read_folders([Path(folder) for folder in args.folders])))


if __name__ == "__main__":
    main()
