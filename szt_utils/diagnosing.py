"""Diagnosis of a folder of images, as `diagnose_images.py` does it.

Every image is judged by its pixels (`szt_utils.pixel_score`), at its full size. A model's signals
(`szt_utils.diagnosis`) join them under "model" where a model is given. The output folder gets
`diagnosis.json`, `options.json` and, with a model, `stats.jsonl` with the model's signals of every image and
the `calibration.json` of the clean images.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from . import pocket
from .devices import best_device, dtype_of
from .diagnosis import SIGNALS, calibrate, check_clean_count, image_signals, read_calibration, report
from .errors import InputError, printable
from .files import write_json
from .fingerprint import identity
from .folder_run import FolderRun, Record, sha256_of
from .images import list_images, read_image
from .models import Model, load_model
from .pixel_score import is_coarse_jpeg, read_pixel_calibration, report_pixels
from .pixel_signals import pixel_signals
from .square_images import read_square, resolution_for

__all__ = ["DiagnosisSettings", "diagnose_folder"]


@dataclass(frozen=True)
class DiagnosisSettings:
    """What decides a diagnosis; a field has the name and the meaning of its flag."""

    image_dir: str
    pretrained_model_name_or_path: str | None = None
    clean_dir: str | None = None
    calibration: str | None = None
    resolution: int | None = None
    seed: int = 0
    mixed_precision: str = "no"
    revision: str | None = None
    variant: str | None = None


def diagnose_folder(settings: DiagnosisSettings, output_dir: str | Path) -> dict[str, Any]:
    """Write and print the diagnosis of every image of a folder; returns the content of diagnosis.json.

    Signals that stats.jsonl holds are not computed again. InputError for input that cannot be used, before
    anything is written.
    """
    with FolderRun(output_dir, "diagnose_images.py", asdict(settings), settings.image_dir) as run:
        diagnosis = _diagnose(settings, run)
    for title, part in (("", diagnosis), ("by the model, ", diagnosis.get("model"))):
        for name, image in part["images"].items() if part else ():
            print(f"{title}{printable(name)}: {image['sentence']}")
        if part:
            print(f"{title}{part['sentence']}")
    return diagnosis


def _diagnose(settings: DiagnosisSettings, run: FolderRun) -> dict[str, Any]:
    """Write the diagnosis and, with a model, its calibration; returns the diagnosis."""
    root = Path(settings.image_dir)
    calibration = _find_calibration(settings)
    clean = list_images(settings.clean_dir, recursive=True) if settings.clean_dir else []
    paths = {path.relative_to(root).as_posix(): path for path in list_images(root, recursive=True)}
    if settings.clean_dir and calibration is None:
        check_clean_count(len(clean))
    for path in clean:
        read_image(path)  # an unreadable file must not stop the run half-way
    rows = {name: pixel_signals(np.asarray(read_image(path)))
            for name, path in tqdm(paths.items(), desc="pixels", unit="image")}
    coarse = [name for name, path in paths.items() if is_coarse_jpeg(path)]
    diagnosis = report_pixels(read_pixel_calibration(), rows, coarse)
    if settings.pretrained_model_name_or_path:
        model, made_with = _load_model(settings)
        for name, value in (calibration or {}).get("made_with", {}).items():
            if value != made_with[name]:
                raise InputError(f"The calibration '{settings.calibration or 'built in'}' was made with the "
                                 f"{name} {value}, not {made_with[name]}; give --clean_dir instead.")
        signals = _measure(model, made_with["resolution"], [*clean, *paths.values()], settings, run)
        if calibration is None:
            calibration = {**calibrate([signals[path] for path in clean]), "made_with": made_with}
            write_json(run.folder / "calibration.json", calibration)
        diagnosis["model"] = report(calibration, {name: signals[path] for name, path in paths.items()})
    else:
        run.begin()
    write_json(run.folder / "diagnosis.json", diagnosis)
    return diagnosis


def _known_signals(records: Sequence[Record]) -> dict[str, list[float]]:
    """The signals that records hold by the hash of their image, without those that are not numbers."""
    known = {str(record.get("sha256")): [record.get(name) for name in SIGNALS] for record in records}
    return {sha256: values for sha256, values in known.items()
            if all(isinstance(value, float) and math.isfinite(value) for value in values)}


def _find_calibration(settings: DiagnosisSettings) -> dict[str, Any] | None:
    """The model's calibration, None with a clean_dir or without a model; InputError when it has none."""
    if not settings.pretrained_model_name_or_path:
        return None
    if settings.calibration:
        return read_calibration(settings.calibration)
    if settings.clean_dir:
        return None
    if Path(settings.pretrained_model_name_or_path).resolve() == Path(pocket.model_path()).resolve():
        return read_calibration(pocket.calibration_path())
    raise InputError(f"The model '{settings.pretrained_model_name_or_path}' needs --clean_dir, a folder of "
                     "clean images, or the --calibration of an earlier run: only the pocket model has one "
                     "built in.")


def _load_model(settings: DiagnosisSettings) -> tuple[Model, dict[str, Any]]:
    """The model, and what a calibration made with it must be used with: the model and the resolution."""
    path = settings.pretrained_model_name_or_path
    model = load_model(path, revision=settings.revision, variant=settings.variant,
                       dtype=dtype_of(settings.mixed_precision), device=best_device())
    return model, {"model": identity(path), "resolution": resolution_for(model, settings.resolution)}


def _measure(model: Model, resolution: int, paths: Sequence[Path], settings: DiagnosisSettings,
             run: FolderRun) -> dict[Path, list[float]]:
    """The signals of every image; those of an image in the run's records are taken from there."""
    run.begin()
    known = _known_signals(run.records)
    signals = {}
    for path in tqdm(paths, desc="signals", unit="image"):
        _, pixels = read_square(path, resolution)
        sha256 = sha256_of(pixels)
        if sha256 not in known:
            known[sha256] = image_signals(model, pixels, seed=settings.seed)
            if not all(map(math.isfinite, known[sha256])):
                raise InputError(f"The signals of '{path}' are not finite; use --mixed_precision bf16 or no "
                                 "instead of fp16.")
            run.append([{"file": str(path), "sha256": sha256,
                         **dict(zip(SIGNALS, known[sha256], strict=True))}])
        signals[path] = known[sha256]
    return signals
