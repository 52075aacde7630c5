"""Checkpoints from which a run continues bit for bit: folders `checkpoint-<step>`, renamed into place when
complete, with the random state of every rank."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .files import write_torch

__all__ = ["find_checkpoint", "list_checkpoints", "load_checkpoint", "prune_checkpoints", "save_checkpoint"]


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; other files and folders are ignored."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(folders, key=_step)


def find_checkpoint(output_dir: str | Path, name: str) -> Path | None:
    """The checkpoint called `name` (a folder's name or path), or the newest for "latest",
    None when there is none yet."""
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    for checkpoint in checkpoints:
        if checkpoint.name == Path(name).name:
            return checkpoint
    known = ", ".join(c.name for c in checkpoints) or "none"
    raise InputError(f"The checkpoint '{name}' is not in '{output_dir}'; there is: {known}.")


def prune_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Remove the oldest checkpoints until at most `keep` are left."""
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in checkpoints[:max(0, len(checkpoints) - keep)]:
        # Renamed first: a removal cut short leaves no half checkpoint under a valid name.
        doomed = checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.removed"))
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


def load_checkpoint(folder: Path, fingerprint: dict[str, Any],
                    rank: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read `common` and this rank's `own`;
    InputError when it is damaged or `common["fingerprint"]` is of another run."""
    try:
        common = _today(torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True))
        for key, value in fingerprint.items():
            if common["fingerprint"].get(key) != value:
                raise InputError(f"The checkpoint '{folder}' does not fit this run: {key} was "
                                 f"{common['fingerprint'].get(key)!r} and is now {value!r}.")
        return common, torch.load(folder / f"rank_{rank}.pt", map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes torch and pickle raise almost anything
        raise InputError(f"The checkpoint '{folder}' cannot be read ({error}); "
                         "remove it to use an older one.") from None


def _today(common: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of version 0.1, which knew one text encoder only, in today's form; others as they are."""
    before = common.get("fingerprint", {})
    if "pictures" not in before:
        return common
    return {**common, "rows": [common["rows"]], "fingerprint": {
        **before, "embedding width": [before["embedding width"]], "images": before["pictures"]}}
