"""Calibrate and test the pixel signals of `diagnose_images.py` on real clean and really poisoned images.

    python examples/calibrate_pixels.py --image_dir images --output_dir calibration

The folder holds `<source>/<kind>/<image>`: a kind is `clean-photograph`, `clean-painting` or another clean
one, or the name of a poison. Images of one source share their origin, such as one data set. Copies of every
image (noisy, JPEG-saved, upscaled, ...) are made in memory. Writes pixel_calibration.json, which belongs into
szt_utils, signals.json, and measured.json: what is found and missed when the source and its poisons take no
part in the calibration.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm.auto import tqdm

from szt_utils.arguments import number, script_parser, user_path
from szt_utils.errors import InputError, exit_on_input_error
from szt_utils.files import read_json, write_json
from szt_utils.images import list_images, read_image
from szt_utils.jpeg import jpeg
from szt_utils.pixel_score import PARTS, fit_score, score_pixels
from szt_utils.pixel_signals import SIGNALS, pixel_signals
from szt_utils.statistics import roc_auc

LARGEST = 1024  # pixels: larger images are cut to their center before copies are made
ACCUSED, MISSED = 0.05, 0.1  # shares: of clean images called poisoned, of poisons called clean
NOISE_WEIGHT = 4  # of clean noisy copies, which poisons are mistaken for most easily


def noisy(image: Image.Image, level: float) -> Image.Image:
    """The image with Gaussian noise of so many levels, by draws that its pixels decide."""
    pixels = np.asarray(image)
    rng = np.random.default_rng(zlib.crc32(pixels.tobytes()))
    changed = (pixels + rng.normal(0, level, pixels.shape)).round().clip(0, 255)
    return Image.fromarray(changed.astype(np.uint8))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([round(length * factor) for length in image.size], Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "original": lambda image: image,
    "noise 2": lambda image: noisy(image, 2), "noise 4": lambda image: noisy(image, 4),
    "noise 8": lambda image: noisy(image, 8),
    "JPEG 95": lambda image: jpeg(image, 95), "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 75": lambda image: jpeg(image, 75),
    "upscaled 1.5": lambda image: scaled(image, 1.5), "upscaled 2": lambda image: scaled(image, 2),
    "sharpened": lambda image: image.filter(ImageFilter.UnsharpMask(2, 150, 0)),
    "halved": lambda image: scaled(image, 0.5),
}
# Copies of poisons that teach the scores: where a poison is there to be seen, and where it is not to be
# called clean.
TAUGHT = {"poison": ("original", "noise 2", "noise 4", "sharpened", "halved"), "trace": tuple(COPIES)}
EXPECTED = tuple(copy for copy in COPIES if copy not in ("JPEG 75", "sharpened"))  # of poisons in the wild
TREATMENTS = ("original", "noise", "JPEG", "upscaled", "sharpened", "halved")  # COPIES by first word


def measure(folder: Path, most: int) -> Iterator[dict]:
    """The signals of all copies of at most `most` images of every kind of every source."""
    kinds = sorted(path for path in folder.glob("*/*") if path.is_dir())
    if not kinds:
        raise InputError(f"The folder '{folder}' holds no <source>/<kind> folders.")
    for kind in tqdm(kinds, desc="signals", unit="kind"):
        paths = list_images(kind)
        chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
        for path in (paths[i] for i in chosen):
            image = read_image(path)
            left, top = (max(0, length - LARGEST) // 2 for length in image.size)
            image = image.crop((left, top, *(start + min(length, LARGEST) for start, length
                                             in zip((left, top), image.size, strict=True))))
            for copy, make in COPIES.items():
                yield {"source": kind.parent.name, "kind": kind.name, "file": path.name, "copy": copy,
                       "signals": pixel_signals(np.asarray(make(image)))}


class Table:
    """Measured copies as columns: signals, source, kind, copy, treatment, and whether they are poisoned."""

    def __init__(self, records: list[dict]):
        self.signals = np.array([record["signals"] for record in records])
        self.source, self.kind, self.copy = (np.array([record[name] for record in records])
                                             for name in ("source", "kind", "copy"))
        self.treatment = np.array([copy.split()[0] for copy in self.copy])
        self.poisoned = ~np.char.startswith(self.kind, "clean")

    def learns(self, part: str) -> np.ndarray:
        """The rows that a score is fitted to: all clean ones, and the copies of poisons that teach it."""
        return ~self.poisoned | np.isin(self.copy, TAUGHT[part])

    def fit(self, part: str, rows: np.ndarray) -> dict:
        """A score fitted to some rows; a weight is one over the root of the number of its like, or more."""
        like = [f"{kind} {copy if bad else treatment}" for kind, copy, treatment, bad in
                zip(*(column[rows] for column in (self.kind, self.copy, self.treatment, self.poisoned)),
                    strict=True)]
        count = Counter(like)
        weight = np.array([count[x]**-0.5 for x in like])
        weight[~self.poisoned[rows] & (self.treatment[rows] == "noise")] *= NOISE_WEIGHT
        return fit_score(self.signals[rows], self.poisoned[rows], weight)

    def left_out(self, part: str) -> np.ndarray:
        """Scores of every row, by what other sources and other poisons teach."""
        scores = np.full(len(self.kind), np.nan)
        for source in np.unique(self.source):
            own = self.source == source
            known = np.isin(self.kind, np.unique(self.kind[own & self.poisoned]))
            scores[own] = score_pixels(self.fit(part, self.learns(part) & ~own & ~known), self.signals[own])
        return scores


def thresholds(table: Table, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Where "poisoned" begins and "clean" ends: 5 % of each treated clean kind, 10 % of copied poisons.

    Kinds of fewer than 20 copies count together only, and photographs chosen for their noise do not count.
    Nor do poisons sharpened or at JPEG 75: to wait for them would call hardly any image clean.
    """
    ordinary = ~table.poisoned & (table.kind != "clean-noisy")
    cells = [ordinary & (table.kind == kind) & (table.treatment == treatment)
             for kind in np.unique(table.kind) for treatment in TREATMENTS]
    clean = [ordinary, *(cell for cell in cells if cell.sum() >= 20)]
    poisons = [rows for copy in EXPECTED if (rows := table.poisoned & (table.copy == copy)).any()]
    return {"poison": max(float(np.quantile(scores["poison"][rows], 1 - ACCUSED)) for rows in clean),
            "trace": min(float(np.quantile(scores["trace"][rows], MISSED)) for rows in poisons)}


def wilson(found: int, count: int, z: float = 1.96) -> dict[str, float]:
    """A share and its Wilson interval (95 %): {"found", "of", "low", "high"}."""
    share, spread = found / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return {"found": int(found), "of": int(count), "low": float(max(0, middle - half)),
            "high": float(min(1, middle + half))}


def summarize(table: Table, scores: dict[str, np.ndarray], limit: dict[str, float]) -> dict:
    """Found, missed and accused images by kind and copy, and the area under the ROC curve."""
    accused = scores["poison"] > limit["poison"]
    cleared = ~accused & (scores["trace"] < limit["trace"])
    found = {}
    for kind in np.unique(table.kind):
        copies = table.treatment if kind.startswith("clean") else table.copy
        found[str(kind)] = {
            str(copy): {name: wilson(rows[own].sum(), own.sum()) for name, rows in
                        (("poisoned", accused), ("clean", cleared))}
            for copy in dict.fromkeys(copies[table.kind == kind])
            for own in [(table.kind == kind) & (copies == copy)]}
    as_it_is = table.copy == "original"
    score = scores["poison"]
    area = {against: roc_auc(score[~table.poisoned & rows], score[table.poisoned & as_it_is])
            for against, rows in (("originals", as_it_is), ("all copies", as_it_is | True))}
    return {"area": area, "thresholds": limit, "kinds": found}


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--image_dir", type=user_path, required=True,
                        help="folder of <source>/<kind>/<image>")
    parser.add_argument("--output_dir", type=user_path, default="calibration")
    parser.add_argument("--most", type=number(int, 1), default=40,
                        help="images of one kind of one source, at equal distances of their names (40)")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        of = {"image_dir": str(Path(args.image_dir).resolve()), "most": args.most}
        path = output / "signals.json"
        if not path.exists():
            write_json(path, {**of, "images": list(measure(Path(args.image_dir), args.most))})
        before = read_json(path)
        if not isinstance(before, dict) or {name: before.get(name) for name in of} != of:
            raise InputError(f"'{path}' was made with another --image_dir or --most; give another "
                             "--output_dir.")
        records = before["images"]
        table = Table([record for record in records if record["signals"]])
        for what, rows in (("clean images", ~table.poisoned), ("poisons", table.poisoned)):
            if len(np.unique(table.source[rows])) < 2:
                raise InputError(f"'{args.image_dir}' has fewer than two sources of {what}: none can be left "
                                 "out; add one.")
        scores = {part: table.left_out(part) for part in PARTS}
        limit = thresholds(table, scores)
        write_json(output / "pixel_calibration.json", {"signals": list(SIGNALS), **{
            part: {**table.fit(part, table.learns(part)), "threshold": limit[part]} for part in PARTS}})
        found = summarize(table, scores, limit)
        found["without signals"] = Counter(r["kind"] for r in records if not r["signals"])
        write_json(output / "measured.json", found)
        for kind, copies in found["kinds"].items():
            print(kind, {copy: (f"{x['poisoned']['found']} poisoned, {x['clean']['found']} clean of "
                                f"{x['poisoned']['of']}") for copy, x in copies.items()})


if __name__ == "__main__":
    main()
