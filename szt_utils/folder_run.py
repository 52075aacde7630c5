"""One resumable run of a script over a folder of images: the same command again does what is missing.

The output folder holds the results, `options.json` (script, arguments, versions) and `stats.jsonl`, one
record per result: {"file": its name, "sha256": hash of what it was made of, ..., "seconds": per image,
"outputs": {its name: hash of its bytes}}. Records of version 0.1 have no "outputs".
"""

import collections
import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm.auto import tqdm

from .errors import InputError, printable, some_of
from .files import append_stats, read_json, read_stats, write_bytes, write_json
from .images import png_bytes
from .locks import lock_folder, sweep_leftovers

__all__ = ["FolderRun", "Record", "library_versions", "open_run", "provenance", "sha256_of"]

MOST_FAILURES = 3  # after which a run ends that has made nothing
Job = TypeVar("Job")
Record = dict[str, Any]


class FolderRun:
    """The output folder of a run. Within its `with` block, it is locked and no other command works in it.

    `script` is the script's file name, `arguments` is what decides the results, as JSON will hold it.
    Entering raises InputError when the folder belongs to another run (`open_run`) or is in use
    (`lock_folder`), and removes what a killed run left. A result that was changed by hand is kept and named,
    never overwritten.
    """

    keeps_unrecorded = False  # whether a file without a record counts as made by hand, too

    def __init__(self, output_dir: str | Path, script: str, arguments: dict[str, Any],
                 image_dir: str | Path | None = None):
        self.folder, self.script, self.arguments = Path(output_dir), script, arguments
        self.image_dir = image_dir
        self.records: list[Record] = []
        self.latest: dict[str, Record] = {}  # the newest record of every result
        self._made: dict[tuple[str, str], Record] = {}  # by a result's name and the hash of its bytes

    def __enter__(self) -> "FolderRun":
        open_run(self.folder, self.script, self.arguments, self.image_dir)  # makes no folder if refused
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_folder(self.folder))
            self._remember(open_run(self.folder, self.script, self.arguments, self.image_dir))
            sweep_leftovers(self.folder, recursive=True)
            self._lock = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._lock.close()

    def _remember(self, records: Sequence[Record]) -> None:
        self.records += records
        for record in records:
            for name, digest in (_outputs(record) or {str(record.get("file")): None}).items():
                self.latest[name] = record
                self._made[name, str(digest)] = record

    def find(self, name: str) -> tuple[Record | None, bool]:
        """The record of a result, None without one; and whether its file was changed by hand."""
        latest = self.latest.get(name)
        if not os.path.isfile(self.folder / name):
            return None, False
        if latest is None:
            return None, self.keeps_unrecorded
        if not _outputs(latest):
            return latest, False
        record = self._made.get((name, hashlib.sha256((self.folder / name).read_bytes()).hexdigest()))
        return record, record is None

    def missing(self, jobs: Sequence[Job], names: Callable[[Job], Sequence[str]],
                is_current: Callable[[Job, Record], bool]) -> list[Job]:
        """The jobs that lack a result, or with one whose record is not current.

        `names(job)` are the names of its results; those changed by hand do not count. Prints how many jobs
        there are, and what is kept.
        """
        work, kept = [], []
        for job in jobs:
            found = {name: self.find(name) for name in names(job)}
            kept += [name for name, (_, by_hand) in found.items() if by_hand]
            if not all(by_hand or (record and is_current(job, record)) for record, by_hand in found.values()):
                work.append(job)
        where = f" in '{printable(self.image_dir)}'" if self.image_dir else ""
        print(f"{len(jobs)} images{where}, {len(work)} of them to do.")
        if kept:
            print(f"Results made or changed by hand are kept ({len(kept)}): {some_of(kept, 10)}; "
                  "delete them to make them again.")
        wanted = {name for job in jobs for name in names(job)}
        others = [name for name, record in self.latest.items() if "source" in record and name not in wanted
                  and os.path.isfile(self.folder / name)]
        if others:
            print(f"Results of images that are no longer there are kept ({len(others)}): "
                  f"{some_of(others, 10)}.")
        return work

    def batches(self, jobs: Sequence[Job], name: Callable[[Job], str],
                read: Callable[[Job], tuple[str, tuple[int, ...]]], batch_size: int = 1) -> list[list[Job]]:
        """The jobs whose result is missing or was made of something else, in batches of one shape.

        `name(job)` is its result's name, `read(job)` the hash of its input and its shape. Every job is read
        before any work, so that a file that cannot be used does not stop the run half-way.
        """
        inputs = {name(job): read(job) for job in jobs}
        work: dict[tuple[int, ...], list[Job]] = {}
        for job in self.missing(jobs, lambda job: [name(job)], lambda job, record: (
                record.get("sha256") == inputs[name(job)][0])):
            work.setdefault(inputs[name(job)][1], []).append(job)
        return [same[i:i + batch_size] for same in work.values() for i in range(0, len(same), batch_size)]

    def begin(self, **more: Any) -> None:
        """Make the folder and write options.json, with `more` entries beside the arguments."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "options.json", {"script": self.script, "arguments": self.arguments, **more,
                                                  **provenance()})

    def append(self, records: Sequence[Record]) -> None:
        """Append records to stats.jsonl."""
        append_stats(self.folder / "stats.jsonl", records)
        self._remember(records)

    def without_kept(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Results by name, without those that were changed by hand."""
        return {name: content for name, content in files.items() if not self.find(name)[1]}

    def save(self, records: Sequence[Record], files: Mapping[str, bytes]) -> None:
        """Write results by name, and their records.

        The records come first: a run that is killed in between makes the result again, and does not take it
        for one that was changed by hand.
        """
        outputs = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.append([{**record, "outputs": outputs} for record in records])
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / name, content)

    def save_image(self, record: Record, image: Image.Image) -> None:
        """Write the image `record["file"]` as a PNG, and its record."""
        self.save([record], {record["file"]: png_bytes(image)})

    def work(self, batches: Iterable[list[Job]],
             make: Callable[[list[Job]], list[tuple[Record, Image.Image]]], path: Callable[[Job], Path],
             title: str | None = None) -> None:
        """Call `make(batch)` for every batch; save its images and records, with the seconds per image.

        An image for which `make` raises an InputError is left out. An InputError at the end gives each
        reason and the `path`s of the first images that failed for it. When the first images of a new folder
        all fail for one reason, the rest is not tried. With a `title`, a progress bar counts the images.
        """
        work, made, untried = collections.deque(batches), 0, 0
        failures: dict[str, list[str]] = collections.defaultdict(list)  # the images of every reason
        with tqdm(total=sum(map(len, work)), unit="image", desc=title, disable=title is None) as progress:
            while work and not untried:
                batch, start = work.popleft(), time.perf_counter()
                try:
                    results = make(batch)
                except InputError as error:
                    if len(batch) > 1:  # which of them it is shows when they are made alone
                        work.extendleft([job] for job in reversed(batch))
                        continue
                    failed = failures[str(error)]
                    failed.append(f"'{path(batch[0])}'")
                    if len(failed) == MOST_FAILURES and len(failures) == 1 and not (made or self.latest):
                        untried = sum(map(len, work))
                else:
                    made += len(batch)
                    seconds = round((time.perf_counter() - start) / len(batch), 3)
                    for record, image in results:
                        self.save_image({**record, "seconds": seconds}, image)
                progress.update(len(batch))
        if failures:
            reasons = [f"{some_of(failed)}: {reason}" for reason, failed in failures.items()]
            reasons += [f"The other images were not tried ({untried})."] * (untried > 0)
            raise InputError(" ".join(reasons))


def _outputs(record: Record) -> dict[str, Any]:
    """The hashes of a record's results by name, none for a record of version 0.1."""
    outputs = record.get("outputs")
    return outputs if isinstance(outputs, dict) else {}


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
        options = read_json(output_dir / "options.json")
        ours, before = options["script"] == script, dict(options["arguments"])
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"The folder '{output_dir}' holds files that this script did not write; "
                         "give another --output_dir.")
    changed = [f"--{name}" for name, value in arguments.items()
               if name not in before or _same_path(before[name]) != _same_path(value)]
    if changed and any(path.is_file() and path.name != "options.json" and not path.name.startswith(".")
                       for path in output_dir.rglob("*")):  # else the run has failed before its first result
        raise InputError(f"The folder '{output_dir}' was made with another {', '.join(changed)}; "
                         "give another --output_dir.")
    stats = output_dir / "stats.jsonl"
    return read_stats(stats) if stats.exists() else []


def _same_path(value: Any) -> Any:
    """A recorded argument, a path without the slash at its end that a shell adds."""
    return value.rstrip("/") if isinstance(value, str) else value


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    versions = {}
    for name in ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def provenance() -> dict[str, Any]:
    """The `library_versions`, and the commit of this project when it is run from a checkout."""
    root = Path(__file__).parent.parent
    commit = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(command, capture_output=True, text=True,
                                    check=False).stdout.strip() or None
    return {"versions": library_versions(), "commit": commit}
