"""One command at a time in an output folder, and no leftovers of one that was killed."""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError

__all__ = ["lock_folder", "sweep_leftovers"]

# What a killed command leaves: latent caches, files and folders half-written, checkpoints half-removed.
_LEFTOVER = re.compile(r"\.latents-.+|\..+\.(part|removed)")


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder; InputError when another command holds it.

    The lock is the hidden file `.lock`; the system frees it when its process dies, however it dies. A missing
    folder is made. At the end `.lock` is removed, and so are folders that were made here and are empty. Where
    no file can be written or locked (read-only folders, some network drives), there is no lock and no error.
    """
    folder = Path(folder)
    file, made = folder / ".lock", [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            _acquire(FileLock(file, timeout=0), file, stack)
        yield


def _acquire(lock: FileLock, file: Path, stack: contextlib.ExitStack) -> None:
    """Take the lock until `stack` closes, and write the process's number into its file."""
    holder = ""
    with contextlib.suppress(OSError, ValueError):
        holder = file.read_text()[:20].strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where flock is missing, filelock's substitute will do
            stack.enter_context(lock)
    except Timeout:
        process = f" (process {holder})" if holder.isdecimal() else ""
        raise InputError(f"The folder '{file.parent}' is in use by another command{process}; "
                         "wait for it or give another --output_dir.") from None
    stack.callback(_remove, file)  # while the lock is held: no file that another command has locked
    with contextlib.suppress(OSError):
        file.write_text(str(os.getpid()))


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one that holds something
        for folder in folders:
            folder.rmdir()


def sweep_leftovers(folder: str | Path, recursive: bool = False) -> None:
    """Remove what a killed command left in an output folder, with `recursive` in its sub-folders too.

    The caller holds the folder's lock: a living command writes such files as well.
    """
    paths = Path(folder).rglob(".*") if recursive else Path(folder).glob(".*")
    for path in sorted(paths):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _remove(path)
