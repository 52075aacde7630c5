"""K concepts in one run against K separate runs, ours and upstream's algorithm: seconds per concept-step.

    python benchmarks/concepts.py --concepts 1 2 4 8 16 --batch_size 1

A separate run's step is that of a run alone, so K of them take K times as long.
"""

import argparse
import json
import tempfile
from pathlib import Path

import training_step
from PIL import Image
from timing import alternate, medians, ratio, report

from szt_utils.pocket import write_concept


def together(options, folder: Path, count: int) -> float:
    """Seconds per step of a run of `count` concepts."""
    concepts = folder / f"concepts-{count}.json"
    concepts.write_text(json.dumps([{"placeholder_token": f"<new-{i}>"} for i in range(count)]))
    return training_step.ours(options, folder / "pictures", "--concepts", str(concepts),
                              "--concepts_per_batch", str(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    training_step.add_options(parser)
    options = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_concept("teal-striped-star", folder / "pictures", folder / "masks")
        for picture in (folder / "pictures").iterdir():
            Image.open(picture).resize((options.picture_size,) * 2).save(picture)
        upstream = training_step.Upstream(options, folder / "pictures")
        for count in options.concepts:
            sides = {"upstream": upstream.run,
                     "ours alone": lambda: training_step.ours(options, folder / "pictures"),
                     "ours together": lambda count=count: together(options, folder, count) / count}
            durations = alternate(sides, options.rounds)
            results[count] = {"seconds per concept-step": medians(durations),
                              "upstream / ours together": ratio(durations, "upstream", "ours together"),
                              "ours alone / ours together": ratio(durations, "ours alone", "ours together")}
            print(count, json.dumps(results[count]), flush=True)
    report(f"concepts_{options.size}_batch{options.batch_size}_{options.precision}",
           {"options": vars(options), "concepts": results})


if __name__ == "__main__":
    main()
