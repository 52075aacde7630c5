"""Atomic writes, JSON and stats.jsonl: a crash or a full disk leaves no half-written file."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["append_stats", "atomic_path", "read_stats", "truncate_stats", "write_bytes", "write_json",
           "write_torch"]


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
        error.filename = str(path)  # name the final file, not the temporary one
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


def append_stats(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
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
    """The records of a stats.jsonl; a last line that a crash cut short is ignored."""
    records = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def truncate_stats(path: str | Path, last_step: int) -> None:
    """Drop the records after `last_step`, so that a resumed run does not record a step twice."""
    if Path(path).exists():
        kept = [record for record in read_stats(path) if record["step"] <= last_step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
