"""Compare tables of poisons and defences with each other and with the paper's Table 1.

    python examples/compare_tables.py results/table1 results/world-0.1/table1

Prints the similarity by defence, on clean images and on average over the poisons, and the recovered share of
what the poisons took, for each folder and for the paper; then Spearman's rank correlation with the paper over
the defences. It compares only data, concepts and seeds that all folders have, and defences that have all of
these cells; of the paper, the same poisons and defences. Needs scipy: pip install scipy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from szt_utils.arguments import script_parser, user_path
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.tables import Cell, averages, read_table, recovered

try:
    from scipy.stats import spearmanr
except ImportError:
    raise SystemExit("error: This needs scipy: pip install scipy") from None

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
    """The mean of the poisons' rows, under "poisons", and the rows."""
    of_poisons = [row for name, row in rows.items() if name in POISONS]
    return {"poisons": {defence: mean(row[defence] for row in of_poisons) for defence in DEFENCES
                        if all(defence in row for row in of_poisons)}, **rows}


def read_folders(folders: Sequence[Path], metric: str = "dino") -> dict[str, Rows]:
    """The rows of each folder over the data, concepts and seeds that all of them have.

    InputError when they have no concept or no poison in common.
    """
    tables = {str(folder): [cell for cell in read_table(folder) if metric in cell.metrics]
              for folder in folders}
    places = [{(cell.data, cell.concept, cell.seed) for cell in cells} for cells in tables.values()]
    data = [name for name in PAPER if all(any(name == own for own, *_ in each) for each in places)]
    shared = {(concept, seed) for _, concept, seed in places[0]
              if all((name, concept, seed) in each for name in data for each in places)}
    if not shared or not {*data} & {*POISONS}:
        raise InputError(f"The folders have no cells with {metric} of the same poisons, concepts and seeds.")
    print(f"concepts: {len({concept for concept, _ in shared})}, seeds: {len({s for _, s in shared})}\n")

    def rows(cells: list[Cell]) -> Rows:
        found = averages([cell for cell in cells if (cell.concept, cell.seed) in shared], metric)
        whole = {place: average.mean for place, average in found.items() if average.count == len(shared)}
        return with_mean({name: {d: whole[name, d] for d in DEFENCES if (name, d) in whole} for name in data})
    return {name: rows(cells) for name, cells in tables.items()}


def rank_correlation(row: Row, other: Row) -> float | None:
    """Spearman's rank correlation of the defences that both rows have, without nominal training; None where
    one row does not vary."""
    both = [defence for defence in row if defence in other and defence != "nominal"]
    first, second = ([values[defence] for defence in both] for values in (row, other))
    return float(spearmanr(first, second).statistic) if len({*first}) > 1 < len({*second}) else None


def report(tables: Mapping[str, Rows]) -> str:
    """The tables beside the paper's, as Markdown."""
    compared = next(iter(tables.values()))
    paper = with_mean({name: dict(zip(DEFENCES, row, strict=True)) for name, row in PAPER.items()
                       if name in compared})

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
    lines += ["", line("rank correlation with the paper", *paper), "| --- |" + " --- |" * len(paper)]
    for name, rows in tables.items():
        ranks = [rank_correlation(rows[data], row) for data, row in paper.items()]
        lines.append(line(name, *("" if rank is None else f"{rank:.2f}" for rank in ranks)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, help="output folders of examples/table1.py")
    parser.add_argument("--metric", choices=("dino", "attributes"), default="dino",
                        help="similarity (dino), which is the paper's, or attributes")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        print(report(read_folders([Path(folder) for folder in args.folders], args.metric)))


if __name__ == "__main__":
    main()
