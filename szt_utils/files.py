"""Reading and writing: one reader of JSON and text, stats.jsonl, and atomic writes.

A crash or a full disk leaves no half-written file.
"""

import contextlib
import io
import json
import math
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

from .errors import InputError, first_line

__all__ = ["append_stats", "atomic_path", "nfc", "parse_json", "read_calibration_json", "read_json",
           "read_stats", "read_text", "read_torch", "truncate_stats", "write_bytes", "write_json",
           "write_text", "write_torch"]

MEGABYTES = 64  # the largest text or JSON file that is read


def nfc(name: str) -> str:
    """A file's name in Unicode's composed form: macOS writes accents in another one than people type."""
    return unicodedata.normalize("NFC", name)


def read_text(path: str | Path, what: str = "file") -> str:
    """A text file as UTF-8, with or without a byte order mark, whatever the locale.

    InputError, which calls the file `what`, when it is missing, too large or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read((MEGABYTES << 20) + 1)
        if len(content) > MEGABYTES << 20:
            raise InputError(f"The {what} '{path}' has more than {MEGABYTES} MB; give a smaller one.")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise InputError(f"The {what} '{path}' does not exist.") from None
    except OSError as error:
        raise InputError(f"The {what} '{path}' cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"The {what} '{path}' is not UTF-8 text; save it as UTF-8.") from None


def read_json(path: str | Path, what: str = "file") -> Any:
    """What a JSON file holds (`read_text`, `parse_json`); InputError, which calls the file `what`."""
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"The {what} '{path}' is not valid JSON ({error}).") from None


def read_calibration_json(path: str | Path, fits: Callable[[Any], bool], of: str, advice: str) -> Any:
    """Read a calibration `of` a model; InputError, with the `advice`, for content that `fits` rejects.

    `fits` may raise ValueError, LookupError or TypeError about content of another shape.
    """
    reason = ""
    try:
        content = read_json(path, "calibration")
        if fits(content):
            return content
    except InputError as error:
        reason = f" ({str(error).rstrip('.')})"
    except (ValueError, LookupError, TypeError):
        pass
    raise InputError(f"The file '{path}' is not a calibration of {of}{reason}; {advice}.")


def parse_json(text: str | bytes) -> Any:
    """Standard JSON; ValueError for deep nesting, an object with one name twice, NaN and infinity."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"it has '{twice}' twice in one object")
        return entries

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a finite number")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


def read_torch(path: str | Path, what: str = "file") -> Any:
    """What `torch.save` wrote, with its tensors on the CPU; code in the file is not run.

    InputError, which calls the file `what`, when it is missing, damaged or holds more than tensors and plain
    values.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"The {what} '{path}' cannot be read: it does not exist.") from None
    except Exception as error:
        reason = f" ({first_line(error)})"
        if isinstance(error, UnpicklingError):  # torch names the function, or the step, that it did not run
            code = re.search(r"GLOBAL |allowed global|instantiate|REDUCE|BUILD", str(error))
            reason = (": it holds code, which is never run; give a file of tensors only, such as .safetensors"
                      if code else " (it is damaged, or torch.save did not write it)")
        raise InputError(f"The {what} '{path}' cannot be read{reason}.") from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends without an error.

    The content reaches the disk before the name does,
    so that a crash or a full disk leaves the old file as it was.
    """
    path = Path(path)
    # A name of its own length would be too long where `path` is as long as a file system allows.
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.part")
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


def write_text(path: str | Path, content: str) -> None:
    """Write text as UTF-8, atomically; bytes of a file name that are not UTF-8 are written as they are."""
    write_bytes(path, content.encode("utf-8", "surrogateescape"))


def write_torch(path: str | Path, content: Any) -> None:
    """Write with torch.save's format, atomically."""
    import torch

    buffer = io.BytesIO()  # torch.save itself raises RuntimeError when the disk is full
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, in ASCII, indented, with a newline at the end."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


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
    """The records of a stats.jsonl; lines that are not one, such as one that a crash cut, are ignored."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def truncate_stats(path: str | Path, last_step: int) -> None:
    """Drop the records after `last_step`, so that a resumed run does not record a step twice."""
    def late(step: Any) -> bool:
        return isinstance(step, int | float) and step > last_step

    if Path(path).exists():
        kept = [record for record in read_stats(path) if not late(record.get("step"))]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
