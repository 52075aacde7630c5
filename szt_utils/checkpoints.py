"""Checkpoints from which a run continues bit for bit: folders `checkpoint-<step>`, renamed into place when
complete, with the random state of every rank.

Those of an earlier run in the same folder are moved to `earlier-<n>`, so that no run takes another's.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, first_line
from .files import read_json, read_torch, write_torch

__all__ = ["find_checkpoint", "list_checkpoints", "load_rank_state", "load_shared_state", "prune_checkpoints",
           "readable", "save_checkpoint", "set_aside"]


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; other files and folders are ignored."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(folders, key=_step)


def find_checkpoint(output_dir: str | Path, name: str) -> Path | None:
    """The checkpoint called `name` (a folder's name or path), or the run's newest for "latest",
    None when there is none yet."""
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        run = _run_of(output_dir)
        return next((checkpoint for checkpoint in reversed(checkpoints)
                     if run is None or load_shared_state(checkpoint).get("run", run) == run), None)
    path = Path(name)
    is_elsewhere = len(path.parts) > 1 and path.is_dir() and (
        path.resolve().parent != Path(output_dir).resolve())
    for checkpoint in checkpoints:
        if checkpoint.name == path.name and not is_elsewhere:
            return checkpoint
    known = ", ".join(c.name for c in checkpoints) or "none"
    raise InputError(f"The checkpoint '{name}' is not in '{output_dir}'; there is: {known}.")


def _run_of(output_dir: str | Path) -> str | None:
    """The id of the run that wrote options.json last; None when it says none."""
    with contextlib.suppress(InputError, AttributeError):
        return read_json(Path(output_dir) / "options.json").get("run")
    return None


def set_aside(output_dir: str | Path, after: int) -> Path | None:
    """Move the checkpoints after a step, which an earlier run has left, to `earlier-<n>`; None without any.

    A run that starts at step 0 sets the earlier run's options.json and stats.jsonl aside with them.
    """
    output_dir = Path(output_dir)
    checkpoints = [folder for folder in list_checkpoints(output_dir) if _step(folder) > after]
    if not checkpoints:
        return None
    number = 1
    while (aside := output_dir / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    records = [output_dir / name for name in ("options.json", "stats.jsonl")] if after == 0 else []
    # The newest first: what is left of a move that was cut short is never taken for the newest of this run.
    for path in [*reversed(checkpoints), *(path for path in records if path.exists())]:
        path.rename(aside / path.name)
    return aside


def prune_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Remove the oldest checkpoints until at most `keep` are left."""
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in checkpoints[:max(0, len(checkpoints) - keep)]:
        # Renamed first: a removal cut short leaves no half checkpoint under a valid name.
        doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)  # left by a run that was killed here
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def save_checkpoint(output_dir: str | Path, step: int, common: dict[str, Any], own: dict[str, Any], *,
                    rank: int = 0, barrier: Callable[[], None] = lambda: None) -> None:
    """Write `checkpoint-<step>`: `common` by rank 0, `own` (random state, stream) by every rank;
    all ranks must call this."""
    final = Path(output_dir) / f"checkpoint-{step}"
    part = final.with_name(f".{final.name}.part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed here
        part.mkdir(parents=True)
        write_torch(part / "training_state.pt", common)
    barrier()
    write_torch(part / f"rank_{rank}.pt", own)
    barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    barrier()


def load_shared_state(folder: Path) -> dict[str, Any]:
    """Read the state that all ranks share; InputError when it is damaged."""
    with readable(folder):
        state = read_torch(folder / "training_state.pt", "checkpoint")
        return _in_current_form(state)


def load_rank_state(folder: Path, rank: int = 0) -> dict[str, Any]:
    """Read the state of one rank; InputError when it is damaged or missing."""
    with readable(folder):
        return read_torch(folder / f"rank_{rank}.pt", "checkpoint")


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read or applied is an InputError that names it."""
    try:
        yield
    except InputError as error:
        reason = str(error).removesuffix(".")
        raise InputError(f"{reason}; remove '{folder.name}' to use an older one.") from None
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        raise InputError(f"The checkpoint '{folder}' cannot be read ({first_line(error)}); "
                         "remove it to use an older one.") from None


def _in_current_form(state: dict[str, Any]) -> dict[str, Any]:
    """A shared state that an earlier version may have written, with less in its fingerprint.

    Version 0.1 knew one text encoder only, and earlier fingerprints had the images' names without a hash.
    """
    before = dict(state["fingerprint"])
    if "pictures" in before:
        state = {**state, "rows": [state["rows"]]}
        before |= {"embedding width": [before["embedding width"]], "images": before.pop("pictures")}
    if isinstance(before.get("images"), list):
        before["images"] = dict.fromkeys(before["images"])
    return {**state, "fingerprint": before}
