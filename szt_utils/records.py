"""What a run leaves behind: options.json, stats.jsonl,
and files that are whole or absent, never half-written."""

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["append_stats", "atomic_path", "open_run", "provenance", "read_stats", "truncate_stats",
           "write_bytes", "write_json", "write_torch"]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends without an error.

    The content reaches the disk before the name does,
    so that a crash or a full disk leaves the old file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not say where, and nobody knows the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically; a full disk is an OSError that names it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_torch(path: str | Path, content: Any) -> None:
    """Write with torch.save's format, atomically."""
    import torch

    buffer = io.BytesIO()  # torch.save itself raises RuntimeError when the disk is full
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented, with a newline at the end."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def append_stats(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Append one JSON object per line, on a line of their own even if a crash cut the last one short."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else "\n" + lines
            file.write(lines.encode())
    except OSError as error:
        error.filename = str(path)
        raise


def read_stats(path: str | Path) -> list[dict[str, Any]]:
    """The records of a stats.jsonl; a last line that a crash cut short is passed over."""
    records = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def truncate_stats(path: str | Path, last_step: int) -> None:
    """Drop the records after `last_step`, so that a resumed run does not tell the same steps twice."""
    if Path(path).exists():
        kept = [record for record in read_stats(path) if record["step"] <= last_step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


def open_run(output_dir: str | Path, script: str, arguments: dict[str, Any],
             image_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """The stats.jsonl records that an output folder holds of this run, none when it is new; writes nothing.

    Raises InputError when the folder has files that are not of `script`, the script's file name, when its
    options.json, {"script": ..., "arguments": ...}, is of other arguments, or when it lies in `image_dir`.
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
        raise InputError(f"The folder '{output_dir}' holds files that are not of this script; "
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
