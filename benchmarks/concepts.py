"""K concepts in one run against K separate runs, ours and upstream's loop: seconds per concept and step.

    python benchmarks/concepts.py --concepts 1 2 4 8 16 --batch_size 1

A step of a separate run is that of a run alone, so K of them take K times as long.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from timing import alternate, medians, ratio, report
from training_step import Settings, ours, upstream, write_images

from szt_utils.arguments import script_parser


def together(settings: Settings, images: Path, count: int) -> float:
    """Seconds per step of a run of `count` concepts."""
    concepts = images.parent / f"concepts-{count}.json"
    concepts.write_text(json.dumps([{"placeholder_token": f"<new-{i}>"} for i in range(count)]))
    return ours(settings, images, concepts=concepts, concepts_per_batch=count)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    Settings.add_flags(parser)
    args = parser.parse_args()
    settings, results = Settings.of(args), {}
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(settings, Path(folder))
        for count in args.concepts:
            sides = {"upstream": lambda: upstream(settings, images),
                     "ours alone": lambda: ours(settings, images),
                     "ours together": lambda count=count: together(settings, images, count) / count}
            durations = alternate(sides, settings.rounds)
            results[count] = {"seconds per concept-step": medians(durations),
                              "upstream / ours together": ratio(durations, "upstream", "ours together"),
                              "ours alone / ours together": ratio(durations, "ours alone", "ours together")}
            print(count, json.dumps(results[count]), flush=True)
    report(f"concepts_{settings.size}_batch{settings.batch_size}_{settings.precision}",
           {"options": {"concepts": args.concepts, **asdict(settings)}, "concepts": results})


if __name__ == "__main__":
    main()
