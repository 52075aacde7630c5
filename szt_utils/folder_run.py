"""One resumable run of a script over a folder of images: the same command again does what is missing.

The output folder holds the results, `options.json` (script, arguments, versions) and `stats.jsonl`, one
record per result: {"file": its name, "sha256": hash of what it was made of, ..., "seconds": per image}.
"""

import contextlib
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import InputError
from .files import append_stats, read_stats, write_json

__all__ = ["FolderRun", "open_run", "provenance", "sha256_of"]

Job = TypeVar("Job")
Record = dict[str, Any]


class FolderRun:
    """The output folder of a run; InputError when it belongs to another one (`open_run`).

    `script` is the script's file name, `arguments` is what decides the results, as JSON will hold it.
    """

    def __init__(self, output_dir: str | Path, script: str, arguments: dict[str, Any],
                 image_dir: str | Path | None = None):
        self.folder, self.script, self.arguments = Path(output_dir), script, arguments
        self.image_dir = image_dir
        self.records = open_run(self.folder, script, arguments, image_dir)
        self.finished = {record["file"]: record for record in self.records
                         if "file" in record and (self.folder / record["file"]).exists()}

    def batches(self, jobs: Sequence[Job], name: Callable[[Job], str],
                read: Callable[[Job], tuple[str, tuple[int, ...]]], batch_size: int = 1) -> list[list[Job]]:
        """The jobs whose result is missing or was made of something else, in batches of one shape.

        `name(job)` is its result's name, `read(job)` the hash of its input and its shape. Every job is read
        before any work, so that a file that cannot be used does not stop the run half-way. Prints how many
        there are.
        """
        work: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            sha256, shape = read(job)
            if self.finished.get(name(job), {}).get("sha256") != sha256:
                work.setdefault(shape, []).append(job)
        self.announce(len(jobs), sum(map(len, work.values())))
        return [same[i:i + batch_size] for same in work.values() for i in range(0, len(same), batch_size)]

    def announce(self, total: int, missing: int) -> None:
        """Print how many images there are, and how many of them lack a result."""
        print(f"{total} images in '{self.image_dir}', {missing} of them to do.")

    def begin(self, **more: Any) -> None:
        """Make the folder and write options.json, with `more` entries beside the arguments."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "options.json", {"script": self.script, "arguments": self.arguments, **more,
                                                  **provenance()})

    def append(self, records: Sequence[Record]) -> None:
        """Append records to stats.jsonl."""
        append_stats(self.folder / "stats.jsonl", records)
        self.records += records
        self.finished |= {record["file"]: record for record in records if "file" in record}

    def work(self, batches: Iterable[list[Job]], make: Callable[[list[Job]], list[Record]]) -> None:
        """Call `make(batch)` for every batch and append its records, with the seconds per image."""
        for batch in batches:
            start = time.perf_counter()
            records = make(batch)
            seconds = round((time.perf_counter() - start) / len(batch), 3)
            self.append([{**record, "seconds": seconds} for record in records])


def sha256_of(*tensors: torch.Tensor | None) -> str:
    """SHA-256 of the bytes of CPU tensors, in order; None is skipped."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_run(output_dir: str | Path, script: str, arguments: dict[str, Any],
             image_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """The stats.jsonl records that an output folder holds of this run, none when it is new; writes nothing.

    InputError when the folder holds another script's files, when its options.json has other arguments, or
    when it is `image_dir` or lies in it.
    """
    output_dir = Path(output_dir)
    if image_dir is not None and output_dir.resolve().is_relative_to(Path(image_dir).resolve()):
        raise InputError(f"--output_dir '{output_dir}' is --image_dir or lies in it; "
                         "give another --output_dir.")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir '{output_dir}' is not a folder; give another one.")
    if not output_dir.exists() or all(path.name.startswith(".") for path in output_dir.iterdir()):
        return []
    try:
        options = json.loads((output_dir / "options.json").read_text())
        ours, before = options["script"] == script, options["arguments"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"The folder '{output_dir}' holds files that this script did not write; "
                         "give another --output_dir.")
    changed = [f"--{name}" for name, value in arguments.items()
               if name not in before or before[name] != value]
    if changed:
        raise InputError(f"The folder '{output_dir}' was made with another {', '.join(changed)}; "
                         "give another --output_dir.")
    stats = output_dir / "stats.jsonl"
    return read_stats(stats) if stats.exists() else []


def provenance() -> dict[str, Any]:
    """Versions of the libraries that decide a result,
    and the commit of this project when it is run from a checkout."""
    versions = {}
    for name in ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    root = Path(__file__).parent.parent
    commit = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(command, capture_output=True, text=True,
                                    check=False).stdout.strip() or None
    return {"versions": versions, "commit": commit}
